"""Scores the last tokens of many texts: what texts share is evaluated once, several texts in one batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from . import checks
from .context import Context
from .engine import Engine
from .sequence import longest_token_prefix

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Score = tuple[float, bool]  # log probability, whether no token is likelier
CACHED = 1 << 16  # logits that are computed with at once


@dataclass(frozen=True)
class Request:
    """A text to score.

    Attributes:
        index: names the request in results.
        inputs: all tokens but the last, which nothing follows.
        targets: the tokens to score, the text's last ones.
    """

    index: int
    inputs: list[int]
    targets: list[int]

    @classmethod
    def checked(cls, engine: Engine, index: int, tokens: Sequence[int], n_scored: int) -> Request:
        """The request to score the last `n_scored` of `tokens`; ValueError if that is not possible."""
        n_ctx = engine.context.n_ctx
        if not 1 <= checks.integer("n_scored", n_scored) < len(tokens):
            raise ValueError(f"n_scored is {n_scored}, expected 1 to {len(tokens) - 1}: one token less than there are")
        if len(tokens) - 1 > n_ctx:
            raise ValueError(f"Requested tokens ({len(tokens) - 1}) exceed context window of {n_ctx}")
        return cls(index, list(tokens[:-1]), list(tokens[-n_scored:]))

    @property
    def first(self) -> int:
        """The first position whose logits are needed: they predict the first target."""
        return len(self.inputs) - len(self.targets)


@dataclass(frozen=True)
class Limits:
    """What a context holds: `cells` of its KV cache, `sequences`; a wave evaluates at most `tokens`, or one text.

    One batch of tokens is best: attention looks at the cells of all texts in the wave (two batches: 5 % to 20 % slower
    with ernie-tiny on Zen 5).
    """

    cells: int
    sequences: int
    tokens: int


@dataclass
class Wave:
    """Texts that are in the KV cache together, as a tree of tokens in depth-first order.

    A leaf is a sequence. A token belongs to the sequences `first` to `last` of the leaves below it. Texts that end
    inside another text have no leaf of their own.

    Attributes:
        kept: how many tokens each sequence has from the text evaluated last, which is in the cache as sequence 0.
        tokens: what is evaluated, with `positions`, `first` and `last` of each.
        targets: (index into tokens, index of the request, token to score), in order for each request.
        path: the inputs of the last sequence.
    """

    kept: list[int]
    path: list[int]
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)
    _nodes: list[int] = field(default_factory=list)  # of the path: indices into tokens; kept tokens have none

    @classmethod
    def of(cls, request: Request, evaluated: Sequence[int]) -> Wave:
        """A wave that begins with `request`, after `evaluated`."""
        kept = min(longest_token_prefix(evaluated, request.inputs), request.first)
        wave = cls([kept], request.inputs[:kept])
        wave.add(request)
        return wave

    def takes(self, request: Request, limits: Limits) -> bool:
        """Whether `request`, which sorts behind those in the wave, fits in."""
        shared = longest_token_prefix(self.path, request.inputs)
        n = len(self.tokens) + len(request.inputs) - shared
        return (
            min(shared, self.kept[-1]) <= request.first  # the logits of kept tokens are gone
            and len(self.kept) + (shared < len(self.path)) <= limits.sequences
            and self.kept[0] + n <= limits.cells
            and n <= limits.tokens
        )

    def add(self, request: Request) -> None:
        """Add a request that the wave takes."""
        shared = longest_token_prefix(self.path, request.inputs)
        if shared < len(self.path):
            del self._nodes[max(shared - self.kept[-1], 0) :]
            self.kept.append(min(shared, self.kept[-1]))
        sequence = len(self.kept) - 1
        for node in self._nodes:
            self.last[node] = sequence
        begin, n = len(self.tokens), len(request.inputs) - shared
        self._nodes += range(begin, begin + n)
        self.tokens += request.inputs[shared:]
        self.positions += range(shared, shared + n)
        self.first += [sequence] * n
        self.last += [sequence] * n
        self.path = request.inputs
        outputs = self._nodes[len(self._nodes) - len(request.targets) :]
        self.targets += zip(outputs, [request.index] * len(outputs), request.targets, strict=True)


def score(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, list[Score]]]:
    """The scores of each request's targets by its index, as they are done; acquires the lock when first asked."""
    limits = Limits(engine.context.n_ctx, engine.context.n_seq_max, engine.context.n_batch)
    lease = engine.lock.acquire()
    try:
        for wave in waves(requests, engine.sequence.ids, limits):
            with lease:
                scores = _score_wave(engine, wave)
            yield from scores.items()
    finally:
        lease.release()


def _score_wave(engine: Engine, wave: Wave) -> dict[int, list[Score]]:
    """The scores of a wave; needs a lease."""
    scores: dict[int, list[Score]] = {}
    sequence = engine.sequence
    sequence.keep(wave.kept[0])
    try:
        for index, each in evaluate(engine.context, wave):
            scores.setdefault(index, []).append(each)
    except BaseException:
        sequence.keep(0)  # any part of the wave may have been evaluated
        raise
    sequence.replaced(wave.path)
    if sequence.scores is not None:
        sequence.keep(0)  # there are no rows for these tokens
    return scores


def waves(requests: Iterable[Request], evaluated: Sequence[int], limits: Limits) -> Iterator[Wave]:
    """Arrange requests so that those with a common beginning follow each other."""
    wave = None
    for request in sorted(requests, key=lambda each: each.inputs):
        if wave is not None and wave.takes(request, limits):
            wave.add(request)
            continue
        if wave is not None:
            yield wave
            evaluated = wave.path
        wave = Wave.of(request, evaluated)
    if wave is not None:
        yield wave


def evaluate(context: Context, wave: Wave) -> Iterator[tuple[int, Score]]:
    """The score of each target of a wave, with the index of its request; sequence 0 of the context is left at `path`.

    The context holds `wave.kept[0]` tokens in sequence 0, and nothing else.
    """
    import numpy as np  # see Context.logits

    for sequence, n in enumerate(wave.kept):
        if sequence and n:
            context.copy_sequence(sequence, n)
    targets = np.array(sorted(wave.targets), np.intp)  # [n_targets, 3]
    outputs = np.zeros(len(wave.tokens), np.int8)
    outputs[targets[:, 0]] = 1
    tokens, positions, first, last = (
        np.array(each, np.int32) for each in (wave.tokens, wave.positions, wave.first, wave.last)
    )
    for begin in range(0, len(wave.tokens), context.n_batch):
        part = slice(begin, begin + context.n_batch)
        context.decode_tree(tokens[part], positions[part], first[part], last[part], outputs[part])
        low, high = np.searchsorted(targets[:, 0], (part.start, part.stop))
        nodes, requests, scored = targets[low:high].T
        rows = np.cumsum(outputs[part])[nodes - begin] - 1
        if len(rows):
            logprobs, greedy = log_probabilities(context.logits(int(rows[-1]) + 1), rows, scored)
            yield from zip(requests.tolist(), zip(logprobs.tolist(), greedy.tolist(), strict=True), strict=True)
    context.keep_sequence(len(wave.kept) - 1)


def log_probabilities(
    logits: npt.NDArray[np.float32], rows: npt.NDArray[np.intp], tokens: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Log probabilities of `tokens`, [n], in `rows` of `logits`, [.., n_vocab], and whether no token is likelier."""
    import numpy as np  # see Context.logits

    best = logits.max(axis=1)
    sums = np.empty_like(best)
    # A buffer that stays in the cache: 1.3 times as fast as one row at a time on Zen 5.
    n = max(1, CACHED // logits.shape[1])
    buffer = np.empty((n, logits.shape[1]), np.float32)
    for begin in range(0, len(logits), n):
        part = slice(begin, begin + n)
        shifted = np.subtract(logits[part], best[part, None], out=buffer[: len(best[part])])
        np.exp(shifted, out=shifted).sum(axis=1, out=sums[part])
    chosen = logits[rows, tokens]
    return chosen - best[rows] - np.log(sums[rows]), chosen == best[rows]
