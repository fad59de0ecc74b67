"""The program and the oracle side by side over many points of the sample traces."""
from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvreplay_cli import Series, run

PROCESSES = min(16, os.cpu_count() or 2)


class Engine:
    """The program's results on the sample traces: one call per trace, made when first needed.

    A point has a `trace`; `block(point)` is its block of a sweep, `want(point)` what its row says of its settings.
    """

    def __init__(self, binary: Path, data: Path, folder: Path, points: list, block: Callable[[Any], dict[str, Any]],
                 want: Callable[[Any], dict[str, Any]], backend: str) -> None:
        self.binary, self.data, self.folder, self.points, self.backend = binary, data, folder, points, backend
        self.block, self.want = block, want
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def sweep(self, trace: str, blocks: list[dict[str, Any]], folder: Path, **base: Any) -> list[dict[str, Any]]:
        """Rows of one sweep over a sample trace."""
        config = {"trace": str(self.data / f"{trace}.h5"), "backend": self.backend, "seed": 0, "series": True,
                  **base, "replay": {"measure": "decode"}, "sweep": blocks}
        return run(self.binary, config, folder)

    def result(self, point: Any) -> tuple[dict[str, Any], Series]:
        """Row and series of a point; the row is found by its settings, defaults included."""
        folder = self.folder / point.trace
        if point.trace not in self.rows:
            self.rows[point.trace] = []  # a call that fails is not repeated for every point
            blocks = [self.block(p) for p in self.points if p.trace == point.trace]
            self.rows[point.trace] = self.sweep(point.trace, blocks, folder)
        want, rows = self.want(point), self.rows[point.trace]
        found = [row for row in rows if all(row.get(key) == value for key, value in want.items())]
        assert len(found) == 1, f"{len(found)} of {len(rows)} rows have {want}"
        return found[0], Series(folder, found[0])


@contextmanager
def answers(evaluate: Callable[[Path, Any], Any], data: Path, points: list) -> Iterator[dict[Any, Future]]:
    """The oracle's answers, computed by processes of their own while the tests run (nothing is kept on disk)."""
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {point: pool.submit(evaluate, data / f"{point.trace}.h5", point) for point in points}
        pool.shutdown(cancel_futures=True)
