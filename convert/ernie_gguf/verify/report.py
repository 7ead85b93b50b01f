"""What `verify` prints: a table and three sentences for people, a dictionary for --json."""

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ..checkpoint.find_k_order import KOrderFinding
from ..checkpoint.k_order import KOrder
from ..gguf_file.reader import GgufFile
from ..tables import right, table, whole
from .chunk import orders_of
from .finding import Finding, Verdict


def _said(verdict: Verdict) -> str:
    """A verdict in words."""
    found = verdict.finding
    if found.problem:
        return f"MISMATCH: {found.problem}"
    if found.wrong:
        return f"MISMATCH: {found.wrong:,} values"
    if not found.explained:
        return "exact"
    if not verdict.exact:
        return "rounded" if (error := rms_error(found)) is None else f"quantized, relative error {error:.3g}"
    reasons = []
    if found.missed_rows:
        reasons.append(f"{found.missed_rows} rows without an integer code map")
    if found.rounded_rows:
        reasons.append(f"{found.rounded_rows} scales rounded to f16")
    return "exact but for " + " and ".join(reasons)


def rms_error(found: Finding) -> float | None:
    """|W - Ŵ| / |W| of a tensor in few bits; None of others."""
    return sqrt(found.square_error / found.square) if found.square > 0 else None


def _sum_of(verdicts: list[Verdict]) -> Finding:
    return sum((verdict.finding for verdict in verdicts), Finding())


@dataclass(frozen=True)
class KOrders:
    """The orders of K that were compared: of the checkpoint's 2-bit experts, and of the file's residual stream."""

    checkpoint: KOrder  # AUTO where the weights do not tell: then that of the file
    file: KOrder
    finding: KOrderFinding


def k_orders(file: GgufFile, finding: KOrderFinding | None, order: KOrder) -> KOrders | None:
    """What was compared; None without 2-bit experts."""
    if finding is None:
        return None
    return KOrders(order, KOrder.SHUFFLED if orders_of(file, order).file_shuffled else KOrder.NATURAL, finding)


def _orders_line(orders: KOrders) -> str:
    said = orders.checkpoint.value if orders.checkpoint is not KOrder.AUTO else "unclear, taken as the file's"
    line = f"order of K: the checkpoint's 2-bit experts {said}, the file's channels {orders.file.value}"
    return f"{line}; the weights say: {orders.finding}"


def verdicts_json(file: GgufFile, verdicts: list[Verdict], orders: KOrders | None = None) -> dict[str, Any]:
    """The result of `verify` for --json. An infinite difference is given as null."""

    def numbers(found: Finding) -> dict[str, Any]:
        values = {**asdict(found), "rms": rms_error(found)}
        del values["square"], values["square_error"]
        return {key: None if value == float("inf") else value for key, value in values.items()}

    return {
        "file": str(file.path),
        "ok": all(verdict.ok for verdict in verdicts),
        "total": numbers(_sum_of(verdicts)),
        **({"k_order": asdict(orders)} if orders else {}),
        "tensors": [
            {
                "name": verdict.name,
                "source": verdict.source,
                "type": verdict.type_name,
                "ok": verdict.ok,
                "verdict": _said(verdict),
                **numbers(verdict.finding),
            }
            for verdict in verdicts
        ],
    }


def _count(n: int) -> str:
    """A number in at most seven characters; up to a million it is exact."""
    if n < 10**6:
        return f"{n:,}"
    return f"{n / 10**6:.2f}M" if n < 10**9 else f"{n / 10**9:.2f}G"


def _word(verdict: Verdict) -> str:
    """A verdict in a word."""
    if not verdict.ok:
        return "MISMATCH"
    if verdict.exact:
        return "exact" + "*" * (verdict.finding.explained > 0)
    return "rounded" if (error := rms_error(verdict.finding)) is None else f"rms {error:.3f}"


def verdicts_table(file: GgufFile, verdicts: list[Verdict], orders: KOrders | None = None) -> list[RenderableType]:
    """The result of `verify` for people, 80 characters wide with the longest names of a text model."""
    tensors = table(whole("tensor"), "source", "type", *map(right, ("differ", "error", "relative")), "verdict")
    for verdict in verdicts:
        found = verdict.finding
        differ = found.explained + found.wrong
        numbers = (_count(differ), f"{found.largest:.1e}", f"{found.relative:.1e}") if differ else ("0", "", "")
        style = "" if verdict.ok else "red"
        tensors.add_row(
            Text(verdict.name), verdict.source.lower(), verdict.type_name, *numbers, _word(verdict), style=style
        )
    total, bad = _sum_of(verdicts), [verdict for verdict in verdicts if not verdict.ok]
    exact = sum(not verdict.finding.explained and verdict.ok for verdict in verdicts)
    other = (
        f"; it is probably of another checkpoint: {len(bad)} of {len(verdicts)} tensors differ"
        if (len(bad) > len(verdicts) // 2)
        else ""
    )
    missed = f"rows without an integer code map: {total.missed_rows:,}; scales that f16 rounds: {total.rounded_rows:,}"
    lines = [
        *(f"{verdict.name}: {_said(verdict)}" for verdict in bad),
        *([_orders_line(orders)] if orders else []),
        f"{len(verdicts)} tensors, {total.values:,} weights compared: {exact} tensors exact, "
        f"{len(verdicts) - exact - len(bad)} with differences that their type explains, {len(bad)} wrong",
        f"* {missed}" if total.missed_rows or total.rounded_rows else missed,
        f"{file.path}: {'does NOT hold what the checkpoint says' + other if bad else 'holds what the checkpoint says'}",
    ]
    return [tensors, "", *map(Text, lines)]
