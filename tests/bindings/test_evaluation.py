"""`Llama.score` and `score_many`, and lm-evaluation-harness on it, against log probabilities computed apart."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from ernie_llama import Llama
from ernie_llama._engine.scoring import Limits, Request, waves
from hypothesis import given
from hypothesis import strategies as st

from .test_options import LONG

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


def texts(llm: Llama) -> list[tuple[list[int], int]]:
    """Texts to score: with a common beginning, equal but for their end, inside each other, and long ones."""
    long = llm.tokenize(LONG.encode())
    endings = [[5], [6], [6, 7, 8], [9] * 20]
    return [
        *(([*long[:40], *ending], len(ending)) for ending in endings),
        *(([*long[:12], *ending], len(ending)) for ending in endings),
        (long, len(long) - 1),
        (long[:20], 19),
        (long[:20], 3),
        (long[30:], 1),
    ]


@pytest.mark.parametrize(("n_seq_max", "n_batch"), [(1, 512), (3, 512), (64, 512), (64, 16)])
def test_scores_of_many_texts_are_those_of_each_alone(
    bf16: str, keeps_all: Llama, n_seq_max: int, n_batch: int
) -> None:
    asked = texts(keeps_all)
    with Llama(bf16, n_threads=1, n_seq_max=n_seq_max, n_batch=n_batch) as llm:
        scores = list(llm.score_many(asked))
        assert sorted(i for i, _ in scores) == list(range(len(asked)))
        for i, found in scores:
            tokens, n = asked[i]
            expected = logprobs(keeps_all, tokens)[-n:]
            np.testing.assert_allclose([logprob for logprob, _ in found], expected, atol=0.2)
        again = dict(llm.score_many(asked))  # now with something in the cache
        for i, found in scores:
            np.testing.assert_allclose([each for each, _ in again[i]], [each for each, _ in found], atol=0.2)


def n_decoded(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that collects the number of tokens of every later batch that is scored."""
    counts: list[int] = []
    decode = llm._ctx.decode_tree

    def counting(tokens: np.ndarray, *arrays: np.ndarray) -> None:
        counts.append(len(tokens))
        decode(tokens, *arrays)

    monkeypatch.setattr(llm._ctx, "decode_tree", counting)
    return counts


def test_a_shared_context_is_evaluated_once(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    context = llm.tokenize(LONG.encode())
    counts = n_decoded(llm, monkeypatch)
    llm.score([*context, 5], 1)
    first = llm.score([*context, 6], 1)
    assert counts == [len(context), 1]
    llm.score([*context, 6, 7], 2)
    assert counts[2:] == [2]
    llm.reset()
    assert llm.score([*context, 6], 1)[0][0] == pytest.approx(first[0][0], abs=0.15)


def test_texts_are_batched_and_share_what_they_share(bf16: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Llama(bf16, n_threads=1, n_seq_max=8) as llm:
        context = llm.tokenize(LONG.encode())
        counts = n_decoded(llm, monkeypatch)
        list(llm.score_many([([*context, 5], 1), ([*context, 6], 1), ([*context, 7, 8], 2), ([*context, 9, 9, 9], 3)]))
        assert counts == [len(context) + 1 + 2]


def test_generation_continues_after_scores(bf16: str, llm: Llama) -> None:
    context = llm.tokenize(LONG.encode())
    llm.eval(context)
    expected = llm.logits
    with Llama(bf16, n_threads=1, n_seq_max=4) as other:
        list(other.score_many([([*context, 5], 1), ([0, 6, 7], 2)]))
        assert other.eval_tokens == context
        np.testing.assert_allclose(other.logits, expected, atol=0.3)
        assert other.sample(temp=0) == int(expected.argmax())
        assert other(LONG, max_tokens=8, temperature=0)["choices"][0]["text"]


def test_scores_of_the_logits_are_not_those_of_scored_texts(keeps_all: Llama) -> None:
    keeps_all.score([5, 6, 7], 2)
    assert keeps_all.scores.shape == (0, keeps_all.n_vocab())


def test_an_interrupted_score_leaves_nothing_behind(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    context = llm.tokenize(LONG.encode())
    expected = llm.score(context, 5)

    def fail(*_arrays: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm._ctx, "decode_tree", fail)
        with pytest.raises(KeyboardInterrupt):
            llm.score([*context[:40], 5], 1)
    assert llm.n_tokens == 0
    assert llm.score(context, 5) == expected


def test_the_number_of_sequences_is_checked(bf16: str) -> None:
    with pytest.raises(ValueError, match=r"n_seq_max is 0, expected at least 1"):
        Llama(bf16, n_seq_max=0)
    with pytest.raises(ValueError, match=r"no context of 512 tokens can be made: .*n_seq_max must be <= 256"):
        Llama(bf16, n_seq_max=257)


TOKENS = st.lists(st.integers(0, 2), min_size=2, max_size=12)


@given(
    asked=st.lists(st.tuples(TOKENS, st.integers(1, 11)), max_size=12),
    evaluated=TOKENS,
    sequences=st.integers(1, 4),
    tokens=st.integers(1, 30),
)
def test_waves_evaluate_every_text_in_order_and_within_the_limits(
    asked: list[tuple[list[int], int]], evaluated: list[int], sequences: int, tokens: int
) -> None:
    """Follow the KV cache through the waves: what each sequence holds when a token is evaluated and scored."""
    requests = [Request(i, text[:-1], text[-min(n, len(text) - 1) :]) for i, (text, n) in enumerate(asked)]
    limits = Limits(cells=20, sequences=sequences, tokens=tokens)
    scored: dict[int, list[tuple[list[int], int]]] = {}
    for wave in waves(requests, evaluated, limits):
        assert len(wave.kept) <= sequences
        assert wave.kept[0] + len(wave.tokens) <= limits.cells
        assert len(wave.tokens) <= tokens or len(wave.kept) == 1
        assert max(wave.kept) == wave.kept[0]
        cache = [evaluated[:n] for n in wave.kept]
        for i, token in enumerate(wave.tokens):
            for sequence in range(wave.first[i], wave.last[i] + 1):
                assert len(cache[sequence]) == wave.positions[i]
                cache[sequence].append(token)
            for _, index, target in (each for each in wave.targets if each[0] == i):
                scored.setdefault(index, []).append((list(cache[wave.first[i]]), target))
        assert cache[-1] == wave.path
        evaluated = wave.path
    for request in requests:
        text = [*request.inputs, request.targets[-1]]
        expected = [(text[:i], text[i]) for i in range(len(text) - len(request.targets), len(text))]
        assert scored[request.index] == expected


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


QUESTIONS = ["def main():\n    return", "import os\nfrom pathlib import", "class Node:\n    def __init__(self"]
ANSWERS = [[" 0", " None", " False"], [" Path", " os", " x"], ["):", ", x):", "x"]]


@pytest.fixture(scope="module")
def sums(keeps_all: Llama) -> list[list[float]]:
    """The log probability of each answer after its question."""

    def total(question: str, answer: str) -> float:
        context, whole = (keeps_all.tokenize(text.encode(), special=True) for text in (question, question + answer))
        return float(logprobs(keeps_all, whole)[len(context) - 1 :].sum())

    return [[total(question, each) for each in answers] for question, answers in zip(QUESTIONS, ANSWERS, strict=True)]


@pytest.fixture(scope="module")
def evaluated(bf16: str, sums: list[list[float]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm_eval says of three tasks about the same questions."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[eval]'")
    from ernie_llama.evaluation import ErnieLlamaLM
    from lm_eval.tasks import TaskManager

    with Llama(bf16, n_threads=1) as llm:
        texts = [llm(each, max_tokens=8, temperature=0, stop=["\n\n"])["choices"][0]["text"] for each in QUESTIONS]
    rows = [
        {"question": question, "choices": answers, "answer": int(np.argmax(scores)), "continuation": text}
        for question, answers, scores, text in zip(QUESTIONS, ANSWERS, sums, texts, strict=True)
    ]
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, task in (("choices", CHOICES), ("perplexity", PERPLEXITY), ("generation", GENERATION)):
        (folder / f"{name}.yaml").write_text(task.replace("DATA", str(folder / "data.jsonl")))
    results: dict[str, Any] = lm_eval.simple_evaluate(
        ErnieLlamaLM(bf16, n_ctx=512, n_threads=1),
        tasks=["choices", "perplexity", "generation"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return results


def test_lm_eval_chooses_by_the_log_probabilities_of_the_answers(
    evaluated: dict[str, Any], sums: list[list[float]]
) -> None:
    assert evaluated["results"]["choices"]["acc,none"] == 1
    found = [[float(response[0][0]) for response in each["resps"]] for each in evaluated["samples"]["choices"]]
    np.testing.assert_allclose(found, sums, atol=0.3)


def test_lm_eval_generates_the_text_of_a_completion(evaluated: dict[str, Any]) -> None:
    assert evaluated["results"]["generation"]["exact_match,none"] == 1


def test_the_perplexity_of_lm_eval_is_that_of_the_log_probabilities(
    evaluated: dict[str, Any], keeps_all: Llama
) -> None:
    texts = [
        [keeps_all.token_bos(), *keeps_all.tokenize(each.encode(), add_bos=False, special=True)] for each in QUESTIONS
    ]
    total = sum(float(logprobs(keeps_all, tokens).sum()) for tokens in texts)
    expected = np.exp(-total / sum(len(each.encode()) for each in QUESTIONS))
    assert evaluated["results"]["perplexity"]["byte_perplexity,none"] == pytest.approx(expected, rel=0.02)
