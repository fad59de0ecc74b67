"""The program against the oracle on made traces.

They reach what the sample traces do not: softcap, sliding windows, sink logits, float16 and float32, partial and
interleaved rotation, no prompt, keys stored after rotation or never rotated, few recorded queries, budgets below the
protection.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvreplay_cli import Series, differences, execute, run
from made_traces import MADE, Made
from oracle import Reference, replay
from oracle_policies import POLICIES
from oracle_points import VARIANTS
from oracle_trace import read_trace

# budget, replay settings, protection: small budgets put sinks, recents and windows in conflict with it
SETTINGS: tuple[tuple[int, dict[str, Any], dict[str, int]], ...] = (
    (16, {"block": "all", "compress": "always"}, {}),
    (12, {"block": 7, "compress": "prompt"}, {}),
    (5, {"block": 5, "compress": "always"}, {}),
    (9, {"block": 1, "compress": "always"}, {"sinks": 3, "recent": 12}),
    (1, {"block": "all", "compress": "always"}, {"sinks": 1}),
)
BY_NAME = {made.name: made for made in MADE}
COMPLETE = [made for made in MADE if "rows" not in made.options]


def params_of(policy: str, params: dict[str, Any]) -> dict[str, Any]:
    """SnapKV's window and kernel cut down to the size of the traces."""
    return params | ({"window": 8, "kernel": 5} if policy == "snapkv" else {})


def compare(binary: Path, made: Made, points: list[dict[str, Any]], folder: Path, measure: str) -> None:
    """One sweep of points, each a dict of policy, params, budget, replay, protect."""
    path = made.write(folder)
    blocks = [{"policy": {"name": p["policy"], **p["params"]}, "budget": p["budget"], "replay": p["replay"],
               "protect": p["protect"]} for p in points]
    blocks = [{key: value for key, value in block.items() if value} for block in blocks]
    config = {"trace": str(path), "backend": "cpu", "seed": 0, "series": True, "replay": {"measure": measure},
              "sweep": blocks}
    rows = run(binary, config, folder)
    assert len(rows) == len(points)
    trace = read_trace(path)
    reference = Reference(trace, measure)
    found = []
    for point in points:
        want = {"policy": point["policy"], "budget": str(point["budget"])}
        want |= {f"policy.{k}": v for k, v in (POLICIES[point["policy"]].defaults | point["params"]).items()}
        want |= {f"replay.{k}": v for k, v in point["replay"].items()}
        want |= {f"protect.{k}": v for k, v in point["protect"].items()}
        (row,) = [row for row in rows if all(row.get(k) == v for k, v in want.items())]
        result = replay(trace, point["policy"], point["params"], point["budget"], protect=point["protect"],
                        reference=reference, **point["replay"])
        found += [f"{want}: {text}" for text in differences(row, Series(folder, row), result)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("made", COMPLETE, ids=lambda made: made.name)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join([v[0], *(f"{k}_{x}" for k, x in v[1].items())]))
def test_made(made: Made, variant: tuple[str, dict[str, Any]], kvreplay_binary: Path, tmp_path: Path) -> None:
    policy, params = variant
    points = [{"policy": policy, "params": params_of(policy, params), "budget": budget, "protect": protect,
               "replay": {**settings, "positions": positions}}
              for budget, settings, protect in SETTINGS for positions in made.positions]
    compare(kvreplay_binary, made, points, tmp_path, "all")


@pytest.mark.parametrize("policy,params", [("streaming_llm", {}), ("snapkv", {}), ("tova", {}), ("keydiff", {}),
                                           ("h2o", {"score": "decode_only"})])
def test_few_recorded_rows(policy: str, params: dict[str, Any], kvreplay_binary: Path, tmp_path: Path) -> None:
    """Policies that need only the rows that are there."""
    point = {"policy": policy, "params": params_of(policy, params), "budget": 16, "protect": {},
             "replay": {"block": "all", "compress": "always", "positions": "absolute"}}
    compare(kvreplay_binary, BY_NAME["few_rows"], [point], tmp_path, "decode")


@pytest.mark.parametrize("policy,params,block", [("h2o", {}, "all"), ("weighted_kv", {}, "all"), ("tova", {}, 7),
                                                 ("snapkv", {"window": 9, "kernel": 5}, "all")])
def test_missing_rows_are_refused(policy: str, params: dict[str, Any], block: int | str, kvreplay_binary: Path,
                                  tmp_path: Path) -> None:
    """design.md section 3: a policy that needs rows that were not recorded is a config error naming q_index."""
    path = BY_NAME["few_rows"].write(tmp_path)
    config = {"trace": str(path), "backend": "cpu", "replay": {"block": block, "measure": "decode"},
              "sweep": [{"policy": {"name": policy, **params}, "budget": 16}]}
    done = execute(kvreplay_binary, config, tmp_path)
    assert done.returncode == 2 and "q_index" in done.stderr, (done.returncode, done.stderr)


def test_rotated_keys_refuse_cache_positions(kvreplay_binary: Path, tmp_path: Path) -> None:
    """design.md section 3: methods that need unrotated keys refuse a trace stored after rotation."""
    path = BY_NAME["post_rope"].write(tmp_path)
    config = {"trace": str(path), "backend": "cpu", "replay": {"positions": "cache"},
              "sweep": [{"policy": "streaming_llm", "budget": 16}]}
    done = execute(kvreplay_binary, config, tmp_path)
    assert done.returncode == 2 and "positions" in done.stderr, (done.returncode, done.stderr)
