"""Python bindings over the patched libllama, in the style of llama-cpp-python.

>>> from ernie_llama import Llama
>>> with Llama("ernie.gguf", n_ctx=4096) as llm:
...     llm("def main():", max_tokens=32, temperature=0)["choices"][0]["text"]

The first `Llama` loads the shared library, not the import; `docs/python-api.md` says where it is searched. The names
of llama.h that these bindings declare are attributes of this package too, as in llama-cpp-python.
"""

from typing import Any

from . import llama_cache, llama_chat_format, llama_cpp, llama_speculative, llama_tokenizer, llama_types
from ._chat.media_parts import load_local_image, load_local_video
from ._engine.dry_run import DeviceMemory, DryRun, device_memory, dry_run
from ._engine.model import check_gguf
from ._engine.processors import (
    LogitsProcessor,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from ._engine.state import LlamaState
from ._lib.info import Info, info
from ._lib.library import LibraryNotFoundError, data_folder, has_nvidia_device, library_path
from .llama import Llama
from .llama_cache import BaseLlamaCache, LlamaCache, LlamaDiskCache, LlamaRAMCache
from .llama_grammar import LlamaGrammar
from .llama_speculative import LlamaDraftModel
from .llama_tokenizer import BaseLlamaTokenizer, LlamaHFTokenizer, LlamaTokenizer

# The version of llama-cpp-python whose interface this is; programs compare it.
__version__ = "0.3.36"

__all__ = [
    "BaseLlamaCache",
    "BaseLlamaTokenizer",
    "DeviceMemory",
    "DryRun",
    "Info",
    "LibraryNotFoundError",
    "Llama",
    "LlamaCache",
    "LlamaDiskCache",
    "LlamaDraftModel",
    "LlamaGrammar",
    "LlamaHFTokenizer",
    "LlamaRAMCache",
    "LlamaState",
    "LlamaTokenizer",
    "LogitsProcessor",
    "LogitsProcessorList",
    "MinTokensLogitsProcessor",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "check_gguf",
    "data_folder",
    "device_memory",
    "dry_run",
    "has_nvidia_device",
    "info",
    "library_path",
    "llama_cache",
    "llama_chat_format",
    "llama_cpp",
    "llama_speculative",
    "llama_tokenizer",
    "llama_types",
    "load_local_image",
    "load_local_video",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - a type of llama_types, or something of llama.h
    if name in vars(llama_types):
        return getattr(llama_types, name)
    if name.startswith(("llama_", "LLAMA_", "ggml_", "GGML_")):
        return getattr(llama_cpp, name)
    raise AttributeError(f"ernie_llama has no {name}")
