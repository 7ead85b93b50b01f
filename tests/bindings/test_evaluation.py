"""`Llama.score`, and lm-evaluation-harness on it, against log probabilities computed apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ernie_llama import Llama

from .test_options import LONG, n_decoded

pytestmark = pytest.mark.build


@pytest.fixture(scope="module")
def keeps_all(bf16: str) -> Llama:
    return Llama(bf16, n_threads=1, n_ctx=512, logits_all=True)


def logprobs(llm: Llama, tokens: list[int]) -> np.ndarray:
    """The log probability of each token but the first, from the logits of all."""
    llm.reset()
    llm.eval(tokens[:-1])
    logits = llm.scores.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    result: np.ndarray = logits[np.arange(len(tokens) - 1), tokens[1:]]
    return result


@pytest.mark.parametrize("n_batch", [512, 16])
@pytest.mark.parametrize("n_scored", [1, 7, 40])
def test_scores_are_the_log_probabilities(bf16: str, keeps_all: Llama, n_batch: int, n_scored: int) -> None:
    tokens = keeps_all.tokenize(LONG.encode())
    expected = logprobs(keeps_all, tokens)[-n_scored:]
    with Llama(bf16, n_threads=1, n_batch=n_batch) as llm:
        scores = llm.score(tokens, n_scored)
        np.testing.assert_allclose([logprob for logprob, _ in scores], expected, atol=0.15)
        greedy = keeps_all.scores.argmax(axis=1)[-n_scored:] == tokens[-n_scored:]
        assert np.mean([each for _, each in scores] == greedy) > 0.9
        assert llm.score(tokens, len(tokens) - 1)[-1][0] == pytest.approx(expected[-1], abs=0.15)


def test_a_shared_context_is_evaluated_once(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    context = llm.tokenize(LONG.encode())
    llm.score([*context, 5], 1)
    counts = n_decoded(llm, monkeypatch)
    first = llm.score([*context, 6], 1)
    assert counts == []
    llm.score([*context, 6, 7], 2)
    assert sum(counts) == 2
    llm.reset()
    assert llm.score([*context, 6], 1)[0][0] == pytest.approx(first[0][0], abs=0.01)


def test_what_cannot_be_scored_is_refused(llm: Llama) -> None:
    with pytest.raises(ValueError, match="n_scored is 2, expected 1 to 1: one token less than there are"):
        llm.score([5, 6], 2)
    with pytest.raises(ValueError, match="exceed context window of 512"):
        llm.score([5] * 514, 1)


CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
PERPLEXITY = """
task: perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
"""
GENERATION = """
task: generation
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{continuation}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


def test_tasks_of_lm_eval_agree_with_sums_computed_apart(bf16: str, keeps_all: Llama, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[eval]'")
    from ernie_llama.evaluation import ErnieLlamaLM
    from lm_eval.tasks import TaskManager

    questions = ["def main():\n    return", "import os\nfrom pathlib import", "class Node:\n    def __init__(self"]
    choices = [[" 0", " None", " False"], [" Path", " os", " x"], ["):", ", x):", "x"]]

    def total(question: str, choice: str) -> float:
        context, whole = (keeps_all.tokenize(text.encode(), special=True) for text in (question, question + choice))
        return float(logprobs(keeps_all, whole)[len(context) - 1 :].sum())

    sums = [[total(question, choice) for choice in each] for question, each in zip(questions, choices, strict=True)]
    with Llama(bf16, n_threads=1) as llm:
        texts = [llm(each, max_tokens=8, temperature=0, stop=["\n\n"])["choices"][0]["text"] for each in questions]
    rows = [
        {"question": question, "choices": each, "answer": int(np.argmax(scores)), "continuation": text}
        for question, each, scores, text in zip(questions, choices, sums, texts, strict=True)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, task in (("choices", CHOICES), ("perplexity", PERPLEXITY), ("generation", GENERATION)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        ErnieLlamaLM(bf16, n_ctx=512, n_threads=1),
        tasks=["choices", "perplexity", "generation"],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results["results"]["choices"]["acc,none"] == 1
    assert results["results"]["generation"]["exact_match,none"] == 1
    for sample, expected in zip(results["samples"]["choices"], sums, strict=True):
        found = [float(response[0][0]) for response in sample["resps"]]
        np.testing.assert_allclose(found, expected, atol=0.3)
    bits = 0.0
    for question in questions:
        tokens = keeps_all.tokenize(question.encode(), add_bos=False, special=True)
        bits += float(logprobs(keeps_all, [keeps_all.token_bos(), *tokens]).sum())
    expected_perplexity = np.exp(-bits / sum(len(question.encode()) for question in questions))
    assert results["results"]["perplexity"]["byte_perplexity,none"] == pytest.approx(expected_perplexity, rel=0.02)
