"""In which order of K a 2-bit checkpoint was quantized: natural or shuffled, found from its weights.

Baidu's engine changed the order in July 2025, and the files do not say which they have (docs/formats.md, the order of
K). A trained network does, in two ways that need not agree by construction:

- neurons: how large a neuron's gate and up rows are goes with how large its column of down is;
- channels: how large a channel's column of gate and up is goes with its weight in the norm before the experts.

Each is a rank correlation, computed as if K were stored in either order. In the wrong one, all but 4 of 64 partners are
strangers. Between random weights the difference of the two has a known spread: the figure is in standard deviations.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from ..arrays import F32, F64, U8
from ..errors import CheckpointError
from .config import ErnieConfig
from .k_order import GROUP, NATURAL, SHUFFLED, KOrder
from .paddle_ccq import CCQ2
from .shards import ShardReader
from .storage import Source
from .values import to_float32

CLEAR = 6.0  # standard deviations; docs/formats.md has the study
EXPERTS = 2  # of each layer that are looked at,
GROUPS = 8  # in that many groups of K: 200 MB of the 300B


@dataclass(frozen=True)
class Correlation:
    """A sign read in both orders: mean rank correlations, and their difference in standard deviations of chance.

    `sigmas` is positive if the natural order fits better.
    """

    natural: float
    shuffled: float
    sigmas: float

    @property
    def one_sided(self) -> bool:
        """Whether the better order explains at least twice as much as the worse."""
        low, high = sorted((abs(self.natural), abs(self.shuffled)))
        return high >= 2 * low


@dataclass(frozen=True)
class LayerSigns:
    """What one layer's experts say."""

    layer: int
    neurons: Correlation
    channels: Correlation

    @property
    def sigmas(self) -> float:
        """Both signs in one figure."""
        return (self.neurons.sigmas + self.channels.sigmas) / 2**0.5


@dataclass(frozen=True)
class KOrderFinding:
    """What the weights of a 2-bit checkpoint say about its order of K."""

    layers: tuple[LayerSigns, ...]
    neurons: Correlation
    channels: Correlation

    @property
    def sigmas(self) -> float:
        """All layers and signs in one figure, positive for the natural order."""
        return (self.neurons.sigmas + self.channels.sigmas) / 2**0.5

    @property
    def order(self) -> KOrder:
        """NATURAL or SHUFFLED where the figure is clear, else AUTO."""
        strongest = max((self.neurons, self.channels), key=lambda sign: abs(sign.sigmas))
        if abs(self.sigmas) < CLEAR or not strongest.one_sided or self.disagreeing:
            return KOrder.AUTO
        return KOrder.NATURAL if self.sigmas > 0 else KOrder.SHUFFLED

    @property
    def disagreeing(self) -> tuple[int, ...]:
        """The layers that clearly contradict the others."""
        sign = np.sign(self.sigmas)
        return tuple(each.layer for each in self.layers if abs(each.sigmas) >= CLEAR and np.sign(each.sigmas) != sign)

    def __str__(self) -> str:
        order = self.order.value if self.order is not KOrder.AUTO else "unclear"
        return (
            f"{order}, by {abs(self.sigmas):.1f} standard deviations over {len(self.layers)} layers (clear from "
            f"{CLEAR:g}); rank correlations if natural and if shuffled: neurons {self.neurons.natural:.2f} and "
            f"{self.neurons.shuffled:.2f}, channels {self.channels.natural:.2f} and {self.channels.shuffled:.2f}"
        )


def _groups(k: int) -> list[int]:
    """Numbers of the groups that are looked at, spread evenly."""
    count = k // GROUP
    wanted = min(GROUPS, count)
    return [i * count // wanted for i in range(wanted)]


# The squares of the four weights of each 15-bit code, float32 [2^15, 4], and their sums.
_WINDOWS = (np.arange(1 << 15)[:, None] >> np.array([9, 6, 3, 0]) & 63) - 32
_FOURS = np.square(_WINDOWS).astype(np.float32)
_SUMS = _FOURS.sum(1)


def _squares(reader: ShardReader, source: Source, group: int) -> tuple[F32, F32]:
    """Sums of squared weights of one group of K: by stored position [64], by output channel [N]."""
    codes: U8 = reader.read_rows(source.tensors["quant_weight"], group * GROUP // 4, GROUP // 4).view(np.uint8)
    packed: U8 = reader.read_rows(source.tensors["weight_scale"], group // 2, 1).view(np.uint8)[0]
    scale, supers = packed & 15 if group % 2 else packed >> 4, source.tensors["super_scales"]
    cs, cz = (reader.read_all(source.tensors[name]) for name in ("code_scale", "code_zp"))
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged file may hold anything
        power = np.square(scale * to_float32(reader.read_all(supers), supers.dtype))
        code = np.nan_to_num(np.floor(codes * cs + (cz + np.float32(0.5)))).astype(np.int64) & 0x7FFF  # [16, N]
        fours = np.take(_FOURS.view("V16")[:, 0], code).view(np.float32).reshape(*code.shape, 4)
        positions: F32 = (power @ fours).reshape(GROUP)
        return positions, np.take(_SUMS, code).sum(0) * power


def _ranks(values: F32 | F64) -> F64:
    """Ranks from 0; equal values share theirs, so that a matrix of zeros has no order."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    out: F64 = (last - (counts + 1) / 2)[inverse]
    return out


def _rank_correlation(x: F32 | F64, y: F32 | F64) -> float:
    """Spearman's; 0 where one of them is constant."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0


def _channels_of(groups: list[int], order: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The channels of the stored positions of some groups."""
    out: npt.NDArray[np.int64] = (np.array(groups)[:, None] * GROUP + np.array(order)).reshape(-1)
    return out


def _expert(reader: ShardReader, up_gate: list[Source], down: Source, k: int, width: int) -> tuple[F64, F32, F32]:
    """Of one expert: sizes of gate and up by neuron [width]; their columns' sizes, then down's, in stored positions."""
    rows, columns = np.zeros(2 * width), []
    for group in _groups(k):
        found = [_squares(reader, source, group) for source in up_gate]
        columns.append(np.sum([positions for positions, _ in found], axis=0))
        rows += np.concatenate([channels for _, channels in found])
    inner = [_squares(reader, down, group)[0] for group in _groups(width)]
    return rows[:width] * rows[width:], np.concatenate(columns), np.concatenate(inner)


Expert = tuple[list[Source], Source]  # gate and up, fused or not; down


def _two_bit_experts(sources: Mapping[str, Source], experts: int, layer: int) -> list[Expert]:
    """Of the experts of a layer that are 2-bit, those that are looked at: some, spread evenly."""
    found = []
    for expert in range(experts):
        module = f"model.layers.{layer}.mlp.experts.{expert}"
        fused = sources.get(f"{module}.up_gate_proj.weight")
        up_gate = [fused] if fused else [sources[f"{module}.{half}_proj.weight"] for half in ("gate", "up")]
        down = sources[f"{module}.down_proj.weight"]
        if all(source.storage is CCQ2 for source in (*up_gate, down)):
            found.append((up_gate, down))
    wanted = min(EXPERTS, len(found))
    return [found[i * len(found) // wanted] for i in range(wanted)]


def _looked_at(config: ErnieConfig, sources: Mapping[str, Source]) -> dict[int, tuple[Source, list[Expert]]]:
    """The norm before the experts and some of these, by layer; empty without 2-bit experts."""
    if config.moe is None or not any(source.storage is CCQ2 for source in sources.values()):
        return {}
    layers = [layer for layer in range(config.layers) if config.is_moe_layer(layer)]
    experts = {layer: _two_bit_experts(sources, config.moe.experts, layer) for layer in layers}
    norm = "model.layers.{}.post_attention_layernorm.weight"
    return {layer: (sources[norm.format(layer)], found) for layer, found in experts.items() if found}


def spans(config: ErnieConfig, sources: Mapping[str, Source]) -> Iterator[tuple[Path, int, int]]:
    """The bytes, as file, begin and end, that `find_k_order` reads."""
    for norm, experts in _looked_at(config, sources).values():
        yield norm.main.path, norm.main.offset, norm.main.offset + norm.main.nbytes
        for source in (each for up_gate, down in experts for each in (*up_gate, down)):
            yield from _spans_of(source)


def _spans_of(source: Source) -> Iterator[tuple[Path, int, int]]:
    for name in ("super_scales", "code_scale", "code_zp"):
        header = source.tensors[name]
        yield header.path, header.offset, header.offset + header.nbytes
    codes, scales = source.tensors["quant_weight"], source.tensors["weight_scale"]
    for group in _groups(4 * codes.shape[0]):
        for header, row, rows in ((codes, group * GROUP // 4, GROUP // 4), (scales, group // 2, 1)):
            begin = header.offset + row * header.row_nbytes
            yield header.path, begin, begin + rows * header.row_nbytes


def _layer(reader: ShardReader, layer: int, norm: Source, experts: list[Expert], *, k: int, width: int) -> LayerSigns:
    """The signs of one layer."""
    fits, columns = [], np.zeros(len(_groups(k)) * GROUP)
    for up_gate, down in experts:
        rows, wide, inner = _expert(reader, up_gate, down, k, width)
        columns += wide
        fits.append(
            [_rank_correlation(rows[_channels_of(_groups(width), order)], inner) for order in (NATURAL, SHUFFLED)]
        )
    weights = to_float32(reader.read_all(norm.main), norm.dtype)
    natural, shuffled = (
        _rank_correlation(weights[_channels_of(_groups(k), order)], columns) for order in (NATURAL, SHUFFLED)
    )
    a, b = np.mean(fits, axis=0)
    neurons = len(_groups(width)) * GROUP
    # By chance a rank correlation of n values is normal with deviation 1/√(n-1); the size of one has 0.603 of it.
    return LayerSigns(
        layer,
        Correlation(a, b, float((a - b) * np.sqrt(len(experts) * (neurons - 1) / 2))),
        Correlation(natural, shuffled, float((abs(natural) - abs(shuffled)) * np.sqrt((len(columns) - 1) / 2) / 0.603)),
    )


def _mean(signs: list[Correlation]) -> Correlation:
    """Layers together: independent, so their deviations add up as squares do."""
    sigmas = sum(sign.sigmas for sign in signs) / len(signs) ** 0.5
    natural, shuffled = (float(np.mean([getattr(sign, name) for sign in signs])) for name in ("natural", "shuffled"))
    return Correlation(natural, shuffled, sigmas)


def find_k_order(config: ErnieConfig, sources: Mapping[str, Source], threads: int = 2) -> KOrderFinding | None:
    """What a checkpoint's 2-bit experts say about their order of K; None if it has none.

    Reads about 4 MB of each such layer of the 300B. `sources` are complete and well shaped (see `mapping`).
    """
    layers = _looked_at(config, sources)
    if not layers or config.moe is None:
        return None
    k, width = config.hidden, config.moe.width

    def signs_of(layer: int) -> LayerSigns:
        return _layer(reader, layer, *layers[layer], k=k, width=width)

    with ShardReader() as reader, ThreadPoolExecutor(threads) as executor:
        reader.open({path for source in sources.values() for path in source.paths})
        signs = tuple(executor.map(signs_of, layers))
    return KOrderFinding(signs, _mean([each.neurons for each in signs]), _mean([each.channels for each in signs]))


def raise_unclear(finding: KOrderFinding, where: str) -> NoReturn:
    """Raise the CheckpointError for weights that do not tell the order, naming the option that does."""
    if disagreeing := finding.disagreeing:
        layers = ", ".join(map(str, disagreeing))
        raise CheckpointError(
            f"{where}: its 2-bit experts do not agree about their order of K: layers {layers} contradict the others "
            f"({finding}); two checkpoints in one folder? --ccq-k-order natural or shuffled reads it all the same"
        )
    raise CheckpointError(
        f"{where}: cannot tell in which order of K its 2-bit experts were quantized ({finding}); say --ccq-k-order "
        "natural or --ccq-k-order shuffled (docs/formats.md, the order of K)"
    )
