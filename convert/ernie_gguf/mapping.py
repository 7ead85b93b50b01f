"""Mapping: which GGUF tensor comes from which rows of which checkpoint tensors. Knows shapes and roles, no types.

Pure: takes the configuration and the headers, reads no data. Every checkpoint tensor is either a source of exactly one
GGUF tensor (a fused one: of several, by disjoint rows) or dropped for a stated reason; every GGUF tensor that
llama.cpp will look for (see `expected`) has its sources. Anything else is a PlanError.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .checkpoint.config import ErnieConfig
from .checkpoint.names import Names, collect
from .checkpoint.shards import TensorHeader
from .checkpoint.storage import Source, problem_of
from .errors import PlanError
from .expected import Expected, model_tensors, projector_tensors

_SHOWN = 3  # how many of many like errors a message spells out


@dataclass(frozen=True)
class Part:
    """`rows` rows of a source seen as [rows, K], beginning with `row`."""

    source: Source
    row: int
    rows: int


@dataclass(frozen=True)
class MappedTensor:
    """One GGUF tensor and its parts, one after another; none if it is computed."""

    expected: Expected
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The GGUF name."""
        return self.expected.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Outermost first."""
        return self.expected.shape


@dataclass(frozen=True)
class TensorMap:
    """Every tensor of the GGUF in the order of writing; `dropped` pairs checkpoint tensors with reasons.

    `projector` are those of the mmproj, for a VL checkpoint. `sources` are what the checkpoint has, by canonical name.
    """

    tensors: tuple[MappedTensor, ...]
    dropped: tuple[tuple[TensorHeader, str], ...]
    projector: tuple[MappedTensor, ...]
    sources: Mapping[str, Source]


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

    def choose(self, expected: Expected) -> tuple[tuple[str, ...], int, int]:
        """The names to take, their first row, and how many rows each must have in the checkpoint."""
        rows = expected.shape[-2] if len(expected.shape) > 1 else 1
        split = sum(name in self.sources for name in expected.sources)
        if expected.fused and split == 0 and any(name in self.sources for name in expected.fused):
            return expected.fused, expected.fused_row, expected.fused_rows
        return expected.sources, expected.row, rows

    def map(self, expected: Expected) -> MappedTensor:
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
        return MappedTensor(expected, tuple(parts))

    def map_all(self, expected: Iterable[Expected]) -> tuple[MappedTensor, ...]:
        return tuple(self.map(each) for each in expected)

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
    mapped = mapper.map_all(model_tensors(config, has_head))
    projector = mapper.map_all(projector_tensors(config.vision, config.hidden)) if config.vision else ()
    mapper.check_leftovers()
    raise_plan_errors(list(mapper.problems))
    return TensorMap(mapped, tuple(names.dropped), projector, names.sources)
