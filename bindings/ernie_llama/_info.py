"""Which library is loaded, and what it supports."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

from . import _library


@dataclass(frozen=True)
class Device:
    """A device that llama.cpp can use."""

    name: str
    description: str


@dataclass(frozen=True)
class Info:
    """The loaded libllama.

    Attributes:
        path: path of the library.
        origin: where that path comes from: an environment variable, the package or the checkout.
        version: version of llama.cpp.
        build_number: build number of llama.cpp; None without libllama-common beside the library, which holds it.
        ggml_version: version of ggml.
        commit: commit that ggml was built from.
        ccq2: whether the library reads ccq2 tensors, that is, whether it is patched.
        cuda: whether the library supports CUDA.
        rpc: whether the library supports RPC.
        devices: available devices, including those of RPC servers.
        system_info: instruction sets that the CPU code was built for.
    """

    path: Path
    origin: str
    version: str
    build_number: int | None
    ggml_version: str
    commit: str
    ccq2: bool
    cuda: bool
    rpc: bool
    devices: tuple[Device, ...]
    system_info: str

    def __str__(self) -> str:
        build = "unknown" if self.build_number is None else str(self.build_number)
        has = {True: "yes", False: "no"}
        return "\n".join(
            [
                f"{self.path} ({self.origin})",
                f"llama.cpp {self.version} (build {build}), ggml {self.ggml_version} ({self.commit})",
                f"ccq2: {has[self.ccq2]}, CUDA: {has[self.cuda]}, RPC: {has[self.rpc]}",
                *(f"{device.name}: {device.description}" for device in self.devices),
                self.system_info,
            ]
        )


def info() -> Info:
    """Describe the library, after loading it if necessary.

    Raises:
        LibraryNotFoundError: there is no library.
        OSError: the library cannot be used, with the reason.
    """
    place, path = _library.find()
    library = _library.load()
    devices = [library.ggml_backend_dev_get(i) for i in range(library.ggml_backend_dev_count())]
    return Info(
        path=path,
        origin=place.origin,
        version=library.llama_version().decode(),
        build_number=_build_number(path),
        ggml_version=library.ggml_version().decode(),
        commit=library.ggml_commit().decode(),
        ccq2=hasattr(library, "dequantize_row_ccq2"),
        cuda=bool(library.ggml_backend_reg_by_name(b"CUDA")),
        rpc=bool(library.llama_supports_rpc()),
        devices=tuple(
            Device(library.ggml_backend_dev_name(d).decode(), library.ggml_backend_dev_description(d).decode())
            for d in devices
        ),
        system_info=library.llama_print_system_info().decode().strip(),
    )


def _build_number(path: Path) -> int | None:
    common = path.with_name(path.name.replace("llama", "llama-common", 1))
    with contextlib.suppress(OSError, ValueError):  # the file or the variable is missing
        return ctypes.c_int.in_dll(ctypes.CDLL(str(common)), "LLAMA_BUILD_NUMBER").value
    return None
