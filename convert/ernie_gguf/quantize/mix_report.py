"""The plan of a mix as a table: a row per run of layers with the same types, then the rest, sizes and steps."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from ..expected import Role
from ..report import experts_by_layer, right, table
from ..units import human
from .mix import part_of
from .target import Mix, cards_that_fit


def _rest(mix: Mix) -> dict[tuple[str, str], int]:
    """Bytes by part and type of everything else."""
    sizes: dict[tuple[str, str], int] = {}
    for tensor in mix.job.plan.tensors:
        if tensor.is_expert:
            continue
        part = "vision experts" if tensor.role is Role.VISION_EXPERT else "norms, routers"
        if tensor.role is Role.LINEAR:
            part = part_of(tensor.name)
        key = (part, tensor.ggml_type.name.lower())
        sizes[key] = sizes.get(key, 0) + tensor.nbytes
    return sizes


def mix_table(mix: Mix) -> list[RenderableType]:
    """For people."""
    experts = experts_by_layer((t.name, t.ggml_type.name.lower(), t.nbytes) for t in mix.job.plan.tensors)
    rest = table("rest", "type", right("size"))
    for (part, name), nbytes in _rest(mix).items():
        rest.add_row(part, name, human(nbytes))
    lines: list[RenderableType] = [experts, ""] if experts else []
    lines += [rest, ""]
    lines += [Text(f"{t.name}: {t.note}") for t in mix.job.plan.tensors if t.note]
    loss = "unknown" if mix.loss is None else f"{mix.loss:.4f}"
    lines.append(
        Text(
            f"{human(mix.nbytes)}, {mix.bits:.3f} bits per weight in the experts; predicted loss {loss} (the KL "
            "divergence that these types cost a small ERNIE: for ranking only)"
        )
    )
    fits = cards_that_fit(mix)
    lines.append(Text(f"fits, with 8K of context, by a plain sum: {', '.join(fits) or 'none of the usual cards'}"))
    if mix.steps:
        steps = table(right("size"), right("bits"), right("predicted loss"), "")
        for step in mix.steps:
            here = "this" if step.nbytes == mix.nbytes else ""
            steps.add_row(human(step.nbytes), f"{step.bits:.3f}", f"{step.loss:.4f}", here)
        lines += ["", steps]
    return lines
