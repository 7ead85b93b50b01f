"""Has llama.cpp plan the memory of a model and a context without loading weights."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .._lib.library import load
from .._lib.log import LOG
from .._lib.structs import ggml_log_callback
from .checks import enum_value
from .params import KV_TYPES, model_fields
from .rpc import add_rpc_servers

_LAYER = re.compile(r"layer +\d+ assigned to device (\S+),")
_COMPUTE = re.compile(r"sched_reserve: +(\S+) compute buffer size = +([\d.]+) MiB")


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of a device that llama.cpp can use, in bytes."""

    name: str
    free: int
    total: int


@dataclass(frozen=True)
class DryRun:
    """Where llama.cpp would put a model.

    Attributes:
        layers: device of each layer; the last entry is the output's.
        compute: bytes of the compute buffer of each buffer type, which are named after devices ("CUDA0", "CUDA_Host",
            "CPU"; "RPC0[HOST:PORT]" for RPC servers).
    """

    layers: tuple[str, ...]
    compute: dict[str, int]


def device_memory() -> tuple[DeviceMemory, ...]:
    """The devices of the library with their memory.

    Raises:
        LibraryNotFoundError: there is no library.
        OSError: the library cannot be used, with the reason.
    """
    library = load()
    found = []
    for i in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(i)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append(DeviceMemory(library.ggml_backend_dev_name(device).decode(), free.value, total.value))
    return tuple(found)


def dry_run(
    path: str | os.PathLike[str],
    *,
    n_ctx: int,
    n_ubatch: int = 512,
    type_k: str = "f16",
    type_v: str = "f16",
    n_cpu_moe: int = 0,
    tensor_split: Sequence[float] | None = None,
    rpc_servers: Sequence[str] = (),
) -> DryRun:
    """Load only the metadata of a GGUF file, all layers on GPUs, and reserve the compute buffers of a context.

    With `rpc_servers` their devices are the only GPUs. This process keeps them, and aborts if it needs one whose server
    has ended.

    Raises:
        ValueError: llama.cpp refuses the file or an option, with its reason.
        LibraryNotFoundError: there is no library.
        OSError: the library cannot be used, with the reason.
    """
    library = load()
    if rpc_servers:
        add_rpc_servers(library, rpc_servers)
    model_params = library.llama_model_default_params()
    fields = model_fields(
        library,
        n_gpu_layers=-1,
        split_mode="layer",
        main_gpu=0,
        tensor_split=tensor_split,
        n_cpu_moe=n_cpu_moe,
        tensor_buft_overrides={},
        kv_overrides=None,
        use_mmap=False,
        use_mlock=False,
    )
    for name, value in {**fields, "no_alloc": True}.items():
        setattr(model_params, name, value)
    devices = _rpc_devices(library, len(rpc_servers)) if rpc_servers else None
    if devices:
        model_params.devices = ctypes.cast(devices, ctypes.c_void_p)
    context_params = library.llama_context_default_params()
    context_params.n_ctx, context_params.n_ubatch, context_params.n_seq_max = n_ctx, n_ubatch, 1
    context_params.type_k = enum_value("type_k", type_k, KV_TYPES)
    context_params.type_v = enum_value("type_v", type_v, KV_TYPES)

    lines: list[str] = []
    listener = ggml_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", errors="replace")))
    library.llama_log_set(listener, None)
    try:
        model = library.llama_model_load_from_file(os.fsencode(path), model_params)
        if not model:
            raise ValueError(f"{Path(path)} cannot be planned: {_last_error(lines)}")
        context = library.llama_init_from_model(model, context_params)
        try:
            if not context:
                raise ValueError(f"{Path(path)}: no context of {n_ctx} tokens: {_last_error(lines)}")
            library.llama_free(context)
        finally:
            library.llama_model_free(model)
    finally:
        library.llama_log_set(LOG.callback, None)
    text = "".join(lines)
    compute = {name: round(float(mib) * 2**20) for name, mib in _COMPUTE.findall(text)}
    return DryRun(tuple(_LAYER.findall(text)), compute)


def _rpc_devices(library: ctypes.CDLL, count: int) -> ctypes.Array[ctypes.c_void_p]:
    """The last `count` devices of RPC servers, ended by NULL as `llama_model_params.devices` wants it."""
    devices = [library.ggml_backend_dev_get(i) for i in range(library.ggml_backend_dev_count())]
    remote = [device for device in devices if library.ggml_backend_dev_name(device).startswith(b"RPC")]
    pointers = [ctypes.cast(device, ctypes.c_void_p) for device in remote[-count:]]
    return (ctypes.c_void_p * (count + 1))(*pointers, None)


def _last_error(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if "error" in line or "failed" in line), "no reason given")
