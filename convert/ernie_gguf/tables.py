"""Tables for people and JSON for programs, on any terminal and in any pipe."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table

from .units import human

_NARROWEST = 9  # characters of a column whose text may go on in the next line: the longest verdict


def table(*columns: Column | str) -> Table:
    """A table that cuts nothing on a narrow terminal: text goes on in the next line."""
    folding = (Column(each, overflow="fold") if isinstance(each, str) else each for each in columns)
    return Table(*folding, box=None, padding=(0, 2, 0, 0), pad_edge=False)


def right(header: str) -> Column:
    """A column of numbers."""
    return Column(header, justify="right", no_wrap=True)


def whole(header: str) -> Column:
    """A column of names, which stay in one line."""
    return Column(header, no_wrap=True)


def show(output: dict[str, Any] | Sequence[RenderableType]) -> None:
    """Print JSON, or tables and lines. Piped tables, and those for which a terminal is too narrow, have their width."""
    if isinstance(output, dict):
        print(_json(output))
        return
    console = Console(highlight=False, markup=False)
    least = max((least_width(each) for each in output if isinstance(each, Table)), default=0)
    if console.is_terminal and console.width >= least:
        console.print(*output, sep="\n")
        return
    wide = Console(highlight=False, markup=False, width=least if console.is_terminal else 400)
    with wide.capture() as capture:
        wide.print(*output, sep="\n", soft_wrap=console.is_terminal)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def least_width(shown: Table) -> int:
    """The width below which rich would cut or drop what a table says."""
    console = Console(width=10_000, markup=False)
    widths = []
    for column in shown.columns:
        cells = [Measurement.get(console, console.options, cell) for cell in (column.header, *column.cells)]
        longest = max((cell.maximum for cell in cells), default=0)
        widths.append(longest if column.no_wrap else min(longest, _NARROWEST))
    return sum(widths) + 2 * max(0, len(widths) - 1)


def _json(output: dict[str, Any]) -> str:
    """JSON that stdout's encoding can hold."""
    text = json.dumps(output, indent=1, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(output, indent=1)
    return text


def shape_of(ne: Iterable[int]) -> str:
    """Sizes, innermost first: `256 x 512`."""
    return " x ".join(str(n) for n in ne)


def by_type(tensors: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, Any]]:
    """(type, elements, bytes) of each tensor -> totals per type, largest first."""
    totals: dict[str, list[int]] = {}
    for name, elements, nbytes in tensors:
        entry = totals.setdefault(name, [0, 0, 0])
        for i, n in enumerate((1, elements, nbytes)):
            entry[i] += n
    ordered = sorted(totals.items(), key=lambda item: -item[1][2])
    return {name: {"tensors": n, "elements": e, "bytes": b, "bpw": round(8 * b / e, 4)} for name, (n, e, b) in ordered}


def bpw(types: dict[str, dict[str, Any]]) -> float:
    """Bits per weight of all of them."""
    elements = sum(entry["elements"] for entry in types.values())
    return round(8 * sum(entry["bytes"] for entry in types.values()) / elements, 4) if elements else 0.0


def types_table(types: dict[str, dict[str, Any]]) -> Table:
    """The same for people."""
    rows = table("type", *(right(name) for name in ("tensors", "weights", "size", "share", "bits/weight")))
    total = sum(entry["bytes"] for entry in types.values()) or 1
    for name, entry in types.items():
        rows.add_row(
            name,
            str(entry["tensors"]),
            f"{entry['elements']:,}",
            human(entry["bytes"]),
            f"{100 * entry['bytes'] / total:.1f} %",
            f"{entry['bpw']:.4g}",
        )
    return rows
