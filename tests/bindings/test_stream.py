"""Streams and log probabilities of completions."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from ernie_llama import Llama

from .test_completion import PROMPT, text

pytestmark = pytest.mark.build


def joined(llm: Llama, **options: object) -> tuple[str, str | None]:
    """The text and the finish reason of a stream."""
    chunks = list(llm(PROMPT, stream=True, **options))  # type: ignore[call-overload]  # options of several types
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[:-1] == [None] * (len(chunks) - 1)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    return "".join(chunk["choices"][0]["text"] for chunk in chunks), reasons[-1]


@pytest.mark.parametrize("options", [{}, {"stop": ["e"]}, {"stop": "(self"}, {"echo": True}], ids=str)
def test_the_chunks_add_up_to_the_result(llm: Llama, options: dict[str, object]) -> None:
    whole = llm(PROMPT, max_tokens=24, seed=7, **options)  # type: ignore[call-overload]  # options of several types
    reason = whole["choices"][0]["finish_reason"]
    assert joined(llm, max_tokens=24, seed=7, **options) == (text(whole), reason)


def test_a_stream_starts_before_generation_ends(llm: Llama) -> None:
    stream = llm(PROMPT, max_tokens=200, stream=True)
    next(stream)
    assert llm.n_tokens < 20


def test_characters_split_over_tokens_come_complete(llm: Llama) -> None:
    emoji = llm.tokenize("🎉".encode(), add_bos=False)[-4:]
    assert [len(llm.detokenize([token])) for token in emoji] == [1, 1, 1, 1]

    def only(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        logits[:] = -np.inf
        logits[emoji[(len(ids) - n_prompt) % 4]] = 0
        return logits

    n_prompt = len(llm.tokenize(PROMPT.encode(), special=True))
    chunks = list(llm(PROMPT, max_tokens=10, temperature=0, logits_processor=[only], stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["🎉", "🎉", ""]  # half of a third is dropped


def test_after_ctrl_c_in_a_stream_the_model_still_works(llm: Llama) -> None:
    stream = llm(PROMPT, max_tokens=100, stream=True)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            signal.raise_signal(signal.SIGINT)
    assert llm(PROMPT, max_tokens=2)["usage"]["completion_tokens"] == 2


def test_logprobs_are_those_of_the_logits(llm: Llama) -> None:
    completion = llm(PROMPT, max_tokens=3, temperature=0, logprobs=2)
    logprobs = completion["choices"][0]["logprobs"]
    assert logprobs is not None
    assert "".join(logprobs["tokens"]) == text(completion)
    assert logprobs["text_offset"][0] == len(PROMPT)
    assert logprobs["text_offset"][1] == len(PROMPT) + len(logprobs["tokens"][0])
    llm.reset()
    llm.eval(llm.tokenize(PROMPT.encode(), special=True))
    logits = llm.logits.astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    first = logprobs["top_logprobs"][0]
    assert first is not None
    assert len(first) == 2
    assert sorted(first.values()) == pytest.approx(np.sort(expected)[-2:], abs=1e-4)
    assert logprobs["token_logprobs"][0] == pytest.approx(expected.max(), abs=1e-4)


def test_the_sampled_token_is_among_its_top_logprobs(llm: Llama) -> None:
    completion = llm(PROMPT, max_tokens=20, temperature=2.0, seed=5, logprobs=0)
    logprobs = completion["choices"][0]["logprobs"]
    assert logprobs is not None
    for token, logprob, likeliest in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert likeliest == {token: logprob}


def test_streamed_logprobs_add_up_to_the_result(llm: Llama) -> None:
    whole = llm(PROMPT, max_tokens=24, seed=7, logprobs=1)["choices"][0]["logprobs"]
    assert whole is not None
    parts = [chunk["choices"][0]["logprobs"] for chunk in llm(PROMPT, max_tokens=24, seed=7, logprobs=1, stream=True)]
    assert [token for part in parts if part for token in part["tokens"]] == whole["tokens"]
    assert [offset for part in parts if part for offset in part["text_offset"]] == whole["text_offset"]


def test_tokens_of_a_stop_string_have_no_logprobs(llm: Llama) -> None:
    completion = llm(PROMPT, max_tokens=24, temperature=0, logprobs=0, stop=["return"])
    logprobs = completion["choices"][0]["logprobs"]
    assert logprobs is not None
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert "".join(logprobs["tokens"]).rstrip() == text(completion).rstrip()
    assert "return" not in "".join(logprobs["tokens"])


def test_echoed_logprobs_need_all_logits(bf16: str, llm: Llama) -> None:
    with pytest.raises(ValueError, match=r"echo with logprobs needs the logits of the prompt: .*logits_all=True"):
        llm(PROMPT, echo=True, logprobs=1)
    with Llama(bf16, n_threads=1, logits_all=True) as all_llm:
        completion = all_llm(PROMPT, max_tokens=2, temperature=0, echo=True, logprobs=1)
        logprobs = completion["choices"][0]["logprobs"]
        assert logprobs is not None
        assert "".join(logprobs["tokens"]) == text(completion)
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert all(value is not None and value < 0 for value in logprobs["token_logprobs"][1:])
        offsets = [
            text(completion).index(token, offset)
            for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True)
        ]
        assert offsets == logprobs["text_offset"]


def test_logprobs_below_zero_are_refused(llm: Llama) -> None:
    with pytest.raises(ValueError, match="logprobs is -1, expected at least 0"):
        llm(PROMPT, logprobs=-1)
