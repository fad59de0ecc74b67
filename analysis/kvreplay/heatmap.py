"""Figure 2: error by layer and query head, a panel per policy at one budget, one logarithmic colour scale."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from kvreplay import canvas
from kvreplay.results import BUDGET, HELD, LEAKS, MODE, POLICY, TRACE, Manifest, label

_ERROR2, _OUTPUT2 = "sums.error2", "sums.output2"


@dataclass
class _Map:
    """One policy: its rows (several seeds at most) and their sums, each [layer, query head]."""

    rows: pd.DataFrame
    error2: np.ndarray
    output2: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """sqrt(sum |d|^2 / sum |o|^2) [layer, query head]; NaN where the outputs are zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.sqrt(self.error2 / self.output2)
        return np.where(np.isfinite(ratio), ratio, np.nan)

    @property
    def layers(self) -> list[int]:
        """Model indices of the rows of `ratio`."""
        found = self.rows.iloc[0].get("layers")
        return found if isinstance(found, list) else list(range(len(self.error2)))


def draw(rows: pd.DataFrame, manifest: Manifest, stem: Path) -> list[Path]:
    """Draws the rows of one trace, mode and budget; writes the files, returns their paths; none when no row has
    sums."""
    maps = _maps(rows)
    if not maps:
        return []
    seen = np.concatenate([m.ratio[m.ratio > 0] for m in maps])
    low, high = (seen.min(), seen.max()) if seen.size else (0.1, 1.0)
    norm = LogNorm(low, max(high, low * 1.01))
    columns = min(4 if len(maps) <= 16 else 6, len(maps))
    lines = -(-len(maps) // columns)
    height = lines * (0.5 + min(1.6, max(0.75, 0.07 * len(maps[0].layers)))) + 0.3
    width = plt.rcParams["figure.figsize"][0]
    fig, grid = plt.subplots(
        lines, columns, squeeze=False, sharex=True, sharey=True, layout="constrained", figsize=(width, height)
    )
    fig.get_layout_engine().set(h_pad=0.03, w_pad=0.02)
    for ax, one in zip(grid.flat, maps, strict=False):
        image = _panel(ax, one, manifest, norm, 0.8 * width / columns)
    _label_edges(grid, len(maps))
    budget, mode = rows[BUDGET].iloc[0], rows[MODE].iloc[0]
    clipped = any((m.ratio == 0).any() for m in maps)
    bar = fig.colorbar(image, ax=grid, pad=0.01, aspect=30, extend="min" if clipped else "neither")
    bar.set_label(f"relative error at budget {budget}")
    canvas.error_axis(bar.ax.yaxis, pd.Series(seen))
    about = (f"compress {mode}", f"asked budget {budget}", *canvas.leak_note(rows))
    canvas.finish(fig, height, [], canvas.note(manifest, [rows[TRACE].iloc[0]], *about))
    return canvas.save(fig, _numbers(maps), stem)


def _maps(rows: pd.DataFrame) -> list[_Map]:
    """The policies whose rows carry sums; over seeds the sums add up exactly."""
    if not {_ERROR2, _OUTPUT2} <= set(rows):
        return []
    rows = rows[rows[_ERROR2].notna() & rows[_OUTPUT2].notna()]
    return [
        _Map(same, *(sum(np.array(sums, float) for sums in same[name]) for name in (_ERROR2, _OUTPUT2)))
        for _, same in canvas.lines(rows)
    ]


def _panel(ax: Axes, one: _Map, manifest: Manifest, norm: LogNorm, inches: float):
    """One policy's heat map, its title wrapped to `inches`; undefined is grey, no error at all the darkest."""
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#cccccc", under="#22003a")
    shown = np.where(one.ratio == 0, norm.vmin / 2, one.ratio)
    image = ax.imshow(shown, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    size = plt.rcParams["legend.fontsize"]
    title = textwrap.fill(label(one.rows.iloc[0], manifest), max(8, int(inches * 72 / (0.5 * size))))
    ax.set_title(f"{title}\n{canvas.held(one.rows)} held", fontsize=size, pad=3, linespacing=1.1)
    ax.grid(False)
    layers, heads = one.ratio.shape
    ticks = range(0, layers, -(-layers // 8))
    ax.set_yticks(list(ticks), [str(one.layers[i]) for i in ticks])
    ax.set_xticks(range(0, heads, -(-heads // 5)))
    return image


def _label_edges(grid: np.ndarray, count: int) -> None:
    """Axis labels at the left and under the last panel of every column, which may end above the last line."""
    for ax in grid.flat[count:]:
        ax.axis("off")
    for column in range(grid.shape[1]):
        last = grid[(count - 1 - column) // grid.shape[1], column]
        last.tick_params(labelbottom=True)
        last.set_xlabel("query head")
    for ax in grid[:, 0]:
        ax.set_ylabel("layer")


def _numbers(maps: list[_Map]) -> pd.DataFrame:
    """One line per policy, layer and query head."""
    found = []
    for one in maps:
        first, ratio = one.rows.iloc[0], one.ratio
        common = {name: first[name] for name in (TRACE, MODE, POLICY, "variant", BUDGET, LEAKS)}
        common[HELD] = one.rows[HELD].astype(float).mean()
        for at in np.ndindex(*ratio.shape):
            sums = {_ERROR2: one.error2[at], _OUTPUT2: one.output2[at], "relative": ratio[at]}
            found.append({**common, "layer": one.layers[at[0]], "query_head": at[1], **sums})
    return pd.DataFrame(found)
