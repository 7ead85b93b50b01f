"""The results of `quantize`: a table for people, a dictionary for --json, and the folder of --report.

A ratio below 1 means that calibration made the error smaller. See `stats` for how errors are averaged.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from ..errors import ErnieGgufError, OutputError
from ..files import replacing
from ..report import right, table
from ..units import human
from .pictures import PICTURES
from .stats import Group, MatrixStats, by_projection, by_tensor


@dataclass(frozen=True)
class QuantizeSummary:
    """A finished run, of at least one matrix. A tensor's matrices are its experts."""

    path: Path
    nbytes: int  # of the file
    bits_per_weight: float  # of all its tensors
    expert_bits_per_weight: float  # of those in `matrices`
    seconds: float
    tokens: int  # of the calibration text
    device: str
    settings: dict[str, object]  # what else decides the output: maps, passes, damping, sequence
    matrices: tuple[MatrixStats, ...]
    tensor_bits_per_weight: Mapping[str, float]  # by GGUF tensor, for each in `matrices`
    tensor_types: Mapping[str, str]  # the same


def _number(value: float | None) -> float | None:
    """A finite number or None: JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _settings(summary: QuantizeSummary) -> dict[str, Any]:
    """Settings as JSON holds them: paths become text."""
    settings: dict[str, Any] = json.loads(json.dumps(summary.settings, default=str))
    return settings


def _errors_json(group: Group) -> dict[str, Any]:
    return {
        "error": _number(group.error),
        "metric_error": _number(group.metric_error),
        "plain_metric_error": _number(group.plain_metric_error),
        "ratio": _number(group.ratio),
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "weights": group.weights,
        **_errors_json(group),
        "worse_than_plain": group.worse,
        "tokens_least": group.tokens_least,
        "tokens_median": group.tokens_median,
        "unseen_experts": group.unseen,
        "scales": group.scales,
    }


def _expert_json(matrix: MatrixStats) -> dict[str, Any]:
    errors = _errors_json(Group((matrix,)))
    return {"expert": matrix.expert, "tokens": matrix.tokens, **errors, "scales": list(matrix.scales)}


def summary_json(summary: QuantizeSummary) -> dict[str, Any]:
    """Everything, down to each expert's matrix. Numbers that are not finite, and ratios to 0, are null."""
    return {
        "file": str(summary.path),
        "bytes": summary.nbytes,
        "bits_per_weight": summary.bits_per_weight,
        "expert_bits_per_weight": summary.expert_bits_per_weight,
        "seconds": round(summary.seconds, 3),
        "tokens": summary.tokens,
        "device": summary.device,
        "settings": _settings(summary),
        "projections": {group.projection: _group_json(group) for group in by_projection(summary.matrices)},
        "tensors": [
            {
                "name": group.tensor,
                "layer": group.layer,
                "projection": group.projection,
                "type": summary.tensor_types[group.tensor],
                "bits_per_weight": summary.tensor_bits_per_weight[group.tensor],
                **_group_json(group),
                "experts": [_expert_json(matrix) for matrix in group.matrices],
            }
            for group in by_tensor(summary.matrices)
        ],
    }


_COLUMNS = ("error", "metric error", "plain", "ratio", "tokens min", "median", "unseen")


def _cells(group: Group) -> tuple[str, ...]:
    """The numbers of a group under _COLUMNS."""
    return (
        f"{group.error:.4f}",
        f"{group.metric_error:.4f}",
        f"{group.plain_metric_error:.4f}",
        "" if group.ratio is None else f"{group.ratio:.3f}",
        f"{group.tokens_least:,}",
        f"{group.tokens_median:,.0f}",
        str(group.unseen or ""),
    )


def _duration(seconds: float) -> str:
    """Seconds as 12.3 s, or as hours, minutes and seconds: 0:30:34."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _style(group: Group) -> str:
    if group.ratio is not None and group.ratio > 1:
        return "red"
    return "yellow" if group.unseen else ""


def _verdicts(summary: QuantizeSummary) -> list[str]:
    """The errors in three sentences."""
    everything = Group(summary.matrices)
    ratio, worse = everything.ratio, everything.worse
    change = "" if ratio is None else f", ratio {ratio:.3f}"
    experts = {(matrix.layer, matrix.expert): matrix.tokens for matrix in summary.matrices}
    unseen = sum(tokens == 0 for tokens in experts.values())
    return [
        f"Error in the calibration metric: {everything.metric_error:.4f}; of the plain encoder: "
        f"{everything.plain_metric_error:.4f}{change}.",
        f"Expert matrices worse than with the plain encoder: {worse or 'none'} of {len(summary.matrices):,}.",
        f"Experts that no calibration token reached: {unseen or 'none'} of {len(experts):,}.",
    ]


def summary_table(summary: QuantizeSummary) -> list[RenderableType]:
    """The result for people: a row per tensor, a row per projection, three sentences, the file."""
    matrices = table(right("layer"), "projection", *map(right, _COLUMNS))
    for group in by_tensor(summary.matrices):
        matrices.add_row(str(group.layer), group.projection, *_cells(group), style=_style(group))
    matrices.add_section()
    for group in by_projection(summary.matrices):
        matrices.add_row("all", group.projection, *_cells(group), style=_style(group) or "bold")
    size = f"{human(summary.nbytes)}, {summary.bits_per_weight:.4g} bits per weight"
    lines = [
        *_verdicts(summary),
        f"{summary.path}: {size} ({summary.expert_bits_per_weight:.4g} in the experts), "
        f"{summary.tokens:,} calibration tokens, {_duration(summary.seconds)} on {summary.device}",
    ]
    return [matrices, "", *map(Text, lines)]


_ABOUT = """\
Errors are relative: 0 is exact, 1 is as bad as zeros. *Error* is |W - Ŵ|² / |W|². *Metric error* is the same weighted
by the matrix's inputs for the calibration text, tr(E H Eᵀ) / tr(W H Wᵀ) with E = W - Ŵ and H the Hessian of the
inputs: this is what the encoder minimises. *Plain* is the metric error of the encoder without calibration (with the
first code map for all rows), *ratio* the metric error over it. Errors of several experts are means weighted
by their numbers of weights; ratios are ratios of these means. *Tokens* are the calibration tokens routed to an expert,
*min* and *median* over the experts; *unseen* counts the experts that got none. `report.json` has the same
numbers for every expert.
"""


def _markdown_table(left: Sequence[str], numbers: Sequence[str], rows: Iterable[tuple[str, ...]]) -> str:
    """Columns of text, then columns of numbers."""
    head = [*left, *numbers]
    rule = ["---"] * len(left) + ["---:"] * len(numbers)
    return "".join(f"| {' | '.join(_in_cell(cell) for cell in row)} |\n" for row in (head, rule, *rows))


def _in_cell(text: str) -> str:
    """Escape what would end the cell: file names may hold anything."""
    return " ".join(text.replace("|", "\\|").splitlines())


def _markdown(summary: QuantizeSummary) -> str:
    tensors, projections = by_tensor(summary.matrices), by_projection(summary.matrices)
    facts = {
        "file": str(summary.path),
        "size": f"{human(summary.nbytes)}, {summary.bits_per_weight:.4g} bits per weight",
        "experts": f"{summary.expert_bits_per_weight:.4g} bits per weight",
        "calibration tokens": f"{summary.tokens:,}",
        "time": f"{_duration(summary.seconds)} on {summary.device}",
    }
    settings = {name: json.dumps(value, ensure_ascii=False) for name, value in _settings(summary).items()}
    bits = summary.tensor_bits_per_weight
    numbers = ("weights", "bits/weight", *_COLUMNS)
    overview = ((g.projection, f"{g.weights:,}", *_cells(g)) for g in projections)
    rows = ((g.tensor, f"{g.weights:,}", f"{bits[g.tensor]:.4g}", *_cells(g)) for g in tensors)
    return "\n".join(
        [
            f"# {_in_cell(summary.path.name)}: quantization report\n",
            _markdown_table(("what", "value"), (), [*facts.items(), *settings.items()]),
            *_verdicts(summary),
            "",
            _markdown_table(("projection",), ("weights", *_COLUMNS), overview),
            _ABOUT,
            *(f"## {picture.title}\n\n![{picture.title}]({picture.name})\n\n{picture.text}" for picture in PICTURES),
            "## Tensors\n",
            _markdown_table(("tensor",), numbers, rows),
        ]
    )


def _file_names() -> tuple[str, ...]:
    return ("report.md", "report.json", *(picture.name for picture in PICTURES))


def check_report_folder(folder: Path, overwrite: bool) -> None:
    """Check before the long run that `write_report` can succeed. Leaves nothing behind.

    Raises:
        OutputError: the folder cannot be created or written, or holds a report and `overwrite` is false.
        ErnieGgufError: matplotlib is missing.
    """
    place = folder if folder.exists() else folder.parent
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: exists and is not a folder; give --report another name")
    if not place.is_dir():
        raise OutputError(f"{place}: no such folder; create it first")
    for name in _file_names():
        if (folder / name).exists() and not overwrite:
            raise OutputError(f"{folder / name}: exists already; give --overwrite to replace it")
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OutputError(f"{place}: {error.strerror}; the report cannot be written there") from error
    try:
        import matplotlib.figure  # noqa: F401 - a part of the extra
    except ImportError as error:
        raise ErnieGgufError("--report draws with matplotlib, which is not installed: run `make quantizer`") from error


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Create `folder` if it is missing, and remove it again if the block fails."""
    created = not folder.is_dir()
    try:
        if created:
            folder.mkdir()
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; the report was not written") from error
    try:
        yield
    except BaseException:
        if created:
            folder.rmdir()
        raise


def write_report(folder: Path, summary: QuantizeSummary) -> None:
    """Write report.md, report.json and the pictures to `folder`, all of them or none, replacing older ones.

    Raises:
        OutputError: the folder cannot be created or written.
    """
    files = {
        "report.md": _markdown(summary).encode(),
        "report.json": (json.dumps(summary_json(summary), indent=1, ensure_ascii=False) + "\n").encode(),
        **{picture.name: picture.draw(by_tensor(summary.matrices)) for picture in PICTURES},
    }
    with _folder(folder), ExitStack() as renamed_at_the_end:
        for name, data in files.items():
            renamed_at_the_end.enter_context(replacing(folder / name, overwrite=True)).write_bytes(data)
