"""Text through ernie-tiny in two bits, quantized in either order of K: right in its own order, garbage in the other."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from reference.specimens import CODE, TINY
from support.checkpoints import F32
from support.models import convert, logits_of
from support.trained import ORDERS, make_trained

pytestmark = [pytest.mark.build, pytest.mark.usefixtures("built_library")]

Convert = Callable[[str, str, str], Path]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """A GGUF by the checkpoint's order, the order it is read in, and the outtype. Layer 1 is int4, layer 2 two bits."""
    folder = tmp_path_factory.mktemp("k-order")

    def make(order: str, read_as: str, outtype: str) -> Path:
        source, out = folder / order, folder / f"{order}-{read_as}-{outtype}.gguf"
        if not source.exists():
            make_trained(source, TINY, order, int4_end=1)
        return out if out.exists() else convert(source, out, outtype, k_order=read_as).path

    return make


def tokens() -> list[int]:
    return list(sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model")).encode(CODE * 4))[:240]


def logits(path: Path) -> F32:
    return logits_of(path, [tokens()])[0]


def perplexity(path: Path) -> float:
    rows = logits(path).astype(np.float64)[:-1]
    rows -= rows.max(1, keepdims=True)
    log_probs = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    return float(np.exp(-log_probs[np.arange(len(rows)), tokens()[1:]].mean()))


@pytest.mark.parametrize("order", ORDERS)
def test_logits_are_those_of_the_same_weights_as_floats(converted: Convert, order: str) -> None:
    """The float file has its channels in their own order, so the two share no permutation."""
    kept, decoded = logits(converted(order, "auto", "auto")), logits(converted(order, "auto", "f32"))
    error = np.abs(kept - decoded).max(1) / decoded.std(1)
    assert np.median(error) < 0.2  # activations in 8 bits: measured 0.05
    assert np.mean(kept.argmax(1) == decoded.argmax(1)) > 0.9


def test_both_orders_say_what_the_float_model_says(converted: Convert, tiny_bf16_gguf: Path) -> None:
    trained = perplexity(tiny_bf16_gguf)
    for order in ORDERS:
        assert perplexity(converted(order, "auto", "auto")) < 1.25 * trained


@pytest.mark.parametrize("order", ORDERS)
def test_the_wrong_order_fails_visibly(converted: Convert, order: str) -> None:
    other = ORDERS[1 - ORDERS.index(order)]
    right, wrong = (perplexity(converted(order, read_as, "auto")) for read_as in (order, other))
    assert wrong > 1.5 * right
