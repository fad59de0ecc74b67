"""Is one policy better than others at equal bytes? Reads a sweep, prints tables and one plain sentence per trace.

python -m kvreplay.compare OUT POLICY OTHER [OTHER ...]      POLICY is a name, or name[parameter=value,...]

Comparisons are paired: within one trace and compress mode, at equal mean bytes held. Of each pair of lines, errors are
read at the first one's own points and at the ends of the bytes that both cover, along the straight lines of the pareto
figure (both axes logarithmic), never outside a line's own points. Variants of a policy are lines of their own, as in
figures; where POLICY and OTHER have values of a setting in common (picks, positions, merge), only lines with equal ones
are paired.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kvreplay import canvas
from kvreplay.results import (
    HELD,
    LEAK_NOTE,
    LEAKS,
    MODE,
    NMSE,
    POLICY,
    TRACE,
    Manifest,
    ResultsError,
    add_variants,
    align,
    canonical,
    format_bytes,
    identity_columns,
    label,
    load,
    load_manifest,
    over_seeds,
    short,
)

_SELECTOR = re.compile(r"(\w+)(?:\[(.*)\])?")
_YAML = {"true": "yes", "false": "no"}  # the spelling of `canonical`


@dataclass
class Pair:
    """Two lines at the bytes that both cover; no bytes: they have none in common."""

    other: str
    held: np.ndarray
    own_error: np.ndarray
    other_error: np.ndarray
    apart: str = ""  # why they have none in common

    @property
    def ratio(self) -> np.ndarray:
        """Error of the first over that of the other."""
        return self.own_error / self.other_error

    @property
    def times(self) -> float:
        """The geometric mean of `ratio`."""
        return math.exp(np.log(self.ratio).mean())

    @property
    def lower(self) -> str:
        """At how many of the byte counts the first has the lower error."""
        return f"{int((self.ratio < 1).sum())} of {len(self.held)}"


def select(rows: pd.DataFrame, text: str) -> pd.DataFrame:
    """The rows that `text` names: a policy, or policy[parameter=value, ...]. Names that do not occur are an error with
    the nearest one."""
    match = _SELECTOR.fullmatch(text.strip())
    if not match:
        raise ResultsError(f"expected a policy or policy[parameter=value,...], got '{text}'")
    policy, conditions = match.groups()
    chosen = rows[rows[POLICY] == _known(policy, rows[POLICY].unique(), "no finished run of policy")]
    columns = {short(c): c for c in identity_columns(rows) if chosen[c].notna().any()}
    for condition in filter(None, re.split(r"\s*,\s*", conditions or "")):
        key, _, value = (part.strip() for part in condition.partition("="))
        column = columns[_known(key, columns, f"{policy} has no parameter")]
        values = chosen[column].map(canonical)
        wanted = _YAML.get(value, value)
        wanted = f"{float(wanted):.6g}" if re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", wanted) else wanted
        chosen = chosen[values == _known(wanted, values.unique(), f"{policy} was not run with {key}")]
    return chosen


def _known(name: str, names, problem: str) -> str:
    """`name` when it is one of `names`, else an error that names the nearest."""
    if name in names:
        return name
    near = difflib.get_close_matches(name, list(names), 1, 0)
    raise ResultsError(f"{problem} '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""))


def compare(rows: pd.DataFrame, manifest: Manifest, policy: str, others: list[str]) -> str:
    """The text that `main` prints: a table and a sentence for every trace, compress mode and line of `policy`."""
    rows = add_variants(rows[(rows[NMSE] > 0) & (rows[HELD] > 0)])
    names = canvas.trace_names(list(dict.fromkeys(rows[TRACE])))
    first, rest = select(rows, policy), [select(rows, other) for other in others]
    blocks = []
    for (trace, mode), panel in first.groupby([TRACE, MODE], sort=False):
        against = [other[(other[TRACE] == trace) & (other[MODE] == mode)] for other in rest]
        for _, line in canvas.lines(panel):
            pairs = [pair for other in against for pair in _pairs(line, panel, other, manifest)]
            if pairs:
                blocks.append(_block(f"{names[trace]}, compress {mode}", label(line.iloc[0], manifest), pairs))
    if not blocks:
        raise ResultsError(f"{policy} has no trace, compress mode and settings in common with {', '.join(others)}")
    leaks = any(chosen[LEAKS].any() for chosen in (first, *rest))
    return "\n\n".join(blocks) + (f"\n{LEAK_NOTE}" if leaks else "")


def _pairs(line: pd.DataFrame, panel: pd.DataFrame, others: pd.DataFrame, manifest: Manifest) -> list[Pair]:
    """`line`, one of the lines of `panel`, with each line of `others` that has the same value of every setting of which
    the two selections have values in common."""
    for column in identity_columns(panel):
        ours, theirs = (some[column].dropna().map(canonical) for some in (panel, others))
        if set(ours) & set(theirs):
            others = others.loc[theirs.index[theirs.isin(set(line[column].map(canonical)))]]
    keys = (line[POLICY].iloc[0], line["variant"].iloc[0])
    return [_pair(line, other, label(other.iloc[0], manifest)) for key, other in canvas.lines(others) if key != keys]


def _pair(line: pd.DataFrame, other: pd.DataFrame, name: str) -> Pair:
    """Errors of both lines at the points of the first and the ends of the common range."""
    own, their = over_seeds(line), over_seeds(other)
    low, high = max(own["held"].min(), their["held"].min()), min(own["held"].max(), their["held"].max())
    if low > high:
        spans = (f"{format_bytes(p['held'].min())} to {format_bytes(p['held'].max())}" for p in (own, their))
        return Pair(name, *np.empty((3, 0)), apart=" against ".join(spans))
    held = np.unique([low, *own["held"][own["held"].between(low, high)], high])
    return Pair(name, held, _error_at(own, held), _error_at(their, held))


def _error_at(points: pd.DataFrame, held: np.ndarray) -> np.ndarray:
    """The error where the line through `points` passes `held`, both logarithmic."""
    return np.exp(np.interp(np.log(held), np.log(points["held"]), np.log(points["error"])))


def _block(where: str, name: str, pairs: list[Pair]) -> str:
    """One table and its sentence."""
    cells = [("against", "held", "nmse", "its nmse", "ratio", "")]
    for pair in pairs:
        points = zip(pair.held, pair.own_error, pair.other_error, pair.ratio, strict=True)
        lines = [(format_bytes(h), f"{e:.4f}", f"{o:.4f}", f"{r:.2f}") for h, e, o, r in points]
        cells += [(pair.other if i == 0 else "", *line, "") for i, line in enumerate(lines)]
    return "\n".join([f"{where}: {name}", *align(cells), "", f"{where}: {_sentence(name, pairs)}"])


def _sentence(name: str, pairs: list[Pair]) -> str:
    """What the table says, in words."""
    compared, apart = [p for p in pairs if len(p.held)], [p for p in pairs if not len(p.held)]
    parts = [f"than {p.other} at {p.lower} ({p.times:.2f} times)" for p in compared[1:]]
    if compared:
        p, unit = compared[0], "times its error, geometric mean"
        start = f"has the lower nmse than {p.other} at {p.lower} byte counts ({p.times:.2f} {unit})"
        parts = [", ".join([start, *parts])]
    parts += [f"shares no byte count with {p.other} ({p.apart})" for p in apart]
    return f"{name} {'; it '.join(parts)}."


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code (2 when there is nothing to compare)."""
    parser = argparse.ArgumentParser(
        prog="python -m kvreplay.compare",
        description=__doc__.split("\n")[0],
        epilog="a policy is a name, or name[parameter=value,...] such as kv_slimmer[picks=fold]",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="an output folder of `kvreplay run`")
    parser.add_argument("policy", metavar="POLICY", help="whose error is compared")
    parser.add_argument("others", metavar="OTHER", nargs="+", help="with whose")
    options = parser.parse_args(arguments)
    try:
        print(compare(load(options.out), load_manifest(options.out), options.policy, options.others))
    except ResultsError as error:
        print(f"kvreplay.compare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
