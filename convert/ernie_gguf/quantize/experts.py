"""The experts of a layer: the second moments of their inputs, their encoding, and what they then give to the layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import linear

from ..errors import EncodeError, ErnieGgufError
from .encoder import Encoded, Measured, Pipeline
from .model import Weights, expert_hidden
from .stats import MatrixStats

SAMPLE = 4096  # tokens that stand for the layer's average
# What the average weighs, in tokens, for an expert that saw few. On ernie-mini with 4096 tokens of text, a thousand per
# expert: KL divergence .183 with 32, .176 with 256, .172 with 1024, .175 with 4096.
LEAN_TOKENS = 1024
LEAN_BELOW = 16 * LEAN_TOKENS  # the others have a better picture of their own


class ActivationError(ErnieGgufError):
    """The forward pass gave NaN or infinity."""


@dataclass(frozen=True)
class LayerInput:
    """What the experts of a layer get: h float32 [T, hidden]; experts int64 and weights float32 [T, used].

    `device` is where the experts are encoded; the tensors are in the computer's memory.
    """

    h: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    device: str

    def sample(self) -> torch.Tensor:
        """Evenly spaced tokens of the layer, at most SAMPLE."""
        return self.h[:: -(-len(self.h) // SAMPLE)].to(self.device)

    def routed(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Its tokens int64 [n], in order, and its weight for each [n]."""
        tokens, place = (self.experts == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, place]


@dataclass(frozen=True)
class EncodedExpert:
    """One expert: ccq2 rows by projection, how good they are, its weighted result y [n, hidden] for `tokens` [n]."""

    expert: int
    data: dict[str, npt.NDArray[np.uint8]]
    stats: tuple[MatrixStats, ...]
    tokens: torch.Tensor
    y: torch.Tensor


def moments(x: torch.Tensor, share: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Second moments [K, K] of an expert's inputs x [n, K]; `share` [n] is its weight in the layer's sum.

    A token counts by its share: on ernie-mini the KL divergence is .1352 so, .1391 if all count alike, and .1371 with
    the shares' squares, although those are what an error is multiplied by in the layer's result.

    An expert that saw few tokens leans on its layer's average: its inputs for `sample`, routed to it or not, count as
    LEAN_TOKENS tokens more. So a dead expert has the average alone.
    """
    n = len(x)
    own = (x * share[:, None]).T @ x
    if n >= LEAN_BELOW:
        return own
    level = share.mean() if n else torch.ones((), device=x.device)
    return own + LEAN_TOKENS / len(sample) * level * (sample.T @ sample)


@dataclass(frozen=True)
class _Seen:
    """What an expert was given: tokens [n] of the layer, their shares [n], its inputs x [n, K]; and the sample's."""

    expert: int
    tokens: torch.Tensor
    share: torch.Tensor
    x: torch.Tensor
    sample: torch.Tensor


class ExpertEncoder:
    """Encodes the experts of one layer, some at a time."""

    def __init__(self, weights: Weights, layer: int, inputs: LayerInput, pipeline: Pipeline) -> None:
        self._weights = weights
        self._layer = layer
        self._inputs = inputs
        self._pipeline = pipeline

    def _load(self, projection: str, expert: int) -> torch.Tensor:
        name = f"blk.{self._layer}.ffn_{projection}_exps.weight"
        w = self._weights.expert(name, expert)
        if bool((finite := torch.isfinite(w)).all()):
            return w
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise EncodeError(
            row,
            column,
            f"{w[row, column]:g} does not fit ccq2, which holds finite values only",
            f"{name}, expert {expert}",
        )

    def _seen(self, expert: int) -> _Seen:
        inputs = self._inputs
        tokens, share = inputs.routed(expert)
        # Of an expert that does not lean, none: its hidden values would be computed for nothing.
        sample = inputs.sample() if len(tokens) < LEAN_BELOW else inputs.h[:0].to(inputs.device)
        return _Seen(expert, tokens, share.to(inputs.device), inputs.h[tokens].to(inputs.device), sample)

    def _encode(self, projections: Sequence[str], seen: Sequence[_Seen]) -> Encoded:
        """Matrices with the same inputs, one below the other, of several experts."""
        h = torch.stack([moments(each.x, each.share, each.sample) for each in seen])
        for each, finite in zip(seen, torch.isfinite(h).all(2).all(1).tolist(), strict=True):
            if not finite:
                raise ActivationError(
                    f"layer {self._layer}, expert {each.expert}: the inputs of {projections[0]}_proj are not finite "
                    "for the calibration text; the checkpoint's weights before it are damaged, or overflow float32"
                )
        w = [torch.cat([self._load(projection, each.expert) for projection in projections]) for each in seen]
        return self._pipeline.encode(torch.stack(w), h)

    def _stats(self, projection: str, seen: _Seen, k: int, measured: Measured) -> MatrixStats:
        return MatrixStats(
            self._layer,
            projection,
            seen.expert,
            weights=measured.rows * k,
            tokens=len(seen.tokens),
            error=measured.error,
            metric_error=measured.metric_error,
            plain_metric_error=measured.plain_metric_error,
            scales=measured.scales,
        )

    def encode(self, experts: Sequence[int]) -> list[EncodedExpert]:
        """gate and up, which share their inputs, then down on what the encoded gate and up give it."""
        outside = [self._seen(expert) for expert in experts]
        up_gate = self._encode(("gate", "up"), outside)
        _, rows, hidden = up_gate.value.shape
        width = rows // 2
        inside = []
        for seen, (gate, up) in zip(outside, up_gate.value.unflatten(1, (2, width)), strict=True):
            x, sample = (expert_hidden(each, gate, up) for each in (seen.x, seen.sample))
            inside.append(replace(seen, x=x, sample=sample))
        down = self._encode(("down",), inside)
        out = []
        for b, seen in enumerate(inside):
            data = {"gate": up_gate.data[b][:width], "up": up_gate.data[b][width:], "down": down.data[b]}
            stats = (
                self._stats("gate", seen, hidden, up_gate.measure(b, 0, width)),
                self._stats("up", seen, hidden, up_gate.measure(b, width, rows)),
                self._stats("down", seen, width, down.measure(b, 0, hidden)),
            )
            y = linear(seen.x, down.value[b]) * seen.share[:, None]
            out.append(EncodedExpert(seen.expert, data, stats, seen.tokens, y))
        return out
