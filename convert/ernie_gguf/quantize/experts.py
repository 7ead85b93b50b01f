"""The experts of a layer: the Hessians of their inputs, their encoding, and their output once encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from ..arrays import U8
from ..errors import ActivationError, EncodeError
from .encoder import Encoded, Measured
from .encoders import Encoder
from .model import Weights, expert_hidden
from .stats import MatrixStats

SAMPLE = 4096  # tokens that stand for the layer's average
# The weight of the layer's average, in tokens, for an expert that saw few. On ernie-mini with 4096 tokens of text, a
# thousand per expert: KL divergence .183 with 32, .176 with 256, .172 with 1024, .175 with 4096.
PRIOR_TOKENS = 1024
ENOUGH_TOKENS = 16 * PRIOR_TOKENS  # from here on an expert's own inputs say more than the average


@dataclass(frozen=True)
class LayerInput:
    """The inputs of a layer's experts: h float32 [T, hidden]; experts int64 and weights float32 [T, used].

    `device` is where the experts are encoded. The tensors may be elsewhere.
    """

    h: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    device: str

    def sample(self) -> torch.Tensor:
        """Evenly spaced tokens of the layer, at most SAMPLE."""
        return self.h[:: -(-len(self.h) // SAMPLE)].to(self.device)

    def routed(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens int64 [n] that an expert gets, in order, and its weight for each [n]."""
        tokens, place = (self.experts == expert).nonzero(as_tuple=True)
        return tokens, self.weights[tokens, place]


@dataclass(frozen=True)
class EncodedExpert:
    """One expert: rows of bytes by projection, their errors, and its weighted output y [n, hidden] for `tokens` [n]."""

    expert: int
    data: dict[str, U8]
    stats: tuple[MatrixStats, ...]
    tokens: torch.Tensor
    y: torch.Tensor


def hessian(x: torch.Tensor, share: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """The Hessian [K, K] of an expert's inputs x [n, K]: the sum of x xᵀ. `share` [n] is its weight in the layer's sum.

    A token counts by its share: on ernie-mini the KL divergence is .1352 so, .1391 if all count alike, and .1371 with
    the squares of the shares, although an error reaches the layer's output times the share.

    An expert that saw few tokens blends with the layer's average: its inputs for `sample`, whether routed to it or not,
    count as PRIOR_TOKENS more tokens. An expert that saw none has the average alone.
    """
    n = len(x)
    own = (x * share[:, None]).T @ x
    if n >= ENOUGH_TOKENS:
        return own
    level = share.mean() if n else torch.ones((), device=x.device)
    return own + PRIOR_TOKENS / len(sample) * level * (sample.T @ sample)


@dataclass(frozen=True)
class _ExpertInput:
    """One expert's input: tokens [n] of the layer, their shares [n], x [n, K]; and the sample's x [m, K]."""

    expert: int
    tokens: torch.Tensor
    share: torch.Tensor
    x: torch.Tensor
    sample: torch.Tensor


@dataclass(frozen=True)
class _Encoding:
    """One projection of several experts: rows `start` … `end` of `encoded`."""

    encoded: Encoded
    start: int
    end: int

    def data(self, b: int) -> U8:
        return self.encoded.data[b][self.start : self.end]

    def value(self, b: int) -> torch.Tensor:
        return self.encoded.value[b, self.start : self.end]

    def measure(self, b: int) -> Measured:
        return self.encoded.measure(b, self.start, self.end)


class ExpertEncoder:
    """Encodes the experts of one layer, a few at a time; `encoders` are those of its projections."""

    def __init__(self, weights: Weights, layer: int, inputs: LayerInput, encoders: Mapping[str, Encoder]) -> None:
        self._weights = weights
        self._layer = layer
        self._inputs = inputs
        self._encoders = encoders

    def _load(self, projection: str, expert: int) -> torch.Tensor:
        name = f"blk.{self._layer}.ffn_{projection}_exps.weight"
        w = self._weights.expert(name, expert)
        if bool((finite := torch.isfinite(w)).all()):
            return w
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise EncodeError(
            row,
            column,
            f"{w[row, column]:g} does not fit {self._encoders[projection].name}, which holds finite values only",
            f"{name}, expert {expert}",
        )

    def _input(self, expert: int) -> _ExpertInput:
        inputs = self._inputs
        tokens, share = inputs.routed(expert)
        # An expert that does not blend needs no sample, nor its hidden values.
        sample = inputs.sample() if len(tokens) < ENOUGH_TOKENS else inputs.h[:0].to(inputs.device)
        return _ExpertInput(expert, tokens, share.to(inputs.device), inputs.h[tokens].to(inputs.device), sample)

    def _encode(self, projections: Sequence[str], inputs: Sequence[_ExpertInput]) -> dict[str, _Encoding]:
        """Encode several experts' matrices; an expert's projections share their inputs, and are stacked in one type."""
        h = torch.stack([hessian(each.x, each.share, each.sample) for each in inputs])
        for each, finite in zip(inputs, torch.isfinite(h).all(2).all(1).tolist(), strict=True):
            if not finite:
                raise ActivationError(
                    f"layer {self._layer}, expert {each.expert}: the inputs of {projections[0]}_proj are not finite "
                    "for the calibration text; the checkpoint's weights before it are damaged, or overflow float32"
                )
        out: dict[str, _Encoding] = {}
        for name in dict.fromkeys(self._encoders[projection].name for projection in projections):
            together = [projection for projection in projections if self._encoders[projection].name == name]
            w = [torch.cat([self._load(projection, each.expert) for projection in together]) for each in inputs]
            encoded, rows = self._encoders[together[0]].encode(torch.stack(w), h), len(w[0]) // len(together)
            out |= {p: _Encoding(encoded, i * rows, (i + 1) * rows) for i, p in enumerate(together)}
        return out

    def _stats(self, projection: str, given: _ExpertInput, k: int, measured: Measured) -> MatrixStats:
        return MatrixStats(
            self._layer,
            projection,
            given.expert,
            weights=measured.rows * k,
            tokens=len(given.tokens),
            error=measured.error,
            metric_error=measured.metric_error,
            plain_metric_error=measured.plain_metric_error,
            scales=measured.scales,
        )

    def encode(self, experts: Sequence[int]) -> list[EncodedExpert]:
        """Encode gate and up, which share their inputs; then down, for what the encoded gate and up give it."""
        inputs = [self._input(expert) for expert in experts]
        made = self._encode(("gate", "up"), inputs)
        down_inputs = []
        for b, given in enumerate(inputs):
            gate, up = made["gate"].value(b), made["up"].value(b)
            x, sample = (expert_hidden(each, gate, up) for each in (given.x, given.sample))
            down_inputs.append(replace(given, x=x, sample=sample))
        made |= self._encode(("down",), down_inputs)
        columns = {p: self._inputs.h.shape[1] if p != "down" else down_inputs[0].x.shape[1] for p in made}
        out = []
        for b, given in enumerate(down_inputs):
            data = {projection: each.data(b) for projection, each in made.items()}
            stats = tuple(self._stats(p, given, columns[p], each.measure(b)) for p, each in made.items())
            y = linear(given.x, made["down"].value(b)) * given.share[:, None]
            out.append(EncodedExpert(given.expert, data, stats, given.tokens, y))
        return out
