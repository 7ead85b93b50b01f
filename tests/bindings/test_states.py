"""What is evaluated once need not be evaluated again: shared prefixes, saved states, caches of states."""

from __future__ import annotations

from pathlib import Path

import pytest
from ernie_llama import Llama, LlamaState
from ernie_llama.llama_cache import LlamaRAMCache
from ernie_llama.llama_types import ChatCompletionRequestMessage

from .test_completion import PROMPTS
from .test_options import LONG, greedy, n_decoded

pytestmark = pytest.mark.build


def test_the_start_of_a_chat_is_not_evaluated_again(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[ChatCompletionRequestMessage] = [{"role": "user", "content": LONG}]
    first = llm.create_chat_completion(messages, max_tokens=4, temperature=0)
    counts = n_decoded(llm, monkeypatch)
    messages += [
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "again"},
    ]
    second = llm.create_chat_completion(messages, max_tokens=1, temperature=0)
    assert counts[0] < 32 < second["usage"]["prompt_tokens"]


def test_the_same_prompt_again_is_a_fresh_start(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    first = greedy(llm, LONG)
    counts = n_decoded(llm, monkeypatch)
    assert greedy(llm, LONG) == first
    assert counts[0] == len(llm.tokenize(LONG.encode(), special=True))


def test_without_the_cache_every_prompt_is_a_fresh_start(bf16: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Llama(bf16, n_threads=1, cache_prompt=False) as llm:
        greedy(llm, LONG, 2)
        counts = n_decoded(llm, monkeypatch)
        greedy(llm, LONG + "x = 1", 1)
        assert counts[0] == len(llm.tokenize((LONG + "x = 1").encode(), special=True))


def test_a_kept_prefix_gives_the_text_of_a_fresh_start(bf16: str, llm: Llama) -> None:
    """Except for the last bits of the logits, which do not matter here."""
    prompts = [LONG + prompt for prompt in PROMPTS[:3]]
    kept = [greedy(llm, prompt, 16) for prompt in prompts]
    with Llama(bf16, n_threads=1, cache_prompt=False) as fresh:
        assert [greedy(fresh, prompt, 16) for prompt in prompts] == kept


def test_a_state_restores_the_evaluated_tokens(bf16: str, llm: Llama) -> None:
    expected = greedy(llm, LONG)
    llm.reset()
    llm.eval(llm.tokenize(LONG.encode(), special=True))
    state = llm.save_state()
    assert state.n_tokens == llm.n_tokens
    greedy(llm, "other text")
    llm.load_state(state)
    assert llm.eval_tokens == list(state.input_ids)
    with pytest.raises(RuntimeError, match="no logits before eval"):
        _ = llm.logits
    tokens = [token for token, _ in zip(llm.generate([], temp=0, reset=False), range(8), strict=False)]
    assert expected.startswith(llm.detokenize(tokens).decode())
    with Llama(bf16, n_threads=1) as other:
        other.load_state(state)
        assert other.n_tokens == state.n_tokens
        assert [next(other.generate([], temp=0, reset=False))] == tokens[:1]


def test_a_state_of_other_options_is_refused(bf16: str, llm: Llama) -> None:
    llm.eval([5] * 64)
    with (
        Llama(bf16, n_threads=1, type_k="q8_0") as other,
        pytest.raises(ValueError, match="the state does not belong to this model and these options"),
    ):
        other.load_state(llm.save_state())


def test_a_state_of_another_model_of_the_same_shapes_is_refused(llm: Llama, bf16: str, tmp_path: Path) -> None:
    data = bytearray(Path(bf16).read_bytes())
    data[-len(data) // 4 :] = bytes(byte ^ 1 for byte in data[-len(data) // 4 :])
    (tmp_path / "tuned.gguf").write_bytes(data)
    llm.eval([5, 6, 7])
    state = llm.save_state()
    with Llama(tmp_path / "tuned.gguf", n_threads=1) as other:
        with pytest.raises(ValueError, match="the state belongs to another model"):
            other.load_state(state)
        other.eval([5])  # it is as it was
    with Llama(bf16, n_threads=1) as same:
        same.load_state(state)
        assert same.eval_tokens == [5, 6, 7]


def test_a_cache_brings_back_prompts_that_take_turns(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [LONG + "a = ", "# other\n" + LONG]
    llm.set_cache(LlamaRAMCache())
    try:
        for prompt in prompts:
            llm(prompt, max_tokens=1, temperature=0)
        counts = n_decoded(llm, monkeypatch)
        llm(prompts[0] + "1\nb = ", max_tokens=1, temperature=0)
        assert counts[0] < 16
    finally:
        llm.set_cache(None)


def test_a_cache_drops_the_oldest_states() -> None:
    cache = LlamaRAMCache(capacity_bytes=25)
    for i in range(3):
        cache[[i, 1]] = LlamaState((i, 1), bytes(10), 0)
    assert [0, 1] not in cache
    assert cache[[2, 1, 5]].input_ids == (2, 1)
    with pytest.raises(KeyError, match="no cached state shares a prefix"):
        cache[[9]]
