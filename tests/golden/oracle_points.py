"""The points on which program and oracle are compared: the whole product, and the cover that CI can afford."""
from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle import Reference, Result, replay
from oracle_trace import Trace, read_trace

TRACES = ("smollm2-135m-wikitext2", "smollm2-135m-retrieval")
BUDGETS = ("6.25%", "12.5%", "25%", "50%")
BLOCKS = ("all", 128, 1)
POSITIONS = ("absolute", "cache")
COMPRESS = ("prompt", "always")
MAX = {"pool": "max"}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("streaming_llm", {}),
    ("h2o", {"score": "sum"}),
    ("h2o", {"score": "mean_visible"}),
    ("h2o", {"score": "decode_only"}),
    ("tova", {"share": "layer"}),
    ("tova", {"share": "kv_head"}),
    ("snapkv", {}),
    ("snapkv", MAX),
    ("snapkv", MAX | {"order": "pool_then_group"}),
    ("snapkv", {"group": "max"}),
    ("knorm", {}),
    ("keydiff", {}),
    ("weighted_kv", {"merge": True}),
    ("weighted_kv", {"merge": False}),
)
# Six rows a variant: block, positions, compress, trace. Every pair of their values occurs. The budget moves on by one
# from row to row and from variant to variant, and odd variants swap compress, so that each variant meets each value of
# each axis and over all variants every pair of values of any two axes occurs (test_cover_is_pairwise).
COVER = (
    ("all", "absolute", "prompt", 0),
    ("all", "cache", "always", 1),
    (128, "absolute", "always", 0),
    (128, "cache", "prompt", 1),
    (1, "absolute", "prompt", 1),
    (1, "cache", "always", 0),
)


@dataclass(frozen=True)
class Point:
    """One run of program and oracle alike."""

    trace: str
    policy: str
    params: tuple[tuple[str, Any], ...]
    budget: str | None
    block: int | str
    positions: str
    compress: str

    def __str__(self) -> str:
        settings = [self.policy, *(f"{key}_{value}" for key, value in self.params), self.budget, self.block,
                    self.positions, self.compress, self.trace.rsplit("-", 1)[-1]]
        return "-".join(str(x) for x in settings)

    @property
    def replay(self) -> dict[str, Any]:
        """The settings of the replay section."""
        return {"block": self.block, "positions": self.positions, "compress": self.compress}


def _point(trace: int, variant: tuple[str, dict[str, Any]], budget: str | None, *replay: Any) -> Point:
    return Point(TRACES[trace], variant[0], tuple(variant[1].items()), budget, *replay)


def cover() -> list[Point]:
    """The deterministic pairwise cover, and the full cache once per trace."""
    other = {"prompt": "always", "always": "prompt"}
    points = [_point(trace, ("full", {}), None, BLOCKS[trace], POSITIONS[trace], "always") for trace in (0, 1)]
    for number, variant in enumerate(VARIANTS):
        for row, (block, positions, compress, trace) in enumerate(COVER):
            compress = other[compress] if number % 2 else compress
            points.append(_point(trace, variant, BUDGETS[(row + number) % 4], block, positions, compress))
    return points


def product() -> list[Point]:
    """Everything."""
    axes = itertools.product((0, 1), VARIANTS, BUDGETS, BLOCKS, POSITIONS, COMPRESS)
    full = itertools.product((0, 1), [("full", {})], [None], BLOCKS, POSITIONS, ["always"])
    return [_point(*values) for values in (*full, *axes)]


def slots(budget: str, prompt: int) -> int:
    """Percent of the prompt tokens in slots (design.md section 6)."""
    return max(1, math.floor(float(budget.rstrip("%")) / 100 * prompt + 1e-9))


@functools.cache
def _loaded(path: Path) -> tuple[Trace, Reference]:
    trace = read_trace(path)
    return trace, Reference(trace)


def evaluate(path: Path, point: Point) -> Result:
    """The oracle's answer; a process keeps the traces it has read."""
    trace, reference = _loaded(path)
    budget = None if point.budget is None else slots(point.budget, trace.prompt)
    return replay(trace, point.policy, dict(point.params), budget, reference=reference, **point.replay)
