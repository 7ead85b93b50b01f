"""The part of llama.h that these bindings declare, under llama.h's names; as llama-cpp-python's module of this name.

Functions load the library when they are first named. Handles are those of `Llama.model` and `Llama.ctx`:

>>> from ernie_llama import llama_cpp
>>> llama_cpp.llama_model_get_vocab(llm.model)
"""

from __future__ import annotations

from typing import Any

from ._lib import structs as _structs
from ._lib.functions import FUNCTIONS
from ._lib.library import load as _load
from ._lib.structs import CONSTANTS


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a struct, a constant or a function
    if name in CONSTANTS:
        return CONSTANTS[name]
    if name in FUNCTIONS:
        return getattr(_load(), name)
    if name == "_lib":  # how llguidance finds a function's address
        return _load()
    if name.startswith(("llama_", "ggml_")) and hasattr(_structs, name):
        return getattr(_structs, name)
    raise AttributeError(
        f"{name} is not declared here: only the functions and structs of llama.h that these bindings use; for all of "
        "llama.h, run llama-cpp-python with this library (docs/python-api.md)"
    )


def __dir__() -> list[str]:
    structs = [name for name in vars(_structs) if name.startswith(("llama_", "ggml_"))]
    return sorted([*CONSTANTS, *FUNCTIONS, *structs])
