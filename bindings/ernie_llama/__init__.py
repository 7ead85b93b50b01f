"""Python bindings over the patched libllama, in the style of llama-cpp-python.

>>> from ernie_llama import Llama
>>> with Llama("ernie.gguf", n_ctx=4096) as llm:
...     llm("def main():", max_tokens=32, temperature=0)["choices"][0]["text"]

The first `Llama` loads the shared library, not the import; `docs/python-api.md` says where it is searched.
"""

from ._engine import LlamaState
from ._info import Info, info
from ._library import LibraryNotFoundError, library_path
from ._model import check_gguf
from .llama import Llama
from .llama_grammar import LlamaGrammar

__all__ = [
    "Info",
    "LibraryNotFoundError",
    "Llama",
    "LlamaGrammar",
    "LlamaState",
    "check_gguf",
    "info",
    "library_path",
]
