"""Which type of a checkpoint fits: every type's file as it would be, weighed without its weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ..convert import file_header, prepare
from ..errors import PlanError
from ..gguf_file.outtype import Outtype
from ..gguf_file.reader import read_gguf
from ..gguf_file.writer import begin, finish
from ..tables import right, table
from ..units import human
from ..write import data_nbytes
from .cards import Cards
from .memory import Model, Plan, Question, fit, main_memory

# From the most exact one on. Of a checkpoint that is quantized already only `auto` keeps every weight.
TYPES = (Outtype.BF16, Outtype.Q8_0, Outtype.Q4_0, Outtype.CCQ2)
GIB = 2**30


@dataclass(frozen=True)
class Weighed:
    """One type of a checkpoint: the file's size, and how it lies on the cards at best."""

    outtype: Outtype
    nbytes: int
    plan: Plan
    cards: bool

    @property
    def in_memory(self) -> int:
        """Bytes that the computer's own memory holds."""
        return self.plan.needs[-1].bytes

    @property
    def fits(self) -> bool:
        """Whether the cards and the memory of this machine have room."""
        return self.plan.fits and self.in_memory <= main_memory()

    @property
    def on_cards(self) -> bool:
        """Whether it fits without experts in the computer's own memory."""
        return self.cards and self.fits and self.plan.n_cpu_moe == 0

    @property
    def verdict(self) -> str:
        """For people."""
        if self.on_cards:
            return "fits"
        ram = f"{self.in_memory / GIB:.1f} GiB of memory"
        if not self.plan.fits:
            return "does not fit"
        if self.in_memory > main_memory():
            return f"needs {ram}, {main_memory() / GIB:.1f} are free"
        return f"fits with experts of {self.plan.n_cpu_moe} layers in {ram}" if self.cards else f"fits in {ram}"


@contextmanager
def weightless(folder: Path, outtype: Outtype, text_only: bool = False) -> Iterator[Path]:
    """The file that a conversion would make, with nothing where the weights go: a sparse file.

    Raises:
        PlanError: the checkpoint has no such type.
    """
    job = prepare(folder, outtype, text_only, look=False)
    with tempfile.TemporaryDirectory(prefix="ernie-gguf-") as parent:
        path = Path(parent) / f"{outtype.value}.gguf"
        data_offset = begin(path, file_header(job, [job.plan], 0))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, data_offset + data_nbytes(job.plan))
            finish(fd)
        finally:
            os.close(fd)
        yield path


def possible(folder: Path) -> list[Outtype]:
    """The types worth asking for, from the most exact one on."""
    plan = prepare(folder, Outtype.AUTO, text_only=True, look=False).plan
    quantized = any(part.source.storage.quantized for tensor in plan.tensors for part in tensor.parts)
    has_experts = any(tensor.is_expert for tensor in plan.tensors)
    if quantized:
        return [Outtype.AUTO]
    return list(TYPES) if has_experts else [Outtype.BF16, Outtype.Q8_0, Outtype.Q4_0]


def weigh(
    folder: Path, question: Question, cards: Cards, types: list[Outtype] | None = None, text_only: bool = False
) -> list[Weighed]:
    """Each type, or each of `types`, of a checkpoint whose headers are in `folder`, but those that it cannot have."""
    found = []
    for outtype in types or possible(folder):
        try:
            with weightless(folder, outtype, text_only) as path:
                plans = fit(Model(read_gguf(path)), question, cards)
                found.append(Weighed(outtype, path.stat().st_size, plans[-1], bool(question.cards)))
        except PlanError:
            continue
    return found


def best(found: list[Weighed]) -> Weighed | None:
    """The most exact type that fits on the cards alone; else the most exact one with the fewest experts beside them."""
    if on_cards := [each for each in found if each.on_cards]:
        return on_cards[0]
    fitting = [each for each in found if each.fits]
    return min(fitting, key=lambda each: each.plan.n_cpu_moe) if fitting else None


def types_json(label: str, question: Question, found: list[Weighed]) -> dict[str, Any]:
    """For --json."""
    chosen = best(found)
    return {
        "checkpoint": label,
        "ctx": question.n_ctx,
        "kv": question.kv,
        "best": chosen and chosen.outtype.value,
        "types": [
            {
                "outtype": each.outtype.value,
                "bytes": each.nbytes,
                "options": each.plan.options,
                "memory": each.in_memory,
                "fits": each.fits,
                "fits_on_cards": each.on_cards,
            }
            for each in found
        ],
    }


def types_text(label: str, question: Question, found: list[Weighed]) -> list[str | Table]:
    """For people."""
    rows = table("--outtype", right("file"), "", "llama-server")
    for each in found:
        rows.add_row(each.outtype.value, human(each.nbytes), each.verdict, each.plan.options if each.cards else "")
    sizes = ", ".join(f"{card / GIB:g}" for card in question.cards)
    where = f"cards of {sizes} GiB" if sizes else f"no card, {main_memory() / GIB:.1f} GiB of memory free"
    lines: list[str | Table] = [
        f"{label}: {where}; context of {question.n_ctx} tokens, KV cache {question.kv}",
        "",
        rows,
        "",
    ]
    if (chosen := best(found)) is None:
        return [*lines, "No type fits: try a smaller --ctx-size."]
    return [*lines, f"The most exact type that fits: ernie-gguf convert {label} --outtype {chosen.outtype.value}"]
