"""What the options of a mix ask for -> a plan with a type for every tensor, and how it compares. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..convert import Job, file_header
from ..errors import QuantizeError
from ..expected import Role
from ..gguf_file.types import GgmlType, padded
from ..gguf_file.writer import write_header
from ..plan import Plan, TensorPlan
from ..units import human
from .mix import (
    EXPERT_LOSS,
    REST_LOSS,
    Group,
    Override,
    ccq2_losses,
    expert_of,
    frontier,
    groups_of,
    largest,
    overridden,
    part_of,
    smallest,
    with_types,
)

STOCK_DEFAULT = GgmlType.IQ2_S  # of the experts with --types stock and no size
_SPARE = 1024  # bytes for the keys of calibration, which the plan's header lacks
_NAME = 4  # bytes by which a type's name may be longer than the plan's
_STEPS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)  # of the budget: what else there is to choose from
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class MixRequest:
    """The options: bytes of the whole file or bits per weight of the experts; types; overrides; measured losses."""

    target: int | None = None
    bits: float | None = None
    stock: bool = False
    overrides: tuple[Override, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Whether a mix is asked for at all."""
        return self.target is not None or self.bits is not None or self.stock or bool(self.overrides)


@dataclass(frozen=True)
class Step:
    """One of the sizes that could be had: bytes of the file, bits per weight of the experts, predicted loss."""

    nbytes: int
    bits: float
    loss: float


@dataclass(frozen=True)
class Mix:
    """A chosen mix: the job with its plan, the file's bytes, its predicted loss, and steps around it."""

    job: Job
    nbytes: int
    bits: float
    loss: float | None
    steps: tuple[Step, ...]


def parse_target(text: str) -> int:
    """ "80G", "7.5G", "300M" -> bytes. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([KMGT]?)B?", text.strip(), re.IGNORECASE)
    nbytes = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if nbytes <= 0:
        raise ValueError(f"{text!r}: expected a size above 0 such as 80G or 7.5G (powers of 1000)")
    return nbytes


def read_losses(report: Path, plan: Plan) -> dict[str, float]:
    """Predicted losses in ccq2 from the report of an earlier run, whose metric errors differ from layer to layer.

    A tensor's loss is its metric error times a constant of its projection; the whole keeps its size. Types differ by a
    factor that is the same for all. Raises QuantizeError.
    """
    path = report / "report.json" if report.is_dir() else report
    expected = ccq2_losses(plan)
    try:
        found = json.loads(path.read_text())
        errors = {each["name"]: float(each["metric_error"]) for each in found["tensors"]}
        types = {each["name"]: GgmlType[str(each["type"]).upper()] for each in found["tensors"]}
    except OSError as error:
        raise QuantizeError(f"{path}: {error.strerror}; expected report.json of an earlier --report") from error
    except (ValueError, KeyError, TypeError) as error:
        raise QuantizeError(f"{path}: not a report.json of `quantize --report` ({error!r})") from error
    missing = [name for name in expected if not errors.get(name, 0) > 0 or types[name] not in EXPERT_LOSS]
    if missing:
        raise QuantizeError(f"{path}: has no error of {missing[0]}: expected the report of a run on this checkpoint")
    in_ccq2 = {name: errors[name] * EXPERT_LOSS[GgmlType.CCQ2] / EXPERT_LOSS[types[name]] for name in expected}
    out: dict[str, float] = {}
    for projection in ("gate", "up", "down"):  # each projection keeps its share of the whole
        names = [name for name in expected if expert_of(name)[1] == projection]
        share = sum(expected[name] for name in names) / sum(in_ccq2[name] for name in names)
        out |= {name: in_ccq2[name] * share for name in names}
    return out


def header_nbytes(job: Job, label: str) -> int:
    """Bytes that the header of a mix takes at most, whatever its types; a few keys of calibration included."""
    labelled = replace(job, plan=replace(job.plan, label=label))
    with TemporaryDirectory() as folder:
        found = write_header(file_header(labelled, [labelled.plan], 0), Path(folder) / "header")
    return found + _NAME * len(job.plan.tensors) + _SPARE


def data_nbytes(plan: Plan) -> int:
    """Bytes of all tensors with their padding."""
    return sum(padded(tensor.nbytes) for tensor in plan.tensors)


def expert_bits(plan: Plan) -> float:
    """Bits per weight of the experts for text."""
    experts = [tensor for tensor in plan.tensors if tensor.is_expert]
    return 8 * sum(tensor.nbytes for tensor in experts) / sum(tensor.elements for tensor in experts)


def predicted_loss(plan: Plan, losses: Mapping[str, float]) -> float | None:
    """The sum of all losses; None if a type is not in the tables."""
    total, seen = 0.0, set()
    for tensor in plan.tensors:
        if tensor.is_expert:
            if tensor.ggml_type not in EXPERT_LOSS:
                return None
            total += losses[tensor.name] * EXPERT_LOSS[tensor.ggml_type] / EXPERT_LOSS[GgmlType.CCQ2]
        elif tensor.expected.role is Role.LINEAR and (part := part_of(tensor.name)) not in seen:
            seen.add(part)
            total += REST_LOSS[part].get(tensor.ggml_type, 0.0)
    return total


def _check_stock(overrides: Mapping[str, GgmlType], plan: Plan) -> None:
    wrong = [name for name, ggml_type in overrides.items() if ggml_type is GgmlType.CCQ2]
    if wrong:
        raise QuantizeError(f"{wrong[0]}: ccq2 is unknown to stock llama.cpp; leave --types stock out, or take iq2_s")
    if any(t.ggml_type is GgmlType.CCQ2 and not t.is_expert and t.name not in overrides for t in plan.tensors):
        raise QuantizeError(
            "--vision-experts ccq2 is unknown to stock llama.cpp; leave --types stock out, or give q4_0"
        )


def choose_mix(job: Job, request: MixRequest, chosen: Mapping[str, GgmlType]) -> Mix:
    """Give every tensor its type. `chosen` are types that other options give to tensors by name.

    Raises QuantizeError if the target is too small, or an override is wrong.
    """
    plan, losses = job.plan, request.losses or ccq2_losses(job.plan)
    fixed = {**chosen, **overridden(plan, request.overrides)}
    if request.stock:
        _check_stock(fixed, plan)
        plan = with_types(plan, {t.name: STOCK_DEFAULT for t in plan.tensors if t.is_expert and _fits(t)}, "")
    plan = with_types(plan, fixed, "")
    if request.target is None and request.bits is None:
        label = _label(plan, request)
        return _measured(job, with_types(plan, {}, label), header_nbytes(job, label), losses, ())
    whole = request.target is not None
    groups = groups_of(plan, fixed, losses, request.stock, rest=whole)
    loose = {tensor.name for group in groups for tensor in group.tensors}
    counted = [t for t in plan.tensors if t.name not in loose and (whole or t.is_expert)]
    base = sum(padded(tensor.nbytes) for tensor in counted)
    header = header_nbytes(job, _label(plan, request))
    if request.target is not None:
        base += header
        budget = request.target - base
    else:
        weights = sum(tensor.elements for tensor in plan.tensors if tensor.is_expert)
        budget = int(float(request.bits or 0) * weights / 8) - base
    _check_budget(budget, groups, base, job, request)
    mix = _Choice(job, plan, _label(plan, request), header, losses)
    return mix.best(groups, budget)


def _fits(tensor: TensorPlan) -> bool:
    return tensor.shape[-1] % 256 == 0


def _label(plan: Plan, request: MixRequest) -> str:
    """For the file's name: 80G, 2.50BPW, or the experts' type."""
    if request.target is not None:
        return next(f"{request.target / n:g}{u}" for u, n in reversed(_UNITS.items()) if request.target >= n)
    if request.bits is not None:
        return f"{request.bits:.2f}BPW"
    types = {tensor.ggml_type for tensor in plan.tensors if tensor.is_expert}
    return next(iter(types)).name if len(types) == 1 else "MIX"


def _check_budget(budget: int, groups: list[Group], base: int, job: Job, request: MixRequest) -> None:
    least = smallest(groups)
    if budget >= least:
        return
    if request.target is not None:
        raise QuantizeError(
            f"{job.source}: --target-size {human(request.target)} is too small: the smallest possible file has "
            f"{human(base + least)} ({base + least} bytes), {_smallest_types(groups)}"
        )
    weights = sum(tensor.elements for tensor in job.plan.tensors if tensor.is_expert)
    raise QuantizeError(
        f"{job.source}: --bits {request.bits:g} is too small: the smallest possible are "
        f"{8 * (base + least) / weights + 0.0005:.3f} bits per weight of the experts, {_smallest_types(groups)}"
    )


def _smallest_types(groups: list[Group]) -> str:
    names = dict.fromkeys(min(g.options, key=lambda option: option.nbytes).ggml_type.name.lower() for g in groups)
    return "all experts " + names.popitem()[0] if len(names) == 1 else f"with {', '.join(names)}"


@dataclass(frozen=True)
class _Choice:
    """What is known before the knapsack: the plan so far, its label, the header's bytes, the losses."""

    job: Job
    plan: Plan
    label: str
    header: int
    losses: Mapping[str, float]

    def best(self, groups: list[Group], budget: int) -> Mix:
        """The least loss within the budget, and steps around it."""
        curve = frontier(groups, min(int(budget * max(_STEPS)), largest(groups)) + len(groups))
        found = curve.at(budget)
        if found is None:  # the knapsack counts in whole units
            found = {t.name: min(g.options, key=lambda o: o.nbytes).ggml_type for g in groups for t in g.tensors}
        steps: list[Step] = []
        for share in _STEPS:
            types = found if share == 1 else curve.at(int(budget * share))
            if types is not None:
                mix = self.measured(types)
                step = Step(mix.nbytes, mix.bits, mix.loss or 0.0)
                if step not in steps:
                    steps.append(step)
        return replace(self.measured(found), steps=tuple(steps))

    def measured(self, types: Mapping[str, GgmlType]) -> Mix:
        """The mix with these types."""
        return _measured(self.job, with_types(self.plan, types, self.label), self.header, self.losses, ())


def _measured(job: Job, plan: Plan, header: int, losses: Mapping[str, float], steps: tuple[Step, ...]) -> Mix:
    nbytes = header + data_nbytes(plan)
    return Mix(replace(job, plan=plan), nbytes, expert_bits(plan), predicted_loss(plan, losses), steps)


def mix_json(mix: Mix) -> dict[str, Any]:
    """For --json."""
    return {
        "predicted_bytes": mix.nbytes,
        "expert_bits_per_weight": round(mix.bits, 4),
        "predicted_loss": mix.loss and round(mix.loss, 5),
        "types": {t.name: t.ggml_type.name.lower() for t in mix.job.plan.tensors if t.expected.role is not Role.EXACT},
        "notes": [f"{t.name}: {t.note}" for t in mix.job.plan.tensors if t.note],
        "steps": [{"bytes": s.nbytes, "bits": round(s.bits, 4), "loss": round(s.loss, 5)} for s in mix.steps],
        "fits": cards_that_fit(mix),
    }


CARDS = (
    ("one card of 24 GB", 24, 1),
    ("one card of 32 GB", 32, 1),
    ("2 cards of 24 GB", 24, 2),
    ("one card of 80 GB", 80, 1),
    ("4 cards of 24 GB", 24, 4),
    ("one card of 96 GB", 96, 1),
    ("128 GB of shared memory", 120, 1),
)
_CONTEXT = 8192
_MARGIN = 3 << 29  # bytes per card for compute buffers, driver and kernels


def kv_nbytes(mix: Mix) -> int:
    """Bytes of a KV cache of _CONTEXT tokens in q8_0."""
    config = mix.job.config
    return config.layers * 2 * config.kv_heads * config.head_dim * _CONTEXT * 34 // 32


def cards_that_fit(mix: Mix) -> list[str]:
    """The cards that file, cache and buffers fit by a plain sum; `info FILE --gpus` counts exactly."""
    need = mix.nbytes + kv_nbytes(mix)
    return [name for name, gib, count in CARDS if need + count * _MARGIN <= count * gib << 30]
