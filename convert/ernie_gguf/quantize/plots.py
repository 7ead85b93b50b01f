"""The plots of a report: PNG bytes from the statistics of the tensors. matplotlib is imported when one is drawn.

The same statistics give the same bytes with the same matplotlib. Colour-blind readers can tell the colours apart: they
are Okabe and Ito's and the map viridis. Lines differ in their markers too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import F64
from .stats import Group, MatrixStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Grid = F64  # [layers, experts]; NaN where there is no matrix

_LINES = {"gate": ("#0072B2", "o"), "up": ("#E69F00", "s"), "down": ("#009E73", "^")}  # colour, marker
_BARS = "#0072B2"
_WIDTH = 9.0  # inches
_BAR = 0.15  # inches, width of a colour bar
_DPI = 120
_MOST_LABELS = 16  # on an axis
_MOST_COLOURS = 99.0  # percentile that the colours reach: a few outliers must not hide the rest


@dataclass(frozen=True)
class Plot:
    """One plot: how it is drawn, and its text in report.md."""

    name: str
    title: str
    text: str
    draw: Callable[[Sequence[Group]], bytes]


def _new(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")


def _png(figure: Figure) -> bytes:
    out = BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})  # by default it names matplotlib's version
    return out.getvalue()


def _projections(tensors: Sequence[Group]) -> list[str]:
    """The projections that occur, in the order of the tensors."""
    return list(dict.fromkeys(tensor.projection for tensor in tensors))


def _layers(tensors: Sequence[Group]) -> list[int]:
    return sorted({tensor.layer for tensor in tensors})


def _experts(tensors: Sequence[Group]) -> list[int]:
    return sorted({matrix.expert for tensor in tensors for matrix in tensor.matrices})


def _grid(tensors: Sequence[Group], projection: str, value: Callable[[MatrixStats], float]) -> Grid:
    """One number per matrix of a projection: [layers, experts]."""
    rows = {layer: i for i, layer in enumerate(_layers(tensors))}
    columns = {expert: i for i, expert in enumerate(_experts(tensors))}
    grid = np.full((len(rows), len(columns)), np.nan)
    for tensor in tensors:
        for matrix in tensor.matrices if tensor.projection == projection else ():
            grid[rows[matrix.layer], columns[matrix.expert]] = value(matrix)
    return grid


def _labels(numbers: Sequence[int]) -> tuple[list[int], list[str]]:
    """Positions and labels for an axis: every one, every second, every fourth …, so that they do not overlap."""
    step = 1
    while len(numbers) > _MOST_LABELS * step:
        step *= 2
    return list(range(0, len(numbers), step)), [str(number) for number in numbers[::step]]


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def error_by_layer(tensors: Sequence[Group]) -> bytes:
    """Error in the calibration metric by layer, a line per projection and encoder."""
    figure = _new(4.5)
    axes = figure.add_subplot()
    layers = _layers(tensors)
    for projection in _projections(tensors):
        colour, marker = _LINES[projection]
        own = {tensor.layer: tensor for tensor in tensors if tensor.projection == projection}
        plain = [own[layer].plain_metric_error if layer in own else np.nan for layer in layers]
        calibrated = [own[layer].metric_error if layer in own else np.nan for layer in layers]
        lines = (("plain", plain, "--", "white"), ("calibrated", calibrated, "-", colour))
        for encoder, errors, line, face in lines:
            axes.plot(
                range(len(layers)),
                errors,
                label=f"{projection}, {encoder}",
                color=colour,
                linestyle=line,
                marker=marker,
                markerfacecolor=face,
                markersize=5,
            )
    axes.set_title("Error by layer, mean over experts")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error in the calibration metric")
    axes.xaxis.set_ticks(*_labels(layers))
    axes.set_ylim(bottom=0)
    _plain_axes(axes)
    figure.legend(loc="outside right center", frameon=False)
    return _png(figure)


def _heat_map(axes: Axes, grid: Grid, tensors: Sequence[Group], norm: Normalize) -> AxesImage:
    """Draw a [layers, experts] grid with crosses on the experts that got no token."""
    unseen = _grid(tensors, tensors[0].projection, lambda matrix: matrix.tokens) == 0
    image = axes.imshow(grid, norm=norm, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_facecolor("#dddddd")  # shows where the grid is NaN
    rows, columns = np.nonzero(unseen)
    axes.plot(columns, rows, "X", markersize=6, markerfacecolor="white", markeredgecolor="black", markeredgewidth=0.8)
    axes.yaxis.set_ticks(*_labels(_layers(tensors)))
    axes.xaxis.set_ticks(*_labels(_experts(tensors)))
    axes.set_ylabel("layer")
    return image


def error_by_expert(tensors: Sequence[Group]) -> bytes:
    """Error in the calibration metric of every expert matrix, a heat map per projection."""
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    projections = _projections(tensors)
    height = max(0.6, 0.1 * len(_layers(tensors)))
    figure = _new(0.8 + len(projections) * (height + 0.4))
    panels = figure.subplots(len(projections), sharex=True, squeeze=False)[:, 0]
    for axes, projection in zip(panels, projections, strict=True):
        grid = _grid(tensors, projection, lambda matrix: matrix.metric_error)
        values = grid[np.isfinite(grid)]
        least, top = np.percentile(values, [0, _MOST_COLOURS]) if values.size else (0, 1)
        image = _heat_map(axes, grid, tensors, Normalize(float(least), float(top)))
        axes.set_title(projection, loc="left", fontsize=10)
        bar = figure.colorbar(
            image, ax=axes, aspect=height / _BAR, extend="max", extendfrac=0.1 / height, pad=0.02, fraction=0.05
        )
        bar.locator = MaxNLocator(nbins=min(6, round(4 * height)))
        bar.ax.tick_params(labelsize=8)
    panels[-1].set_xlabel("expert")
    figure.suptitle("Relative error in the calibration metric, by layer and expert")
    return _png(figure)


def scale_histograms(tensors: Sequence[Group]) -> bytes:
    """How often each 4-bit group scale occurs, a panel per projection."""
    figure = _new(3.4)
    projections = _projections(tensors)
    panels = figure.subplots(1, len(projections), sharey=True, squeeze=False)[0]
    for axes, projection in zip(panels, projections, strict=True):
        counts = np.sum([tensor.scales for tensor in tensors if tensor.projection == projection], axis=0)
        axes.bar(range(16), 100 * counts / max(1, counts.sum()), color=_BARS, width=0.85)
        axes.set_title(projection, fontsize=10)
        axes.set_xlabel("group scale")
        axes.set_xticks([0, 3, 6, 9, 12, 15])
        _plain_axes(axes)
    panels[0].set_ylabel("share of the groups, %")
    figure.suptitle("Group scales")
    return _png(figure)


def expert_load(tensors: Sequence[Group]) -> bytes:
    """Tokens routed to each expert, a heat map with logarithmic colours."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, NullLocator

    tokens = _grid(tensors, tensors[0].projection, lambda matrix: matrix.tokens)
    tokens[tokens == 0] = np.nan
    seen = tokens[np.isfinite(tokens)]
    least, most = (float(seen.min()), float(seen.max())) if seen.size else (1.0, 1.0)
    height = max(1.0, 0.14 * len(tokens))
    figure = _new(height + 1.0)
    axes = figure.add_subplot()
    image = _heat_map(axes, tokens, tensors, LogNorm(least, max(most, least + 1)))
    axes.set_xlabel("expert")
    axes.set_title("Expert load: calibration tokens, by layer and expert")
    ticks = np.unique(np.geomspace(least, most, 4).round())  # from the fewest to the most tokens of any expert
    bar = figure.colorbar(image, ax=axes, aspect=height / _BAR, pad=0.02, fraction=0.05, ticks=ticks)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.ax.tick_params(labelsize=8)
    return _png(figure)


PLOTS = (
    Plot(
        "error-by-layer.png",
        "Error by layer",
        "The error in each layer's experts, in the calibration metric: solid with calibration, dashed with the plain "
        "encoder. The gap is what calibration gains. If a solid line reaches its dashed one, or a single layer stands "
        "out, look at that layer in the next plot.\n",
        error_by_layer,
    ),
    Plot(
        "error-by-expert.png",
        "Error by layer and expert",
        "The same error for every expert matrix. Each projection has its own range of colours; the worst hundredth of "
        "the matrices exceeds it. Crosses mark experts that got no token. A bright cell is an expert that 2 bits suit "
        "badly or that got too few tokens (compare the load below); a bright row is a hard layer.\n",
        error_by_expert,
    ),
    Plot(
        "scales.png",
        "Group scales",
        "How often the groups of 64 weights use each 4-bit scale. Most belong between 8 and 15, where one step changes "
        "the scale little. A peak at 15 means that the row scale is too small for its largest groups, many below 4 "
        "that a few outliers took the range, scale 0 that whole groups became zeros.\n",
        scale_histograms,
    ),
    Plot(
        "expert-load.png",
        "Expert load",
        "Calibration tokens routed to each expert. Colours are logarithmic; crosses mark experts that got none. "
        "Experts with few tokens blend with their layer's average and gain less from calibration. If many are dark or "
        "crossed out, the text is too short or too far from what the model will read.\n",
        expert_load,
    ),
)
