"""llama.cpp and libmtmd with what they round by default in float32."""

from __future__ import annotations

import pytest
from ernie_llama._lib import library, mtmd


def use_float32(patch: pytest.MonkeyPatch) -> None:
    """Keys and values in float32, and no flash attention, here and in the vision encoder."""
    llama, libmtmd = library.load(), mtmd.load()
    context_defaults, encoder_defaults = llama.llama_context_default_params, libmtmd.mtmd_context_params_default

    def context() -> object:
        params = context_defaults()
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    def encoder() -> object:
        params = encoder_defaults()
        params.flash_attn_type = 0
        return params

    patch.setattr(llama, "llama_context_default_params", context)
    patch.setattr(libmtmd, "mtmd_context_params_default", encoder)
