"""The inner loops for llama.cpp's types in plain torch, on any device. Slow, and the truth for the others' tests."""

from dataclasses import dataclass

import torch

from ..ccq2.rows import GROUP
from ..stock.pack import SIGNS
from ..stock.types import EVEN, StockType
from .hessian import GroupHessian
from .stock_kernels import StockGroup

_AT_ONCE = 1 << 22  # scores of a search in memory


def divided(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """x / by; 0 where `by` is 0."""
    return torch.where(by == 0, 0, x / torch.where(by == 0, 1, by))


def _distance(x: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """x M xᵀ of x [B, dim, N] in the metrics [B, dim, dim]: [B, N]."""
    return ((metric @ x) * x).sum(1)


@dataclass(frozen=True)
class Step:
    """The step and minimum of a run with their integers, float32 of any one shape."""

    step: torch.Tensor
    minimum: torch.Tensor
    scale: torch.Tensor
    min: torch.Tensor


def snap_step(
    kind: StockType, ideal: torch.Tensor, d: torch.Tensor, delta: torch.Tensor | int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step nearest to an ideal one that the type can spell, moved by `delta` scales; and its scale."""
    rule = kind.rule
    if rule is None:
        return ideal, torch.ones_like(ideal)
    scale = ((divided(ideal, d) - rule.c) / rule.a).clamp(-1e6, 1e6).round() + delta
    scale = scale.clamp(rule.low, rule.high)
    return d * (rule.a * scale + rule.c), scale


def snap_minimum(kind: StockType, ideal: torch.Tensor, dmin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimum nearest to an ideal one, and its integer; 0 for types that have none."""
    if not kind.has_min:
        return torch.zeros_like(ideal), torch.zeros_like(ideal)
    integer = divided(ideal, dmin).clamp(0, kind.min_high).round()
    return dmin * integer, integer


def estimate(kind: StockType, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of runs x [..., sub, N]: the first guess of the step, and the mean of what has a minimum [..., N]."""
    mean = x.mean(-2) if kind.has_min else torch.zeros_like(x[..., 0, :])
    return kind.trials.guess * (x - mean[..., None, :]).square().mean(-2).sqrt(), mean


def middle(kind: StockType) -> float:
    """Half of the highest level: where the mean of a type with a minimum lies."""
    return kind.levels[-1] / 2


class StockSearch:
    """The search for codewords of one type."""

    def __init__(self, kind: StockType, device: torch.device) -> None:
        self.kind = kind
        self.words = torch.from_numpy(kind.codewords()).to(device)
        n = self.words.shape[1]
        self._i, self._j = torch.triu_indices(n, n)
        twice = torch.where(self._i == self._j, 1.0, 2.0).to(device)
        self._squares = self.words[:, self._i] * self.words[:, self._j] * twice  # [C, n(n+1)/2]

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Codewords of codes [B, n, N] -> [B, n, dim, N]."""
        index = (codes & (1 << SIGNS) - 1).long()
        if self.kind.pair:
            found = torch.cat([self.words[index & 255], self.words[index >> 8]], -1)
        else:
            found = self.words[index]
        if self.kind.signs:
            bits = torch.arange(SIGNS, SIGNS + self.kind.dim, device=codes.device)
            found = torch.where((codes[..., None] >> bits & 1) == 1, -found, found)
        return found.movedim(3, 2)

    def nearest(self, y: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of targets y [B, dim, N] in the metrics [B, dim, dim]: codes int32 [B, N] and codewords [B, dim, N]."""
        if self.kind.dim == 1:
            middles = (self.words[1:, 0] + self.words[:-1, 0]) / 2
            code = torch.bucketize(y[:, 0].contiguous(), middles)
            return code.int(), self.words[code, 0][:, None]
        rows = y.mT  # [B, N, dim]
        sign = torch.where(rows < 0, -1.0, 1.0)
        if self.kind.signs == EVEN:
            index, sign = self._even(rows, sign, metric)
        else:
            index, _ = self._entry(rows, sign, metric)
        bits = (1 << torch.arange(self.kind.dim, device=y.device)) * (sign < 0)
        code = (index | bits.sum(-1) << SIGNS).int()
        return code, self.values(code[:, None])[:, 0]

    def _even(self, y: torch.Tensor, sign: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries [B, N] and signs [B, N, 8] with an even number of minus signs."""
        odd = (sign.prod(-1) < 0)[..., None]
        flips = 1 - 2 * torch.eye(8, device=y.device)  # [8, 8]
        best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        for flip in flips:
            tried = torch.where(odd, sign * flip, sign)
            index, score = self._entry(y, tried, metric)
            if best is None:
                best = index, score, tried
                continue
            wins = score < best[1]
            best = (
                torch.where(wins, index, best[0]),
                torch.where(wins, score, best[1]),
                torch.where(wins[..., None], tried, best[2]),
            )
        assert best is not None  # noqa: S101 - there are eight flips
        return best[0], best[2]

    def _entry(self, y: torch.Tensor, sign: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """With given signs: entries [B, N] and their scores, (y - v) M (y - v)ᵀ less what all have in common."""
        line = sign * (y @ metric)
        if not self.kind.pair:
            return self._least(line, sign, metric)
        # One half, then the other for it, then the first again.
        first, second, cross = metric[:, :4, :4], metric[:, 4:, 4:], metric[:, :4, 4:]
        signs = sign[..., :4], sign[..., 4:]
        own = signs[1] * (y[..., 4:] @ second)
        high, _ = self._least(own, signs[1], second)
        v2 = signs[1] * self.words[high]
        low, _ = self._least(line[..., :4] - signs[0] * (v2 @ cross.mT), signs[0], first)
        v1 = signs[0] * self.words[low]
        high, score = self._least(line[..., 4:] - signs[1] * (v1 @ cross), signs[1], second)
        return low | high << 8, score + (v1 * (v1 @ first)).sum(-1) - 2 * (line[..., :4] * self.words[low]).sum(-1)

    def _least(self, line: torch.Tensor, sign: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries g with the least |g| M |g|ᵀ - 2 line·g [B, N], and that; M with the signs of the target."""
        square = sign[..., self._i] * sign[..., self._j] * metric[:, self._i, self._j][:, None]
        rows, terms = line.flatten(0, 1), square.flatten(0, 1)
        step = max(1, _AT_ONCE // len(self.words))
        scores, found = [], []
        for a in range(0, len(rows), step):
            score = terms[a : a + step] @ self._squares.T - 2 * (rows[a : a + step] @ self.words.T)
            least = score.min(1)
            scores.append(least.values)
            found.append(least.indices)
        return torch.cat(found).view(line.shape[:2]), torch.cat(scores).view(line.shape[:2])


class TorchStockKernels:
    """See StockKernels for what each method does."""

    def __init__(self) -> None:
        self._searches: dict[tuple[str, torch.device], StockSearch] = {}

    def _search(self, kind: StockType, device: torch.device) -> StockSearch:
        return self._searches.setdefault((kind.name, device), StockSearch(kind, device))

    def feedback_group(
        self, kind: StockType, rows: StockGroup, target: torch.Tensor, hessian: GroupHessian, cost: torch.Tensor
    ) -> None:
        """See StockKernels. All trials stand side by side: the rows stand there T times, [B, ..., T*N]."""
        search, fed = self._search(kind, target.device), target.clone()
        for run in range(GROUP // kind.sub):
            start, end = run * kind.sub, (run + 1) * kind.sub
            self._feed_run(kind, search, rows, fed[:, start:end], hessian, cost, run)
            if end < GROUP:
                fed[:, end:].baddbmm_(hessian.feedback[:, start:end, end:].mT, rows.e[:, start:end])

    def _feed_run(  # noqa: PLR0917 - one call
        self,
        kind: StockType,
        search: StockSearch,
        rows: StockGroup,
        target: torch.Tensor,
        hessian: GroupHessian,
        cost: torch.Tensor,
        run: int,
    ) -> None:
        (b, _, n), tries, dim = target.shape, len(kind.trials.each), kind.dim
        tried = self._trials(kind, rows, target)
        step, minimum = (x.flatten(1)[:, None] for x in (tried.step, tried.minimum))  # [B, 1, T*N]
        begin = run * kind.sub
        w = rows.w[:, begin : begin + kind.sub].repeat(1, 1, tries)
        fed = target.repeat(1, 1, tries)
        error, total = torch.empty_like(fed), torch.zeros_like(step[:, 0])
        codes = torch.empty(b, kind.sub // dim, tries * n, dtype=torch.int32, device=target.device)
        for q in range(kind.sub // dim):
            block, rest = slice(dim * q, dim * (q + 1)), slice(dim * (q + 1), kind.sub)
            at, after = (slice(begin + x.start, begin + x.stop) for x in (block, rest))
            root = hessian.block_root[:, begin // dim + q]
            y = divided(fed[:, block] + minimum, step)
            codes[:, q], found = search.nearest(y, root @ root.mT)
            value = step * found - minimum
            error[:, block] = w[:, block] - value
            total += (root.mT @ (fed[:, block] - value)).square().sum(1)
            if rest.start < rest.stop:
                fed[:, rest].baddbmm_(hessian.feedback[:, at, after].mT, error[:, block])
        best = total.unflatten(1, (tries, n)).argmin(1)  # [B, N]
        pick = best * n + torch.arange(n, device=best.device)
        cost += total.gather(1, pick)
        rows.e[:, begin : begin + kind.sub] = error.gather(2, pick[:, None].expand(-1, kind.sub, -1))
        words = slice(begin // dim, (begin + kind.sub) // dim)
        rows.codes[:, words] = codes.gather(2, pick[:, None].expand(-1, kind.sub // dim, -1))
        for place, values in (
            (rows.step, tried.step),
            (rows.minimum, tried.minimum),
            (rows.scales, tried.scale),
            (rows.mins, tried.min),
        ):
            place[:, run] = values.flatten(1).gather(1, pick)

    @staticmethod
    def _trials(kind: StockType, rows: StockGroup, target: torch.Tensor) -> Step:
        """What is tried for a run [B, sub, N]: [B, T, N]."""
        each = torch.tensor(kind.trials.each, device=target.device)  # [T, 3]
        factor, delta, shift = (each[:, i, None] for i in range(3))
        guess, mean = estimate(kind, target)
        step, scale = snap_step(kind, guess[:, None] * factor, rows.d[:, None], delta)
        if not kind.has_min:
            return Step(step, torch.zeros_like(step), scale, torch.zeros_like(step))
        minimum, integer = snap_minimum(kind, (middle(kind) + shift) * step - mean[:, None], rows.dmin[:, None])
        return Step(step, minimum, scale, integer)

    def descend_group(self, kind: StockType, rows: StockGroup, eh: torch.Tensor, hessian: GroupHessian) -> None:
        """See StockKernels."""
        search, h, p, e, dim = self._search(kind, eh.device), hessian.h, eh.clone(), rows.e, kind.dim
        for run in range(GROUP // kind.sub):
            columns = slice(run * kind.sub, (run + 1) * kind.sub)
            words = slice(columns.start // dim, columns.stop // dim)
            v = search.values(rows.codes[:, words]).flatten(1, 2)  # [B, sub, N]
            self._move_step(kind, rows, run, v, p, h)
            step, minimum = rows.step[:, run, None], rows.minimum[:, run, None]
            for q in range(words.start, words.stop):
                block = slice(dim * q, dim * (q + 1))
                others = p[:, block] - h[:, block, block].mT @ e[:, block]
                ideal = rows.w[:, block] + hessian.diag_inverse[:, q].mT @ others
                y, metric, before = (
                    divided(ideal + minimum, step),
                    h[:, block, block],
                    v[:, q * dim - columns.start :][:, :dim],
                )
                codes, found = search.nearest(y, metric)
                keep = _distance(y - before, metric) < _distance(
                    y - found, metric
                )  # signs may forbid what stands there
                codes = torch.where(keep, rows.codes[:, q], codes)
                found = torch.where(keep[:, None], before, found)
                moved = e[:, block] - (rows.w[:, block] - (step * found - minimum))
                rows.codes[:, q] = codes
                e[:, block] -= moved
                p.baddbmm_(h[:, block].mT, moved, alpha=-1)

    @staticmethod
    def _move_step(  # noqa: PLR0917 - one call
        kind: StockType, rows: StockGroup, run: int, v: torch.Tensor, p: torch.Tensor, h: torch.Tensor
    ) -> None:
        """Move a run's step, then its minimum, to the best that the type has for its codewords v [B, sub, N]."""
        columns = slice(run * kind.sub, (run + 1) * kind.sub)
        own, out = h[:, columns, columns], h[:, columns]
        old = rows.step[:, run].clone()
        bend = ((own.mT @ v) * v).sum(1)
        ideal = old + divided((p[:, columns] * v).sum(1), bend)
        rows.step[:, run], rows.scales[:, run] = snap_step(kind, ideal, rows.d)
        moved = (rows.step[:, run] - old)[:, None] * v
        if kind.has_min:
            before = rows.minimum[:, run].clone()
            shift = (p[:, columns] - own.mT @ moved).sum(1) / own.sum((1, 2))[:, None]
            rows.minimum[:, run], rows.mins[:, run] = snap_minimum(kind, before - shift, rows.dmin)
            moved = moved - (rows.minimum[:, run] - before)[:, None]
        rows.e[:, columns] -= moved
        p.baddbmm_(out.mT, moved, alpha=-1)
