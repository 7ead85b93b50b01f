"""Our CUDA files compile for the cards that people own without spilling registers; needs nvcc, but no GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from ernie_gguf.engine import tools

STUB = Path(__file__).resolve().parents[1] / "support" / "cuda"  # cuBLAS's names: the toolkit may lack its headers
ARCHITECTURES = {"86": (11, 1), "90": (11, 8), "120a": (12, 8)}  # and the nvcc that knows them
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
# Kernels of which two blocks are to fit on a multiprocessor of 65536 registers: their threads.
TWO_BLOCKS = {"_Z8ccq2_mma": 128, "_Z16ccq2_mul_mat_vecILi1E": 512}


@pytest.mark.skipif(tools.find("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", ["ccq.cu", "ccq-mma.cu", "mmv-stream.cu"])
def test_kernels_keep_to_their_registers(name: str, llama_tree: Path, tmp_path: Path) -> None:
    version = tools.cuda_version()
    wanted = [arch for arch, least in ARCHITECTURES.items() if version >= least]
    folder = llama_tree / "ggml" / "src" / "ggml-cuda"
    includes = [f"-I{path}" for path in (STUB, llama_tree / "ggml" / "include", folder.parent, folder)]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in wanted]
    options = ["-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", "-Xptxas", "-v", "-c"]
    command = [str(tools.find("nvcc")), *options, *targets, *includes, str(folder / name), "-o", str(tmp_path / "x.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [match.groupdict() for match in KERNEL.finditer(done.stderr)]
    assert {each["arch"] for each in found} == set(wanted)
    assert [each for each in found if (each["stores"], each["loads"]) != ("0", "0")] == []
    for kernel, threads in TWO_BLOCKS.items():
        for each in found:
            if each["name"].startswith(kernel) and not each["name"].startswith(f"{kernel}_"):
                assert 2 * threads * int(each["registers"]) <= 65536, each
