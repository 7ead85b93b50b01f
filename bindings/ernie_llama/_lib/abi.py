"""Checks that a library uses the structs of these bindings, before any struct is passed to it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping

from . import structs

# What the pinned version's *_default_params functions return, for fields spread over the structs.
_EXPECTED: dict[str, tuple[type[ctypes.Structure], Mapping[str, float | None]]] = {
    "llama_model_default_params": (
        structs.llama_model_params,
        {
            "devices": None,
            "n_gpu_layers": -1,
            "split_mode": structs.LLAMA_SPLIT_MODE_LAYER,
            "load_mode": -1,
            "lazy_mode": 1,
            "main_gpu": 0,
            "kv_overrides": None,
            "vocab_only": 0,
            "use_extra_bufts": 1,
            "load_mtp": 0,
        },
    ),
    "llama_context_default_params": (
        structs.llama_context_params,
        {
            "n_ctx": 512,
            "n_batch": 2048,
            "n_ubatch": 512,
            "n_seq_max": 1,
            "n_outputs_max_per_seq": 1,
            "pooling_type": structs.LLAMA_POOLING_TYPE_UNSPECIFIED,
            "flash_attn_type": structs.LLAMA_FLASH_ATTN_TYPE_AUTO,
            "yarn_ext_factor": -1.0,
            "yarn_beta_slow": -1.0,
            "yarn_orig_ctx": 0,
            "defrag_thold": -1.0,
            "type_k": structs.GGML_TYPE_F16,
            "type_v": structs.GGML_TYPE_F16,
            "offload_kqv": 1,
            "op_offload": 1,
            "swa_full": 1,
            "kv_unified": 0,
            "n_samplers": 0,
            "ctx_other": None,
        },
    ),
}

_ROOM = 4096
_FILL = 0xA5


class _Roomy(ctypes.Structure):
    """Room for a struct that is larger than expected."""

    _fields_ = [("bytes", ctypes.c_ubyte * _ROOM)]


def difference(library: ctypes.CDLL) -> str | None:
    """How the ABI of `library`, which has all functions, differs from the pinned one; None if it is the same."""
    library.llama_version.restype = ctypes.c_char_p
    version = library.llama_version().decode(errors="replace")
    if version.split("-")[0].split(".")[:2] != structs.VERSION.split(".")[:2]:
        return f"it is version {version} of llama.cpp, expected {structs.VERSION}"
    for name, (struct, expected) in _EXPECTED.items():
        if found := _wrong_default(library, name, struct, expected) or _wrong_size(library, name, struct):
            return found
    return None


def _wrong_default(
    library: ctypes.CDLL, name: str, struct: type[ctypes.Structure], expected: Mapping[str, float | None]
) -> str | None:
    function = _untyped(library, name)
    function.restype = _Roomy
    defaults = struct.from_buffer_copy(function())
    for field, value in expected.items():
        found = getattr(defaults, field)
        if getattr(found, "value", found) != value:  # a handle keeps its address in `value`
            return f"its {name} gives {field} = {found}, expected {value}: {struct.__name__} has another layout"
    return None


def _wrong_size(library: ctypes.CDLL, name: str, struct: type[ctypes.Structure]) -> str | None:
    """Detect fields added at the end, which have no default to compare, by how many bytes the function writes.

    Works only where the caller passes the address of a returned struct as a hidden first argument.
    """
    if platform.machine() not in {"x86_64", "AMD64"}:
        return None
    place = (ctypes.c_ubyte * _ROOM)(*[_FILL] * _ROOM)
    function = _untyped(library, name)
    function.restype = None
    function.argtypes = [ctypes.c_void_p]
    function(place)
    written = _ROOM - len(bytes(place)) + len(bytes(place).rstrip(bytes([_FILL])))
    alignment = ctypes.alignment(struct)
    size = -(-written // alignment) * alignment
    if size != ctypes.sizeof(struct):
        return f"its {struct.__name__} has {size} bytes, expected {ctypes.sizeof(struct)}"
    return None


def _untyped(library: ctypes.CDLL, name: str) -> ctypes._NamedFuncPointer:
    """A separate object for the function, whose types can be set without changing those of `library`."""
    return library[name]
