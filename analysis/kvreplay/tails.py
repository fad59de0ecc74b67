"""Figure 3: the tail of the relative error, a line per policy at one budget."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from kvreplay import canvas
from kvreplay.results import BUDGET, FULL, HELD, LEAKS, MODE, NMSE, POLICY, SEED, TRACE, Manifest

TAIL = ("rel_l2.p50", "rel_l2.p95", "rel_l2.p99")
_COLUMNS = [TRACE, MODE, POLICY, "variant", BUDGET, SEED, HELD, FULL, NMSE, *TAIL, LEAKS, "run"]


def draw(rows: pd.DataFrame, manifest: Manifest, stem: Path) -> list[Path]:
    """p50, p95 and p99 of the relative error and the headline nmse (means over seeds), best p99 on top. Draws the rows
    of one trace, mode and budget; writes the files, returns their paths; none when no row has percentiles."""
    if not set(TAIL) <= set(rows):
        return []
    rows = rows[rows[list(TAIL)].notna().all(axis=1)]
    if rows.empty:
        return []
    entries = sorted((same for _, same in canvas.lines(rows)), key=lambda same: -same[TAIL[2]].mean())
    fig, ax = plt.subplots(layout="constrained")
    height = 0.55 + canvas.row_labels(ax, entries, manifest) * len(entries)
    shown = pd.concat([rows[name] for name in (*TAIL, NMSE)])
    least = shown[shown > 0].min() / 2 if (shown > 0).any() else 1e-3  # a percentile of 0 is drawn here
    for y, same in enumerate(entries):
        _line(ax, y, same, least)
    canvas.error_axis(ax.xaxis, shown)
    budget, mode = rows[BUDGET].iloc[0], rows[MODE].iloc[0]
    ax.set_xlabel(f"relative error of one query and head, at budget {budget}")
    size = plt.rcParams["legend.fontsize"]
    ax.annotate("held", (1, 1), (4, 2), xycoords="axes fraction", textcoords="offset points", fontsize=size)
    about = (f"compress {mode}", f"asked budget {budget}", *canvas.leak_note(rows))
    canvas.finish(fig, height, _legend(manifest), canvas.note(manifest, [rows[TRACE].iloc[0]], *about))
    return canvas.save(fig, rows.reindex(columns=[c for c in _COLUMNS if c in rows]), stem)


def _line(ax: Axes, y: int, same: pd.DataFrame, least: float) -> None:
    """One policy at height `y`, its held bytes at the right edge; values below `least` are drawn there."""
    look = canvas.look_of(same)
    p50, p95, p99, nmse = (max(same[name].mean(), least) for name in (*TAIL, NMSE))
    ax.plot([p50, p99], [y, y], color=look.color, linewidth=1.6, alpha=0.6, solid_capstyle="butt", zorder=2)
    ax.plot(p50, y, "o", color=look.color, markersize=3.2)
    ax.plot(p95, y, "|", color=look.color, markersize=7, markeredgewidth=1.6)
    hollow = canvas.face(same, look)
    ax.plot(p99, y, look.marker, color=look.color, markersize=5, markerfacecolor=hollow, markeredgewidth=1)
    ax.plot(nmse, y, "d", color="black", markersize=3, zorder=4)
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    ax.annotate(canvas.held(same), (1, y), (4, 0), fontsize=plt.rcParams["legend.fontsize"], **where)


def _legend(manifest: Manifest) -> list[Artist]:
    grey = {"color": "#555555", "linestyle": "none"}
    black = {"color": "black", "linestyle": "none"}
    return [
        Line2D([], [], marker="o", markersize=3.2, label="p50", **grey),
        Line2D([], [], marker="|", markersize=7, markeredgewidth=1.6, label="p95", **grey),
        Line2D([], [], marker="s", markersize=5, label="p99 (policy's marker)", **grey),
        Line2D([], [], marker="d", markersize=3, label=manifest.metric_label(NMSE), **black),
    ]
