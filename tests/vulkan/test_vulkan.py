"""ccq2 through Vulkan: on the first device there is, which is Mesa's llvmpipe where no GPU is.

The programs are those of the CPU's build. VULKAN_BACKEND names the backend that they load (`make test-vulkan`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from ernie_gguf.convert import prepare, write_gguf
from ernie_gguf.gguf_file.outtype import Outtype
from reference.specimens import VL_TINY

pytestmark = pytest.mark.build

ROOT = Path(__file__).parents[2]
INTEGERS = {"GGML_VK_FORCE_INTEGER_DOT_PRODUCT": "1"}  # llvmpipe has them, though not in hardware
FLOATS = {"GGML_VK_DISABLE_INTEGER_DOT_PRODUCT": "1"}
MODES = pytest.mark.parametrize("mode", [FLOATS, INTEGERS], ids=["floats", "integers"])
CPU = ("-dev", "none")
# Where the matrices are computed: all on the device, or the experts on the CPU.
PLACES = {"device": ("-ngl", "99"), "experts on the CPU": ("-ngl", "99", "--n-cpu-moe", "99")}
# Vulkan has no broadcasts over dimension 3 and no permuted matrices for any quantized type, the CPU no f16 columns.
NOT_SUPPORTED = re.compile(r"type_b=f16|nr=\[\d,2\]|per=\[0,(?!1,2,3\])")


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

    def cases(self, mode: Mapping[str, str], op: str) -> tuple[int, list[str]]:
        """Run the cases of an op with ccq2: how many passed, and those that are not supported."""
        done = self.run(mode, "test-backend-ops", "test", "-b", "Vulkan0", "-o", op, "-p", "ccq2")
        assert "FAIL" not in done.stdout
        lines = done.stdout.splitlines()
        refused = [line for line in lines if "not supported" in line]
        return sum("OK" in line for line in lines if f" {op}(" in line), refused


@pytest.fixture
def programs(llama_bin: Path, tmp_path: Path) -> Programs:
    named = os.environ.get("VULKAN_BACKEND")
    if not named:
        pytest.skip("VULKAN_BACKEND is not set: run make test-vulkan")
    assert Path(named).is_file(), f"VULKAN_BACKEND={named} is no file"
    (tmp_path / "run").mkdir()
    return Programs(Path(named), llama_bin, tmp_path / "run")


@MODES
@pytest.mark.parametrize("op", ["MUL_MAT", "MUL_MAT_ID"])
def test_products_are_those_of_the_cpu(programs: Programs, op: str, mode: dict[str, str]) -> None:
    passed, refused = programs.cases(mode, op)
    assert passed > 70
    assert [line for line in refused if not NOT_SUPPORTED.search(line)] == []


def test_rows_are_read(programs: Programs) -> None:
    passed, refused = programs.cases({}, "GET_ROWS")
    assert passed > 15
    assert refused == []


@pytest.mark.parametrize("op", ["CPY", "CONT", "DUP", "CONCAT", "SET_ROWS"])
def test_no_copy_loses_the_metadata_of_rows(programs: Programs, op: str) -> None:
    programs.cases({}, op)  # none fails


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example model reads best: Python."""
    file = tmp_path_factory.mktemp("text") / "source.py"
    file.write_text((ROOT / "convert" / "ernie_gguf" / "convert.py").read_text()[:3500])
    return file


@MODES
@pytest.mark.parametrize("place", PLACES)
def test_perplexity_is_that_of_the_cpu(
    programs: Programs, tiny_ccq2_gguf: Path, text: Path, place: str, mode: dict[str, str]
) -> None:
    def perplexity(batch: int, *options: str) -> float:
        chunks = {1: 1, 8: 3, 512: 6}[batch]
        sizes = ["-c", "128", "-b", str(max(batch, 128)), "-ub", str(batch), "--chunks", str(chunks)]
        done = programs.run(mode, "llama-perplexity", "-m", tiny_ccq2_gguf, "-f", text, "-t", "2", *sizes, *options)
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
        assert ("offloaded 4/4 layers to GPU" in done.stderr) == (options != CPU)
        return done.stdout

    assert written("-ngl", "99") == written(*CPU)


def test_pictures_are_read_the_same(programs: Programs, tmp_path: Path) -> None:
    model, eyes = tmp_path / "model.gguf", tmp_path / "eyes.gguf"
    write_gguf(prepare(VL_TINY, Outtype("ccq2")), model, 1, False, lambda _: None, mmproj=eyes)

    def answer(picture: Path, *options: str) -> str:
        asked: list[str | Path] = ["-m", model, "--mmproj", eyes, "--image", picture, "-p", "What is written here?"]
        fixed = ["-t", "2", "--temp", "0", "-n", "16", "--jinja"]
        return programs.run(FLOATS, "llama-mtmd-cli", *asked, *fixed, *options).stdout.strip()

    for picture in sorted((VL_TINY / "pictures").glob("*.png"))[:4]:
        seen = answer(picture, "-ngl", "99")
        assert seen == answer(picture, *CPU, "--no-mmproj-offload")
        assert picture.stem.split("-")[1] in seen
