"""What the figures share: axes of bytes, shares and errors, the legend and provenance line, files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from kvreplay.results import FULL, HELD, LEAK_NOTE, LEAKS, POLICY, Manifest, format_bytes, label
from kvreplay.style import NOTE_SIZE, Style, policy_order, policy_style


def bytes_axis(axis, low: float, high: float, labels: int) -> None:
    """A log2 axis of bytes from `low` to `high` with at most `labels` labels such as 64 KiB, at powers of two."""
    axis.axes.set_xscale("log", base=2)
    axis.axes.set_xlim(low, high)
    powers = [p for p in range(0, 60) if low <= 2.0**p <= high]
    step = max(1, -(-len(powers) // labels))
    axis.set_major_locator(FixedLocator([2.0**p for p in powers[::step]]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: format_bytes(v)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def bytes_axes(axes: np.ndarray, of_trace: pd.DataFrame, title: str, labels: int) -> None:
    """The byte axis of one column of panels; on its top panel the trace's name and shares of the full cache."""
    full = full_bytes(of_trace)
    held = of_trace.loc[(of_trace[POLICY] != "full") & (of_trace[HELD] > 0), HELD].astype(float)
    ends = [v for v in (*held, full) if math.isfinite(v)]
    low, high = (min(ends) / 1.25, max(ends) * 1.25) if ends else (1.0, 2.0)
    for ax in axes:
        bytes_axis(ax.xaxis, low, high, max(2, labels))
    axes[-1].set_xlabel("mean bytes held")
    if math.isfinite(full):
        top = axes[0].twiny()
        top.grid(False)
        share_axis(top.xaxis, low / full, high / full, max(2, labels))
    axes[0].set_title(title, fontsize=plt.rcParams["font.size"], pad=4)


def label_mode(ax: Axes, mode: str) -> None:
    """Names the compress mode at the right of a panel."""
    ax.annotate(
        f"compress: {mode}", (1, 0.5), (4, 0), xycoords="axes fraction", textcoords="offset points", rotation=270,
        va="center", fontsize=plt.rcParams["legend.fontsize"],
    )  # fmt: skip


def share_axis(axis, low: float, high: float, labels: int) -> None:
    """The top axis that goes with `bytes_axis`: shares of the full cache from `low` to `high`, halving from 100%."""
    axis.axes.set_xscale("log", base=2)
    axis.axes.set_xlim(low, high)
    shares = [2.0**-p for p in range(20) if low <= 2.0**-p <= high]
    axis.set_major_locator(FixedLocator(shares[:: max(1, -(-len(shares) // labels))]))
    axis.set_major_formatter(FuncFormatter(lambda s, _: f"{100 * s:.3g}%"))
    axis.set_minor_locator(NullLocator())
    axis.set_tick_params(labelsize=plt.rcParams["legend.fontsize"], pad=1)
    axis.set_label_text("of the full cache", fontsize=plt.rcParams["legend.fontsize"])
    axis.labelpad = 2


def error_axis(axis, values: pd.Series) -> None:
    """A log axis of errors with plain labels; 2 and 5 are labelled too when the range is short."""
    values = values[values > 0].astype(float)
    decades = math.log10(values.max() / values.min()) if len(values) else 1
    if values.empty:
        axis.axes.set(**{f"{axis.axis_name}lim": (1e-3, 1)})
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3.5 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    axis.set_minor_formatter(NullFormatter())


def finish(fig: Figure, body: float, handles: list[Artist], text: str) -> None:
    """Gives the panels `body` inches of height and adds below them a legend of `handles`, in as many columns as fit,
    and the provenance line `text`."""
    width = fig.get_figwidth()
    wrapped = textwrap.wrap(text, int(width * 72 / (0.45 * NOTE_SIZE)), break_on_hyphens=False)
    note_height = 0.06 + len(wrapped) * NOTE_SIZE * 1.25 / 72
    legend, legend_height = None, 0.0
    for columns in range(min(6, len(handles)), 0, -1):
        legend = fig.legend(
            handles=handles,
            loc="lower center",
            ncols=columns,
            handlelength=2.4,
            columnspacing=1.4,
            labelspacing=0.35,
            borderpad=0.2,
        )
        box = legend.get_window_extent(fig.canvas.get_renderer())
        legend_height = box.height / fig.dpi + 0.05
        if box.width / fig.dpi <= width or columns == 1:
            break
        legend.remove()
    total = body + legend_height + note_height
    fig.set_figheight(total)
    if legend:
        legend.set_bbox_to_anchor((0.5, note_height / total), fig.transFigure)
    fig.text(
        0.5,
        0.03 / total,
        "\n".join(wrapped),
        ha="center",
        va="bottom",
        fontsize=NOTE_SIZE,
        color="#555555",
        linespacing=1.15,
    )
    bottom = (legend_height + note_height) / total
    fig.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom))


def save(fig: Figure, numbers: pd.DataFrame, stem: Path) -> list[Path]:
    """Writes `stem`.pdf, .png (300 dpi) and .csv (the exact numbers), closes the figure and returns the paths."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("pdf", "png", "csv")]
    fig.savefig(paths[0], metadata={"CreationDate": None, "Creator": "kvreplay"})
    fig.savefig(paths[1])
    numbers.to_csv(paths[2], index=False)
    plt.close(fig)
    return paths


def note(manifest: Manifest, traces: list[str], *more: str) -> str:
    """The provenance line that every figure carries."""
    return "; ".join(
        (
            "open-loop replay, teacher-forced",
            manifest.git_sha or "unknown commit",
            ", ".join(traces),
            "budget = mean held bytes",
            *more,
        )
    )


def trace_names(traces: list[str]) -> dict[str, str]:
    """File stems, numbered where two traces share one."""
    stems = [Path(trace).stem for trace in traces]
    return {
        trace: stem if stems.count(stem) == 1 else f"{stem}-{i + 1}"
        for i, (trace, stem) in enumerate(zip(traces, stems, strict=True))
    }


def held(rows: pd.DataFrame) -> str:
    """Mean held bytes of the rows, as text."""
    return format_bytes(rows[HELD].astype(float).mean())


def face(rows: pd.DataFrame, look: Style) -> str:
    """Hollow markers for points whose policy saw the measured queries."""
    return "white" if rows[LEAKS].any() else look.color


def leak_note(rows: pd.DataFrame) -> tuple[str, ...]:
    """What the provenance line adds when one of the rows leaks: what the dagger behind its name means."""
    return (LEAK_NOTE,) if rows[LEAKS].any() else ()


def lines(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    """((policy, variant), rows) in catalogue order, variants as the results file has them."""
    groups = dict(iter(rows.groupby([POLICY, "variant"], sort=False)))
    for key in sorted(groups, key=lambda key: (policy_order(key[0]), groups[key]["variant_number"].iloc[0])):
        yield key, groups[key]


def row_labels(ax: Axes, entries: list[pd.DataFrame], manifest: Manifest) -> float:
    """Names the rows of a figure that has a policy and variant at each of y = 0, 1, ...; long names are wrapped.
    Returns the inches that a row needs."""
    names = [textwrap.fill(label(same.iloc[0], manifest), 42) for same in entries]
    ax.set_yticks(range(len(names)), names, linespacing=1.0)
    ax.set_ylim(-0.7, len(names) - 0.3)
    ax.grid(axis="y", visible=False)
    return 0.07 + 0.12 * max(name.count("\n") + 1 for name in names)


def look_of(rows: pd.DataFrame) -> Style:
    """The style of rows of one policy and variant."""
    return policy_style(rows[POLICY].iloc[0], int(rows["variant_number"].iloc[0]))


def full_bytes(rows: pd.DataFrame) -> float:
    """Bytes of the full cache over the measured steps of the rows' trace; NaN = unknown."""
    return float(rows[FULL].astype(float).median())
