"""Both engines against the golden values of the merging policies: kept sets, multiplicities and counts exactly, the
error of measured queries to 1e-6, on CUDA to 5e-6 (merge_cases.py, merge_fold_cases.py).

Not reachable through a replay, and so tested on the oracle alone: a given cosine threshold of D2O, CaM with given sums,
the pyramid of 32 layers.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvreplay_cli import Series, run
from merge_cases import LINK_CASES, MergeCase
from merge_fold_cases import FOLD_CASES

TOLERANCE = {"cpu": 1e-6, "cuda": 5e-6}
CASES = [*LINK_CASES, *FOLD_CASES]


def config(case: MergeCase, trace: Path, backend: str) -> dict[str, Any]:
    """One point."""
    point = {"policy": {"name": case.policy, **case.params}, "budget": case.budget, "allocation": case.allocation}
    return {"trace": str(trace), "backend": backend, "seed": 0, "series": True, "replay": case.settings,
            "sweep": [{key: value for key, value in point.items() if value}]}


def check_slots(case: MergeCase, series: Series) -> None:
    """What is left in the cache."""
    for layer, head in np.ndindex(series.heads):
        if case.kept is not None:
            assert series.kept(layer, head) == case.kept
        if case.multiplicity is not None:
            assert series.multiplicity(layer, head) == case.multiplicity
        if case.slots is not None:
            assert len(series.kept(layer, head)) == case.slots[layer][head]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: MergeCase, backend: str, kvreplay_binary: Path, tmp_path: Path) -> None:
    (row,) = run(kvreplay_binary, config(case, case.write(tmp_path), backend), tmp_path)
    series = Series(tmp_path, row)
    assert row["policy"] == case.policy
    check_slots(case, series)
    for name, count in case.counts.items():
        assert row[f"count.{name}"] == count, name
    if case.leaks is not None:
        assert row["leaks"] is case.leaks
    if case.distance:
        assert case.settings["measure"] == "all" and case.rows is None
    error = np.sqrt(series.error2.sum(axis=1))
    for (layer, token), want in case.distance.items():
        apart = abs(error[layer, token] - want)
        assert apart <= TOLERANCE[backend], f"|d| of token {token}: {error[layer, token]}, want {want}"


def test_names_are_used_once() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
