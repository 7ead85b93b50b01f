"""What is built of llama.cpp and with which options."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
PROGRAMS = (
    *("llama-server", "llama-cli", "llama-completion", "llama-bench", "llama-perplexity", "llama-quantize"),
    *("llama-imatrix", "llama-mtmd-cli", "llama-tokenize", "llama-gguf-split", "llama-fit-params", "ggml-rpc-server"),
)
TESTS = ("test-backend-ops", "test-quantize-fns", "test-cpu-panels")  # ours, and those that know ccq2 by our patches
# GPUs to build for where none is there to ask, and the nvcc that each needs: Ampere, Ada, Hopper, Blackwell, DGX Spark.
CUDA_ARCHITECTURES = {
    "80": (11, 0),
    "86": (11, 1),
    "89": (11, 8),
    "90": (11, 8),
    "120a-real": (12, 8),
    "121a-real": (12, 9),
}

OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",  # so that the folder of programs and libraries can be moved
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DGGML_RPC=ON",
)


class Flavour(str, Enum):
    """For which machines a build is."""

    CPU = "cpu"  # this machine's CPU
    CUDA = "cuda"  # this machine's CPU, and NVIDIA GPUs
    VULKAN = "vulkan"  # every CPU of this machine's kind, and every GPU with Vulkan 1.2
    PORTABLE = "portable"  # every x86-64 CPU, for the wheel: its instruction sets are found when it starts


# Backends are files that are loaded when a program starts, if their own libraries are there; of the CPU's, which such a
# build has for every instruction set, the best one.
LOADED = ("-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON", "-DGGML_NATIVE=OFF")
FLAVOUR_OPTIONS = {
    Flavour.CPU: (),
    Flavour.CUDA: ("-DGGML_CUDA=ON",),
    Flavour.VULKAN: ("-DGGML_VULKAN=ON", *LOADED),
    # a wheel cannot hold the links that versions need
    Flavour.PORTABLE: (*LOADED, "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON"),
}


@dataclass(frozen=True)
class Job:
    """One build.

    Attributes:
        folder: where everything is made; the programs come to lie in `bin`.
        source: a llama.cpp checkout to use instead of the pinned one.
        architectures: of the GPUs, as CMake names them: "86" or "80;86".
        cmake_args: what the user adds to CMake's options.
        tests: whether to build `TESTS` as well.
        backend_only: whether to build nothing but what the flavour adds, for programs of another build to load.
        page: whether to build the page that llama-server shows in a browser, if npm is installed.
    """

    folder: Path
    flavour: Flavour
    jobs: int
    source: Path | None = None
    architectures: str = "native"
    cmake_args: tuple[str, ...] = ()
    tests: bool = False
    backend_only: bool = False
    page: bool = True

    @property
    def tree(self) -> Path:
        """The patched llama.cpp."""
        return self.folder / "llama.cpp"

    @property
    def build(self) -> Path:
        """CMake's build folder."""
        return self.folder / self.flavour.value

    @property
    def bin(self) -> Path:
        """Programs and libraries."""
        return self.build / "bin"

    @property
    def targets(self) -> tuple[str, ...]:
        """What ninja is asked to make."""
        if self.backend_only:
            return (f"ggml-{self.flavour.value}",)
        return ("llama", *PROGRAMS, *(TESTS if self.tests else ()))

    def options(self, has_page: bool) -> tuple[str, ...]:
        """CMake's options. Without a page of our own, llama.cpp's build tries to download upstream's."""
        cuda = (f"-DCMAKE_CUDA_ARCHITECTURES={self.architectures}",) if self.flavour is Flavour.CUDA else ()
        page = ("-DLLAMA_BUILD_UI=OFF", f"-DLLAMA_USE_PREBUILT_UI={'OFF' if has_page or not self.page else 'ON'}")
        return (*OPTIONS, *page, *FLAVOUR_OPTIONS[self.flavour], *cuda, *self.cmake_args)


def patch_dir() -> Path:
    """The patch series with our own sources and tree.py: inside an installed package, or in the checkout."""
    packaged = PACKAGE / "ggml_patch"
    return packaged if packaged.is_dir() else PACKAGE.parents[2] / "ggml_patch"


def digest(folder: Path) -> str:
    """A sha256 over names and contents of the files in `folder`, without pages and what Python leaves there."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
            total.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()
