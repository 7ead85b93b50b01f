"""Finds libllama, and loads it once, when it is first needed."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import NamedTuple

import platformdirs

from . import abi, functions, log

LIBRARY_NAME = {"darwin": "libllama.dylib", "win32": "llama.dll"}.get(sys.platform, "libllama.so")
PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = PACKAGE.parents[1]  # or what lies there in an installed package: site-packages' parent
# The Makefile's default build folder, if this is an editable install of a checkout.
CHECKOUT_BIN = CHECKOUT / "build" / "cpu" / "bin" if (CHECKOUT / "ggml_patch").is_dir() else None


class Place(NamedTuple):
    """Where the library may be: `path` is a folder or the library itself, `origin` says where the path comes from."""

    origin: str
    path: Path

    def library(self) -> Path:
        """The file to load."""
        return self.path / LIBRARY_NAME if self.path.is_dir() else self.path


class LibraryNotFoundError(OSError):
    """There is no libllama. The message lists every place that was tried, what was wrong there, and what to do."""

    def __init__(self, tried: list[tuple[Place, str]]) -> None:
        lines = [f"  {place.path} ({place.origin}): {why}" for place, why in tried]
        make = "" if CHECKOUT_BIN is None else ", or `make build` in the ernie-gguf checkout"
        hint = f"run `ernie-gguf build`{make}, or set ERNIE_LLAMA_LIB_PATH to the build's bin folder"
        super().__init__("\n".join([f"{LIBRARY_NAME} was not found; tried:", *lines, hint]))


def data_folder() -> Path:
    """Where `ernie-gguf build` of this version installs: `cpu`, `cuda` and `vulkan` in the user's data folder."""
    from importlib import metadata  # a quarter of the import time of the package

    try:
        version = metadata.version("ernie-gguf")
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        version = "not-installed"
    return platformdirs.user_data_path("ernie-gguf", appauthor=False) / version


def has_nvidia_device() -> bool:
    """Whether the NVIDIA driver is installed and sees a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def places() -> list[Place]:
    """The places to try, in order; if the environment names one, only that.

    A checkout uses what `make build` made there. Otherwise what the user built goes before what came with the package,
    and of the user's builds the one for CUDA if there is a GPU. The one for Vulkan works without a GPU, as the CPU's.
    """
    for variable in ("ERNIE_LLAMA_LIB_PATH", "LLAMA_CPP_LIB_PATH"):
        if value := os.environ.get(variable):
            return [Place(f"environment variable {variable}", Path(value).expanduser().absolute())]
    package = Place("lib folder of the package", PACKAGE / "lib")
    data = data_folder()
    built = [Place("built by `ernie-gguf build`", data / "cpu")]
    if (data / "vulkan").is_dir():
        built.insert(0, Place("built by `ernie-gguf build --vulkan`", data / "vulkan"))
    if (data / "cuda").is_dir() and has_nvidia_device():
        built.insert(0, Place("built by `ernie-gguf build --cuda`", data / "cuda"))
    checkout = [] if CHECKOUT_BIN is None else [Place("build of the checkout", CHECKOUT_BIN)]
    return [package, *built, *checkout] if package.path.is_symlink() else [*built, package, *checkout]


def find() -> tuple[Place, Path]:
    """The first place with a library, and the library file.

    Raises:
        LibraryNotFoundError: no place has one.
    """
    tried = []
    for place in places():
        if not place.path.exists():
            tried.append((place, "does not exist"))
        elif not place.library().is_file():
            tried.append((place, f"holds no {LIBRARY_NAME}"))
        else:
            return place, place.library()
    for other in sorted(data_folder().parent.glob("*/*/")):
        if other.parent != data_folder() and (other / LIBRARY_NAME).is_file() and other.is_symlink():
            tried.append((Place("built by `ernie-gguf build`", other), f"of version {other.parent.name}, not this one"))
    raise LibraryNotFoundError(tried)


def library_path() -> Path:
    """Path of the libllama that `Llama` loads; llama.cpp's programs are in the same folder.

    Raises:
        LibraryNotFoundError: there is no library; the message lists the places that were tried.
    """
    return find()[1]


@functools.lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """Load the library and declare every function of `functions.FUNCTIONS`; its rpath finds the other libraries.

    Raises:
        LibraryNotFoundError: there is no library.
        OSError: the file is not a library for this machine, lacks functions that the bindings call, or uses other
            structs than they pass.
    """
    _, path = find()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise OSError(f"{path} cannot be loaded: {error}") from error
    missing = functions.declare(library)
    if wrong := f"it lacks {', '.join(missing)}" if missing else abi.difference(library):
        raise OSError(
            f"{path} is not the version of llama.cpp that these bindings need: {wrong}; "
            "build that version with `ernie-gguf build`, or `make build` in a checkout"
        )
    log.install(library)
    if library.ggml_backend_reg_count() == 0:  # GGML_BACKEND_DL: the CPU's code is chosen and loaded now
        library.ggml_backend_load_all_from_path(os.fsencode(path.parent))
    library.llama_backend_init()
    return library
