"""Which library is loaded, and what it supports."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass
from pathlib import Path

from . import structs
from .library import find, load


@dataclass(frozen=True)
class Device:
    """A device that llama.cpp can use.

    Attributes:
        ccq2: whether it computes with ccq2 weights; if not, the CPU does.
    """

    name: str
    description: str
    ccq2: bool


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
        vulkan: whether the library supports Vulkan.
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
    vulkan: bool
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
                f"ccq2: {has[self.ccq2]}, CUDA: {has[self.cuda]}, Vulkan: {has[self.vulkan]}, RPC: {has[self.rpc]}",
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
    place, path = find()
    library = load()
    devices = [library.ggml_backend_dev_get(i) for i in range(library.ggml_backend_dev_count())]
    ccq2 = hasattr(library, "dequantize_row_ccq2")
    return Info(
        path=path,
        origin=place.origin,
        version=library.llama_version().decode(),
        build_number=_build_number(path),
        ggml_version=library.ggml_version().decode(),
        commit=library.ggml_commit().decode(),
        ccq2=ccq2,
        cuda=bool(library.ggml_backend_reg_by_name(b"CUDA")),
        vulkan=bool(library.ggml_backend_reg_by_name(b"Vulkan")),
        rpc=bool(library.llama_supports_rpc()),
        devices=tuple(
            Device(
                library.ggml_backend_dev_name(d).decode(),
                library.ggml_backend_dev_description(d).decode(),
                ccq2 and _computes_ccq2(library, d),
            )
            for d in devices
        ),
        system_info=library.llama_print_system_info().decode().strip(),
    )


def _computes_ccq2(library: ctypes.CDLL, device: structs.ggml_backend_dev_t) -> bool:
    """Whether the device would compute a product of a ccq2 matrix with a token. The library must know the type."""
    context = library.ggml_init(structs.ggml_init_params(8 * library.ggml_tensor_overhead(), None, True))
    try:
        matrix = library.ggml_new_tensor_2d(context, structs.GGML_TYPE_CCQ2, 256, 4)
        token = library.ggml_new_tensor_2d(context, structs.GGML_TYPE_F32, 256, 1)
        return bool(library.ggml_backend_dev_supports_op(device, library.ggml_mul_mat(context, matrix, token)))
    finally:
        library.ggml_free(context)


def _build_number(path: Path) -> int | None:
    common = path.with_name(path.name.replace("llama", "llama-common", 1))
    with contextlib.suppress(OSError, ValueError):  # the file or the variable is missing
        return ctypes.c_int.in_dll(ctypes.CDLL(str(common)), "LLAMA_BUILD_NUMBER").value
    return None
