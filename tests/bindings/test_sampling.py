"""Sampling options: the text is llama.cpp's own, and each option has its effect."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from ernie_llama import (
    Llama,
    LlamaGrammar,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    StoppingCriteriaList,
)
from ernie_llama._engine.sampling import Sampling

from .test_completion import PROMPT, PROMPTS, continued, text

pytestmark = pytest.mark.build

GRAMMAR = 'root ::= "yes" | "no, " [a-z]{3,8} "."'


@pytest.mark.parametrize(
    "options",
    [
        {"repeat_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
        {"typical_p": 0.5},
        {"mirostat": 1, "mirostat_tau": 3.0},
        {"mirostat": 2, "mirostat_eta": 0.3},
        {"grammar": GRAMMAR},
    ],
    ids=lambda options: next(iter(options)),
)
def test_text_is_that_of_continued(llm: Llama, llama_bin: Path, bf16: str, options: dict[str, float | str]) -> None:
    names = {"mirostat": "mirostat_mode", "typical_p": "typical_p"}
    flags = {"typical_p": "--typical", "mirostat_tau": "--mirostat-ent", "mirostat_eta": "--mirostat-lr"}
    ours = {names.get(name, name): value for name, value in options.items()}
    if "grammar" in ours:
        ours["grammar"] = LlamaGrammar.from_string(GRAMMAR)  # type: ignore[assignment]  # options of several types
    theirs = [
        part for name, value in options.items() for part in (flags.get(name, "--" + name.replace("_", "-")), str(value))
    ]
    for prompt in PROMPTS[:2]:
        mine = text(llm(prompt, max_tokens=48, seed=42, **ours))  # type: ignore[call-overload]  # the same
        written = continued(llama_bin, Path(bf16), prompt, "--seed", "42", *theirs)
        assert written.removesuffix(" [end of text]\n") == mine


def test_a_grammar_holds_at_any_temperature(llm: Llama) -> None:
    grammar = LlamaGrammar.from_string(GRAMMAR)
    for seed in range(4):
        completion = llm(PROMPT, max_tokens=64, temperature=1.5, seed=seed, grammar=grammar)
        answer = text(completion)
        assert answer == "yes" or (answer.startswith("no, ") and answer.endswith(".") and 8 <= len(answer) <= 13)
        assert completion["choices"][0]["finish_reason"] == "stop"


def test_an_invalid_grammar_is_refused(llm: Llama) -> None:
    with pytest.raises(ValueError, match=r"llama.cpp cannot read the grammar, which begins 'root ::= \('"):
        llm(PROMPT, grammar=LlamaGrammar("root ::= ("))
    assert text(llm(PROMPT, max_tokens=2))


def test_a_schema_makes_the_answer_json(llm: Llama) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "n": {"type": "integer"}},
        "required": ["name", "n"],
    }
    for seed in range(3):
        answer = json.loads(text(llm(PROMPT, max_tokens=200, seed=seed, grammar=LlamaGrammar.from_json_schema(schema))))
        assert set(answer) == {"name", "n"}
        assert isinstance(answer["n"], int)


def test_logit_bias_forbids_and_forces(llm: Llama) -> None:
    llm.eval(llm.tokenize(PROMPT.encode()))
    usual = llm.sample(temp=0)
    assert llm.sample(temp=0, logit_bias={usual: -math.inf}) != usual
    assert llm.sample(temp=0.8, logit_bias={77: 1000.0}) == 77
    assert llm.sample(temp=0.8, logit_bias={"77": 1000.0}) == 77
    with pytest.raises(ValueError, match="logit_bias names token 4096, which is not in the vocabulary of 4096 tokens"):
        llm.sample(logit_bias={4096: 1.0})


def test_penalties_see_the_prompt(llm: Llama) -> None:
    tokens = [5, 6, 7] * 5
    assert next(llm.generate(tokens, temp=0, logit_bias={5: 30.0})) == 5
    assert next(llm.generate(tokens, temp=0, logit_bias={5: 30.0}, presence_penalty=50.0)) != 5


def test_with_no_tokens_to_look_back_there_is_no_penalty(bf16: str) -> None:
    with Llama(bf16, n_threads=1, last_n_tokens_size=0) as llm:
        plain = text(llm(PROMPT, max_tokens=24, temperature=0))
        assert text(llm(PROMPT, max_tokens=24, temperature=0, repeat_penalty=2.0)) == plain


def test_logits_processors_run_in_order_on_the_evaluated_tokens(llm: Llama) -> None:
    seen: list[list[int]] = []

    def forbid_all_but(ids: npt.NDArray[np.intc], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        seen.append(ids.tolist())
        only = np.full_like(logits, -np.inf)
        only[[9, 10]] = [1.0, 2.0]
        return only

    def prefer(_ids: npt.NDArray[np.intc], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits[9] += 5
        return logits

    tokens = llm.generate([5, 6], temp=0, logits_processor=[forbid_all_but, prefer])
    assert [next(tokens), next(tokens)] == [9, 9]
    assert seen == [[5, 6], [5, 6, 9]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeat_penalty": 0.0}, "repeat_penalty is 0.0, expected a number from 1e-06 to 1e\\+06"),
        ({"presence_penalty": math.nan}, "presence_penalty is nan, expected a number from"),
        ({"mirostat_mode": 3}, r"mirostat_mode is 3, expected 0 \(off\), 1 or 2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]  # options of several types


def test_an_unknown_option_is_a_type_error(llm: Llama) -> None:
    with pytest.raises(TypeError, match="has no option 'dry_base'"):
        llm(PROMPT, dry_base=0.9)  # type: ignore[call-overload]  # the mistake


def test_stopping_criteria_end_generation(llm: Llama) -> None:
    n_prompt = len(llm.tokenize(PROMPT.encode(), special=True))
    seen: list[int] = []

    def third(input_ids: npt.NDArray[np.intc], scores: npt.NDArray[np.float32]) -> bool:
        assert scores.shape == (llm.n_vocab(),)
        seen.append(len(input_ids) - n_prompt)
        return len(input_ids) - n_prompt >= 3

    full = text(llm(PROMPT, max_tokens=8, temperature=0))
    completion = llm(PROMPT, max_tokens=8, temperature=0, stopping_criteria=StoppingCriteriaList([third]))
    assert completion["usage"]["completion_tokens"] == 3
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert full.startswith(text(completion))
    assert seen == [0, 1, 2, 3]


def test_lists_of_processors_and_a_minimum_of_tokens(llm: Llama) -> None:
    eos = llm.token_eos()

    def only_eos(_input_ids: npt.NDArray[np.intc], scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        scores[eos] = scores.max() + 1
        return scores

    processors = LogitsProcessorList([only_eos, MinTokensLogitsProcessor(3, eos)])
    assert llm(PROMPT, max_tokens=8, temperature=0, logits_processor=processors)["usage"]["completion_tokens"] == 3
    assert llm(PROMPT, max_tokens=8, temperature=0, logits_processor=only_eos)["usage"]["completion_tokens"] == 0
