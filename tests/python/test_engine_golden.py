"""Both engines against the golden tables: kept sets and multiplicities exactly, errors to 5e-6 (design.md section 12).

Each case writes its inputs as a small trace, runs the program on it and reads the series. WeightedKV A1 and A4 start
from given averages and are tested at hook level.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_cases import CASES, Case
from kvreplay_cli import Series, run

TOLERANCE = 5e-6


def config(case: Case, trace: Path, backend: str) -> dict[str, Any]:
    """One point."""
    point = {"policy": {"name": case.policy, **case.params}, "budget": case.budget}
    if case.protect:
        point["protect"] = case.protect
    return {"trace": str(trace), "backend": backend, "seed": 0, "series": True, "replay": case.settings,
            "sweep": [point]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, backend: str, kvreplay_binary: Path, tmp_path: Path) -> None:
    (row,) = run(kvreplay_binary, config(case, case.write(tmp_path), backend), tmp_path)
    series = Series(tmp_path, row)
    assert row["policy"] == case.policy and row["budget_slots"] == min(case.budget, case.k.shape[2])
    assert series.heads == (case.q.shape[0], case.k.shape[1])
    for head in np.ndindex(series.heads):
        if case.kept is not None:
            assert series.kept(*head) == case.kept
        if case.multiplicity is not None:
            assert series.multiplicity(*head) == case.multiplicity
    tokens = list(range(case.q.shape[2])) if case.rows is None else case.rows
    count = case.settings["measure"].removeprefix("last:")
    measured = tokens if count == "all" else tokens[-int(count):]
    assert series.error2.shape == (case.q.shape[0], case.q.shape[1], len(measured))
    error, norm = np.sqrt(series.error2.sum(axis=1)), np.sqrt(series.output2.sum(axis=1))
    for token, want in case.rel_l2.items():
        at = measured.index(token)
        assert abs(error[0, at] / norm[0, at] - want) <= TOLERANCE, f"rel_l2 of token {token}"
        if case.q.shape[1] == 1:
            assert abs(series.rel_l2[0, 0, at] - want) <= TOLERANCE
    for (layer, token), want in case.distance.items():
        assert abs(error[layer, measured.index(token)] - want) <= TOLERANCE, f"|d| of layer {layer}, token {token}"
