"""Both engines against the float64 oracle on the sample traces (design.md section 10).

Metrics agree to 1e-3 relative. Kept sets agree in every head in which no compression chose between scores closer than
1e-5 relative; where one did, a swapped slot may change every later choice, so only the number of slots is compared.
Heads that chose alike are held to tighter limits (kvreplay_cli.differences).
By default a pairwise cover of the settings runs (oracle_points.COVER); `--full` runs the whole product (~25 minutes).
"""
from __future__ import annotations

import itertools
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest

import oracle_points
from kvreplay_cli import Series, differences, near
from oracle_points import BLOCKS, BUDGETS, COMPRESS, POSITIONS, TRACES, VARIANTS, Point
from oracle_policies import POLICIES
from sample_sweeps import Engine, answers

HEADS = (4, 3)  # recorded layers, KV heads


def _points(config: pytest.Config) -> list[Point]:
    points = oracle_points.product() if config.getoption("--full") else oracle_points.cover()
    return sorted(points, key=lambda point: TRACES.index(point.trace))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a point; which points depends on --full."""
    if "point" in metafunc.fixturenames:
        metafunc.parametrize("point", _points(metafunc.config), ids=str)


def block_of(point: Point) -> dict[str, Any]:
    """The sweep block of one point."""
    parts = {"policy": {"name": point.policy, **dict(point.params)}, "replay": point.replay}
    return parts | ({"budget": point.budget} if point.budget else {})


def settings_of(point: Point) -> dict[str, Any]:
    """What the row of a point says of its settings."""
    params = POLICIES[point.policy].defaults | dict(point.params)
    settings = {"policy": point.policy, **{f"policy.{key}": value for key, value in params.items()},
                **{f"replay.{key}": value for key, value in point.replay.items()}}
    return settings | ({"budget": point.budget} if point.budget else {})


@pytest.fixture(scope="module")
def engine(backend: str, kvreplay_binary: Path, data: Path, tmp_path_factory: pytest.TempPathFactory,
           request: pytest.FixtureRequest) -> Engine:
    """The program with one of its engines."""
    folder = tmp_path_factory.mktemp(backend)
    return Engine(kvreplay_binary, data, folder, _points(request.config), block_of, settings_of, backend)


@pytest.fixture(scope="module")
def oracle(kvreplay_binary: Path, data: Path, request: pytest.FixtureRequest) -> Iterator[dict[Point, Future]]:
    """The oracle's answers."""
    with answers(oracle_points.evaluate, data, _points(request.config)) as futures:
        yield futures


def test_point(point: Point, engine: Engine, oracle: dict[Point, Future]) -> None:
    row, series = engine.result(point)
    found = differences(row, series, oracle[point].result())
    assert not found, "\n".join(found)


def test_series_sum_to_the_row(engine: Engine, oracle: dict[Point, Future]) -> None:
    """nmse and rel_l2 of a row are those of its series."""
    for point in engine.points[:6]:
        row, series = engine.result(point)
        assert near(row["nmse"], float(np.sqrt(series.error2.sum() / series.output2.sum())))
        assert near(row["rel_l2.mean"], float(np.nanmean(series.rel_l2)))


def test_cover_is_pairwise() -> None:
    """Every variant meets every value of every axis, and any two values of two axes meet somewhere."""
    points = [point for point in oracle_points.cover() if point.budget]
    axes = {"trace": TRACES, "budget": BUDGETS, "block": BLOCKS, "positions": POSITIONS, "compress": COMPRESS,
            "variant": [(name, tuple(params.items())) for name, params in VARIANTS]}

    def place(point: Point, axis: str) -> Any:
        return (point.policy, point.params) if axis == "variant" else getattr(point, axis)

    for a, b in itertools.combinations(axes, 2):
        met = {(place(point, a), place(point, b)) for point in points}
        assert met == set(itertools.product(axes[a], axes[b])), (a, b)
    assert len(set(points)) == len(points)


def test_random_invariants(engine: Engine, tmp_path: Path) -> None:
    """E 3.2: a token's draw is fixed, so the final set ignores blocks and positions; heads and seeds differ."""
    blocks = [{"policy": {"name": "random"}, "budget": "12.5%", "replay": {"block": block, "positions": positions,
                                                                           "compress": "always"}}
              for block in BLOCKS for positions in POSITIONS]
    sets = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        for row in engine.sweep(TRACES[0], blocks, folder, seed=seed):
            series = Series(folder, row)
            kept = tuple(tuple(series.kept(*head)) for head in np.ndindex(HEADS))
            assert all(len(k) == 96 and sorted(set(k)) == list(k) and 0 <= k[0] and k[-1] < 1024 for k in kept)
            assert len(set(kept)) == len(kept), "heads share their draw"
            assert row["nmse"] > 0
            sets.setdefault(seed, set()).add(kept)
    assert len(sets[0]) == len(sets[1]) == 1, "the kept set depends on block or positions"
    assert sets[0] != sets[1], "the seed changes nothing"
    spread = np.histogram(np.concatenate([np.array(k) for k in next(iter(sets[0]))]), bins=4, range=(0, 1024))[0]
    assert (abs(spread / spread.sum() - 0.25) < 0.07).all(), f"not uniform over the tokens: {spread}"


def test_random_keeps_the_protected(engine: Engine, tmp_path: Path) -> None:
    block = {"policy": {"name": "random"}, "budget": 64, "protect": {"sinks": 3, "recent": 10}, "replay": {"block": 99}}
    (row,) = engine.sweep(TRACES[0], [block], tmp_path)
    series = Series(tmp_path, row)
    for head in np.ndindex(HEADS):
        kept = series.kept(*head)
        assert kept[:3] == [0, 1, 2] and kept[-10:] == list(range(1014, 1024)) and len(kept) == 64
