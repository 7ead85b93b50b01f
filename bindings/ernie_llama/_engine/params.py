"""The options of `Llama`, checked, as fields of `llama_model_params` and `llama_context_params`."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._lib import structs
from .checks import enum_value, flag, int32, integer

SPLIT_MODES = {
    "none": structs.LLAMA_SPLIT_MODE_NONE,
    "layer": structs.LLAMA_SPLIT_MODE_LAYER,
    "row": structs.LLAMA_SPLIT_MODE_ROW,
    "tensor": structs.LLAMA_SPLIT_MODE_TENSOR,
}
# The types that llama.cpp accepts for the KV cache.
KV_TYPES = {
    "f32": structs.GGML_TYPE_F32,
    "f16": structs.GGML_TYPE_F16,
    "bf16": structs.GGML_TYPE_BF16,
    "q8_0": structs.GGML_TYPE_Q8_0,
    "q4_0": structs.GGML_TYPE_Q4_0,
    "q4_1": structs.GGML_TYPE_Q4_1,
    "iq4_nl": structs.GGML_TYPE_IQ4_NL,
    "q5_0": structs.GGML_TYPE_Q5_0,
    "q5_1": structs.GGML_TYPE_Q5_1,
}
# By (use_mmap, use_mlock).
LOAD_MODES = {
    (False, False): structs.LLAMA_LOAD_MODE_NONE,
    (True, False): structs.LLAMA_LOAD_MODE_MMAP,
    (False, True): structs.LLAMA_LOAD_MODE_MLOCK,
    (True, True): structs.LLAMA_LOAD_MODE_MMAP_MLOCK,
}
# Every name that llama.cpp gives to the expert tensors of a layer.
EXPERTS = r"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps"

MAX_THREADS = 512  # GGML_MAX_N_THREADS; more end the process


def model_fields(
    library: ctypes.CDLL,
    *,
    n_gpu_layers: int,
    split_mode: int | str,
    main_gpu: int,
    tensor_split: Sequence[float] | None,
    n_cpu_moe: int,
    tensor_buft_overrides: Mapping[str, str] | str,
    use_mmap: bool,
    use_mlock: bool,
    kv_overrides: Mapping[str, bool | int | float | str] | None,
) -> dict[str, Any]:
    """The fields of `llama_model_params` that the options set.

    Raises:
        ValueError: an option is out of range, or names something that this library does not have.
        TypeError: an option has the wrong type.
    """
    fields: dict[str, Any] = {
        "n_gpu_layers": int32("n_gpu_layers", n_gpu_layers),
        "split_mode": enum_value("split_mode", split_mode, SPLIT_MODES),
        "main_gpu": int32("main_gpu", main_gpu, 0),
        "load_mode": LOAD_MODES[flag("use_mmap", use_mmap), flag("use_mlock", use_mlock)],
    }
    if tensor_split:
        fields["tensor_split"] = _tensor_split(library, tensor_split)
    overrides = _overrides(library, tensor_buft_overrides, int32("n_cpu_moe", n_cpu_moe, 0))
    if overrides is not None:
        fields["tensor_buft_overrides"] = ctypes.cast(overrides, ctypes.c_void_p)  # keeps the array alive
    if kv_overrides:
        fields["kv_overrides"] = ctypes.cast(_kv_overrides(kv_overrides), ctypes.c_void_p)
    return fields


def context_fields(
    *,
    n_ctx: int,
    n_batch: int,
    n_ubatch: int,
    n_seq_max: int,
    n_threads: int | None,
    n_threads_batch: int | None,
    type_k: int | str | None,
    type_v: int | str | None,
    flash_attn: bool | None,
    offload_kqv: bool,
    embedding: bool,
    pooling_type: int,
) -> dict[str, Any]:
    """The fields of `llama_context_params` that the options set.

    Raises:
        ValueError: an option is out of range.
        TypeError: an option has the wrong type.
    """
    fields = {
        "n_ctx": int32("n_ctx", n_ctx, 0),
        "n_batch": int32("n_batch", n_batch, 1),
        "n_ubatch": int32("n_ubatch", n_ubatch, 1),
        # More than tokens in a batch are of no use, and llama.cpp would abort the process.
        "n_seq_max": min(int32("n_seq_max", n_seq_max, 1), n_batch, n_ctx or n_batch),
        "kv_unified": n_seq_max > 1,
        "n_threads": int32("n_threads", n_threads or physical_cores(), 1, MAX_THREADS),
        "offload_kqv": flag("offload_kqv", offload_kqv),
        "embeddings": flag("embedding", embedding),
        "pooling_type": int32("pooling_type", pooling_type, -1, structs.LLAMA_POOLING_TYPE_RANK),
    }
    fields["n_threads_batch"] = int32("n_threads_batch", n_threads_batch or fields["n_threads"], 1, MAX_THREADS)
    if embedding:
        fields["n_ubatch"] = fields["n_batch"]  # pooling needs the whole text in one micro-batch
    if flash_attn is not None:
        fields["flash_attn_type"] = int(flag("flash_attn", flash_attn))
    for name, kv_type in (("type_k", type_k), ("type_v", type_v)):
        if kv_type is not None:
            fields[name] = enum_value(name, kv_type, KV_TYPES)
    return fields


def _tensor_split(library: ctypes.CDLL, shares: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    """The share of each device, [llama_max_devices]; devices without a share get zero."""
    most: int = library.llama_max_devices()
    if len(shares) > most:
        raise ValueError(f"tensor_split has {len(shares)} shares, llama.cpp knows at most {most} devices")
    return (ctypes.c_float * most)(*shares)


def _overrides(
    library: ctypes.CDLL, patterns: Mapping[str, str] | str, n_cpu_moe: int
) -> ctypes.Array[structs.llama_model_tensor_buft_override] | None:
    """The list for `tensor_buft_overrides`, ended by a NULL pattern; None if it would be empty.

    The first pattern that matches a tensor wins, so `patterns` go before those of `n_cpu_moe`.
    """
    wanted = _parsed(patterns) if isinstance(patterns, str) else dict(patterns)
    wanted |= {EXPERTS.format(layer=layer): "CPU" for layer in range(n_cpu_moe)}
    if not wanted:
        return None
    types = _buffer_types(library)
    result = (structs.llama_model_tensor_buft_override * (len(wanted) + 1))()  # the last stays NULL
    for i, (pattern, name) in enumerate(wanted.items()):
        if name not in types:
            raise ValueError(f"tensor_buft_overrides: there is no buffer type {name!r}; there are {', '.join(types)}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(pattern)  # llama.cpp would abort the process
        except (re.error, RecursionError) as error:
            raise ValueError(
                f"tensor_buft_overrides: {pattern!r} is not a valid regular expression: {error}"
            ) from error
        result[i] = structs.llama_model_tensor_buft_override(pattern.encode(), types[name])
    return result


def _kv_overrides(
    values: Mapping[str, bool | int | float | str],
) -> ctypes.Array[structs.llama_model_kv_override]:
    """The list for `kv_overrides`, ended by an empty key."""
    result = (structs.llama_model_kv_override * (len(values) + 1))()
    for each, (key, value) in zip(result, values.items(), strict=False):
        if not isinstance(key, str):
            raise TypeError(f"kv_overrides: found the key {key!r}, expected a string")
        each.key = key.encode()[:127]
        if isinstance(value, bool):
            each.tag, each.val_bool = structs.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int) and -(2**63) <= value < 2**63:
            each.tag, each.val_i64 = structs.LLAMA_KV_OVERRIDE_TYPE_INT, value
        elif isinstance(value, float):
            each.tag, each.val_f64 = structs.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        elif isinstance(value, str) and len(value.encode()) < 128:
            each.tag, each.val_str = structs.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            raise ValueError(
                f"kv_overrides: {key} is {value!r}, expected a bool, an int of 64 bits, a float or at most 127 bytes"
            )
    return result


def _parsed(text: str) -> dict[str, str]:
    wanted = {}
    for entry in filter(None, text.split(",")):
        pattern, equals, name = entry.rpartition("=")
        if not equals:
            raise ValueError(f"tensor_buft_overrides: found {entry!r}, expected PATTERN=BUFFER_TYPE")
        wanted[pattern] = name
    return wanted


def _buffer_types(library: ctypes.CDLL) -> dict[str, structs.ggml_backend_buffer_type_t]:
    devices = [library.ggml_backend_dev_get(i) for i in range(library.ggml_backend_dev_count())]
    types = [library.ggml_backend_dev_buffer_type(device) for device in devices]
    return {library.ggml_backend_buft_name(each).decode(): each for each in types if each}


def physical_cores() -> int:
    """Physical cores that this process may use, which is also llama.cpp's default for its threads."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    try:
        siblings = {Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings").read_text() for cpu in cpus}
    except OSError:  # a container without /sys
        return len(cpus)
    return len(siblings)


def init_numa(library: ctypes.CDLL, strategy: bool | int) -> None:
    """Set llama.cpp's NUMA strategy for the process; True is "distribute", as in llama-cpp-python."""
    if strategy:
        library.llama_numa_init(1 if strategy is True else integer("numa", strategy, 0))
