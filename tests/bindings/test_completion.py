"""Completions: the dictionary, where they end, and that the text is llama.cpp's own."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path

import pytest
from ernie_llama import Llama
from ernie_llama.llama_types import CreateCompletionResponse
from support.models import llama_completion

pytestmark = pytest.mark.build

PROMPT = "def main():"
PROMPTS = [PROMPT, "import os\n\n\nclass ", "# naïve 日本語 🎉\n", "def f(x):\n" + "    x += 1\n" * 40]


def text(completion: CreateCompletionResponse) -> str:
    return completion["choices"][0]["text"]


def test_the_dictionary_is_that_of_llama_cpp_python(llm: Llama) -> None:
    completion = llm(PROMPT, max_tokens=8, temperature=0)
    n_prompt = len(llm.tokenize(PROMPT.encode(), special=True))
    assert completion["id"].startswith("cmpl-")
    assert abs(completion["created"] - time.time()) < 60
    assert dict(completion) == {
        "id": completion["id"],
        "created": completion["created"],
        "object": "text_completion",
        "model": llm.model_path,
        "choices": [{"text": text(completion), "index": 0, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": n_prompt, "completion_tokens": 8, "total_tokens": n_prompt + 8},
    }
    assert llm(PROMPT, max_tokens=1, model="tiny")["model"] == "tiny"


def test_create_completion_is_the_same_call_and_accepts_tokens(llm: Llama) -> None:
    expected = text(llm(PROMPT, max_tokens=8, temperature=0))
    assert text(llm.create_completion(PROMPT, max_tokens=8, temperature=0)) == expected
    assert text(llm(llm.tokenize(PROMPT.encode()), max_tokens=8, temperature=0)) == expected


def test_greedy_text_repeats(llm: Llama) -> None:
    assert text(llm(PROMPT, max_tokens=64, temperature=0)) == text(llm(PROMPT, max_tokens=64, temperature=0, seed=7))


def test_greedy_text_is_that_of_single_steps(llm: Llama) -> None:
    expected = text(llm(PROMPT, max_tokens=16, temperature=0))
    llm.reset()
    llm.eval(llm.tokenize(PROMPT.encode()))
    tokens = []
    for _ in range(16):
        tokens.append(llm.sample(temp=0))
        llm.eval(tokens[-1:])
    assert llm.detokenize(tokens).decode() == expected


def continued(llama_bin: Path, model: Path, prompt: str, *options: str) -> str:
    """The text that llama-completion writes after the prompt."""
    return llama_completion(llama_bin, model, prompt, 48, *options).stdout.removesuffix("\n\n")


@pytest.mark.parametrize("gguf", ["tiny_bf16_gguf", "tiny_ccq2_gguf"])
def test_text_is_that_of_llama_completion(
    built_library: None, llama_bin: Path, request: pytest.FixtureRequest, gguf: str
) -> None:
    model = request.getfixturevalue(gguf)
    sampled = ["--temp", "0.8", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.05", "--seed", "42"]
    with Llama(model, n_threads=1, n_ctx=512) as llm:
        for prompt in PROMPTS:
            greedy = text(llm(prompt, max_tokens=48, temperature=0))
            assert continued(llama_bin, model, prompt, "--temp", "0") == greedy
            assert continued(llama_bin, model, prompt, *sampled) == text(llm(prompt, max_tokens=48, seed=42))


def test_a_seed_repeats_the_text_and_another_changes_it(llm: Llama) -> None:
    first, again, other = (text(llm(PROMPT, max_tokens=32, temperature=1.0, seed=seed)) for seed in (42, 42, 43))
    assert first == again
    assert first != other


def test_without_a_seed_the_texts_of_one_llama_differ_but_repeat_with_its_seed(bf16: str) -> None:
    runs = []
    for _ in range(2):
        with Llama(bf16, n_threads=1, seed=1) as llm:
            runs.append([text(llm(PROMPT, max_tokens=32, temperature=1.0)) for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]


def test_a_random_seed_differs_between_loads(bf16: str) -> None:
    texts = set()
    for _ in range(3):
        with Llama(bf16, n_threads=1) as llm:
            texts.add(text(llm(PROMPT, max_tokens=32, temperature=1.5)))
    assert len(texts) > 1


def test_top_k_1_is_greedy_at_any_temperature(llm: Llama) -> None:
    assert text(llm(PROMPT, max_tokens=32, temperature=2.0, top_k=1)) == text(llm(PROMPT, max_tokens=32, temperature=0))


def test_stop_string_across_tokens_ends_the_text(llm: Llama) -> None:
    whole = text(llm(PROMPT, max_tokens=32, temperature=0))
    pieces = [
        llm.detokenize([token]).decode() for token in islice(llm.generate(llm.tokenize(PROMPT.encode()), temp=0), 12)
    ]
    stop = pieces[8][-1] + pieces[9][:1]  # the end of one token and the beginning of the next
    assert len(stop) == 2
    completion = llm(PROMPT, max_tokens=32, temperature=0, stop=["never there", stop])
    assert text(completion) == whole[: whole.index(stop)]
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["usage"]["completion_tokens"] <= 10
    assert text(llm(PROMPT, max_tokens=32, temperature=0, stop=stop)) == text(completion)


def test_an_end_of_generation_token_ends_the_text(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(islice(llm.generate(llm.tokenize(PROMPT.encode()), temp=0), 8))
    last = next(token for token in whole if token not in whole[:4])
    monkeypatch.setattr(llm._model, "is_eog", lambda token: token == last)
    completion = llm(PROMPT, max_tokens=32, temperature=0)
    assert text(completion) == llm.detokenize(whole[: whole.index(last)]).decode()
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["usage"]["completion_tokens"] == whole.index(last)


def test_eos_is_an_end_of_generation_token(llm: Llama) -> None:
    assert llm._model.is_eog(llm.token_eos())
    assert not llm._model.is_eog(llm.tokenize(b"x", add_bos=False)[0])


def test_echo_puts_the_prompt_before_the_text(llm: Llama) -> None:
    expected = text(llm(PROMPT, max_tokens=8, temperature=0))
    assert text(llm(PROMPT, max_tokens=8, temperature=0, echo=True)) == PROMPT + expected
    tokens = llm.tokenize(PROMPT.encode())
    assert text(llm(tokens, max_tokens=8, temperature=0, echo=True)) == PROMPT + expected


@pytest.mark.parametrize("max_tokens", [None, 0, -1, 10_000])
def test_without_a_limit_the_context_is_filled(
    bf16: str, max_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Llama(bf16, n_threads=1, n_ctx=256) as llm:
        monkeypatch.setattr(llm._model, "is_eog", lambda _token: False)
        completion = llm(PROMPT, max_tokens=max_tokens, temperature=0)
        assert completion["usage"]["total_tokens"] == 256
        assert completion["choices"][0]["finish_reason"] == "length"


def test_a_prompt_that_fills_the_context_names_both_numbers(llm: Llama) -> None:
    with pytest.raises(ValueError, match=r"Requested tokens \(512\) exceed context window of 512"):
        llm([5] * 512)
    assert llm([5] * 511, max_tokens=9)["usage"]["completion_tokens"] == 1


def test_generate_raises_when_the_context_is_full(llm: Llama) -> None:
    with pytest.raises(ValueError, match=r"Requested tokens \(513\) exceed context window of 512"):
        list(llm.generate([5] * 510, temp=0))


def test_generate_can_continue_after_the_evaluated_tokens(llm: Llama) -> None:
    tokens = llm.tokenize(PROMPT.encode())
    expected = list(islice(llm.generate(tokens, temp=0), 8))
    llm.reset()
    llm.eval(tokens)
    assert list(islice(llm.generate([], temp=0, reset=False), 8)) == expected


def test_a_prompt_without_tokens_is_an_error(llm: Llama) -> None:
    with pytest.raises(ValueError, match="the prompt holds no tokens"):
        llm([])


def test_a_prompt_of_bytes_is_an_error(llm: Llama) -> None:
    with pytest.raises(TypeError, match="the prompt is bytes, expected str or token ids"):
        llm(PROMPT.encode())
