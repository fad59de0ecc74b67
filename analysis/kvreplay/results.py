"""Reads what `kvreplay run` wrote: runs.jsonl as a pandas frame, manifest.json, and the names figures and tables share.

rows = load("out/quickstart")                 # one row a run, flat dotted columns such as "rel_l2.p99"
python -m kvreplay.results OUT [--csv [FILE]]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd

TRACE, MODE, POLICY, BUDGET = "trace", "replay.compress", "policy", "budget"
NMSE, LEAKS, SEED, LOST = "nmse", "leaks", "seed", "count.lost_in_folds"
HELD, FULL = "bytes.cache_mean", "bytes.full_mean"  # of this cache and of the full one, over the same measured steps

LEAK_NOTE = "† leaks: the policy saw the measured queries"
# What a policy itself does; the other phases, append and attend, every cache needs.
OWN_PHASES = ("observe", "score", "select", "compact")

# What identifies a point besides trace, compress mode, policy, budget and seed: rows that differ here are never joined.
_IDENTITY = ("policy.", "replay.", "protect.", "allocation")
_MERGE = "policy.merge"
_STDOUT = Path("-")
_SHORT = {"backend": "backend", "replay.block": "block", "replay.positions": "positions", "replay.measure": "measure"}


class ResultsError(ValueError):
    """An output folder cannot be read or holds no finished run."""


@dataclass
class Manifest:
    """manifest.json, everything optional: a folder without one still draws."""

    data: dict = field(default_factory=dict)

    def title(self, policy: str) -> str:
        """The policy's title, else its name."""
        return self._entry("policies", policy).get("title") or policy

    def metric_label(self, metric: str) -> str:
        """The metric's axis label, else its name."""
        return self._entry("metrics", metric).get("label") or metric

    def prompt_share(self, trace: str) -> float:
        """The part of the trace's tokens that is its prompt; NaN = unknown."""
        entry = self._entry("traces", trace)
        return entry["prompt_tokens"] / entry["tokens"] if entry else math.nan

    @property
    def git_sha(self) -> str:
        """The first ten digits of the program's commit, "+dirty" behind it when the tree was changed; "" = unknown."""
        git = self.data.get("git")
        if not isinstance(git, dict) or not git.get("sha"):
            return ""
        return f"{str(git['sha'])[:10]}{'+dirty' if git.get('dirty') else ''}"

    def _entry(self, kind: str, name: str) -> dict:
        entry = self.data.get(kind, {}).get(name)
        return entry if isinstance(entry, dict) else {}


def load_manifest(out: str | Path) -> Manifest:
    """OUT/manifest.json; an empty manifest when there is none."""
    path = Path(out) / "manifest.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Manifest()
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ResultsError(f"{path}: is not a JSON object")
    return Manifest(data)


def load(out: str | Path, status: tuple[str, ...] | None = ("ok",)) -> pd.DataFrame:
    """OUT/runs.jsonl as a frame, in file order. Of rows with the same `run` the last one counts (a forced or retried
    run).

    `status` keeps rows with one of these statuses, None keeps all. A last line that does not end in a newline, torn
    when the program was killed, is left out unless it is whole. Raises ResultsError when nothing is left.
    """
    path = Path(out) / "runs.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}") from error
    rows: dict[object, dict] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("is not an object")
        except ValueError as error:
            if number == len(lines):  # torn
                continue
            raise ResultsError(f"{path}:{number}: {error}") from error
        key = row.get("run", number)
        rows.pop(key, None)
        rows[key] = row
    kept = [row for row in rows.values() if status is None or row.get("status") in status]
    if not kept:
        raise ResultsError(
            f"{path}: holds no run with status {' or '.join(status)}" if status and rows else f"{path}: holds no run"
        )
    frame = pd.DataFrame(kept)
    if status == ("ok",):
        for column in (TRACE, MODE, POLICY, NMSE):
            if column not in frame or (column != NMSE and frame[column].isna().any()):
                raise ResultsError(f"{path}: a finished run has no {column}")
    for column in (BUDGET, HELD, FULL, SEED):
        if column not in frame:
            frame[column] = None
    frame = frame.apply(lambda c: c.astype(float) if c.isna().all() else c)  # undefined throughout: NaN, not None
    frame[LEAKS] = frame[LEAKS].map(lambda v: isinstance(v, (bool, np.bool_)) and bool(v)) if LEAKS in frame else False
    return frame


def panels(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(trace, compress mode, rows) for each pair that occurs, never mixed. The policy `full` never compresses, so its
    rows belong to every mode of their trace and make no panel of their own beside others."""
    for trace, same in rows.groupby(TRACE, sort=False):
        full = same[same[POLICY] == "full"]
        others = same[same[POLICY] != "full"]
        if others.empty:
            yield trace, full[MODE].iloc[0], full
        for mode, panel in others.groupby(MODE, sort=False):
            yield trace, mode, pd.concat([full, panel])


def identity_columns(rows: pd.DataFrame) -> list[str]:
    """Columns that, with trace, compress mode, policy, budget and seed, tell points apart."""
    return [c for c in rows.columns if (c.startswith(_IDENTITY) and c != MODE) or c == "backend"]


def add_variants(rows: pd.DataFrame) -> pd.DataFrame:
    """A copy with a column `variant`: what tells lines of one policy apart ("window 16, kernel 5"), "" where nothing
    does; and `variant_number`, which counts them from 0 in the order of the file.

    A parameter is named when it takes more than one value among the rows of the policy that share a trace, mode and
    budget; parameters that change with the budget alone stay on one line, which says "by budget". Controls that drop
    what they could merge are "dropped", AsymKV without recorded gradients has a "surrogate gradient", always.
    """
    rows = rows.copy()
    rows["variant"], rows["variant_number"] = "", 0
    columns = identity_columns(rows)
    for _, same in rows.groupby(POLICY, sort=False):
        named = [c for c in columns if _varies(same, c, [TRACE, MODE, BUDGET])]
        zipped = [short(c) for c in columns if c not in named and _varies(same, c, [TRACE, MODE])]
        by_budget = f"{' and '.join(zipped)} by budget" if zipped else ""
        for at, row in same.iterrows():
            phrases = [_phrase(c, row[c], c in named) for c in columns if c != _MERGE]
            phrases += [by_budget, "dropped" if canonical(row.get(_MERGE)) == "no" else ""]
            rows.at[at, "variant"] = ", ".join(filter(None, phrases))
        rows.loc[same.index, "variant_number"] = pd.factorize(rows.loc[same.index, "variant"])[0]
    return rows


def _varies(same: pd.DataFrame, column: str, within: list[str]) -> bool:
    """Whether rows of one policy that agree in `within` differ in `column`."""
    groups = same.groupby(within, sort=False, dropna=False)
    return any(group[column].map(canonical).nunique() > 1 for _, group in groups)


def _phrase(column: str, value: object, varies: bool) -> str:
    """What a variant's name says of one parameter."""
    if column == "policy.gradient" and value == "surrogate":
        return "surrogate gradient"
    return f"{short(column)} {canonical(value)}" if varies else ""


def over_seeds(same: pd.DataFrame) -> pd.DataFrame:
    """One line per budget of a policy and variant, by mean held bytes: `held`, and `error`, the mean nmse, with the
    `low`est and `high`est."""
    budgets = same.groupby(BUDGET, sort=False, dropna=False)
    points = budgets.agg(held=(HELD, "mean"), error=(NMSE, "mean"), low=(NMSE, "min"), high=(NMSE, "max"))
    return points.sort_values("held")


def lost_share(row: pd.Series, manifest: Manifest) -> float:
    """Tokens lost in merges over those that could be compressed: the prompt's, and decoded ones where decode compresses
    too; NaN = unknown. Every token of a KV head was evicted, was merged, or is a slot."""
    slots = row.get("multiplicity.slots")
    tokens = _number(row, "count.evictions") + _number(row, "count.merges")
    tokens += sum(slots) if isinstance(slots, list) else math.nan
    return _number(row, LOST) / (tokens * (manifest.prompt_share(row[TRACE]) if row[MODE] == "prompt" else 1))


def common_budget(panel: pd.DataFrame) -> pd.DataFrame:
    """The rows of one trace and mode at the middle (of two, the tighter) of the budgets that most policies share."""
    rows = panel[(panel[POLICY] != "full") & panel[BUDGET].notna()]
    if rows.empty:
        return rows
    shared = rows.drop_duplicates([BUDGET, POLICY, "variant"])[BUDGET].value_counts()
    best = sorted(shared.index[shared == shared.max()], key=budget_key)
    return rows[rows[BUDGET] == best[(len(best) - 1) // 2]]


def budget_key(budget: object) -> tuple[int, float]:
    """Sorts budgets as written: shares, then slots, then bytes, each ascending; what is none of them last."""
    text = str(budget).strip()
    try:
        if text.endswith("%"):
            return 0, float(text[:-1]) / 100
        for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB"), (0, "B")):
            if text.endswith(unit):
                return 2, float(text[: -len(unit)]) * 1024.0**power
        return (0, float(text)) if "." in text else (1, float(text))
    except ValueError:
        return 3, 0.0


def format_bytes(count: float) -> str:
    """Binary units with three digits: 96 KiB, 1.5 MiB."""
    if count is None or not math.isfinite(count):
        return "-"
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1023.5 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.3g} {units[0]}" if count < 999.5 else f"{count:.0f} {units[0]}"


def table(rows: pd.DataFrame, manifest: Manifest) -> str:
    """Policy, budget, nmse, rel_l2 p99, held bytes and the policy's own time (of the whole prompt and of a decode step)
    and working memory, of every row; a block for each trace and mode."""
    blocks = []
    for trace, mode, panel in panels(add_variants(rows)):
        panel = panel.assign(_order=panel[BUDGET].map(budget_key))
        lines = [("policy", "budget", "nmse", "rel_l2 p99", "held", "of full", "prompt", "step", "memory", "")]
        lines += [_cells(row, manifest) for _, row in panel.sort_values([POLICY, "variant", "_order"]).iterrows()]
        blocks.append("\n".join([f"{trace}, compress {mode}", *align(lines)]))
    blocks.append("prompt, step, memory: the policy's own time in the prompt and in a decode step, its working memory")
    return "\n\n".join(blocks) + (f"\n{LEAK_NOTE}" if rows[LEAKS].any() else "")


def align(lines: list[tuple[str, ...]]) -> list[str]:
    """Lines of cells in columns, the first and the last flush left, those between flush right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = []
    for name, *cells, last in lines:
        flush_right = (cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True))
        rows.append("  ".join((name.ljust(widths[0]), *flush_right, last)).rstrip())
    return rows


def _cells(row: pd.Series, manifest: Manifest) -> tuple[str, ...]:
    """One line of the table; the last cell warns."""
    held, full = _number(row, HELD), _number(row, FULL)
    notes = ["never acted"] if row.get("acted") is False and row[POLICY] != "full" else []
    notes += [f"loses {lost_share(row, manifest):.0%} of its tokens"] if _number(row, LOST) > 0 else []
    notes += ["worst in the early layers"] if row.get("nmse.early_heavy") is True else []
    return (
        label(row, manifest),
        _text(row[BUDGET]) if row[POLICY] != "full" else "-",
        _digits(_number(row, NMSE)),
        _digits(_number(row, "rel_l2.p99")),
        format_bytes(held),
        f"{100 * held / full:.1f}%" if full and math.isfinite(held / full) else "-",
        _duration(sum(_number(row, f"us.prompt.{phase}") for phase in OWN_PHASES)),
        _duration(sum(_number(row, f"us.{phase}.p50") for phase in OWN_PHASES)),
        format_bytes(_number(row, "memory.workspace_bytes")),
        ", ".join(notes),
    )


def to_csv(rows: pd.DataFrame) -> str:
    """Every column of every row as CSV, numbers with all their digits, lists as JSON."""
    return rows.map(lambda v: json.dumps(v) if isinstance(v, (list, dict)) else v).to_csv(index=False)


def label(row: pd.Series, manifest: Manifest) -> str:
    """The policy's title, with its variant in brackets and a dagger (LEAK_NOTE) when it leaks."""
    title = manifest.title(row[POLICY])
    return f"{title}{' (' + row['variant'] + ')' if row['variant'] else ''}{' †' if row[LEAKS] else ''}"


def short(column: str) -> str:
    """A column's name without its "policy." or "replay."."""
    return _SHORT.get(column) or column.removeprefix("policy.").removeprefix("replay.")


def canonical(value: object) -> str:
    """One spelling for equal parameter values; absent and null are the same."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "none"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, Real):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _number(row: pd.Series, column: str) -> float:
    value = row.get(column)
    return float(value) if isinstance(value, Real) else math.nan


def _text(value: object) -> str:
    return "-" if value is None or value != value else str(value)


def _digits(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _duration(us: float) -> str:
    for power, unit in ((6, "s"), (3, "ms")):
        if us >= 0.1 * 10.0**power:
            return f"{us / 10.0**power:.3g} {unit}"
    return f"{us:.3g} us" if math.isfinite(us) else "-"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code (2 when there is nothing to show)."""
    parser = argparse.ArgumentParser(
        prog="python -m kvreplay.results", description="print the runs of an output folder"
    )
    parser.add_argument("out", metavar="OUT", type=Path)
    help_text = "every column of every finished run as CSV (lists as JSON), to FILE or printed"
    parser.add_argument("--csv", metavar="FILE", type=Path, nargs="?", const=_STDOUT, help=help_text)
    options = parser.parse_args(arguments)
    try:
        rows = load(options.out)
        text = to_csv(rows) if options.csv else table(rows, load_manifest(options.out)) + "\n"
        if options.csv not in (None, _STDOUT):
            options.csv.write_text(text, encoding="utf-8")
            text = f"{options.csv}\n"
    except (ResultsError, OSError) as error:
        print(f"kvreplay.results: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    for status, count in load(options.out, None)["status"].value_counts().items():
        if status != "ok":
            print(f"not shown: {count} with status {status}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
