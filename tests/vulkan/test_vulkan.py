"""ccq2 through Vulkan: on the first device there is, which is Mesa's llvmpipe where no GPU is.

The programs are those of the CPU's build. VULKAN_BACKEND names the backend that they load (`make test-vulkan`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from reference.specimens import VL_TINY

sys.path.insert(0, str(Path(__file__).parents[2] / "convert"))

from build_archive import Archive, check, stripped

pytestmark = pytest.mark.build

# Which kernels a product takes: in integers, which llvmpipe has, though not in hardware, or in floats.
KERNELS = {
    "integers": {"GGML_VK_FORCE_INTEGER_DOT_PRODUCT": "1"},
    "floats": {"GGML_VK_DISABLE_INTEGER_DOT_PRODUCT": "1"},
}
FLOATS = KERNELS["floats"]
CPU = ("-dev", "none")
TEXT = Path(__file__).with_name("source.txt")  # what the example model reads best, Python; it stays as it is
# Where the matrices are computed: all on the device, or the experts on the CPU.
DEVICE = ("-dev", "Vulkan0", "-ngl", "99")  # naming it loads the backend
PLACES = {"device": DEVICE, "experts on the CPU": (*DEVICE, "--n-cpu-moe", "99")}
# For no quantized type has Vulkan broadcasts over dimension 3, permuted matrices, or experts whose sums must be in f32.
NOT_ON_VULKAN = re.compile(r"nr=\[\d,2\]|per=\[0,(?!1,2,3\])|amax=1000000")


@dataclass(frozen=True)
class Programs:
    """llama.cpp's programs, with the Vulkan backend.

    Attributes:
        folder: an empty one to run them in: they load the libraries of the working folder too.
    """

    backend: Path
    bin: Path
    folder: Path

    def run(self, mode: Mapping[str, str], name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a program that must succeed."""
        environment = {"GGML_VK_VISIBLE_DEVICES": "0", **os.environ, "GGML_BACKEND_PATH": str(self.backend), **mode}
        command = [str(self.bin / name), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, errors="replace", check=False,
            stdin=subprocess.DEVNULL, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done

    def cases(self, action: str, mode: Mapping[str, str], *arguments: str) -> list[tuple[str, str, str]]:
        """Let test-backend-ops do something with ccq2's cases: the op, the parameters and the outcome of each."""
        done = self.run(mode, "test-backend-ops", action, "-b", "Vulkan0", *arguments)
        plain = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)
        found = re.findall(r"^  ([A-Z_]+)\((.*)\): (.*\S) *$", plain, re.MULTILINE)
        return [(op, parameters, outcome) for op, parameters, outcome in found if "ccq2" in parameters]


@pytest.fixture
def programs(llama_bin: Path, tmp_path: Path) -> Programs:
    named = os.environ.get("VULKAN_BACKEND")
    if not named:
        pytest.skip("VULKAN_BACKEND is not set: run make test-vulkan")
    assert Path(named).is_file(), f"VULKAN_BACKEND={named} is no file"
    (tmp_path / "run").mkdir()
    return Programs(Path(named), llama_bin, tmp_path / "run")


@pytest.mark.parametrize("kernels", KERNELS)
def test_what_has_no_kernel_is_refused(programs: Programs, kernels: str) -> None:
    """Of every case of every op: nothing that would copy rows without their metadata, or decode a matrix whole."""
    supported: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for op, parameters, outcome in programs.cases("support", KERNELS[kernels], "-p", "ccq2"):
        {"SUPPORTED": supported, "NOT SUPPORTED": refused}[outcome].setdefault(op, []).append(parameters)
    assert set(supported) == {"MUL_MAT", "MUL_MAT_ID", "GET_ROWS"}
    assert {"CPY", "CONT", "DUP", "CONCAT", "SET_ROWS"} <= set(refused)
    missing = [each for op in supported for each in refused.get(op, []) if not NOT_ON_VULKAN.search(each)]
    assert missing == []


# That one process runs the kernels for few columns and for many, in integers, is part of the test: see the patch
# "no stale buffers in the descriptor sets of llvmpipe".
@pytest.mark.parametrize(
    ("kernels", "op"),
    [
        ("floats", "MUL_MAT"),
        ("floats", "MUL_MAT_ID"),
        ("floats", "GET_ROWS"),
        ("integers", "MUL_MAT"),
        ("integers", "MUL_MAT_ID"),
    ],
)
def test_results_are_those_of_the_cpu(programs: Programs, kernels: str, op: str) -> None:
    """Every supported case is computed, but those that the CPU cannot, or whose matrices it encodes for a minute."""
    select = ("-o", op, "-p", "ccq2(?!.*,m=160,)")
    supported = [
        each for _, each, outcome in programs.cases("support", KERNELS[kernels], *select) if outcome == "SUPPORTED"
    ]
    outcomes = dict(outcome[1:] for outcome in programs.cases("test", KERNELS[kernels], *select))
    computed = [each for each in supported if "[CPU]" not in outcomes[each]]
    assert computed
    assert {each: outcomes[each] for each in computed if outcomes[each] != "OK"} == {}


@pytest.mark.parametrize("place", PLACES)
def test_perplexity_is_that_of_the_cpu(programs: Programs, tiny_ccq2_gguf: Path, place: str) -> None:
    def perplexity(batch: int, *options: str) -> float:
        # few, for llvmpipe's sake; over six the CPU's own kernels for batches of 8 and of 512 differ by 0.8 percent
        chunks = {1: 1, 8: 4, 512: 10}[batch]
        sizes = ["-c", "128", "-b", "512", "-ub", str(batch), "--chunks", str(chunks)]
        done = programs.run(FLOATS, "llama-perplexity", "-m", tiny_ccq2_gguf, "-f", TEXT, "-t", "2", *sizes, *options)
        found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
        assert found, done.stderr[-3000:]
        return float(found[1])

    for batch in (1, 8, 512):
        assert perplexity(batch, *PLACES[place]) == pytest.approx(perplexity(batch, *CPU), rel=0.005), batch


def test_the_example_writes_the_same(programs: Programs, tiny_ccq2_gguf: Path) -> None:
    def written(*options: str) -> str:
        fixed = ["-n", "24", "-c", "512", "-t", "2", "-no-cnv", "--no-display-prompt", "--temp", "0"]
        done = programs.run(
            FLOATS, "llama-completion", "-m", tiny_ccq2_gguf, "-p", "import os\n", *fixed, *options, "-v"
        )
        assert ("Vulkan0 model buffer size" in done.stderr) == (options != CPU)
        return done.stdout

    assert written(*DEVICE) == written(*CPU)


def test_pictures_are_read_the_same(programs: Programs, tmp_path: Path) -> None:
    model, eyes = tmp_path / "model.gguf", tmp_path / "eyes.gguf"
    write_gguf(prepare(VL_TINY, Outtype("ccq2")), model, 1, False, lambda _: None, mmproj=eyes)

    def answer(picture: Path, *options: str) -> str:
        asked: list[str | Path] = ["-m", model, "--mmproj", eyes, "--image", picture, "-p", "What is written here?"]
        fixed = ["-t", "2", "--temp", "0", "-n", "16", "--jinja"]
        return programs.run(FLOATS, "llama-mtmd-cli", *asked, *fixed, *options).stdout.strip()

    for picture in sorted((VL_TINY / "pictures").glob("*.png"))[:2]:
        seen = answer(picture, *DEVICE)
        assert seen == answer(picture, *CPU, "--no-mmproj-offload")
        assert picture.stem.split("-")[1] in seen


def test_what_the_archive_holds_runs(programs: Programs, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    """On the device; without a driver, and without the loader, on the CPU. It takes a minute to pack, so it is not."""
    folder = stripped(programs.bin, tmp_path / "elsewhere", programs.backend)
    check(Archive(folder, "vulkan", "1.2.3"))
    plain = {"HOME": os.environ["HOME"], "GGML_VK_VISIBLE_DEVICES": "0", **FLOATS}
    no_driver = {"VK_ICD_FILENAMES": "/nowhere", "VK_DRIVER_FILES": "/nowhere"}

    def output(environment: Mapping[str, str], *arguments: str | Path) -> str:
        command = [folder / "llama-completion", *arguments]
        done = subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True, check=True)
        return done.stdout

    def written(environment: Mapping[str, str]) -> str:
        fixed = ["-n", "8", "-c", "256", "-no-cnv", "--no-display-prompt", "--temp", "0", "-ngl", "99"]
        return output(environment, "-m", tiny_ccq2_gguf, "-p", "import os\n", *fixed)

    assert "Vulkan0" in output({}, "--list-devices")
    on_device = written({})
    assert "Vulkan0" not in output(no_driver, "--list-devices")
    assert written(no_driver) == on_device
    backend = folder / programs.backend.name
    backend.write_bytes(backend.read_bytes().replace(b"libvulkan.so.1", b"libvulkan.no.1"))
    assert "Vulkan0" not in output({}, "--list-devices")
    assert written({}) == on_device
