"""Figure 4: what a policy itself costs beside attention, in the prompt and in a decode step."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from kvreplay import canvas
from kvreplay.results import BUDGET, HELD, LEAKS, MODE, OWN_PHASES, POLICY, SEED, TRACE, Manifest, format_bytes

MEMORY = "memory.workspace_bytes"
_COLORS = dict(zip(OWN_PHASES, ("#0072B2", "#009E73", "#CC79A7", "#E69F00"), strict=True))
_ATTENTION = "#999999"
_PHASES = ("attend", *OWN_PHASES)
_PARTS = {"us.prompt.{}": "whole prompt, ms", "us.{}.p50": "decode step (median), us"}  # column, axis label
_SCALE = {"us.prompt.{}": 1e-3, "us.{}.p50": 1.0}
_TIMES = [column.format(phase) for column in _PARTS for phase in _PHASES]
_COLUMNS = [TRACE, MODE, POLICY, "variant", BUDGET, SEED, HELD, *_TIMES, MEMORY, "bytes.metadata", LEAKS, "run"]


def draw(rows: pd.DataFrame, manifest: Manifest, stem: Path) -> list[Path]:
    """Times of the policy's own phases and of attention, summed over layers and heads, means over seeds, and the
    working memory. Draws the rows of one trace, mode and budget; writes the files, returns their paths; none when no
    row was timed."""
    if not {*_TIMES, MEMORY} <= set(rows):
        return []
    rows = rows[rows[_TIMES].notna().all(axis=1)]
    if rows.empty:
        return []
    entries = [same for _, same in canvas.lines(rows)][::-1]
    fig, axes = plt.subplots(1, 2, sharey=True, layout="constrained")
    height = 0.6 + canvas.row_labels(axes[0], entries, manifest) * len(entries)
    for ax, column in zip(axes, _PARTS, strict=True):
        for y, same in enumerate(entries):
            _bars(ax, y, same, column)
        ax.set_xlabel(_PARTS[column])
        ax.grid(axis="y", visible=False)
    _memory(axes[1], entries)
    about = (f"compress {rows[MODE].iloc[0]}", f"asked budget {rows[BUDGET].iloc[0]}", *canvas.leak_note(rows))
    handles = [Patch(color=_COLORS[phase], label=phase) for phase in OWN_PHASES]
    handles.append(Patch(color=_ATTENTION, label="attention (in the prompt: where a policy watches it)"))
    canvas.finish(fig, height, handles, canvas.note(manifest, [rows[TRACE].iloc[0]], *about))
    return canvas.save(fig, rows.reindex(columns=[c for c in _COLUMNS if c in rows]), stem)


def _bars(ax: Axes, y: int, same: pd.DataFrame, column: str) -> None:
    """One policy at height `y`: its own phases behind each other, attention as a thin bar below."""
    mean = {phase: _SCALE[column] * same[column.format(phase)].astype(float).mean() for phase in _PHASES}
    left = 0.0
    for phase in OWN_PHASES:
        ax.barh(y + 0.12, mean[phase], 0.4, left, color=_COLORS[phase], linewidth=0)
        left += mean[phase]
    ax.barh(y - 0.24, mean["attend"], 0.2, color=_ATTENTION, linewidth=0)


def _memory(ax: Axes, entries: list[pd.DataFrame]) -> None:
    """Working memory of every policy at the right edge."""
    size = plt.rcParams["legend.fontsize"]
    where = {"textcoords": "offset points", "fontsize": size}
    ax.annotate("memory", (1, 1), (4, 2), xycoords="axes fraction", **where)
    for y, same in enumerate(entries):
        text = format_bytes(same[MEMORY].astype(float).mean())
        ax.annotate(text, (1, y), (4, 0), xycoords=("axes fraction", "data"), va="center", **where)
