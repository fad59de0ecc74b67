"""What figures about matrices share: a look per matrix, a grid of panels by layer, a curve with its band over heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from kvreplay.style import DASH, DASHDOT, Style

_MATRICES = {
    "k_post": Style("#0072B2", "o"),
    "k_pre": Style("#56B4E9", "^", DASH),
    "v": Style("#D55E00", "s", DASHDOT),
    "w_q": Style("#009E73", "^", DASH),
    "w_k": Style("#0072B2", "o"),
    "w_v": Style("#D55E00", "s", DASHDOT),
}
_MOST = 12  # panels of a figure


def line_style(matrix: str, points: int) -> dict:
    """Colour and dash of `matrix`, with its marker when a line of so many `points` has room for markers."""
    look = _MATRICES[matrix]
    return {"color": look.color, "linestyle": look.dash, "marker": look.marker if points <= 40 else None}


def legend(titles: dict[str, str], names: Iterable[str]) -> list[Line2D]:
    """Legend entries of the matrices `names`."""
    return [Line2D([], [], **line_style(name, 1), markersize=3, label=titles[name]) for name in names]


def dotted(text: str) -> Line2D:
    """The legend entry of thin dotted lines."""
    return Line2D([], [], color="#555555", linestyle=":", linewidth=0.8, label=text)


def some(layers: Sequence[int]) -> list[int]:
    """At most a dozen of `layers`, evenly spread, first and last among them: what fits into one figure."""
    if len(layers) <= _MOST:
        return list(layers)
    return [layers[i] for i in np.linspace(0, len(layers) - 1, _MOST).round().astype(int)]


def panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes], float]:
    """(figure, `count` panels, their height together in inches): `columns` beside each other, `height` inches each."""
    columns = min(columns, count)
    lines = -(-count // columns)
    width, total = plt.rcParams["figure.figsize"][0], lines * height + 0.2
    fig, grid = plt.subplots(lines, columns, squeeze=False, layout="constrained", figsize=(width, total))
    for ax in grid.flat[count:]:
        ax.axis("off")
    return fig, list(grid.flat[:count]), total


def curve(ax: Axes, x: np.ndarray, values: np.ndarray, matrix: str) -> None:
    """The mean of `values` [heads (or layers), n] over its first axis, and a band from the lowest to the highest."""
    style = line_style(matrix, len(x))
    ax.plot(x, values.mean(0), markersize=2.5, **style)
    if len(values) > 1:
        ax.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.18, linewidth=0)


def by_layer(table: pd.DataFrame, across: str, value: str) -> tuple[Figure, list[Axes], float]:
    """`panels`, one a layer of `table`: for every matrix `value` against the column `across`, curves over its heads."""
    layers = some(sorted(set(table["layer"])))
    fig, axes, height = panels(len(layers), 4, 1.45)
    for ax, layer in zip(axes, layers, strict=True):
        for name, one in table[table["layer"] == layer].groupby("matrix"):
            values = one.pivot(index="head", columns=across, values=value)
            curve(ax, values.columns.to_numpy(), values.to_numpy(), name)
        title(ax, f"layer {layer}")
    return fig, axes, height


def band(what: str) -> str:
    """What a footer says about curves over every `what` (head, layer)."""
    return f"lines are means, bands reach from the lowest to the highest {what}"


def title(ax: Axes, text: str) -> None:
    """A small title, where many panels stand close."""
    ax.set_title(text, fontsize=plt.rcParams["legend.fontsize"], pad=2)


def layer_axis(ax: Axes) -> None:
    """Whole numbers, labelled as layers."""
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("layer")
