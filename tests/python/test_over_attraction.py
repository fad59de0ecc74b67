"""Why disjoint picks fail in a sharp layer, and that `picks: fold` repairs it, on both sample traces.

Disjoint links share no slot, so at low budgets a heavy token must join a light neighbour. KVSlimmer's key stays at the
heavy token, the slot counts all its tokens, and attention to it is multiplied: mass_tv shows it. `fold` joins the lowest
links only, whatever they touch: heavy tokens stay alone, and no token is lost as in the released code.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvreplay_cli import run
from oracle_points import TRACES

SHARP = 1  # of the recorded layers: layer 9


@pytest.fixture(scope="module", params=TRACES)
def rows(request: pytest.FixtureRequest, kvreplay_binary: Path, data: Path,
         tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By picks: kv_slimmer at a quarter of the prompt; `released` is the authors' code."""
    config = {"trace": str(data / f"{request.param}.h5"), "budget": "25%", "metrics": "mass", "timing": {"repeats": 0},
              "replay": {"block": 128},
              "sweep": [{"policy": {"name": "kv_slimmer", "picks": ["disjoint", "fold"]}}, {"policy": "kv_slimmer_released"}]}
    rows = run(kvreplay_binary, config, tmp_path_factory.mktemp("over_attraction"))
    return {"released" if row["policy"] == "kv_slimmer_released" else row["policy.picks"]: row for row in rows}


def test_disjoint_picks_over_attract(rows: dict[str, dict[str, Any]]) -> None:
    moved = {name: row["mass_tv.layer"][SHARP] for name, row in rows.items()}
    assert moved["disjoint"] > 10 * moved["fold"], moved
    errors = {name: row["nmse.layer"][SHARP] for name, row in rows.items()}
    assert errors["disjoint"] > 5 * errors["released"], errors
    lost = rows["disjoint"]["lost_mass.mean"]
    assert lost < 1e-9, "nothing was lost: the mass that moved is attention to slots that count too much"


def test_fold_is_better_than_both(rows: dict[str, dict[str, Any]]) -> None:
    for error in ({name: row["nmse"] for name, row in rows.items()},
                  {name: row["nmse.layer"][SHARP] for name, row in rows.items()}):
        assert error["fold"] < error["released"] and error["fold"] < error["disjoint"], error
    assert rows["fold"]["count.lost_in_folds"] == 0 < rows["released"]["count.lost_in_folds"]
