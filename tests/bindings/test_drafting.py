"""Draft models: fewer evaluations, the same text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ernie_llama import Llama
from ernie_llama.llama_speculative import LlamaPromptLookupDecoding

from .test_completion import text
from .test_options import n_decoded

pytestmark = pytest.mark.build

REPEATED = "x = 1\ny = 2\nz = 3\n" * 4


@pytest.fixture(scope="module")
def drafting(bf16: str) -> Any:  # noqa: ANN401
    with Llama(bf16, n_threads=1, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=6), cache_prompt=False) as llm:
        yield llm


def test_a_draft_model_saves_evaluations_and_keeps_the_text(
    llm: Llama, drafting: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = n_decoded(drafting, monkeypatch)
    drafted = drafting(REPEATED, max_tokens=48, temperature=0, logprobs=1)
    plain = llm(REPEATED, max_tokens=48, temperature=0, logprobs=1)
    assert text(drafted) == text(plain)
    assert len(counts) < 40
    ours, theirs = (completion["choices"][0]["logprobs"] for completion in (drafted, plain))
    assert ours is not None
    assert theirs is not None
    both = np.array([ours["token_logprobs"], theirs["token_logprobs"]], float)
    np.testing.assert_allclose(both[0], both[1], atol=0.1)
    assert drafting.n_tokens <= len(drafting.tokenize(REPEATED.encode(), special=True)) + 48 + 6


def test_a_draft_model_keeps_seeds_grammars_and_stop_strings(llm: Llama, drafting: Llama) -> None:
    examples: list[dict[str, Any]] = [
        {"temperature": 0.5, "seed": 3},
        {"temperature": 0, "grammar": 'root ::= ("x = 1\\n" | "y = 2\\n")+'},
        {"temperature": 0, "stop": ["z"]},
        {"temperature": 0, "repeat_penalty": 1.3},
    ]
    for options in examples:
        assert text(drafting(REPEATED, max_tokens=24, **options)) == text(llm(REPEATED, max_tokens=24, **options))


def test_a_draft_stays_within_the_context(bf16: str) -> None:
    with Llama(bf16, n_threads=1, n_ctx=256, draft_model=LlamaPromptLookupDecoding()) as llm:
        completion = llm("x = 1\n" * 20, max_tokens=None, temperature=0, logit_bias={llm.token_eos(): -100.0})
        assert completion["usage"]["total_tokens"] == llm.n_ctx() or completion["choices"][0]["finish_reason"] == "stop"


def test_prompt_lookup_takes_what_followed_the_longest_earlier_match() -> None:
    draft = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=3)
    assert draft(np.array([1, 2, 3, 4, 5, 1, 2], np.intc)).tolist() == [3, 4, 5]
    assert draft(np.array([7, 2, 3, 4, 1, 2], np.intc)).tolist() == [3, 4, 1]
    assert draft(np.array([1, 2, 3], np.intc)).tolist() == []
