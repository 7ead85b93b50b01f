"""Plan: which GGUF tensor comes from which rows of which checkpoint tensors.

Pure: takes the configuration and the headers, reads no data. Every checkpoint tensor is either a source of exactly one
GGUF tensor (a fused one: of several, by disjoint rows) or dropped for a stated reason; every GGUF tensor that
llama.cpp will look for has its sources. Anything else is a PlanError.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod

from .checkpoint.config import ErnieConfig, MoeConfig
from .checkpoint.names import Names, collect
from .checkpoint.paddle_ccq import CCQ2
from .checkpoint.paddle_int import INT4, INT8
from .checkpoint.shards import TensorHeader
from .checkpoint.storage import Packing, Source, problem_of
from .errors import PlanError
from .gguf_file.outtype import Outtype
from .gguf_file.types import GgmlType, block_size, row_size

_SHOWN = 3  # how many of many like errors a message spells out


class Role(Enum):
    """What decides a tensor's type."""

    LINEAR = "linear"  # attention, dense and shared-expert MLPs, embedding, head
    EXPERT = "expert"  # the stacked expert matrices
    EXACT = "exact"  # norms, router, correction bias: always f32


# outtype -> types of linears and of experts; Role.EXACT is f32 throughout, as in upstream
TYPES: dict[Outtype, tuple[GgmlType, GgmlType]] = {
    Outtype.F32: (GgmlType.F32, GgmlType.F32),
    Outtype.BF16: (GgmlType.BF16, GgmlType.BF16),
    Outtype.F16: (GgmlType.F16, GgmlType.F16),
    Outtype.Q8_0: (GgmlType.Q8_0, GgmlType.Q8_0),
    Outtype.Q4_0: (GgmlType.Q8_0, GgmlType.Q4_0),
    Outtype.CCQ2: (GgmlType.Q8_0, GgmlType.CCQ2),
}

# What `auto` makes of quantized sources: the type that holds them exactly, and what such a file is called.
NATIVE: dict[Packing, GgmlType] = {INT8: GgmlType.Q8_0, INT4: GgmlType.Q4_0, CCQ2: GgmlType.CCQ2}
_NAMED_AFTER = ((CCQ2, Outtype.CCQ2), (INT4, Outtype.Q4_0), (INT8, Outtype.Q8_0))


@dataclass(frozen=True)
class Part:
    """`rows` rows of a source seen as [rows, K], beginning with `row`."""

    source: Source
    row: int
    rows: int


@dataclass(frozen=True)
class TensorPlan:
    """One GGUF tensor: its parts one after another. `shape` is outermost first, so its last entry is K = ne[0]."""

    name: str
    shape: tuple[int, ...]
    kind: GgmlType
    parts: tuple[Part, ...]
    note: str = ""

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def row_nbytes(self) -> int:
        """Bytes of one output row."""
        return row_size(self.kind, self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the output tensor."""
        return self.elements // self.shape[-1] * self.row_nbytes


def is_expert(tensor: TensorPlan) -> bool:
    """Whether it holds a layer's experts, one matrix each."""
    return "_exps." in tensor.name


@dataclass(frozen=True)
class Plan:
    """All of a conversion, in the order of writing. `outtype` is never AUTO; `dropped` pairs tensors with reasons."""

    outtype: Outtype
    tensors: tuple[TensorPlan, ...]
    dropped: tuple[tuple[TensorHeader, str], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all output tensors, without header and padding."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class _Want:
    """A GGUF tensor and where it may come from: `sources` are concatenated along their rows.

    With `fused`, the rows may instead be those from `fused_row` on of one tensor of `fused_rows` rows.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    sources: tuple[str, ...]
    fused: tuple[str, ...] = ()
    fused_row: int = 0
    fused_rows: int = 0


def _attention(config: ErnieConfig, gguf: str, hf: str) -> Iterator[_Want]:
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    row = 0
    for letter, rows in (("q", q), ("k", kv), ("v", kv)):
        yield _Want(
            f"{gguf}.attn_{letter}.weight",
            (rows, config.hidden),
            Role.LINEAR,
            (f"{hf}.self_attn.{letter}_proj.weight",),
            (f"{hf}.self_attn.qkv_proj.weight",),
            row,
            q + 2 * kv,
        )
        row += rows
    yield _Want(f"{gguf}.attn_output.weight", (config.hidden, q), Role.LINEAR, (f"{hf}.self_attn.o_proj.weight",))


def _mlp(name: str, modules: list[str], hidden: int, width: int, stacked: bool = False) -> Iterator[_Want]:
    """Gate, up and down of one MLP (`modules` holds one path), or of a layer's experts stacked.

    `name` is the GGUF name with {} for gate, up or down.
    """
    role, stack = (Role.EXPERT, (len(modules),)) if stacked else (Role.LINEAR, ())
    for half, letter in enumerate(("gate", "up")):  # up_gate_proj: gate in the first half of the rows, up in the second
        yield _Want(
            name.format(letter),
            (*stack, width, hidden),
            role,
            tuple(f"{module}.{letter}_proj.weight" for module in modules),
            tuple(f"{module}.up_gate_proj.weight" for module in modules),
            half * width,
            2 * width,
        )
    down = tuple(f"{module}.down_proj.weight" for module in modules)
    yield _Want(name.format("down"), (*stack, hidden, width), role, down)


def _moe(moe: MoeConfig, hidden: int, gguf: str, hf: str) -> Iterator[_Want]:
    yield _Want(f"{gguf}.ffn_gate_inp.weight", (moe.experts, hidden), Role.EXACT, (f"{hf}.mlp.gate.weight",))
    if moe.has_bias:
        bias = f"{hf}.mlp.moe_statics.e_score_correction_bias"
        yield _Want(f"{gguf}.exp_probs_b.bias", (moe.experts,), Role.EXACT, (bias,))
    experts = [f"{hf}.mlp.experts.{e}" for e in range(moe.experts)]
    yield from _mlp(gguf + ".ffn_{}_exps.weight", experts, hidden, moe.width, stacked=True)
    if moe.shared:
        yield from _mlp(gguf + ".ffn_{}_shexp.weight", [f"{hf}.mlp.shared_experts"], hidden, moe.shared_width)


def _wanted(config: ErnieConfig, has_head: bool) -> Iterator[_Want]:
    """Every tensor that llama.cpp's loader looks for, in its order."""
    embedding = (config.vocab, config.hidden)
    yield _Want("token_embd.weight", embedding, Role.LINEAR, ("model.embed_tokens.weight",))
    for layer in range(config.layers):
        gguf, hf = f"blk.{layer}", f"model.layers.{layer}"
        yield _Want(f"{gguf}.attn_norm.weight", (config.hidden,), Role.EXACT, (f"{hf}.input_layernorm.weight",))
        yield from _attention(config, gguf, hf)
        yield _Want(f"{gguf}.ffn_norm.weight", (config.hidden,), Role.EXACT, (f"{hf}.post_attention_layernorm.weight",))
        if config.moe is not None and config.is_moe_layer(layer):
            yield from _moe(config.moe, config.hidden, gguf, hf)
        else:
            yield from _mlp(gguf + ".ffn_{}.weight", [f"{hf}.mlp"], config.hidden, config.ffn_width)
    yield _Want("output_norm.weight", (config.hidden,), Role.EXACT, ("model.norm.weight",))
    if has_head:
        yield _Want("output.weight", embedding, Role.LINEAR, ("lm_head.weight",))


class _Planner:
    """Collects the plan and everything wrong with it, so that one message can count all of it."""

    def __init__(self, names: Names) -> None:
        self.sources = names.sources
        self.used: set[str] = set()
        self.errors: dict[str, None] = {}  # in order; a fused tensor is wrong once, not once per tensor made of it

    def fail(self, problem: str) -> None:
        self.errors[problem] = None

    def choose(self, want: _Want) -> tuple[tuple[str, ...], int, int]:
        """The names to take, their first row, and how many rows each must have in the checkpoint."""
        rows = want.shape[-2] if len(want.shape) > 1 else 1
        split = sum(name in self.sources for name in want.sources)
        if want.fused and split == 0 and any(name in self.sources for name in want.fused):
            return want.fused, want.fused_row, want.fused_rows
        return want.sources, 0, rows

    def parts(self, want: _Want) -> tuple[Part, ...]:
        names, row, source_rows = self.choose(want)
        rows, k = (want.shape[-2], want.shape[-1]) if len(want.shape) > 1 else (1, want.shape[-1])
        shape = (source_rows, k) if len(want.shape) > 1 else (k,)
        parts = []
        for name in names:
            self.used.add(name)
            if (source := self.sources.get(name)) is None:
                self.fail(f"tensor {name} is missing; expected {list(shape)} for {want.name}")
            elif (problem := problem_of(source, shape)) is not None:
                self.fail(problem)
            else:
                parts.append(Part(source, row, rows))
        return tuple(parts)

    def plan(self, want: _Want, kind: GgmlType, native: bool) -> TensorPlan:
        parts = self.parts(want)
        packings = {part.source.packing for part in parts}
        if native and packings & NATIVE.keys():
            if len(packings) > 1:
                found = sorted(packing.name for packing in packings)
                self.fail(f"tensor {want.name}: its sources are stored differently ({', '.join(found)})")
            kind = NATIVE[next(packing for packing in packings if packing in NATIVE)]
        k, note = want.shape[-1], ""
        if k % block_size(kind):
            if kind is GgmlType.CCQ2:
                self.fail(
                    f"tensor {want.name}: rows of {k} weights do not fit ccq2, which needs a multiple of "
                    f"{block_size(kind)}; use convert --outtype q8_0"
                )
            note = f"rows of {k} are no multiple of {block_size(kind)}: f16 instead of {kind.name.lower()}"
            kind = GgmlType.F16  # upstream's fallback
        return TensorPlan(want.name, want.shape, kind, parts, note)

    def check_leftovers(self) -> None:
        for name, source in self.sources.items():
            if name not in self.used:
                for header in source.tensors.values():
                    self.fail(f"tensor {header.name}: unknown, config.json gives it no place")

    def raise_errors(self) -> None:
        if not self.errors:
            return
        shown = "; ".join(list(self.errors)[:_SHOWN])
        rest = f"; and {len(self.errors) - _SHOWN} more" if len(self.errors) > _SHOWN else ""
        raise PlanError(shown + rest)


def resolve_auto(tensors: Mapping[str, TensorHeader]) -> Outtype:
    """What `auto` makes of floats: the dtype of the checkpoint's matrices (upstream's rule: the first one's), else f16.

    Paddle's raw uint16 is bfloat16.
    """
    floats = {"BF16": Outtype.BF16, "U16": Outtype.BF16, "F16": Outtype.F16}
    for tensor in tensors.values():
        if len(tensor.shape) >= 2 and tensor.dtype in floats:
            return floats[tensor.dtype]
    return Outtype.F16


def make_plan(
    config: ErnieConfig,
    tensors: Mapping[str, TensorHeader],
    outtype: Outtype,
    types: Mapping[str, GgmlType] | None = None,
) -> Plan:
    """Match a checkpoint's headers with what llama.cpp needs.

    `auto` keeps floats as they are stored and repacks what is quantized into the type that holds it exactly. `types`
    overrides the type of single GGUF tensors. The head is written if and only if the checkpoint has `lm_head.weight`;
    llama.cpp otherwise uses the embedding. Raises PlanError naming the first few tensors that are missing, unknown,
    misshapen or of an unexpected dtype.
    """
    names = collect(tensors, config)
    auto = outtype is Outtype.AUTO
    linear, expert = TYPES[resolve_auto(tensors) if auto else outtype]
    kinds = {Role.LINEAR: linear, Role.EXPERT: expert, Role.EXACT: GgmlType.F32}
    overrides = types or {}
    planner = _Planner(names)
    has_head = "lm_head.weight" in names.sources or not config.tied
    planned = tuple(
        planner.plan(want, overrides.get(want.name, kinds[want.role]), native=auto and want.name not in overrides)
        for want in _wanted(config, has_head)
    )
    planner.check_leftovers()
    planner.raise_errors()
    packings = {part.source.packing for tensor in planned for part in tensor.parts}
    label = next((name for packing, name in _NAMED_AFTER if packing in packings), resolve_auto(tensors))
    return Plan(label if auto else outtype, planned, tuple(names.dropped))
