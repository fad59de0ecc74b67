"""Draws a sweep for a paper: `python -m kvreplay.figures OUT [--venue neurips2024]` fills OUT/figures.

    pareto                error (nmse) against mean held bytes, a panel per trace and compress mode; of many lines,
                          each policy's first variant, all of them in pareto-POLICY
    heatmap-TRACE-MODE    error by layer and query head, a panel per policy at one budget
    tails-TRACE-MODE      p50, p95 and p99 of the relative error, per policy at that budget
    cost-TRACE-MODE       the policy's own time beside attention's, and its memory, at that budget
    losses                share of tokens that merges lose, where any does

Each as PDF, PNG (300 dpi) and CSV with the exact numbers. Traces and compress modes are never mixed in a panel.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from kvreplay import canvas, cost, heatmap, losses, pareto, style, tails
from kvreplay.results import (
    NMSE,
    POLICY,
    TRACE,
    ResultsError,
    add_variants,
    common_budget,
    load,
    load_manifest,
    panels,
    table,
)


def draw(out: str | Path, venue: str = "neurips2024") -> list[Path]:
    """Draws every figure of the output folder `out` into out/figures; returns the written paths."""
    rows, manifest = add_variants(load(out)), load_manifest(out)
    folder = Path(out) / "figures"
    folder.mkdir(exist_ok=True)
    names = canvas.trace_names(list(dict.fromkeys(rows[TRACE])))
    drawn = []
    with plt.rc_context(style.venue_params(venue)):
        for name, some in pareto.pages(rows):
            drawn += pareto.draw(some, manifest, folder / name)
        for trace, mode, panel in panels(rows):
            at_budget = common_budget(panel)
            if len(at_budget):
                drawn += heatmap.draw(at_budget, manifest, folder / f"heatmap-{names[trace]}-{mode}")
                drawn += tails.draw(at_budget, manifest, folder / f"tails-{names[trace]}-{mode}")
                drawn += cost.draw(at_budget, manifest, folder / f"cost-{names[trace]}-{mode}")
        drawn += losses.draw(rows, manifest, folder / "losses")
    return drawn


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code (2 when there is nothing to draw)."""
    parser = argparse.ArgumentParser(prog="python -m kvreplay.figures", description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="an output folder of `kvreplay run`")
    known = style.venues()
    help_text = f"sizes and fonts: {', '.join(known)} (default: %(default)s)"
    parser.add_argument("--venue", default="neurips2024", choices=known, metavar="VENUE", help=help_text)
    options = parser.parse_args(arguments)
    matplotlib.use("Agg")
    try:
        rows, manifest = load(options.out), load_manifest(options.out)
        paths = draw(options.out, options.venue)
    except ResultsError as error:
        print(f"kvreplay.figures: {error}", file=sys.stderr)
        return 2
    print(table(rows, manifest))
    exact = int(((rows[NMSE] == 0) & (rows[POLICY] != "full")).sum())
    if exact:
        print(f"\n{exact} points without any error are in the CSV but not on the logarithmic axis of pareto")
    print("\n" + "\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
