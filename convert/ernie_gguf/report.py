"""What `convert` prints: rich tables for people, dictionaries for --json."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from .checkpoint.find_k_order import KOrderFinding
from .checkpoint.k_order import KOrder
from .convert import ConvertResult, Job
from .plan import Plan, TensorPlan
from .tables import bpw, by_type, right, shape_of, table, types_table, whole
from .transform import ALL_EXACT, Inexact
from .units import human
from .write import data_nbytes


def _plan_types(plan: Plan) -> dict[str, dict[str, Any]]:
    return by_type((tensor.ggml_type.name.lower(), tensor.elements, tensor.nbytes) for tensor in plan.tensors)


def plan_json(plan: Plan, paths: Sequence[Path]) -> dict[str, Any]:
    """The plan for --json; `paths` are the files it will make."""
    return {
        "files": [str(path) for path in paths],
        "outtype": plan.outtype.value,
        "bytes": data_nbytes(plan),
        "bits_per_weight": bpw(_plan_types(plan)),
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
    """All plans of a conversion for --json: the model's, and under `mmproj` that of its vision encoder."""
    vision = {"mmproj": plan_json(job.projector, [mmproj])} if job.projector and mmproj else {}
    small = {"notes": job.notes} | k_order_json(job.k_order, job.k_order_finding)
    return plan_json(job.plan, paths) | small | vision


def job_table(job: Job, paths: Sequence[Path], mmproj: Path | None) -> list[RenderableType]:
    """All plans of a conversion for people."""
    vision = ["", *plan_table(job.projector, [mmproj])] if job.projector and mmproj else []
    notes = k_order_lines(job.k_order, job.k_order_finding, job.plan.absorbed) + _notes(job)
    return plan_table(job.plan, paths, notes) + vision


def _notes(job: Job) -> list[Text]:
    return [Text(f"note: {note}") for note in job.notes]


def _origin(tensor: TensorPlan) -> str:
    """Where a tensor comes from, in a few words."""
    if tensor.expected.computed:
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
            shape_of(reversed(tensor.shape)),
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
    total = f"{files}: {len(plan.tensors)} tensors, {human(data_nbytes(plan))}, {bpw(types):.4g} bits per weight"
    return [*out, types_table(types), "", Text(f"{total}; nothing was written (--dry-run)")]


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
    vision = {"mmproj": {"file": str(result.paths[-1]), "types": _plan_types(job.projector)}} if job.projector else {}
    return {
        "file": str(result.paths[0]),
        "files": [str(path) for path in result.paths],
        "outtype": plan.outtype.value,
        "bytes": result.nbytes,
        "bits_per_weight": bpw(_plan_types(plan)),
        "types": _plan_types(plan),
        "dropped": [{"name": header.name, "reason": reason} for header, reason in plan.dropped],
        "notes": job.notes,
        "repacked": _inexact_json(result.inexact),
        "seconds": round(result.seconds, 3),
        "bytes_per_second": round(result.nbytes / result.seconds),
        **k_order_json(job.k_order, job.k_order_finding),
        **vision,
    }


def result_text(job: Job, result: ConvertResult) -> list[RenderableType]:
    """The summary of a conversion for people."""
    plan = job.plan
    types = _plan_types(plan)
    rate = human(result.nbytes / result.seconds)
    lines: list[RenderableType] = [types_table(types), ""]
    if plan.dropped:
        lines.append(Text(f"dropped {len(plan.dropped)} tensors (--dry-run names them and the reasons)"))
    lines += _inexact_text(result.inexact)
    lines += k_order_lines(job.k_order, job.k_order_finding, plan.absorbed)
    lines += [Text(tensor.name + ": " + tensor.note) for tensor in plan.tensors if tensor.note]
    lines += _notes(job)
    model = result.paths[:-1] if job.projector else result.paths
    size = f"{human(result.nbytes)}, {bpw(types):.4g} bits per weight"
    files = f" and {len(model) - 1} more files" if len(model) > 1 else ""
    if job.projector:
        files += f" and {result.paths[-1]} ({human(data_nbytes(job.projector))})"
    return [*lines, Text(f"{model[0]}{files}: {size}, {result.seconds:.1f} s, {rate}/s")]
