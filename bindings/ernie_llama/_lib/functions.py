"""The signatures of the libllama functions that the bindings call."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_void_p
from typing import Any

from .structs import (
    enum,
    ggml_abort_callback,
    ggml_backend_buffer_type_t,
    ggml_backend_dev_t,
    ggml_backend_reg_t,
    ggml_context_p,
    ggml_init_params,
    ggml_log_callback,
    ggml_tensor_p,
    llama_adapter_lora_p,
    llama_batch,
    llama_context_p,
    llama_context_params,
    llama_logit_bias,
    llama_memory_p,
    llama_model_p,
    llama_model_params,
    llama_pos,
    llama_sampler_chain_params,
    llama_sampler_p,
    llama_seq_id,
    llama_token,
    llama_token_data_array,
    llama_vocab_p,
)

# name: (result, arguments)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [ggml_log_callback, c_void_p]),
    "llama_version": (c_char_p, []),
    "llama_print_system_info": (c_char_p, []),
    "llama_supports_rpc": (c_bool, []),
    "llama_max_devices": (c_size_t, []),
    "llama_numa_init": (None, [enum]),
    "ggml_version": (c_char_p, []),
    "ggml_commit": (c_char_p, []),
    # devices
    "ggml_backend_load_all_from_path": (None, [c_char_p]),
    "ggml_backend_reg_count": (c_size_t, []),
    "ggml_backend_reg_by_name": (ggml_backend_reg_t, [c_char_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [ggml_backend_reg_t, c_char_p]),
    "ggml_backend_register": (None, [ggml_backend_reg_t]),
    "ggml_backend_dev_count": (c_size_t, []),
    "ggml_backend_dev_memory": (None, [ggml_backend_dev_t, POINTER(c_size_t), POINTER(c_size_t)]),
    "ggml_backend_dev_get": (ggml_backend_dev_t, [c_size_t]),
    "ggml_backend_dev_name": (c_char_p, [ggml_backend_dev_t]),
    "ggml_backend_dev_description": (c_char_p, [ggml_backend_dev_t]),
    "ggml_backend_dev_buffer_type": (ggml_backend_buffer_type_t, [ggml_backend_dev_t]),
    "ggml_backend_dev_supports_op": (c_bool, [ggml_backend_dev_t, ggml_tensor_p]),
    "ggml_backend_buft_name": (c_char_p, [ggml_backend_buffer_type_t]),
    # a product that nobody computes, to ask a device for
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_init": (ggml_context_p, [ggml_init_params]),
    "ggml_free": (None, [ggml_context_p]),
    "ggml_new_tensor_2d": (ggml_tensor_p, [ggml_context_p, enum, c_int64, c_int64]),
    "ggml_mul_mat": (ggml_tensor_p, [ggml_context_p, ggml_tensor_p, ggml_tensor_p]),
    # model
    "llama_model_default_params": (llama_model_params, []),
    "llama_model_load_from_file": (llama_model_p, [c_char_p, llama_model_params]),
    "llama_model_free": (None, [llama_model_p]),
    "llama_model_get_vocab": (llama_vocab_p, [llama_model_p]),
    "llama_model_n_embd": (c_int32, [llama_model_p]),
    "llama_model_is_recurrent": (c_bool, [llama_model_p]),
    "llama_model_is_hybrid": (c_bool, [llama_model_p]),
    "llama_model_meta_count": (c_int32, [llama_model_p]),
    "llama_model_meta_key_by_index": (c_int32, [llama_model_p, c_int32, c_char_p, c_size_t]),
    "llama_model_meta_val_str_by_index": (c_int32, [llama_model_p, c_int32, c_char_p, c_size_t]),
    "llama_model_chat_template": (c_char_p, [llama_model_p, c_char_p]),
    "llama_adapter_lora_init": (llama_adapter_lora_p, [llama_model_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [llama_context_p, POINTER(llama_adapter_lora_p), c_size_t, POINTER(c_float)]),
    # vocabulary
    "llama_vocab_n_tokens": (c_int32, [llama_vocab_p]),
    "llama_vocab_bos": (llama_token, [llama_vocab_p]),
    "llama_vocab_eos": (llama_token, [llama_vocab_p]),
    "llama_vocab_nl": (llama_token, [llama_vocab_p]),
    "llama_vocab_get_text": (c_char_p, [llama_vocab_p, llama_token]),
    "llama_vocab_get_attr": (enum, [llama_vocab_p, llama_token]),
    "llama_token_get_attr": (enum, [llama_vocab_p, llama_token]),
    "llama_vocab_is_eog": (c_bool, [llama_vocab_p, llama_token]),
    "llama_tokenize": (c_int32, [llama_vocab_p, c_char_p, c_int32, POINTER(llama_token), c_int32, c_bool, c_bool]),
    "llama_token_to_piece": (c_int32, [llama_vocab_p, llama_token, c_char_p, c_int32, c_int32, c_bool]),
    # context
    "llama_context_default_params": (llama_context_params, []),
    "llama_init_from_model": (llama_context_p, [llama_model_p, llama_context_params]),
    "llama_free": (None, [llama_context_p]),
    "llama_n_ctx": (c_uint32, [llama_context_p]),
    "llama_n_batch": (c_uint32, [llama_context_p]),
    "llama_n_seq_max": (c_uint32, [llama_context_p]),
    "llama_set_abort_callback": (None, [llama_context_p, ggml_abort_callback, c_void_p]),
    "llama_batch_init": (llama_batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [llama_batch]),
    "llama_decode": (c_int32, [llama_context_p, llama_batch]),
    "llama_get_logits": (POINTER(c_float), [llama_context_p]),
    "llama_get_logits_ith": (POINTER(c_float), [llama_context_p, c_int32]),
    "llama_pooling_type": (enum, [llama_context_p]),
    "llama_get_embeddings": (POINTER(c_float), [llama_context_p]),
    "llama_get_embeddings_seq": (POINTER(c_float), [llama_context_p, llama_seq_id]),
    "llama_state_get_size": (c_size_t, [llama_context_p]),
    "llama_state_get_data": (c_size_t, [llama_context_p, POINTER(c_uint8), c_size_t]),
    "llama_state_set_data": (c_size_t, [llama_context_p, POINTER(c_uint8), c_size_t]),
    "llama_get_memory": (llama_memory_p, [llama_context_p]),
    "llama_memory_clear": (None, [llama_memory_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [llama_memory_p, llama_seq_id, llama_pos, llama_pos]),
    "llama_memory_seq_cp": (None, [llama_memory_p, llama_seq_id, llama_seq_id, llama_pos, llama_pos]),
    "llama_memory_seq_pos_max": (llama_pos, [llama_memory_p, llama_seq_id]),
    "llama_memory_seq_keep": (None, [llama_memory_p, llama_seq_id]),
    # sampling
    "llama_sampler_chain_default_params": (llama_sampler_chain_params, []),
    "llama_sampler_chain_init": (llama_sampler_p, [llama_sampler_chain_params]),
    "llama_sampler_chain_add": (None, [llama_sampler_p, llama_sampler_p]),
    "llama_sampler_init_greedy": (llama_sampler_p, []),
    "llama_sampler_init_top_k": (llama_sampler_p, [c_int32]),
    "llama_sampler_init_top_p": (llama_sampler_p, [c_float, c_size_t]),
    "llama_sampler_init_min_p": (llama_sampler_p, [c_float, c_size_t]),
    "llama_sampler_init_typical": (llama_sampler_p, [c_float, c_size_t]),
    "llama_sampler_init_temp": (llama_sampler_p, [c_float]),
    "llama_sampler_init_mirostat": (llama_sampler_p, [c_int32, c_uint32, c_float, c_float, c_int32]),
    "llama_sampler_init_mirostat_v2": (llama_sampler_p, [c_uint32, c_float, c_float]),
    "llama_sampler_init_penalties": (llama_sampler_p, [c_int32, c_int32, c_float, c_float, c_float]),
    "llama_sampler_init_logit_bias": (llama_sampler_p, [c_int32, c_int32, POINTER(llama_logit_bias)]),
    "llama_sampler_init_grammar": (llama_sampler_p, [llama_vocab_p, c_char_p, c_char_p]),
    "llama_sampler_init_dist": (llama_sampler_p, [c_uint32]),
    "llama_sampler_apply": (None, [llama_sampler_p, POINTER(llama_token_data_array)]),
    "llama_sampler_accept": (None, [llama_sampler_p, llama_token]),
    "llama_sampler_sample": (llama_token, [llama_sampler_p, llama_context_p, c_int32]),
    "llama_sampler_free": (None, [llama_sampler_p]),
}


def declare(library: ctypes.CDLL) -> list[str]:
    """Set the result and argument types of every function in `FUNCTIONS`; return the names that are missing."""
    missing = []
    for name, (result, arguments) in FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            missing.append(name)
            continue
        function.restype = result
        function.argtypes = arguments
    return missing
