"""Figure 1: error against mean held bytes, a column per trace and a row per compress mode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from kvreplay import canvas, style
from kvreplay.results import BUDGET, FULL, HELD, LEAKS, MODE, NMSE, POLICY, SEED, TRACE, Manifest, label, panels

NOISE = "noise_floor.nmse"
_TRACES_A_FIGURE = 3
_MODES = {"prompt": 0, "always": 1}
_COLUMNS = [TRACE, "trace.dataset", MODE, POLICY, "variant", BUDGET, "budget_slots", SEED]
_COLUMNS += [HELD, FULL, NMSE, NOISE, LEAKS, "run"]


def pages(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(file name, rows) of at most three traces each, so that panels stay legible."""
    traces = list(dict.fromkeys(rows[TRACE]))
    for first in range(0, len(traces), _TRACES_A_FIGURE):
        name = "pareto" if len(traces) <= _TRACES_A_FIGURE else f"pareto-{first // _TRACES_A_FIGURE + 1}"
        yield name, rows[rows[TRACE].isin(traces[first : first + _TRACES_A_FIGURE])]


def draw(rows: pd.DataFrame, manifest: Manifest, stem: Path) -> list[Path]:
    """nmse (log) against mean held bytes (log2; share of the full cache on top). Writes the files, returns their
    paths."""
    cells = {(trace, mode): panel for trace, mode, panel in panels(rows)}
    traces = list(dict.fromkeys(trace for trace, _ in cells))
    modes = sorted({mode for _, mode in cells}, key=lambda mode: _MODES.get(mode, 2))
    height = (1.7 if len(modes) > 1 else 2.1) * len(modes) + 0.6
    width = plt.rcParams["figure.figsize"][0]
    fig, grid = plt.subplots(
        len(modes), len(traces), squeeze=False, sharex="col", sharey=True, layout="constrained", figsize=(width, height)
    )
    names, floor, lowest = canvas.trace_names(traces), _noise_floor(rows), _lowest(rows)
    handles: dict[object, Artist] = {}
    for column, trace in enumerate(traces):
        of_trace = rows[rows[TRACE] == trace]
        for ax, mode in zip(grid[:, column], modes, strict=True):
            if (trace, mode) not in cells:
                ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="#777777")
                continue
            handles.update(_panel(ax, cells[trace, mode], manifest, lowest))
            if floor and floor.get_linestyle() != "None":
                ax.axhline(of_trace[NOISE].median(), color=floor.get_color(), linestyle="--", linewidth=0.8)
        grid[-1, column].set_xlabel("mean bytes held")
        _bytes_axes(grid[:, column], of_trace, names[trace], int(width / len(traces) / 0.52))
    _label_rows(grid, modes, manifest)
    canvas.error_axis(grid[0, 0].yaxis, rows.loc[rows[NMSE] >= lowest, NMSE])
    if floor:
        handles["noise"] = floor
    if rows[LEAKS].any():
        handles["leaks"] = canvas.leaks_handle()
    order = [key for key in (*(key for key, _ in canvas.lines(rows)), "full", "noise", "leaks") if key in handles]
    canvas.finish(fig, height, [handles[key] for key in order], canvas.note(manifest, traces))
    return canvas.save(fig, rows.reindex(columns=[c for c in _COLUMNS if c in rows]), stem)


def _lowest(rows: pd.DataFrame) -> float:
    """The least error that the axis shows: what lies more than three times below every compressed point (the full
    cache's float rounding, usually) would only squeeze them, and is named in the legend instead."""
    errors = rows.loc[(rows[POLICY] != "full") & (rows[NMSE] > 0), NMSE]
    return float(errors.min()) / 3 if len(errors) else 0.0


def _panel(ax: Axes, panel: pd.DataFrame, manifest: Manifest, lowest: float) -> dict[object, Artist]:
    """Draws one trace in one mode; returns legend entries by key, so that equal ones of other panels fall together."""
    handles: dict[object, Artist] = {}
    for key, same in canvas.lines(panel[panel[POLICY] != "full"]):
        look = canvas.look_of(same)
        drawn = {"color": look.color, "linestyle": look.dash, "marker": look.marker, "markeredgewidth": 0.8}
        drawn["markerfacecolor"] = canvas.face(same, look)
        points = _over_seeds(same[(same[NMSE] > 0) & (same[HELD] > 0)])  # a log axis has no place for 0; the CSV has
        why = "" if len(points) else " (no error)" if (same[NMSE] == 0).any() else " (undefined)"
        handles[key] = Line2D([], [], **drawn, label=label(same.iloc[0], manifest) + why)
        ax.plot(points["held"], points["error"], **drawn)
        if (points["high"] > points["low"]).any():
            ax.fill_between(points["held"], points["low"], points["high"], color=look.color, alpha=0.2, linewidth=0)
    handles["full"] = _full_cache(ax, panel, manifest, lowest)
    return handles


def _over_seeds(same: pd.DataFrame) -> pd.DataFrame:
    """One line per budget: mean held bytes; mean, lowest and highest error."""
    budgets = same.groupby(BUDGET, sort=False, dropna=False)
    points = budgets.agg(held=(HELD, "mean"), error=(NMSE, "mean"), low=(NMSE, "min"), high=(NMSE, "max"))
    return points.sort_values("held")


def _full_cache(ax: Axes, panel: pd.DataFrame, manifest: Manifest, lowest: float) -> Line2D:
    """A vertical line at the bytes of the full cache, a star where it was run and its error is on the axis."""
    look, full = style.policy_style("full"), panel[(panel[POLICY] == "full") & (panel[NMSE] > 0)]
    ax.axvline(canvas.full_bytes(panel), color=look.color, linestyle=look.dash, linewidth=0.9)
    shown = full[full[NMSE] >= lowest]
    marker = look.marker if len(shown) else "none"
    ax.plot(shown[HELD], shown[NMSE], color=look.color, marker=marker, linestyle="none")
    why = "" if len(shown) else f" (error {full[NMSE].max():.0e})" if len(full) else " (no error)"
    text = manifest.title("full") + why
    return Line2D([], [], color=look.color, linestyle=look.dash, linewidth=0.9, marker=marker, label=text)


def _noise_floor(rows: pd.DataFrame) -> Line2D | None:
    """The legend entry of the recording's noise floor, None when it is unknown. Its line is drawn unless it lies so far
    below every point that it would only squeeze them."""
    floors = rows.groupby(TRACE)[NOISE].median().dropna() if NOISE in rows else pd.Series(dtype=float)
    if floors.empty:
        return None
    visible = floors.max() > _lowest(rows)
    low, high = f"{floors.min():.2g}", f"{floors.max():.2g}"
    text = f"noise floor {low if low == high else f'{low} to {high}'}" + ("" if visible else " (below the axis)")
    return Line2D([], [], color="#555555", linestyle="--" if visible else "none", linewidth=0.8, label=text)


def _bytes_axes(axes: np.ndarray, of_trace: pd.DataFrame, title: str, labels: int) -> None:
    """The byte axis of one column; on its top panel the trace's name and shares of the full cache."""
    full = canvas.full_bytes(of_trace)
    held = of_trace.loc[(of_trace[POLICY] != "full") & (of_trace[HELD] > 0), HELD].astype(float)
    ends = [v for v in (*held, full) if math.isfinite(v)]
    low, high = (min(ends) / 1.25, max(ends) * 1.25) if ends else (1.0, 2.0)
    for ax in axes:
        canvas.bytes_axis(ax.xaxis, low, high, max(2, labels))
    if math.isfinite(full):
        top = axes[0].twiny()
        top.grid(False)
        canvas.share_axis(top.xaxis, low / full, high / full, max(2, labels))
    axes[0].set_title(title, fontsize=plt.rcParams["font.size"], pad=4)


def _label_rows(grid: np.ndarray, modes: list[str], manifest: Manifest) -> None:
    """The error at the left of every row, its compress mode at the right."""
    for line, mode in zip(grid, modes, strict=True):
        line[0].set_ylabel(manifest.metric_label(NMSE))
        line[-1].annotate(
            f"compress: {mode}", (1, 0.5), (4, 0), xycoords="axes fraction", textcoords="offset points", rotation=270,
            va="center", fontsize=plt.rcParams["legend.fontsize"],
        )  # fmt: skip
