"""Mixes: which tensor gets which type, so that a file has a given size and loses as little as can be. Needs no torch.

The loss of a tensor is predicted as the KL divergence that its type costs ernie-mini (docs/quality.md): for ranking,
not as a promise. The rest is a knapsack: one type for each group of tensors, the least sum of losses that fits. With
equal losses in all layers it climbs a ladder: down first, then gate and up together, then the rest of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..arrays import F64, I64
from ..errors import QuantizeError
from ..expected import Role
from ..gguf_file.types import GgmlType, block_size, padded, row_size
from ..plan import Plan, TensorPlan, retype

G = GgmlType

# KL divergence of ernie-mini with all experts in the type, calibrated by this package (docs/quality.md). Measured for
# ccq2, iq2_s and iq3_s, and for iq2_xs and iq3_xxs together; the others follow the encoder's errors.
EXPERT_LOSS: dict[GgmlType, float] = {
    G.IQ2_XXS: 0.165,
    G.CCQ2: 0.1335,
    G.IQ2_XS: 0.115,
    G.IQ2_S: 0.0817,
    G.IQ3_XXS: 0.0460,
    G.IQ3_S: 0.0259,
    G.IQ4_XS: 0.0091,
    G.Q5_K: 0.0028,
    G.Q6_K: 0.0012,
    G.Q8_0: 0.0006,
}
# How much of it each projection causes, in equal parts of its layers; down is half of an expert's loss.
PROJECTION_SHARE = {"gate": 0.30, "up": 0.20, "down": 0.50}
# The same for the rest of the model, as a whole.
REST_LOSS: dict[str, dict[GgmlType, float]] = {
    "attention": {G.Q8_0: 0.0006, G.Q6_K: 0.0023},
    "dense": {G.Q8_0: 0.0002, G.Q6_K: 0.0010},
    "shared": {G.Q8_0: 0.0001, G.Q6_K: 0.0003},
    "head": {G.Q8_0: 0.0001, G.Q6_K: 0.0003},
    "embedding": {G.Q8_0: 0.0003, G.Q6_K: 0.0013},
}
_PARTS = (
    (r"^token_embd\.", "embedding"),
    (r"^output\.", "head"),
    (r"\.attn_", "attention"),
    (r"_shexp\.", "shared"),
    (r"\.ffn_(gate|up|down)\.", "dense"),
)
_UNITS = 1 << 16  # of the budget, in which the knapsack counts
_LATER = 1e-3  # equal gains are spent in the later layers first, where they gained a little more
_EXPERT = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")

Losses = Mapping[str, float]  # of tensors by name, in ccq2: what PROJECTION_SHARE says without a measurement


@dataclass(frozen=True)
class Option:
    """A type for a group: bytes in the file, and the predicted loss."""

    ggml_type: GgmlType
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Group:
    """Tensors that get one type."""

    tensors: tuple[TensorPlan, ...]
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Override:
    """--tensor-type PATTERN=TYPE: tensors whose name the regular expression finds."""

    pattern: re.Pattern[str]
    ggml_type: GgmlType


def part_of(name: str) -> str:
    """Which part of the rest of the model a tensor belongs to, a key of REST_LOSS."""
    return next(part for pattern, part in _PARTS if re.search(pattern, name))


def expert_of(name: str) -> tuple[int, str]:
    """Layer and projection of an expert tensor."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        raise ValueError(name)
    return int(match[1]), match[2]


def ccq2_losses(plan: Plan) -> dict[str, float]:
    """The predicted loss of each expert tensor in ccq2, without a measurement: the same in all layers."""
    names = [tensor.name for tensor in plan.tensors if tensor.is_expert]
    layers = sorted({expert_of(name)[0] for name in names})
    later = {layer: 1 + _LATER * i / len(layers) for i, layer in enumerate(layers)}
    each = EXPERT_LOSS[G.CCQ2] / max(1, len(layers))
    return {name: each * PROJECTION_SHARE[expert_of(name)[1]] * later[expert_of(name)[0]] for name in names}


def loss_of(tensor: TensorPlan, losses: Losses) -> float | None:
    """The predicted loss of a tensor in its type; None if nothing is known of that."""
    if tensor.is_expert:
        of_type = EXPERT_LOSS.get(tensor.ggml_type)
        return None if of_type is None else losses[tensor.name] * of_type / EXPERT_LOSS[G.CCQ2]
    return None


def parse_override(text: str) -> Override:
    """PATTERN=TYPE. Raises ValueError."""
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"{text!r}: expected PATTERN=TYPE, for example ffn_down_exps=iq3_s")
    if name.upper() not in GgmlType.__members__:
        known = ", ".join(sorted(each.name.lower() for each in GgmlType))
        raise ValueError(f"{text!r}: no type {name!r}; there are {known}")
    try:
        return Override(re.compile(pattern), GgmlType[name.upper()])
    except re.error as error:
        raise ValueError(f"{text!r}: {pattern!r} is not a regular expression: {error}") from error


def overridden(plan: Plan, overrides: Sequence[Override]) -> dict[str, GgmlType]:
    """The types that overrides give to tensors; the first that matches counts. Raises QuantizeError."""
    found: dict[str, GgmlType] = {}
    used: set[Override] = set()
    for tensor in plan.tensors:
        matching = [each for each in overrides if each.pattern.search(tensor.name)]
        used.update(matching)
        if matching and tensor.expected.role is not Role.EXACT:
            found[tensor.name] = matching[0].ggml_type
    for each in overrides:
        if each not in used:
            raise QuantizeError(
                f"--tensor-type {each.pattern.pattern}={each.ggml_type.name.lower()}: no tensor has such a name; "
                "--dry-run --json names them"
            )
    return found


def _option(tensors: Sequence[TensorPlan], ggml_type: GgmlType, loss: float) -> Option | None:
    """None where rows do not fit the type."""
    if any(tensor.shape[-1] % block_size(ggml_type) for tensor in tensors):
        return None
    sizes = (tensor.elements // tensor.shape[-1] * row_size(ggml_type, tensor.shape[-1]) for tensor in tensors)
    return Option(ggml_type, sum(map(padded, sizes)), loss)


def groups_of(plan: Plan, fixed: Mapping[str, GgmlType], losses: Losses, stock: bool, rest: bool) -> list[Group]:
    """What the knapsack chooses for: down of each layer, gate and up of each; with `rest` the rest of the model too."""
    free = [tensor for tensor in plan.tensors if tensor.name not in fixed]
    together: dict[tuple[object, ...], list[TensorPlan]] = {}
    for tensor in free:
        if tensor.is_expert:
            layer, projection = expert_of(tensor.name)
            together.setdefault((layer, projection == "down"), []).append(tensor)
        elif tensor.expected.role is Role.LINEAR and rest:
            together.setdefault((part_of(tensor.name),), []).append(tensor)
    groups = []
    for key, tensors in together.items():
        if len(key) == 1:
            table = REST_LOSS[str(key[0])]
        else:
            table = {
                t: sum(losses[tensor.name] for tensor in tensors) * loss / EXPERT_LOSS[G.CCQ2]
                for t, loss in EXPERT_LOSS.items()
                if not (stock and t is G.CCQ2)
            }
        options = [option for t, loss in table.items() if (option := _option(tensors, t, loss)) is not None]
        if options:
            groups.append(Group(tuple(tensors), tuple(options)))
    return groups


@dataclass(frozen=True)
class Frontier:
    """The least loss of `groups` for every budget, float64 [units + 1]; `choices` [groups, units + 1] attain it."""

    groups: tuple[Group, ...]
    unit: int
    loss: F64
    choices: I64

    def at(self, nbytes: int) -> dict[str, GgmlType] | None:
        """The best types that take at most so many bytes; None if there are none."""
        left = min(nbytes // self.unit, len(self.loss) - 1)
        if left < 0 or not np.isfinite(self.loss[left]):
            return None
        found: dict[str, GgmlType] = {}
        for number in range(len(self.groups) - 1, -1, -1):
            option = self.groups[number].options[self.choices[number, left]]
            found |= {tensor.name: option.ggml_type for tensor in self.groups[number].tensors}
            left -= -(-option.nbytes // self.unit)
        return found


def frontier(groups: Sequence[Group], most: int) -> Frontier:
    """The knapsack for all budgets up to `most` bytes. An option counts in whole units, so none is exceeded."""
    unit = max(1, most // _UNITS)
    units = most // unit + 1
    best = np.zeros(units)
    choices = np.zeros((len(groups), units), np.int64)
    for number, group in enumerate(groups):
        tried = np.full((len(group.options), units), np.inf)
        for i, option in enumerate(group.options):
            cost = -(-option.nbytes // unit)
            if cost < units:
                tried[i, cost:] = best[: units - cost] + option.loss
        choices[number] = tried.argmin(0)
        best = tried.min(0)
    return Frontier(tuple(groups), unit, best, choices)


def smallest(groups: Sequence[Group]) -> int:
    """Bytes of the smallest choice."""
    return sum(min(option.nbytes for option in group.options) for group in groups)


def largest(groups: Sequence[Group]) -> int:
    """Bytes of the largest choice."""
    return sum(max(option.nbytes for option in group.options) for group in groups)


def with_types(plan: Plan, types: Mapping[str, GgmlType], label: str) -> Plan:
    """The plan with these types, named `label`."""
    return replace(retype(plan, types), label=label)
