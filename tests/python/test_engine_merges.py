"""The program against the float64 oracle on the sample traces: merging policies, further scorers, allocations.

As in test_engine_oracle.py: metrics agree to 1e-3 relative, kept sets and multiplicities in every head in which no
choice was nearer than 1e-5 relative. By default merge_points.default() runs (some 130 points), with `--full` the rest.
"""
from __future__ import annotations

import multiprocessing
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, Iterator

import pytest

import merge_points
from kvreplay_cli import Series, differences, run
from merge_points import MergePoint
from oracle_points import TRACES

PROCESSES = 2
COUNTS = ("merges", "lost_in_folds", "lost_by_clip")


def _points(config: pytest.Config) -> list[MergePoint]:
    points = merge_points.full() if config.getoption("--full") else merge_points.default()
    return sorted(points, key=lambda point: TRACES.index(point.trace))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a point; which points depends on --full."""
    if "point" in metafunc.fixturenames:
        metafunc.parametrize("point", _points(metafunc.config), ids=str)


class Engine:
    """The program's results on the sample traces: one call per trace, made when first needed."""

    def __init__(self, binary: Path, data: Path, folder: Path, points: list[MergePoint]) -> None:
        self.binary, self.data, self.folder, self.points = binary, data, folder, points
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def result(self, point: MergePoint) -> tuple[dict[str, Any], Series]:
        """Row and series of a point; rows come in the order of the points."""
        folder = self.folder / point.trace
        mine = [p for p in self.points if p.trace == point.trace]
        if point.trace not in self.rows:
            self.rows[point.trace] = []  # a call that fails is not repeated for every point
            config = {"trace": str(self.data / f"{point.trace}.h5"), "backend": "cpu", "seed": 0, "series": True,
                      "replay": {"measure": "decode"}, "sweep": [block(p) for p in mine]}
            self.rows[point.trace] = run(self.binary, config, folder)
        want = {"policy": point.policy, **{f"policy.{key}": value for key, value in point.defaults.items()},
                **{f"replay.{key}": value for key, value in point.replay},
                **{f"allocation.{key}": value for key, value in point.allocation or (("kind", "uniform"),)}}
        want |= {"budget": point.budget} if point.budget else {}
        found = [row for row in self.rows[point.trace] if all(row.get(key) == value for key, value in want.items())]
        assert len(found) == 1, f"{len(found)} of {len(self.rows[point.trace])} rows have {want}"
        return found[0], Series(folder, found[0])


def block(point: MergePoint) -> dict[str, Any]:
    """The sweep block of one point."""
    parts = {"policy": {"name": point.policy, **dict(point.params)}, "replay": dict(point.replay),
             "budget": point.budget, "allocation": dict(point.allocation)}
    return {key: value for key, value in parts.items() if value}


@pytest.fixture(scope="module")
def engine(kvreplay_binary: Path, data: Path, tmp_path_factory: pytest.TempPathFactory,
           request: pytest.FixtureRequest) -> Engine:
    """The program."""
    return Engine(kvreplay_binary, data, tmp_path_factory.mktemp("merges"), _points(request.config))


@pytest.fixture(scope="module")
def oracle(kvreplay_binary: Path, data: Path, request: pytest.FixtureRequest) -> Iterator[dict[MergePoint, Future]]:
    """The oracle's answers, computed by two processes while the tests run (nothing is kept on disk)."""
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        points = _points(request.config)
        yield {point: pool.submit(merge_points.evaluate, data / f"{point.trace}.h5", point) for point in points}
        pool.shutdown(cancel_futures=True)


def test_point(point: MergePoint, engine: Engine, oracle: dict[MergePoint, Future]) -> None:
    row, series = engine.result(point)
    want = oracle[point].result()
    found = differences(row, series, want)
    if not want.near_ties().any() and point.policy != "weighted_kv":
        found += [f"{name}: program {row[f'count.{name}']}, oracle {want.counts[name]}" for name in COUNTS
                  if row[f"count.{name}"] != want.counts[name]]
    assert row["leaks"] is (point.policy == "oracle_mass")
    assert not found, "\n".join(found)
