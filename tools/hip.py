"""Checks that the CUDA sources which the patches touch are C++ to HIP's compiler too; nothing is linked or run.

Debian 12 has HIP 5.2 and no hipBLAS, llama.cpp wants HIP 6.1: what the newer headers have is declared here, without
meaning. `apt-get install hipcc` brings clang and HIP's headers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# RDNA 2: for what has matrix cores llama.cpp uses a type that clang 15 lacks.
TARGETS = {
    "gfx1030": ["--offload-device-only", "--offload-arch=gfx1030"],
    "host": ["--offload-host-only"],
}
DEFINES = ("GGML_USE_HIP", "GGML_HIP_NO_VMM", "__HIP_PLATFORM_AMD__", "NDEBUG")
CUDA = Path("ggml", "src", "ggml-cuda")
CACHES = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # CMake names each pair that attention is built for
ATTENTION = ('GGML_CUDA_FA_QUANTS=""', *(f"GGML_CUDA_FA_{k}_{v}=1" for k in CACHES for v in CACHES))

BF16 = """\
#pragma once
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
struct __hip_bfloat16 {
    unsigned short data;
    __hip_bfloat16() = default;
    __host__ __device__ __hip_bfloat16(float);
    __host__ __device__ operator float() const;
};
struct __hip_bfloat162 { __hip_bfloat16 x, y; };
__host__ __device__ __hip_bfloat16 __float2bfloat16(float);
__host__ __device__ __hip_bfloat162 __float22bfloat162_rn(float2);
__host__ __device__ float __bfloat162float(__hip_bfloat16);
__host__ __device__ float2 __bfloat1622float2(__hip_bfloat162);
__device__ __half __hmax(__half, __half);
__device__ __half2 __shfl(__half2, int, int = warpSize);
__device__ __half2 __shfl_up(__half2, unsigned, int = warpSize);
__device__ __half2 __shfl_xor(__half2, int, int = warpSize);
__device__ void __builtin_amdgcn_sched_group_barrier(int, int, int);
enum { hipHostRegisterReadOnly = 8 };
inline hipError_t hipStreamWaitEvent(hipStream_t s, hipEvent_t event) { return hipStreamWaitEvent(s, event, 0); }
"""


def write_headers(tree: Path, folder: Path) -> None:
    """Write into `folder` what HIP 5.2 lacks; hipBLAS is whatever llama.cpp calls so."""
    (folder / "hip").mkdir()
    (folder / "hip" / "hip_bf16.h").write_text(BF16)
    text = (tree / CUDA / "vendors" / "hip.h").read_text()
    constants = sorted(set(re.findall(r"\bHIPBLAS_[A-Z]\w*", text)))
    types = sorted(set(re.findall(r"\bhipblas\w+_t\b", text)) | {"hipblasStatus_t"})
    functions = sorted(set(re.findall(r"\bhipblas[A-Z]\w*", text)) - set(types))
    lines = [f"enum hipblasConstant {{ {', '.join(constants)} }};"]
    lines += [f"typedef {'void *' if name == 'hipblasHandle_t' else 'int'} {name};" for name in types]
    lines += [f"template <typename... T> hipblasStatus_t {name}(T...);" for name in functions]
    (folder / "hipblas").mkdir()
    (folder / "hipblas" / "hipblas.h").write_text("\n".join(["#pragma once", *lines, ""]))


def touched(tree: Path) -> list[Path]:
    """The CUDA sources that differ from upstream's, relative to their folder."""
    command = ["git", "-C", str(tree), "diff", "--name-only", "upstream", "HEAD", "--", str(CUDA)]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [Path(name).relative_to(CUDA) for name in names if name.endswith(".cu")]


def errors(tree: Path, headers: Path, source: Path, target: str) -> Iterator[str]:
    """What the compiler says against a source for a target."""
    folders = [headers, tree / "ggml" / "include", tree / "ggml" / "src", tree / CUDA]
    command = ["clang++-15", "-x", "hip", "-std=c++17", "-fsyntax-only", "-nogpulib", "-nogpuinc", "-Wno-everything"]
    command += [*TARGETS[target], "-include", "hip/hip_runtime.h", *(f"-I{folder}" for folder in folders)]
    command += [*(f"-D{name}" for name in (*DEFINES, *ATTENTION)), str(tree / CUDA / source)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    found = [line for line in done.stderr.splitlines() if "error:" in line]
    yield from found or ([done.stderr] if done.returncode else [])


def main() -> None:
    """Check every source for every target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, required=True, help="the patched llama.cpp")
    args = parser.parse_args()
    tree, failed = args.tree.resolve(), False
    with tempfile.TemporaryDirectory(prefix="ernie-gguf-") as work:
        write_headers(tree, Path(work))
        for source in touched(tree):
            for target in TARGETS:
                found = list(errors(tree, Path(work), source, target))
                failed = failed or bool(found)
                print(
                    f"{source} {target}: {'ok' if not found else f'{len(found)} errors'}",
                    *found[:10],
                    sep="\n  ",
                    flush=True,
                )
    sys.exit(failed)


if __name__ == "__main__":
    main()
