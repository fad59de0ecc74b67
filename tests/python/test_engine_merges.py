"""Both engines against the float64 oracle on the sample traces: merging policies, further scorers, allocations.

As in test_engine_oracle.py: metrics agree to 1e-3 relative, kept sets and multiplicities in every head in which no
choice was nearer than 1e-5 relative. By default merge_points.default() runs (some 130 points), with `--full` the rest.
"""
from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest

import merge_points
from kvreplay_cli import Series, differences, execute, run
from made_traces import MADE, Made
from merge_points import BASE, MADE_VARIANTS, MergePoint
from oracle import Reference
from oracle_catalogue import PUBLISHED
from oracle_heads import read_extras
from oracle_points import TRACES
from oracle_replay import replay
from oracle_trace import read_trace
from sample_sweeps import Engine, answers

COUNTS = ("merges", "lost_in_folds", "lost_by_clip")


def _points(config: pytest.Config) -> list[MergePoint]:
    points = merge_points.full() if config.getoption("--full") else merge_points.default()
    return sorted(points, key=lambda point: TRACES.index(point.trace))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a point; which points depends on --full."""
    if "point" in metafunc.fixturenames:
        metafunc.parametrize("point", _points(metafunc.config), ids=str)


def block_of(point: MergePoint) -> dict[str, Any]:
    """The sweep block of one point."""
    parts = {"policy": {"name": point.policy, **dict(point.params)}, "replay": dict(point.replay),
             "budget": point.budget, "allocation": dict(point.allocation)}
    return {key: value for key, value in parts.items() if value}


def settings_of(point: MergePoint) -> dict[str, Any]:
    """What the row of a point says of its settings."""
    settings = {"policy": point.policy, **{f"policy.{key}": value for key, value in point.defaults.items()},
                **{f"replay.{key}": value for key, value in point.replay},
                **{f"allocation.{key}": value for key, value in point.allocation or (("kind", "uniform"),)}}
    return settings | ({"budget": point.budget} if point.budget else {})


@pytest.fixture(scope="module")
def engine(backend: str, kvreplay_binary: Path, data: Path, tmp_path_factory: pytest.TempPathFactory,
           request: pytest.FixtureRequest) -> Engine:
    """The program with one of its engines."""
    folder = tmp_path_factory.mktemp(backend)
    return Engine(kvreplay_binary, data, folder, _points(request.config), block_of, settings_of, backend)


@pytest.fixture(scope="module")
def oracle(kvreplay_binary: Path, data: Path, request: pytest.FixtureRequest) -> Iterator[dict[MergePoint, Future]]:
    """The oracle's answers."""
    with answers(merge_points.evaluate, data, _points(request.config)) as futures:
        yield futures


def test_point(point: MergePoint, engine: Engine, oracle: dict[MergePoint, Future]) -> None:
    row, series = engine.result(point)
    want = oracle[point].result()
    found = differences(row, series, want)
    if not want.near_ties().any() and point.policy != "weighted_kv":
        found += [f"{name}: program {row[f'count.{name}']}, oracle {want.counts[name]}" for name in COUNTS
                  if row[f"count.{name}"] != want.counts[name]]
    assert row["leaks"] is (point.policy == "oracle_mass")
    assert not found, "\n".join(found)


COMPLETE = [made for made in MADE if "rows" not in made.options]
SETTINGS: tuple[tuple[int, dict[str, Any]], ...] = ((16, {"block": 24}), (5, {"block": 5}), (40, {"block": "all"}))


def with_extras(made: Made) -> Made:
    """The made trace with gradients and output projections."""
    random, (heads, _), (dim, value_dim) = np.random.default_rng(len(made.name)), made.heads, made.dim
    e = random.normal(size=(made.layers, heads, made.tokens, value_dim))
    wo = random.normal(size=(made.layers, heads * dim, heads * value_dim))
    return replace(made, options=made.options | {"e": e, "wo": wo})


@pytest.mark.parametrize("policy,params", MADE_VARIANTS, ids=lambda x: "-".join(
    f"{k}_{v}" for k, v in x.items()) if isinstance(x, dict) else x)
@pytest.mark.parametrize("made", COMPLETE, ids=lambda made: made.name)
def test_made(made: Made, policy: str, params: dict[str, Any], kvreplay_binary: Path, tmp_path: Path) -> None:
    """Softcap, sliding windows, sink logits, other types, partial rotation, no prompt, no sinks, budgets of 5."""
    if policy == "expected_attention" and made.options.get("rope") == "post":
        pytest.skip("its queries must be stored before rotation")
    path = with_extras(made).write(tmp_path)
    settings = BASE | PUBLISHED.get(policy, {})
    if made.options.get("rope") == "post" and settings["positions"] == "span":
        settings["positions"] = "absolute"
    sweep = [{"policy": {"name": policy, **params}, "budget": budget, "replay": settings | more}
             for budget, more in SETTINGS]
    rows = run(kvreplay_binary, {"trace": str(path), "backend": "cpu", "seed": 0, "series": True,
                                 "replay": {"measure": "all"}, "sweep": sweep}, tmp_path)
    trace, extras, found = read_trace(path), read_extras(path), []
    reference = Reference(trace, "all")
    for budget, more in SETTINGS:
        (row,) = [row for row in rows if row["budget"] == str(budget)]
        result = replay(trace, policy, params, budget, reference=reference, extras=extras, **(settings | more))
        found += [f"budget {budget}, {more}: {text}" for text in differences(row, Series(tmp_path, row), result)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name,block,word", [
    ("links always", {"policy": "kv_slimmer", "budget": 9, "replay": {"compress": "always"}}, "compress"),
    ("no gradients", {"policy": "asym_kv", "budget": 9}, "needs e"),
    ("no projection", {"policy": "critical_kv", "budget": 9}, "needs wo"),
    ("threshold and budget", {"policy": {"name": "kv_merger", "threshold": 0.75}, "budget": 9}, "budget"),
    ("rotated keys", {"policy": "kv_slimmer", "budget": 9}, "rotat"),
    ("rotated queries", {"policy": "expected_attention", "budget": 9}, "rotat"),
], ids=lambda x: x.replace(" ", "_") if isinstance(x, str) else "")
def test_impossible_points(name: str, block: dict[str, Any], word: str, kvreplay_binary: Path, tmp_path: Path) -> None:
    """Config errors (exit code 2) that say what is missing."""
    made = {made.name: made for made in MADE}["post_rope" if "rotated" in name else "no_rope"]
    config = {"trace": str(made.write(tmp_path)), "backend": "cpu", "replay": {"measure": "decode"}, "sweep": [block]}
    done = execute(kvreplay_binary, config, tmp_path)
    assert done.returncode == 2 and word in done.stderr, (done.returncode, done.stderr)
