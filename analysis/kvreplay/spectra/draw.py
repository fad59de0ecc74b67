"""Figures of spectra; each as PDF, PNG and CSV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from kvreplay import canvas, curves
from kvreplay.spectra.ranks import ALL, TITLES

_GRID = np.linspace(0, 1, 101)  # shares of min(dim) at which cumulative energies of different sizes are compared
_FLOOR = 1e-3  # singular values below this share of the largest are not drawn


def weights(spectra: pd.DataFrame, matrices: dict[str, str], note: str, stem: Path) -> list[Path]:
    """Cumulative energy against the share of min(dim), and decay of the singular values: mean over layers, band from
    the lowest to the highest layer."""
    fig, (left, right), height = curves.panels(2, 2, 2.1)
    for name in matrices:
        layers = [one for _, one in spectra[spectra["matrix"] == name].groupby("layer")]
        share = [np.interp(_GRID, _with_origin(one["index"] / one["dim"]), _with_origin(one["cumulative_energy"]))
                 for one in layers]  # fmt: skip
        curves.curve(left, _GRID, np.array(share), name)
        size = min(len(one) for one in layers)
        decay = np.array([one["relative"].to_numpy()[:size] for one in layers])
        curves.curve(right, np.arange(1, size + 1), decay, name)
    left.set(xlabel="share of min(dim)", ylabel="cumulative energy")
    right.set(xlabel="index", ylabel="singular value / largest", xscale="log", yscale="log", ylim=(_FLOOR, 1.3))
    canvas.finish(fig, height, curves.legend(matrices, matrices), f"{note}; {curves.band('layer')}")
    return canvas.save(fig, spectra, stem)


def spectra(table: pd.DataFrame, matrices: dict[str, str], note: str, stem: Path) -> list[Path]:
    """Singular values divided by the largest, a panel per layer: mean over heads, band from the lowest to the highest
    head."""
    fig, axes, height = curves.by_layer(table, "index", "relative")
    for ax in axes:
        ax.set(yscale="log", ylim=(_FLOOR, 1.3), xlabel="index")
    axes[0].set_ylabel("singular value / largest")
    names = [name for name in matrices if name in set(table["matrix"])]
    canvas.finish(fig, height, curves.legend(matrices, names), f"{note}; {curves.band('head')}")
    return canvas.save(fig, table, stem)


def ranks(table: pd.DataFrame, matrices: dict[str, str], note: str, stem: Path) -> list[Path]:
    """Every quantity over layers, a panel each: heads as mean and band, whole matrices (where there are) dotted."""
    fig, axes, height = curves.panels(len(TITLES), 3, 1.35)
    for ax, (quantity, text) in zip(axes, TITLES.items(), strict=True):
        for name, one in table[table["quantity"] == quantity].groupby("matrix"):
            _over_layers(ax, one, name)
        ranked = not quantity.endswith("energy")
        curves.title(ax, f"{text} / dim" if ranked else text)
        ax.set_ylim(bottom=0)
        curves.layer_axis(ax)
    handles = curves.legend(matrices, [name for name in matrices if name in set(table["matrix"])])
    if (table["head"] == ALL).any():
        handles += [curves.dotted("all heads as one matrix")]
    canvas.finish(fig, height, handles, f"{note}; {curves.band('head')}")
    return canvas.save(fig, table, stem)


def _over_layers(ax: Axes, table: pd.DataFrame, matrix: str) -> None:
    """One quantity of one matrix."""
    heads = table[table["head"] != ALL].pivot(index="head", columns="layer", values="share")
    curves.curve(ax, heads.columns.to_numpy(), heads.to_numpy(dtype=float), matrix)
    whole = table[table["head"] == ALL].sort_values("layer")
    style = {**curves.line_style(matrix, 1), "marker": None, "linestyle": ":", "linewidth": 0.8}
    ax.plot(whole["layer"], whole["share"], **style)


def _with_origin(values: pd.Series) -> np.ndarray:
    return np.concatenate([[0.0], values.to_numpy()])
