"""Figure 5: tokens that a policy meant to merge and lost, because their target went as well."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from kvreplay import canvas
from kvreplay.results import (
    BUDGET,
    FULL,
    HELD,
    LEAKS,
    LOST,
    MODE,
    POLICY,
    SEED,
    TRACE,
    Manifest,
    label,
    lost_share,
    panels,
)

_COLUMNS = [TRACE, MODE, POLICY, "variant", BUDGET, SEED, HELD, FULL, "lost_share", LOST, "count.lost_by_clip"]
_COLUMNS += ["count.evictions", "count.merges", LEAKS, "run"]
_NOTHING = {"color": "#777777", "linestyle": ":", "marker": "|"}  # the look of lines that lose nothing


def draw(rows: pd.DataFrame, manifest: Manifest, stem: Path) -> list[Path]:
    """Share of tokens lost in merges against mean held bytes, a column per trace and a row per compress mode. Writes
    the files, returns their paths; none when nothing was lost."""
    if LOST not in rows or not (rows[LOST] > 0).any():
        return []
    rows = rows[rows["count.merges"] > 0]
    rows = rows.assign(lost_share=[lost_share(row, manifest) for _, row in rows.iterrows()])
    cells = {(trace, mode): panel for trace, mode, panel in panels(rows) if (panel[LOST] > 0).any()}
    traces, modes = (list(dict.fromkeys(key)) for key in zip(*cells, strict=True))
    width, height = plt.rcParams["figure.figsize"][0], 1.6 * len(modes) + 0.6
    fig, grid = plt.subplots(
        len(modes), len(traces), squeeze=False, sharex="col", sharey=True, layout="constrained", figsize=(width, height)
    )
    names, handles = canvas.trace_names(traces), {}
    for (trace, mode), panel in cells.items():
        ax = grid[modes.index(mode), traces.index(trace)]
        for key, same in canvas.lines(panel):
            if (same[LOST] > 0).any():
                handles[key] = _line(ax, same, manifest)
            else:
                ax.plot(same[HELD], same["lost_share"], **_NOTHING)
    for column, trace in enumerate(traces):
        canvas.bytes_axes(grid[:, column], rows[rows[TRACE] == trace], names[trace], int(width / len(traces) / 0.52))
    for line, mode in zip(grid, modes, strict=True):
        line[0].set_ylabel(f"{'prompt tokens' if mode == 'prompt' else 'tokens'} lost")
        canvas.label_mode(line[-1], mode)
    grid[0, 0].yaxis.set_major_formatter(PercentFormatter(1, 0))
    grid[0, 0].set_ylim(-0.02, 1)
    shown = [handles[key] for key, _ in canvas.lines(rows) if key in handles]
    others = rows.groupby([POLICY, "variant"]).ngroups - len(shown)
    shown += [Line2D([], [], **_NOTHING, label=f"{others} other merging lines")] if others else []
    canvas.finish(fig, height, shown, canvas.note(manifest, traces, *canvas.leak_note(rows)))
    return canvas.save(fig, rows.reindex(columns=[c for c in _COLUMNS if c in rows]), stem)


def _line(ax: Axes, same: pd.DataFrame, manifest: Manifest) -> Artist:
    """Draws one policy and variant, means over seeds; returns its legend entry."""
    look = canvas.look_of(same)
    points = same.groupby(BUDGET, sort=False)[[HELD, "lost_share"]].mean().sort_values(HELD)
    drawn = {"color": look.color, "linestyle": look.dash, "marker": look.marker}
    ax.plot(points[HELD], points["lost_share"], **drawn)
    return Line2D([], [], **drawn, label=label(same.iloc[0], manifest))
