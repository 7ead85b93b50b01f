"""A package `llama_cpp` that is `ernie_llama`, for programs whose imports nobody edits.

It is not installed under this name. `python -m ernie_llama.as_llama_cpp` runs a program with it.
"""

import sys

import ernie_llama  # noqa: F401 - its modules are renamed below

sys.modules.update(
    (name.replace("ernie_llama", "llama_cpp", 1), module)
    for name, module in list(sys.modules.items())
    if name == "ernie_llama" or name.startswith("ernie_llama.llama")
)
