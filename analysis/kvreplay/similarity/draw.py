"""Figures of similarity; each as PDF, PNG and CSV."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from kvreplay import canvas, curves
from kvreplay.matrices import TITLES
from kvreplay.similarity.trace import ALL, Tables

_COLOURS = "RdBu"
_RANKS = (-0.2, 1.0)  # range of colours for rank correlations, AsymKV's


def draw(tables: Tables, note: str, out: Path) -> list[Path]:
    """Every figure of a trace into the folder `out`; returns the written paths."""
    values = tables.values
    paths = []
    for layer, maps in tables.maps.items():
        paths += _maps(layer, maps, tables.edges, note, out / f"similarity-map-{layer:03d}")
    adjacent = values[values["quantity"].str.startswith(("adjacent", "mean"))]
    paths += _adjacent(adjacent, note, out / "similarity-adjacent")
    paths += _lags(tables.lags, note, out / "similarity-lag")
    paths += _ranks(values[values["quantity"] == "rank_correlation"], note, out / "similarity-rank")
    return paths + _sets(tables.sets, note, out / "similarity-sets")


def _maps(layer: int, maps: dict[str, np.ndarray], edges: np.ndarray, note: str, stem: Path) -> list[Path]:
    """Mean cosine of every pair of blocks of tokens: a line per matrix, a column per head."""
    heads = curves.some(range(len(maps["v"])))
    width = plt.rcParams["figure.figsize"][0]
    height = len(maps) * min(1.5, 0.95 * width / len(heads)) + 0.3
    fig, grid = plt.subplots(
        len(maps), len(heads), squeeze=False, sharex=True, sharey=True, layout="constrained", figsize=(width, height)
    )
    for line, (name, means) in zip(grid, maps.items(), strict=True):
        for ax, head in zip(line, heads, strict=True):
            image = _map(ax, means[head], int(edges[-1]))
        line[0].set_ylabel(TITLES[name])
    for ax, head in zip(grid[0], heads, strict=True):
        curves.title(ax, f"KV head {head}")
    fig.colorbar(image, ax=grid, pad=0.01, aspect=30).set_label("mean cosine")
    size = int(edges[1] - edges[0])
    canvas.finish(fig, height, [], f"{note}; layer {layer}; a pixel is {size} x {size} pairs of tokens")
    return canvas.save(fig, _map_numbers(layer, maps, edges), stem)


def _map(ax: Axes, means: np.ndarray, tokens: int):
    """One head's map; both axes are tokens."""
    extent = (0, tokens, tokens, 0)
    image = ax.imshow(means, cmap=_COLOURS, vmin=-1, vmax=1, extent=extent, interpolation="nearest")
    ax.grid(False)
    ax.set_xticks([0, tokens // 2])
    ax.set_yticks([0, tokens // 2])
    return image


def _map_numbers(layer: int, maps: dict[str, np.ndarray], edges: np.ndarray) -> pd.DataFrame:
    """One line per matrix, head and pair of blocks (each named by its first token), rounded to four digits."""
    rows, columns = np.tril_indices(len(edges) - 1)
    tables = [
        pd.DataFrame(
            {"layer": layer, "head": head, "matrix": name, "token": edges[rows], "other_token": edges[columns],
             "quantity": "mean_cosine", "value": np.round(one[rows, columns].astype(np.float64), 4)}
        )
        for name, means in maps.items()
        for head, one in enumerate(means)
    ]  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def _adjacent(table: pd.DataFrame, note: str, stem: Path) -> list[Path]:
    """Adjacent cosines over layers, a panel per matrix: median, quartiles, 5th and 95th percentile (means over heads);
    the mean of all pairs dotted."""
    names = [name for name in TITLES if name in set(table["matrix"])]
    fig, axes, height = curves.panels(len(names), 3, 1.7)
    for ax, name in zip(axes, names, strict=True):
        one = table[table["matrix"] == name].groupby(["layer", "quantity"])["value"].mean().unstack()
        style = curves.line_style(name, 1)
        for low, high in ((5, 95), (25, 75)):
            edges = one[f"adjacent_p{low:02d}"], one[f"adjacent_p{high:02d}"]
            ax.fill_between(one.index, *edges, color=style["color"], alpha=0.18, linewidth=0)
        ax.plot(one.index, one["adjacent_p50"], markersize=2.5, **style)
        ax.plot(one.index, one["mean"], color="#555555", linestyle=":", linewidth=0.8)
        curves.title(ax, TITLES[name])
        ax.set_ylim(*_limits(table))
        curves.layer_axis(ax)
    axes[0].set_ylabel("cosine of adjacent tokens")
    text = f"{note}; lines are medians, bands 25 to 75 % and 5 to 95 % of adjacent pairs, means over heads"
    canvas.finish(fig, height, [curves.dotted("mean of all pairs")], text)
    return canvas.save(fig, table, stem)


def _lags(table: pd.DataFrame, note: str, stem: Path) -> list[Path]:
    """Mean cosine against the distance of two tokens, a panel per layer."""
    fig, axes, height = curves.by_layer(table, "lag", "value")
    for ax in axes:
        ax.set(xlabel="lag (tokens)", ylim=_limits(table))
    axes[0].set_ylabel("mean cosine")
    names = [name for name in TITLES if name in set(table["matrix"])]
    canvas.finish(fig, height, curves.legend(TITLES, names), f"{note}; {curves.band('head')}")
    return canvas.save(fig, table, stem)


def _ranks(table: pd.DataFrame, note: str, stem: Path) -> list[Path]:
    """AsymKV's rank correlation of neighbours, head by layer, a panel per matrix."""
    names = [name for name in TITLES if name in set(table["matrix"])]
    fig, axes, height = curves.panels(len(names), 3, 1.7)
    for ax, name in zip(axes, names, strict=True):
        cells = table[table["matrix"] == name].pivot(index="head", columns="layer", values="value")
        image = ax.imshow(
            cells, cmap=matplotlib.colormaps[_COLOURS].with_extremes(bad="#cccccc"), vmin=_RANKS[0], vmax=_RANKS[1],
            aspect="auto", interpolation="nearest",
        )  # fmt: skip
        ax.grid(False)
        every = -(-cells.shape[1] // 8)
        ax.set_xticks(range(0, cells.shape[1], every), [str(layer) for layer in cells.columns[::every]])
        ax.set_yticks(range(0, cells.shape[0], -(-cells.shape[0] // 8)))
        ax.set_xlabel("layer")
        curves.title(ax, TITLES[name])
    axes[0].set_ylabel("KV head")
    fig.colorbar(image, ax=axes, pad=0.01, aspect=20, extend="min").set_label("rank correlation")
    canvas.finish(fig, height, [], f"{note}; of cos(i, j) and cos(i, j + 1), random pairs")
    return canvas.save(fig, table, stem)


def _sets(table: pd.DataFrame, note: str, stem: Path) -> list[Path]:
    """KVMerger's sparsity over layers, a line per threshold: mean over heads with standard deviation."""
    moments = table[table["head"] == ALL].pivot(index=["threshold", "layer"], columns="quantity", values="value")
    fig, (ax,), height = curves.panels(1, 1, 2.2)
    thresholds = moments.index.levels[0]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(thresholds)))
    handles = []
    for colour, threshold in zip(colours, thresholds, strict=True):
        one = moments.loc[threshold]
        mean, deviation = one["sparsity_mean"], one["sparsity_std"]
        ax.errorbar(mean.index, mean, deviation, color=colour, marker="o", markersize=2.5, capsize=1.5, linewidth=0.9)
        handles.append(Line2D([], [], color=colour, marker="o", markersize=2.5, label=f"cosine > {threshold:g}"))
    ax.set(ylabel="1 - sets / tokens", ylim=(0, 1))
    curves.layer_axis(ax)
    text = f"{note}; runs of adjacent post-RoPE keys, none protected; mean and standard deviation over heads"
    canvas.finish(fig, height, handles, text)
    return canvas.save(fig, table, stem)


def _limits(table: pd.DataFrame) -> tuple[float, float]:
    """Of an axis of cosines, the same in every panel."""
    return min(0.0, float(table["value"].min()) - 0.03), 1.03
