"""Plan: which GGML type each tensor of the mapping gets. Pure; everything is known before the first byte is written."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .checkpoint.config import ErnieConfig
from .checkpoint.k_order import KOrder
from .checkpoint.shards import TensorHeader
from .expected import Expected, Role
from .gguf_file.outtype import ExpertType, FloatType, Outtype
from .gguf_file.types import GgmlType, block_size, row_size
from .mapping import MappedTensor, Part, TensorMap, map_tensors, raise_plan_errors
from .reorder import absorb, is_absorbed, mixed, restore

# outtype -> types of linears and of experts; Role.EXACT is f32 throughout, as in upstream
TYPES: dict[Outtype, tuple[GgmlType, GgmlType]] = {
    Outtype.F32: (GgmlType.F32, GgmlType.F32),
    Outtype.BF16: (GgmlType.BF16, GgmlType.BF16),
    Outtype.F16: (GgmlType.F16, GgmlType.F16),
    Outtype.Q8_0: (GgmlType.Q8_0, GgmlType.Q8_0),
    Outtype.Q4_0: (GgmlType.Q8_0, GgmlType.Q4_0),
    Outtype.CCQ2: (GgmlType.Q8_0, GgmlType.CCQ2),
}


@dataclass(frozen=True)
class TensorPlan:
    """A mapped tensor with its type; `note` says why that type is not the one asked for.

    Row i of each block of `len(row_order)` rows is the source's row `row_order[i]` of that block; columns likewise.
    """

    mapped: MappedTensor
    ggml_type: GgmlType
    note: str
    row_order: tuple[int, ...]
    column_order: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The GGUF name."""
        return self.expected.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost first."""
        return self.expected.shape

    @property
    def expected(self) -> Expected:
        """What llama.cpp looks for."""
        return self.mapped.expected

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the checkpoint has of it."""
        return self.mapped.parts

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self.expected.elements

    @property
    def is_expert(self) -> bool:
        """Whether it holds a layer's experts for text, one matrix each."""
        return self.expected.role is Role.EXPERT

    @property
    def row_nbytes(self) -> int:
        """Bytes of one output row."""
        return row_size(self.ggml_type, self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensor."""
        return self.elements // self.shape[-1] * self.row_nbytes


@dataclass(frozen=True)
class Plan:
    """All of one file, in the order of writing. `outtype` is never AUTO; `dropped` pairs tensors with reasons.

    `label` names a mix of types, which has no outtype of its own.
    `absorbed`: its residual stream is in the stored order of shuffled 2-bit experts (see `reorder`).
    """

    outtype: Outtype
    tensors: tuple[TensorPlan, ...]
    dropped: tuple[tuple[TensorHeader, str], ...]
    absorbed: bool = False
    label: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors, without header and padding."""
        return sum(tensor.nbytes for tensor in self.tensors)


# What a tensor gets whose rows do not fit its type: upstream's f16, or before that a type with smaller blocks.
_FALLBACKS: dict[GgmlType, tuple[GgmlType, ...]] = {
    **dict.fromkeys(GgmlType, (GgmlType.F16,)),
    **dict.fromkeys((GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K), (GgmlType.Q8_0, GgmlType.F16)),
    **dict.fromkeys(
        (
            *(GgmlType.IQ2_XXS, GgmlType.IQ2_XS, GgmlType.IQ2_S, GgmlType.IQ3_XXS, GgmlType.IQ3_S, GgmlType.IQ4_XS),
            *(GgmlType.Q2_0, GgmlType.Q2_K, GgmlType.Q3_K),
        ),
        (GgmlType.Q4_0, GgmlType.F16),
    ),
}


def _native(parts: tuple[Part, ...]) -> set[GgmlType]:
    """The types that hold the quantized ones among these parts exactly."""
    return {GgmlType[part.source.storage.native.upper()] for part in parts if part.source.storage.native}


def _type_of(tensor: MappedTensor, ggml_type: GgmlType, native: bool, problems: list[str]) -> TensorPlan:
    """The tensor in `ggml_type`, or with `native` in the type that holds its quantized sources exactly."""
    if native and (exact := _native(tensor.parts)):
        found = sorted({part.source.storage.name for part in tensor.parts})
        if len(found) > 1:
            problems.append(f"tensor {tensor.name}: its sources are stored differently ({', '.join(found)})")
        ggml_type = next(iter(exact))
    k = tensor.shape[-1]
    if k % block_size(ggml_type) and ggml_type is GgmlType.CCQ2:
        problems.append(
            f"tensor {tensor.name}: rows of {k} weights do not fit ccq2, which needs a multiple of "
            f"{block_size(ggml_type)}; use convert --outtype q8_0"
        )
    fitting, note = _fallback(k, ggml_type)
    return TensorPlan(tensor, fitting, note, tensor.expected.head_order)


def _fallback(k: int, ggml_type: GgmlType) -> tuple[GgmlType, str]:
    """The type for rows of K weights where `ggml_type` is asked for, and why if it is another."""
    if k % block_size(ggml_type) == 0:
        return ggml_type, ""
    fitting = next(each for each in _FALLBACKS[ggml_type] if k % block_size(each) == 0)
    asked = f"{block_size(ggml_type)}: {fitting.name.lower()} instead of {ggml_type.name.lower()}"
    return fitting, f"rows of {k} are not a multiple of {asked}"


def retype(plan: Plan, types: Mapping[str, GgmlType]) -> Plan:
    """The plan with other types for tensors, by their names. Raises PlanError for rows that do not fit ccq2."""
    problems: list[str] = []
    tensors = tuple(_type_of(t.mapped, types[t.name], False, problems) if t.name in types else t for t in plan.tensors)
    raise_plan_errors(problems)
    return replace(plan, tensors=tensors)


def resolve_auto(tensors: Mapping[str, TensorHeader]) -> Outtype:
    """What `auto` makes of floats: the dtype of the checkpoint's matrices (upstream's rule: the first one's), else f16.

    Paddle's raw uint16 is bfloat16.
    """
    floats = {"BF16": Outtype.BF16, "U16": Outtype.BF16, "F16": Outtype.F16}
    for tensor in tensors.values():
        if len(tensor.shape) >= 2 and tensor.dtype in floats:
            return floats[tensor.dtype]
    return Outtype.F16


@dataclass(frozen=True)
class Choices:
    """What the command line says of single tensors' types; None leaves a type to the outtype.

    `tensors` are types by the GGUF's names, `vision_experts` and `projector` those of a VL checkpoint's other half.
    """

    tensors: Mapping[str, GgmlType] = field(default_factory=dict)
    vision_experts: GgmlType | None = None
    projector: GgmlType = GgmlType.BF16


def choose(
    token_embedding: FloatType | None = None,
    output: FloatType | None = None,
    vision_experts: ExpertType | None = None,
    projector: FloatType = FloatType.BF16,
) -> Choices:
    """What the options say."""
    tensors = {"token_embd.weight": token_embedding, "output.weight": output}
    return Choices(
        {name: GgmlType[kind.name] for name, kind in tensors.items() if kind is not None},
        None if vision_experts is None else GgmlType[vision_experts.name],
        GgmlType[projector.name],
    )


def make_plan(
    config: ErnieConfig,
    tensors: Mapping[str, TensorHeader],
    outtype: Outtype,
    choices: Choices | None = None,
) -> Plan:
    """Map a checkpoint's headers to GGUF tensors and give each its type: the plan of the model's file."""
    return make_plans(map_tensors(config, tensors), resolve_auto(tensors), outtype, choices)[0]


def make_plans(
    mapped: TensorMap,
    floats: Outtype,
    outtype: Outtype,
    choices: Choices | None = None,
    k_order: KOrder = KOrder.NATURAL,
) -> tuple[Plan, Plan | None]:
    """Give each tensor of a mapping its type and the order of its rows: plans of the model and, of VL, of the mmproj.

    `auto` keeps floats as they are stored (`floats`: see `resolve_auto`) and repacks what is quantized into the type
    that holds it exactly. Vision experts, which no calibration sees, are q8_0 where the outtype quantizes. `k_order` is
    that of 2-bit experts, never AUTO. Raises PlanError for rows that do not fit their type.
    """
    choices = choices or Choices()
    auto = outtype is Outtype.AUTO
    named = floats if auto else outtype
    linear, expert = TYPES[named]
    vision = choices.vision_experts or (GgmlType.Q8_0 if expert in (GgmlType.Q4_0, GgmlType.CCQ2) else expert)
    by_role = {Role.LINEAR: linear, Role.EXPERT: expert, Role.VISION_EXPERT: vision, Role.EXACT: GgmlType.F32}
    by_role[Role.PROJECTOR] = choices.projector
    problems: list[str] = []
    planned = tuple(
        _type_of(t, choices.tensors[t.name], False, problems)
        if t.name in choices.tensors
        else _type_of(t, by_role[t.expected.role], auto, problems)
        for t in mapped.tensors
    )
    projector = tuple(_type_of(t, by_role[t.expected.role], False, problems) for t in mapped.projector)
    if k_order is KOrder.SHUFFLED:
        unlike = [tensor.name for tensor in mapped.tensors if mixed(tensor)]
        problems += [f"tensor {name}: only some of its experts are 2-bit, and shuffled" for name in unlike]
    raise_plan_errors(problems)
    if auto and (native := _native(tuple(part for tensor in mapped.tensors for part in tensor.parts))):
        # A file of quantized sources is named after the smallest of their types.
        named = Outtype(min(native, key=lambda each: row_size(each, 256)).name.lower())
    absorbed = is_absorbed(planned, k_order)
    if k_order is KOrder.SHUFFLED:
        move = absorb if absorbed else restore
        planned, projector = tuple(map(move, planned)), tuple(map(move, projector))
    plan = Plan(named, planned, mapped.dropped, absorbed)
    mmproj = Plan(Outtype(choices.projector.name.lower()), projector, (), absorbed) if projector else None
    return plan, mmproj
