"""The plan of a mix as a table: a row per run of layers with the same types, then the rest, sizes and steps."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from ..expected import Role
from ..report import human, right, table
from .mix import expert_of, part_of
from .target import Mix, cards_that_fit


def _layers(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _runs(mix: Mix) -> list[tuple[list[int], dict[str, str], int]]:
    """Neighbouring layers whose experts have the same types: layers, types by projection, bytes."""
    layers: dict[int, tuple[dict[str, str], int]] = {}
    for tensor in mix.job.plan.tensors:
        if tensor.is_expert:
            layer, projection = expert_of(tensor.name)
            types, nbytes = layers.get(layer, ({}, 0))
            layers[layer] = ({**types, projection: tensor.ggml_type.name.lower()}, nbytes + tensor.nbytes)
    runs: list[tuple[list[int], dict[str, str], int]] = []
    for layer, (types, nbytes) in sorted(layers.items()):
        if runs and runs[-1][1] == types:
            numbers, _, before = runs.pop()
            runs.append(([*numbers, layer], types, before + nbytes))
        else:
            runs.append(([layer], types, nbytes))
    return runs


def _rest(mix: Mix) -> dict[tuple[str, str], int]:
    """Bytes by part and type of everything else."""
    sizes: dict[tuple[str, str], int] = {}
    for tensor in mix.job.plan.tensors:
        if tensor.is_expert:
            continue
        part = {Role.LINEAR: part_of, Role.VISION_EXPERT: lambda _: "vision experts"}.get(
            tensor.role, lambda _: "norms, routers"
        )(tensor.name)
        key = (part, tensor.ggml_type.name.lower())
        sizes[key] = sizes.get(key, 0) + tensor.nbytes
    return sizes


def mix_table(mix: Mix) -> list[Any]:
    """For people."""
    experts = table("layers", "gate", "up", "down", right("size"))
    for numbers, types, nbytes in _runs(mix):
        experts.add_row(_layers(numbers), *(types[p] for p in ("gate", "up", "down")), human(nbytes))
    rest = table("rest", "type", right("size"))
    for (part, name), nbytes in _rest(mix).items():
        rest.add_row(part, name, human(nbytes))
    lines: list[Any] = [experts, "", rest, ""]
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
