"""The kernels of panels.cpp, compiled here for every x86-64 instruction set that they know and this machine has."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.build

AVX2 = ("avx2", "fma", "f16c")
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "fma", "f16c")
INSTRUCTION_SETS = {
    "avx2": AVX2,
    "avx-vnni": (*AVX2, "avxvnni"),
    "avx512-vnni": AVX512,
    "avx512-vbmi": (*AVX512, "avx512vbmi"),
}


def missing(names: tuple[str, ...]) -> set[str]:
    """Those that this machine lacks; Linux writes avx_vnni where compilers write avxvnni."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return {*names} - {flag.replace("_", "") for flag in (found[1].split() if found else ())}


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_kernels_multiply_decoded_weights(name: str, llama_bin: Path, llama_tree: Path, tmp_path: Path) -> None:
    """Panels and what few columns take, on shapes that fill neither, against the sum over decoded weights."""
    if lacking := missing(INSTRUCTION_SETS[name]):
        pytest.skip(f"this machine has no {', '.join(sorted(lacking))}")
    program = tmp_path / "test-panels-kernel"
    ggml = llama_tree / "ggml"
    sources = [llama_tree / "tests/test-panels-kernel.cpp", ggml / "src/ggml-cpu/panels-kernel.cpp"]
    includes = [f"-I{ggml / folder}" for folder in ("include", "src", "src/ggml-cpu")]
    flags = ["-std=c++17", "-O1", "-w", *(f"-m{flag}" for flag in INSTRUCTION_SETS[name]), *includes]
    libraries = [f"-L{llama_bin}", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{llama_bin}"]
    subprocess.run(["c++", *flags, *map(str, sources), *libraries, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert re.fullmatch(r"0 of [1-9]\d+ products differ\n", done.stdout), done.stdout[-2000:]
