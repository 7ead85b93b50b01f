"""Names of llama-cpp-python beside `Llama`'s generation, and programs that import them unchanged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ernie_llama
import numpy as np
import pytest
from ernie_llama import Llama, llama_chat_format, llama_cpp
from ernie_llama.llama_chat_format import Llava15ChatHandler

from .test_chat import MESSAGES

pytestmark = pytest.mark.build


def test_the_functions_of_llama_h(llm: Llama) -> None:
    vocab = ernie_llama.llama_model_get_vocab(llm.model)
    assert llama_cpp.llama_vocab_n_tokens(vocab) == llm.n_vocab()
    assert llama_cpp.llama_token_get_attr(vocab, llm.token_eos()) & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL
    batch = llama_cpp.llama_batch_init(4, 0, 1)
    llama_cpp.llama_batch_free(batch)
    assert llama_cpp.llama_n_ctx(llm.ctx) == llm.context_params.n_ctx == 512
    with pytest.raises(AttributeError, match="llama_model_quantize is not declared here"):
        _ = llama_cpp.llama_model_quantize
    assert {"llama_decode", "LLAMA_DEFAULT_SEED", "llama_batch"} <= set(dir(llama_cpp))


def test_the_tokenizer_is_an_object_of_its_own(llm: Llama) -> None:
    tokenizer = llm.tokenizer()
    assert tokenizer.encode("x") == llm.tokenize(b"x", special=True)
    assert tokenizer.decode(llm.tokenize(b"def f", add_bos=False)) == "def f"


def test_functions_of_the_class() -> None:
    assert Llama.longest_token_prefix([1, 2, 3], [1, 2, 4]) == 2
    np.testing.assert_allclose(np.exp(Llama.logits_to_logprobs(np.zeros(4, np.float32))), 0.25)


def test_what_is_evaluated_as_arrays_and_lists(llm: Llama) -> None:
    llm.eval([5, 6])
    assert llm.input_ids.tolist() == llm.eval_tokens == [5, 6]
    assert llm.eval_logits == [llm.logits.tolist()]
    assert llm.n_batch == 512


def test_chats_with_the_classes_of_openai(llm: Llama) -> None:
    answer: Any = llm.create_chat_completion_openai_v1(MESSAGES, max_tokens=1)
    assert answer.choices[0].message.role == "assistant"
    chunks: list[Any] = list(llm.create_chat_completion_openai_v1(MESSAGES, max_tokens=1, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"


def test_chat_handlers_of_any_name_hold_the_path_of_an_mmproj() -> None:
    assert Llava15ChatHandler(clip_model_path="mmproj.gguf", verbose=False).clip_model_path == "mmproj.gguf"
    handler: Any = llama_chat_format.LlamaChatCompletionHandler  # in autogen's annotations
    assert handler.__name__ == "LlamaChatCompletionHandler"


def test_what_is_absent_says_what_to_do_instead() -> None:
    with pytest.raises(NotImplementedError, match="Llama downloads nothing: `huggingface-cli download x`, convert"):
        Llama.from_pretrained("x")
    with pytest.raises(NotImplementedError, match="LlamaHFTokenizer is not available: Llama uses the tokenizer of"):
        ernie_llama.LlamaHFTokenizer("x")
    with pytest.raises(NotImplementedError, match="LlamaDiskCache is not available: use LlamaRAMCache"):
        ernie_llama.LlamaDiskCache()


SHIMMED = """
import subprocess, sys
import llama_cpp
from llama_cpp.llama import Llama
from llama_cpp.llama_types import ChatCompletionChunk
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from llama_cpp import llama_chat_format, LlamaGrammar, CreateChatCompletionResponse
print(llama_cpp.__name__, Llama.__module__, sys.argv[1:], llama_cpp.LLAMA_POOLING_TYPE_MEAN)
if sys.argv[1:] == ["outer"]:
    print(subprocess.run([sys.executable, __file__, "inner"], capture_output=True, text=True).stdout, end="")
"""


def test_a_program_runs_with_ernie_llama_as_llama_cpp(built_library: None, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SHIMMED)
    command = [sys.executable, "-m", "ernie_llama.as_llama_cpp"]
    done = subprocess.run([*command, tmp_path / "program.py", "outer"], capture_output=True, text=True, check=True)
    lines = [f"ernie_llama ernie_llama.llama ['{each}'] 1" for each in ("outer", "inner")]
    assert done.stdout.splitlines() == lines
    done = subprocess.run(
        [*command, "-m", "program", "inner"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == lines[1:]
    folder = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert (Path(folder) / "llama_cpp" / "__init__.py").is_file()
