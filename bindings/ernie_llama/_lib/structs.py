"""The structs, pointers, callbacks and constants of llama.h and ggml.h that the bindings use.

Field names and order are those of the headers. `tests/bindings/test_layout.py` compiles a probe against the headers
and compares the size and offset of every field, the number of fields, every constant and every function signature.
"""
# ruff: noqa: N801 - llama.h's names, so that one search finds both languages

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    c_bool,
    c_char,
    c_double,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)


class Pointer(c_void_p):
    """An opaque pointer. It converts to its address, which is what llama-cpp-python returns instead."""

    def __index__(self) -> int:
        return self.value or 0


class llama_model_p(Pointer):
    """`struct llama_model *`."""


class llama_context_p(Pointer):
    """`struct llama_context *`."""


class llama_vocab_p(Pointer):
    """`const struct llama_vocab *`."""


class llama_memory_p(Pointer):
    """`llama_memory_t`."""


class llama_sampler_p(Pointer):
    """`struct llama_sampler *`."""


class llama_adapter_lora_p(Pointer):
    """`struct llama_adapter_lora *`."""


class ggml_context_p(Pointer):
    """`struct ggml_context *`."""


class ggml_tensor_p(Pointer):
    """`struct ggml_tensor *`."""


class ggml_backend_buffer_type_t(Pointer):
    """A kind of memory that tensors are allocated in."""


class ggml_backend_dev_t(Pointer):
    """A device."""


class ggml_backend_reg_t(Pointer):
    """A backend: CPU, CUDA, RPC, ..."""


llama_token = c_int32
llama_pos = c_int32
llama_seq_id = c_int32
enum = c_int

llama_progress_callback = ctypes.CFUNCTYPE(c_bool, c_float, c_void_p)
ggml_abort_callback = ctypes.CFUNCTYPE(c_bool, c_void_p)
ggml_backend_sched_eval_callback = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
ggml_log_callback = ctypes.CFUNCTYPE(None, enum, ctypes.c_char_p, c_void_p)


class llama_batch(ctypes.Structure):
    """Input of `llama_decode`; NULL `n_seq_id` and `seq_id` put every token in sequence 0."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(llama_token)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(llama_pos)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(llama_seq_id))),
        ("logits", POINTER(c_int8)),
    ]


class llama_model_params(ctypes.Structure):
    """Options of `llama_model_load_from_file`."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", enum),
        ("load_mode", enum),
        ("lazy_mode", enum),
        ("main_gpu", c_int32),
        ("tensor_split", POINTER(c_float)),
        ("progress_callback", llama_progress_callback),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class llama_context_params(ctypes.Structure):
    """Options of `llama_init_from_model`."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", enum),
        ("rope_scaling_type", enum),
        ("pooling_type", enum),
        ("attention_type", enum),
        ("flash_attn_type", enum),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", ggml_backend_sched_eval_callback),
        ("cb_eval_user_data", c_void_p),
        ("type_k", enum),
        ("type_v", enum),
        ("abort_callback", ggml_abort_callback),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", llama_context_p),
    ]


class llama_token_data(ctypes.Structure):
    """A candidate of a sampler."""

    _fields_ = [("id", llama_token), ("logit", c_float), ("p", c_float)]


class llama_token_data_array(ctypes.Structure):
    """The candidates of a sampler."""

    _fields_ = [
        ("data", POINTER(llama_token_data)),
        ("size", c_size_t),
        ("selected", c_int64),
        ("sorted", c_bool),
    ]


class llama_sampler_chain_params(ctypes.Structure):
    """Options of `llama_sampler_chain_init`."""

    _fields_ = [("no_perf", c_bool)]


class llama_logit_bias(ctypes.Structure):
    """A value to add to the logit of a token."""

    _fields_ = [("token", llama_token), ("bias", c_float)]


class llama_model_tensor_buft_override(ctypes.Structure):
    """The buffer type of tensors whose name matches `pattern`; a NULL pattern ends a list of overrides."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ggml_backend_buffer_type_t)]


class _KvOverrideValue(ctypes.Union):
    _fields_ = [("val_i64", c_int64), ("val_f64", c_double), ("val_bool", c_bool), ("val_str", c_char * 128)]


class llama_model_kv_override(ctypes.Structure):
    """A metadata value to use instead of the file's; an empty key ends a list of overrides."""

    _anonymous_ = ("value",)
    _fields_ = [("tag", enum), ("key", c_char * 128), ("value", _KvOverrideValue)]


class ggml_init_params(ctypes.Structure):
    """Memory of a ggml context; `no_alloc`: its tensors have no data."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


STRUCTS: tuple[type[ctypes.Structure], ...] = (
    llama_batch,
    llama_model_params,
    llama_context_params,
    llama_token_data,
    llama_token_data_array,
    llama_sampler_chain_params,
    llama_logit_bias,
    llama_model_tensor_buft_override,
    ggml_init_params,
)

# The version of llama.cpp that these declarations are for, without its suffix.
VERSION = "0.6.0"

LLAMA_DEFAULT_SEED = 0xFFFFFFFF

LLAMA_LOAD_MODE_NONE = 0
LLAMA_LOAD_MODE_MMAP = 1
LLAMA_LOAD_MODE_MLOCK = 2
LLAMA_LOAD_MODE_MMAP_MLOCK = 3

LLAMA_SPLIT_MODE_NONE = 0
LLAMA_SPLIT_MODE_LAYER = 1
LLAMA_SPLIT_MODE_ROW = 2
LLAMA_SPLIT_MODE_TENSOR = 3

LLAMA_FLASH_ATTN_TYPE_AUTO = -1

LLAMA_POOLING_TYPE_UNSPECIFIED = -1
LLAMA_POOLING_TYPE_NONE = 0
LLAMA_POOLING_TYPE_MEAN = 1
LLAMA_POOLING_TYPE_CLS = 2
LLAMA_POOLING_TYPE_LAST = 3
LLAMA_POOLING_TYPE_RANK = 4

LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED = -1
LLAMA_ROPE_SCALING_TYPE_NONE = 0
LLAMA_ROPE_SCALING_TYPE_LINEAR = 1
LLAMA_ROPE_SCALING_TYPE_YARN = 2
LLAMA_ROPE_SCALING_TYPE_LONGROPE = 3

LLAMA_ATTENTION_TYPE_UNSPECIFIED = -1
LLAMA_ATTENTION_TYPE_CAUSAL = 0
LLAMA_ATTENTION_TYPE_NON_CAUSAL = 1

LLAMA_TOKEN_ATTR_CONTROL = 1 << 3
LLAMA_TOKEN_ATTR_USER_DEFINED = 1 << 4

LLAMA_KV_OVERRIDE_TYPE_INT = 0
LLAMA_KV_OVERRIDE_TYPE_FLOAT = 1
LLAMA_KV_OVERRIDE_TYPE_BOOL = 2
LLAMA_KV_OVERRIDE_TYPE_STR = 3

GGML_TYPE_F32 = 0
GGML_TYPE_F16 = 1
GGML_TYPE_Q4_0 = 2
GGML_TYPE_Q4_1 = 3
GGML_TYPE_Q5_0 = 6
GGML_TYPE_Q5_1 = 7
GGML_TYPE_Q8_0 = 8
GGML_TYPE_IQ4_NL = 20
GGML_TYPE_BF16 = 30
GGML_TYPE_CCQ2 = 180

GGML_LOG_LEVEL_WARN = 3
GGML_LOG_LEVEL_CONT = 5

CONSTANTS: dict[str, int] = {name: value for name, value in globals().items() if name.startswith(("LLAMA_", "GGML_"))}
