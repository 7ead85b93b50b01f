"""What the commands print: rich tables for people, dictionaries for --json."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from .checkpoint.find_k_order import KOrderFinding
from .checkpoint.k_order import KOrder
from .convert import ConvertResult, Job
from .gguf_file.reader import GgufFile
from .gguf_file.types import MIX_KEY
from .plan import Plan, TensorPlan
from .transform import ALL_EXACT, Inexact
from .units import human
from .write import data_nbytes

_LONG_LIST = 8  # metadata lists above this are shown by their length
_LONG_TEXT = 120
_NARROWEST = 9  # characters of a column whose text may go on in the next line: the longest verdict


def by_type(tensors: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, Any]]:
    """(type, elements, bytes) of each tensor -> totals per type, largest first."""
    totals: dict[str, list[int]] = {}
    for name, elements, nbytes in tensors:
        entry = totals.setdefault(name, [0, 0, 0])
        for i, n in enumerate((1, elements, nbytes)):
            entry[i] += n
    ordered = sorted(totals.items(), key=lambda item: -item[1][2])
    return {name: {"tensors": n, "elements": e, "bytes": b, "bpw": round(8 * b / e, 4)} for name, (n, e, b) in ordered}


def _plan_types(plan: Plan) -> dict[str, dict[str, Any]]:
    return by_type((tensor.ggml_type.name.lower(), tensor.elements, tensor.nbytes) for tensor in plan.tensors)


def _bpw(types: dict[str, dict[str, Any]]) -> float:
    elements = sum(entry["elements"] for entry in types.values())
    return round(8 * sum(entry["bytes"] for entry in types.values()) / elements, 4) if elements else 0.0


def _types_table(types: dict[str, dict[str, Any]]) -> Table:
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


def _shape(ne: Iterable[int]) -> str:
    return " x ".join(str(n) for n in ne)


def plan_json(plan: Plan, paths: Sequence[Path]) -> dict[str, Any]:
    """The plan for --json; `paths` are the files it will make."""
    return {
        "files": [str(path) for path in paths],
        "outtype": plan.outtype.value,
        "bytes": data_nbytes(plan),
        "bits_per_weight": _bpw(_plan_types(plan)),
        "types": _plan_types(plan),
        "tensors": [
            {
                "name": tensor.name,
                "ne": list(reversed(tensor.shape)),
                "type": tensor.ggml_type.name.lower(),
                "bytes": tensor.nbytes,
                "sources": [
                    {"name": part.source.name, "dtype": part.source.dtype, "row": part.row, "rows": part.rows}
                    for part in tensor.parts
                ],
                "note": tensor.note,
            }
            for tensor in plan.tensors
        ],
        "dropped": [{"name": header.name, "reason": reason} for header, reason in plan.dropped],
    }


def k_order_json(order: KOrder, finding: KOrderFinding | None) -> dict[str, Any]:
    """The order of K of a checkpoint's 2-bit experts: how it is read, and what their weights say."""
    if finding is None:
        return {}
    return {"k_order": {"read_as": order.value, "found": finding.order.value, "sigmas": finding.sigmas}} | {
        "k_order_signs": asdict(finding)
    }


def k_order_lines(order: KOrder, finding: KOrderFinding | None, absorbed: bool) -> list[Text]:
    """The same for people; nothing where there are no 2-bit experts."""
    if finding is None:
        return []
    said = order.value if order is not KOrder.AUTO else "unclear: convert needs --ccq-k-order natural or shuffled"
    lines = [Text(f"order of K of the 2-bit experts: {said}; their weights say: {finding}")]
    if absorbed:
        lines.append(Text("the file keeps the channels of the residual stream in that order (docs/formats.md)"))
    return lines


def job_json(job: Job, paths: Sequence[Path], mmproj: Path | None) -> dict[str, Any]:
    """All plans of a conversion for --json: the model's, and under `mmproj` that of its eyes."""
    eyes = {"mmproj": plan_json(job.projector, [mmproj])} if job.projector and mmproj else {}
    small = {"notes": job.notes} | k_order_json(job.k_order, job.k_order_finding)
    return plan_json(job.plan, paths) | small | eyes


def job_table(job: Job, paths: Sequence[Path], mmproj: Path | None) -> list[RenderableType]:
    """All plans of a conversion for people."""
    eyes = ["", *plan_table(job.projector, [mmproj])] if job.projector and mmproj else []
    notes = k_order_lines(job.k_order, job.k_order_finding, job.plan.absorbed) + _notes(job)
    return plan_table(job.plan, paths, notes) + eyes


def _notes(job: Job) -> list[Text]:
    return [Text(f"note: {note}") for note in job.notes]


def _origin(tensor: TensorPlan) -> str:
    """Where a tensor comes from, in a few words."""
    if tensor.computed:
        return "computed"
    first, rest = tensor.parts[0].source, len(tensor.parts) - 1
    return f"{first.name} {first.dtype}" + (f" and {rest} more" if rest else "")


def plan_table(plan: Plan, paths: Sequence[Path], notes: Sequence[Text] = ()) -> list[RenderableType]:
    """The plan for people; `paths` are the files it will make, `notes` stand above the totals."""
    tensors = table(whole("tensor"), right("ne"), "type", right("size"), "from")
    for tensor in plan.tensors:
        note = f" ({tensor.note})" if tensor.note else ""
        tensors.add_row(
            tensor.name,
            _shape(reversed(tensor.shape)),
            tensor.ggml_type.name.lower(),
            human(tensor.nbytes),
            Text(_origin(tensor) + note),
        )
    out: list[RenderableType] = [tensors, ""]
    for header, reason in plan.dropped:
        out.append(Text(f"dropped: {header.name}: {reason}"))
    out += [*notes, ""] if notes else []
    types = _plan_types(plan)
    files = f"{paths[0]} and {len(paths) - 1} more files" if len(paths) > 1 else str(paths[0])
    total = f"{files}: {len(plan.tensors)} tensors, {human(data_nbytes(plan))}, {_bpw(types):.4g} bits per weight"
    return [*out, _types_table(types), "", Text(f"{total}; nothing was written (--dry-run)")]


def _inexact_json(inexact: dict[str, Inexact]) -> dict[str, Any]:
    """What exact repacks lost: totals, and each tensor that lost something."""
    total = sum(inexact.values(), ALL_EXACT)
    return {**asdict(total), "inexact": {name: asdict(lost) for name, lost in inexact.items() if lost.any}}


def _inexact_text(inexact: dict[str, Inexact]) -> list[Text]:
    total = sum(inexact.values(), ALL_EXACT)
    if not total.rows:
        return []
    lines = [f"repacked {total.rows:,} quantized rows without quantizing again"]
    if total.missed_rows:
        lines.append(
            f"{total.missed_rows:,} of them have no integer code map: {total.missed_codes:,} code bytes there decode "
            "one unit off (--json names the tensors)"
        )
    if total.rounded_scales:
        lines.append(
            f"{total.rounded_scales:,} scales were rounded to f16, by at most {total.scale_error:.2g} of "
            "their value (--json names the tensors)"
        )
    if not total.any:
        lines[0] += ", all of them exactly"
    return [Text(line) for line in lines]


def result_json(job: Job, result: ConvertResult) -> dict[str, Any]:
    """The summary of a conversion for --json."""
    plan = job.plan
    eyes = {"mmproj": {"file": str(result.paths[-1]), "types": _plan_types(job.projector)}} if job.projector else {}
    return {
        "file": str(result.paths[0]),
        "files": [str(path) for path in result.paths],
        "outtype": plan.outtype.value,
        "bytes": result.nbytes,
        "bits_per_weight": _bpw(_plan_types(plan)),
        "types": _plan_types(plan),
        "dropped": [{"name": header.name, "reason": reason} for header, reason in plan.dropped],
        "notes": job.notes,
        "repacked": _inexact_json(result.inexact),
        "seconds": round(result.seconds, 3),
        "bytes_per_second": round(result.nbytes / result.seconds),
        **k_order_json(job.k_order, job.k_order_finding),
        **eyes,
    }


def result_text(job: Job, result: ConvertResult) -> list[RenderableType]:
    """The summary of a conversion for people."""
    plan = job.plan
    types = _plan_types(plan)
    rate = human(result.nbytes / result.seconds)
    lines: list[RenderableType] = [_types_table(types), ""]
    if plan.dropped:
        lines.append(Text(f"dropped {len(plan.dropped)} tensors (--dry-run names them and the reasons)"))
    lines += _inexact_text(result.inexact)
    lines += k_order_lines(job.k_order, job.k_order_finding, plan.absorbed)
    lines += [Text(tensor.name + ": " + tensor.note) for tensor in plan.tensors if tensor.note]
    lines += _notes(job)
    model = result.paths[:-1] if job.projector else result.paths
    size = f"{human(result.nbytes)}, {_bpw(types):.4g} bits per weight"
    files = f" and {len(model) - 1} more files" if len(model) > 1 else ""
    if job.projector:
        files += f" and {result.paths[-1]} ({human(data_nbytes(job.projector))})"
    return [*lines, Text(f"{model[0]}{files}: {size}, {result.seconds:.1f} s, {rate}/s")]


def _size_of(file: GgufFile) -> int:
    """Bytes of all files of a model."""
    return sum(path.stat().st_size for path in {file.path, *(tensor.path for tensor in file.tensors)})


def file_json(file: GgufFile) -> dict[str, Any]:
    """A GGUF file for --json: metadata whole, tensors with absolute offsets."""
    types = by_type((tensor.type_name, tensor.elements, tensor.nbytes) for tensor in file.tensors)
    return {
        "file": str(file.path),
        "version": file.version,
        "bytes": _size_of(file),
        "metadata": file.metadata,
        "tensors": [
            {
                "name": tensor.name,
                "ne": list(tensor.ne),
                "type": tensor.type_name,
                "offset": tensor.offset,
                "bytes": tensor.nbytes,
                "bpw": round(8 * tensor.nbytes / tensor.elements, 4),
            }
            for tensor in file.tensors
        ],
        "types": types,
        "bits_per_weight": _bpw(types),
    }


_EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")


def experts_by_layer(tensors: Iterable[tuple[str, str, int]]) -> Table | None:
    """(name, type, bytes) of tensors -> the types of the experts, a row per run of layers that have the same.

    None if there are no experts.
    """
    layers: dict[int, dict[str, str]] = {}
    sizes: dict[int, int] = {}
    for name, type_name, nbytes in tensors:
        if match := _EXPERT.fullmatch(name):
            layer = int(match[1])
            layers.setdefault(layer, {})[match[2]] = type_name
            sizes[layer] = sizes.get(layer, 0) + nbytes
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layers[runs[-1][-1]] == layers[layer]:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    rows = table("layers", "gate", "up", "down", right("size"))
    for run in runs:
        types = (layers[run[0]].get(projection, "") for projection in ("gate", "up", "down"))
        name = str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
        rows.add_row(name, *types, human(sum(sizes[layer] for layer in run)))
    return rows if runs else None


def _brief(value: object) -> str:
    if isinstance(value, list) and len(value) > _LONG_LIST:
        return f"[{len(value)} values]"
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= _LONG_TEXT else f"{text[:_LONG_TEXT]}… ({len(text)} characters)"


def file_table(file: GgufFile) -> list[RenderableType]:
    """A GGUF file for people."""
    metadata = table(whole("key"), "value")
    for key, value in file.metadata.items():
        metadata.add_row(Text(key), Text(_brief(value)))
    tensors = table(whole("tensor"), right("ne"), "type", right("size"), right("bits/weight"))
    for tensor in file.tensors:
        bpw = f"{8 * tensor.nbytes / tensor.elements:.4g}"
        tensors.add_row(Text(tensor.name), _shape(tensor.ne), tensor.type_name, human(tensor.nbytes), bpw)
    types = by_type((tensor.type_name, tensor.elements, tensor.nbytes) for tensor in file.tensors)
    experts = (
        experts_by_layer((t.name, t.type_name, t.nbytes) for t in file.tensors) if MIX_KEY in file.metadata else None
    )
    size = f"{human(_size_of(file))}, {_bpw(types):.4g} bits per weight"
    total = f"{file.path}: GGUF version {file.version}, {len(file.tensors)} tensors, {size}"
    mix: list[RenderableType] = [experts, ""] if experts else []
    return [metadata, "", tensors, "", *mix, _types_table(types), "", Text(total)]


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
