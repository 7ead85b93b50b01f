"""Options of llama-cpp-python that few programs need, and wrong types: accepted, obeyed, or refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from ernie_llama import (
    Llama,
    _rare_options,
)

from .test_completion import PROMPT, text
from .test_options import LONG

pytestmark = pytest.mark.build

# What LangChain, LlamaIndex, llama-cpp-agent and others pass whether or not their user has set it.
NEUTRAL: dict[str, Any] = {name: refused.neutral[0] for name, refused in _rare_options.LLAMA.items()} | {
    "rope_freq_scale": 1.0,
    "rope_scaling_type": None,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_orig_ctx": 0,
    "attention_type": -1,
    "op_offload": None,
    "swa_full": None,
    "no_perf": False,
    "numa": False,
    "kv_overrides": None,
    "chat_format": None,
    "draft_model": None,
}


def test_neutral_options_change_nothing(bf16: str, llm: Llama) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Llama(bf16, n_threads=1, **NEUTRAL) as other:
            assert text(other(PROMPT, max_tokens=8, temperature=0, suffix=None, tfs_z=1.0)) == text(
                llm(PROMPT, max_tokens=8, temperature=0)
            )


@pytest.mark.parametrize("option", _rare_options.LLAMA)
def test_other_values_are_refused_with_what_to_do(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option} is 'x', which is not possible here: "):
        Llama("model.gguf", **{option: "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize("option", _rare_options.COMPLETION)
def test_other_values_of_completions_are_refused_too(llm: Llama, option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option} is 'x', which is not possible here: "):
        llm(PROMPT, **{option: "x"})  # type: ignore[call-overload]


def test_an_unknown_option_is_named_with_the_nearest_one(llm: Llama) -> None:
    with pytest.raises(TypeError, match="Llama has no option 'rope_freq_bas'; did you mean rope_freq_base"):
        Llama("model.gguf", rope_freq_bas=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="this method of Llama has no option 'topk'; did you mean top_k"):
        llm(PROMPT, topk=1)  # type: ignore[call-overload]


def logits(path: str, **options: Any) -> Any:  # noqa: ANN401
    with Llama(path, n_threads=1, **options) as llm:
        llm.eval(llm.tokenize(LONG.encode()))
        return llm.logits


def test_langchains_rope_frequency_is_ignored_and_others_are_obeyed(bf16: str) -> None:
    plain = logits(bf16)
    with pytest.warns(UserWarning, match=r"rope_freq_base=10000.0 is ignored: the file has 500000"):
        assert np.array_equal(logits(bf16, rope_freq_base=10000.0), plain)
    assert np.abs(logits(bf16, rope_freq_base=10001.0) - plain).max() > 0.1
    assert np.abs(logits(bf16, rope_freq_scale=0.25) - plain).max() > 0.1


def test_a_chat_handler_that_holds_no_mmproj_is_refused(bf16: str) -> None:
    handler: Any = lambda **_options: None  # noqa: E731 - a function is what llama-cpp-python takes
    with pytest.raises(
        ValueError, match=r"chat_handler is <function .*: expected one that holds the path of an mmproj"
    ):
        Llama(bf16, n_threads=1, chat_handler=handler)


def test_a_chat_format_is_ignored_with_a_warning(bf16: str) -> None:
    with pytest.warns(UserWarning, match="chat_format='chatml' is ignored: the file's own chat template is used"):
        Llama(bf16, n_threads=1, chat_format="chatml").close()


def test_metadata_can_be_overridden(bf16: str) -> None:
    with Llama(bf16, n_threads=1, kv_overrides={"tokenizer.ggml.add_bos_token": False}) as llm:
        assert llm.token_bos() not in llm.tokenize(b"x")
    with Llama(bf16, n_threads=1, kv_overrides={"tokenizer.ggml.add_bos_token": True}) as llm:
        assert llm.tokenize(b"x")[0] == llm.token_bos()
    with pytest.raises(ValueError, match=r"kv_overrides: a is \[\], expected a bool, an int of 64 bits, a float or at"):
        Llama(bf16, kv_overrides={"a": []})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 2.5}, "max_tokens is 2.5, expected an integer"),
        ({"max_tokens": "a"}, "max_tokens is 'a', expected an integer"),
        ({"top_k": "z"}, "top_k is 'z', expected an integer"),
        ({"top_k": 2.5}, "top_k is 2.5, expected an integer"),
        ({"top_p": "a"}, "top_p is 'a', expected a number"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number"),
        ({"stop": 5}, "stop is 5, expected a string or a list of strings"),
        ({"stop": [5]}, r"stop is \[5\], expected a string or a list of strings"),
        ({"grammar": 5}, "grammar is 5, expected a LlamaGrammar or GBNF text"),
        ({"logit_bias": [1]}, r"logit_bias is \[1\], expected a dictionary from token ids to numbers"),
        ({"logits_processor": [1]}, r"logits_processor is \[1\], expected a function or a list of functions"),
        ({"seed": "x"}, "seed is 'x', expected an integer"),
        ({"logprobs": 1.5}, "logprobs is 1.5, expected an integer"),
    ],
)
def test_wrong_types_are_named(llm: Llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        llm(PROMPT, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": "512"}, "n_ctx is '512', expected an integer"),
        ({"n_gpu_layers": None}, "n_gpu_layers is None, expected an integer"),
        ({"use_mmap": "yes"}, "use_mmap is 'yes', expected True or False"),
        ({"rope_freq_base": "x"}, "rope_freq_base is 'x', expected a number"),
        ({"logits_all": 2}, "logits_all is 2, expected True or False"),
    ],
)
def test_wrong_types_of_loading_are_named(bf16: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        Llama(bf16, n_threads=1, **options)


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("hi", TypeError, r"messages is 'hi', expected a list of dictionaries such as"),
        (["hi"], TypeError, r"messages is \['hi'\], expected a list of dictionaries"),
        ([], ValueError, "there are no messages to answer"),
        ([{"role": "user"}], ValueError, "message 0, of the user, has no content"),
        ([{"role": "assistant"}], ValueError, "message 0, of the assistant, has no content"),
        (
            [{"content": "x"}],
            ValueError,
            "message 0 has the role None, expected one of system, developer, user, assistant, tool",
        ),
        ([{"role": "robot", "content": "x"}], ValueError, "message 0 has the role 'robot', expected one of"),
    ],
)
def test_wrong_messages_are_named(llm: Llama, messages: Any, error: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=message):
        llm.create_chat_completion(messages)


def test_a_grammar_may_be_text(llm: Llama) -> None:
    assert text(llm(PROMPT, max_tokens=8, grammar='root ::= "yes" | "no"')) in {"yes", "no"}
