"""Figure 1: error against mean held bytes, a column per trace and a row per compress mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from kvreplay import canvas, style
from kvreplay.results import (
    BUDGET,
    FULL,
    HELD,
    LEAKS,
    MODE,
    NMSE,
    POLICY,
    SEED,
    TRACE,
    Manifest,
    label,
    over_seeds,
    panels,
)

NOISE = "noise_floor.nmse"
_TRACES_A_FIGURE, _LINES_A_PANEL = 3, 14
_MODES = {"prompt": 0, "always": 1}
_COLUMNS = [TRACE, "trace.dataset", MODE, POLICY, "variant", BUDGET, "budget_slots", SEED]
_COLUMNS += [HELD, FULL, NMSE, NOISE, LEAKS, "run"]


def pages(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(file name, rows) of at most three traces and fourteen lines each, so that panels stay legible. Of more lines,
    `pareto` has each policy's first variant, merging and dropping, and `pareto-POLICY` all variants of one policy."""
    traces = list(dict.fromkeys(rows[TRACE]))
    for first in range(0, len(traces), _TRACES_A_FIGURE):
        name = "pareto" if len(traces) <= _TRACES_A_FIGURE else f"pareto-{first // _TRACES_A_FIGURE + 1}"
        some = rows[rows[TRACE].isin(traces[first : first + _TRACES_A_FIGURE])]
        if some.groupby([POLICY, "variant"]).ngroups <= _LINES_A_PANEL:
            yield name, some
            continue
        number, dropped = some["variant_number"], some["variant"].str.contains("dropped")
        yield name, some[number == number.groupby([some[POLICY], dropped]).transform("min")]
        for policy in dict.fromkeys(some.loc[number > 0, POLICY]):
            yield f"{name}-{policy}", some[some[POLICY].isin(["full", policy])]


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
        canvas.bytes_axes(grid[:, column], of_trace, names[trace], int(width / len(traces) / 0.52))
    for line, mode in zip(grid, modes, strict=True):
        line[0].set_ylabel(manifest.metric_label(NMSE))
        canvas.label_mode(line[-1], mode)
    canvas.error_axis(grid[0, 0].yaxis, rows.loc[rows[NMSE] >= lowest, NMSE])
    if floor:
        handles["noise"] = floor
    order = [key for key in (*(key for key, _ in canvas.lines(rows)), "full", "noise") if key in handles]
    note = canvas.note(manifest, traces, *canvas.leak_note(rows))
    canvas.finish(fig, height, [handles[key] for key in order], note)
    return canvas.save(fig, rows.reindex(columns=[c for c in _COLUMNS if c in rows]), stem)


def _lowest(rows: pd.DataFrame) -> float:
    """The least error that the axis shows: what lies more than three times below every compressed point (the full
    cache's float rounding, usually) would only squeeze them, and is named in the legend instead."""
    errors = rows.loc[(rows[POLICY] != "full") & (rows[NMSE] > 0), NMSE]
    return float(errors.min()) / 3 if len(errors) else 0.0


def _panel(ax: Axes, panel: pd.DataFrame, manifest: Manifest, lowest: float) -> dict[object, Artist]:
    """Draws one trace in one mode; returns legend entries by key, so that equal ones of other panels fall together."""
    handles: dict[object, Artist] = {}
    compressed = panel[panel[POLICY] != "full"]
    alone = compressed[POLICY].nunique() == 1
    for key, same in canvas.lines(compressed):
        look = style.variant_style(same["variant_number"].iloc[0]) if alone else canvas.look_of(same)
        drawn = {"color": look.color, "linestyle": look.dash, "marker": look.marker, "markeredgewidth": 0.8}
        drawn["markerfacecolor"] = canvas.face(same, look)
        points = over_seeds(same[(same[NMSE] > 0) & (same[HELD] > 0)])  # a log axis has no place for 0; the CSV has
        why = "" if len(points) else " (no error)" if (same[NMSE] == 0).any() else " (undefined)"
        handles[key] = Line2D([], [], **drawn, label=label(same.iloc[0], manifest) + why)
        ax.plot(points["held"], points["error"], **drawn)
        if (points["high"] > points["low"]).any():
            ax.fill_between(points["held"], points["low"], points["high"], color=look.color, alpha=0.2, linewidth=0)
    handles["full"] = _full_cache(ax, panel, manifest, lowest)
    return handles


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
