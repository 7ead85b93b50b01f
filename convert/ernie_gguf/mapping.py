"""Mapping: which GGUF tensor comes from which rows of which checkpoint tensors. Knows shapes and roles, no types.

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
from .checkpoint.shards import TensorHeader
from .checkpoint.storage import Source, problem_of
from .errors import PlanError

_SHOWN = 3  # how many of many like errors a message spells out


class Role(Enum):
    """What decides a tensor's type."""

    LINEAR = "linear"  # attention, dense and shared-expert MLPs, embedding, head
    EXPERT = "expert"  # the stacked expert matrices
    EXACT = "exact"  # norms, router, correction bias: always f32


@dataclass(frozen=True)
class Part:
    """`rows` rows of a source seen as [rows, K], beginning with `row`."""

    source: Source
    row: int
    rows: int


@dataclass(frozen=True)
class MappedTensor:
    """One GGUF tensor: its parts one after another. `shape` is outermost first, so its last entry is K = ne[0]."""

    name: str
    shape: tuple[int, ...]
    role: Role
    parts: tuple[Part, ...]

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def is_expert(self) -> bool:
        """Whether it holds a layer's experts, one matrix each."""
        return self.role is Role.EXPERT


@dataclass(frozen=True)
class TensorMap:
    """Every tensor of the GGUF in the order of writing; `dropped` pairs checkpoint tensors with reasons."""

    tensors: tuple[MappedTensor, ...]
    dropped: tuple[tuple[TensorHeader, str], ...]


@dataclass(frozen=True)
class _Expected:
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


def _attention(config: ErnieConfig, gguf: str, hf: str) -> Iterator[_Expected]:
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    row = 0
    for letter, rows in (("q", q), ("k", kv), ("v", kv)):
        yield _Expected(
            f"{gguf}.attn_{letter}.weight",
            (rows, config.hidden),
            Role.LINEAR,
            (f"{hf}.self_attn.{letter}_proj.weight",),
            (f"{hf}.self_attn.qkv_proj.weight",),
            row,
            q + 2 * kv,
        )
        row += rows
    yield _Expected(f"{gguf}.attn_output.weight", (config.hidden, q), Role.LINEAR, (f"{hf}.self_attn.o_proj.weight",))


def _mlp(name: str, modules: list[str], hidden: int, width: int, stacked: bool = False) -> Iterator[_Expected]:
    """Gate, up and down of one MLP (`modules` holds one path), or of a layer's experts stacked.

    `name` is the GGUF name with {} for gate, up or down.
    """
    role, stack = (Role.EXPERT, (len(modules),)) if stacked else (Role.LINEAR, ())
    for half, letter in enumerate(("gate", "up")):  # up_gate_proj: gate in the first half of the rows, up in the second
        yield _Expected(
            name.format(letter),
            (*stack, width, hidden),
            role,
            tuple(f"{module}.{letter}_proj.weight" for module in modules),
            tuple(f"{module}.up_gate_proj.weight" for module in modules),
            half * width,
            2 * width,
        )
    down = tuple(f"{module}.down_proj.weight" for module in modules)
    yield _Expected(name.format("down"), (*stack, hidden, width), role, down)


def _moe(moe: MoeConfig, hidden: int, gguf: str, hf: str) -> Iterator[_Expected]:
    yield _Expected(f"{gguf}.ffn_gate_inp.weight", (moe.experts, hidden), Role.EXACT, (f"{hf}.mlp.gate.weight",))
    if moe.has_bias:
        bias = f"{hf}.mlp.moe_statics.e_score_correction_bias"
        yield _Expected(f"{gguf}.exp_probs_b.bias", (moe.experts,), Role.EXACT, (bias,))
    experts = [f"{hf}.mlp.experts.{e}" for e in range(moe.experts)]
    yield from _mlp(gguf + ".ffn_{}_exps.weight", experts, hidden, moe.width, stacked=True)
    if moe.shared:
        yield from _mlp(gguf + ".ffn_{}_shexp.weight", [f"{hf}.mlp.shared_experts"], hidden, moe.shared_width)


def _expected(config: ErnieConfig, has_head: bool) -> Iterator[_Expected]:
    """Every tensor that llama.cpp's loader looks for, in its order."""
    embedding = (config.vocab, config.hidden)
    norm = (config.hidden,)
    yield _Expected("token_embd.weight", embedding, Role.LINEAR, ("model.embed_tokens.weight",))
    for layer in range(config.layers):
        gguf, hf = f"blk.{layer}", f"model.layers.{layer}"
        yield _Expected(f"{gguf}.attn_norm.weight", norm, Role.EXACT, (f"{hf}.input_layernorm.weight",))
        yield from _attention(config, gguf, hf)
        yield _Expected(f"{gguf}.ffn_norm.weight", norm, Role.EXACT, (f"{hf}.post_attention_layernorm.weight",))
        if config.moe is not None and config.is_moe_layer(layer):
            yield from _moe(config.moe, config.hidden, gguf, hf)
        else:
            yield from _mlp(gguf + ".ffn_{}.weight", [f"{hf}.mlp"], config.hidden, config.ffn_width)
    yield _Expected("output_norm.weight", norm, Role.EXACT, ("model.norm.weight",))
    if has_head:
        yield _Expected("output.weight", embedding, Role.LINEAR, ("lm_head.weight",))


def raise_plan_errors(problems: list[str]) -> None:
    """Raise one PlanError that spells out the first few problems and counts the rest; nothing if there are none."""
    if not problems:
        return
    rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise PlanError("; ".join(problems[:_SHOWN]) + rest)


class _Mapper:
    """Finds the parts of each tensor and collects everything wrong, so that one message can count all of it."""

    def __init__(self, names: Names) -> None:
        self.sources = names.sources
        self.used: set[str] = set()
        self.problems: dict[str, None] = {}  # in order; a fused tensor is wrong once, not once per tensor made of it

    def fail(self, problem: str) -> None:
        self.problems[problem] = None

    def choose(self, expected: _Expected) -> tuple[tuple[str, ...], int, int]:
        """The names to take, their first row, and how many rows each must have in the checkpoint."""
        rows = expected.shape[-2] if len(expected.shape) > 1 else 1
        split = sum(name in self.sources for name in expected.sources)
        if expected.fused and split == 0 and any(name in self.sources for name in expected.fused):
            return expected.fused, expected.fused_row, expected.fused_rows
        return expected.sources, 0, rows

    def map(self, expected: _Expected) -> MappedTensor:
        names, row, source_rows = self.choose(expected)
        matrix, k = len(expected.shape) > 1, expected.shape[-1]
        rows = expected.shape[-2] if matrix else 1
        shape = (source_rows, k) if matrix else (k,)
        parts = []
        for name in names:
            self.used.add(name)
            if (source := self.sources.get(name)) is None:
                self.fail(f"tensor {name} is missing; expected {list(shape)} for {expected.name}")
            elif (problem := problem_of(source, shape)) is not None:
                self.fail(problem)
            else:
                parts.append(Part(source, row, rows))
        return MappedTensor(expected.name, expected.shape, expected.role, tuple(parts))

    def check_leftovers(self) -> None:
        for name, source in self.sources.items():
            if name not in self.used:
                for header in source.tensors.values():
                    self.fail(f"tensor {header.name}: unknown, config.json gives it no place")


def map_tensors(config: ErnieConfig, tensors: Mapping[str, TensorHeader]) -> TensorMap:
    """Match a checkpoint's headers with what llama.cpp needs.

    The head is mapped if and only if the checkpoint has `lm_head.weight`; llama.cpp otherwise uses the embedding.
    Raises PlanError naming the first few tensors that are missing, unknown, misshapen or of an unexpected dtype.
    """
    names = collect(tensors, config)
    mapper = _Mapper(names)
    has_head = "lm_head.weight" in names.sources or not config.tied
    mapped = tuple(mapper.map(expected) for expected in _expected(config, has_head))
    mapper.check_leftovers()
    raise_plan_errors(list(mapper.problems))
    return TensorMap(mapped, tuple(names.dropped))
