"""How a budget is shared out over layers (pyramid) or over the KV heads of a layer (adaptive): E 3.8, 3.9."""
from __future__ import annotations

import math
from typing import Any, Callable

import numpy as np

from oracle_policies import Verdict, share


def pyramid(layers: int, base: int, beta: float, limit: int) -> list[int]:
    """E 3.8: a straight line over the layers, rounded by largest remainders so that the sum is layers * base."""
    if layers == 1 or base >= limit:
        return [base] * layers
    low = base / beta
    high = 2 * base - low
    if high > limit:
        low, high = 2 * base - limit, float(limit)
    line = [high - i * (high - low) / (layers - 1) for i in range(layers)]
    whole = [math.floor(x + 1e-9) for x in line]
    left = layers * base - sum(whole)
    for i in sorted(range(layers), key=lambda i: (whole[i] - line[i], i))[:left]:
        whole[i] += 1
    return whole


def budgets(allocation: dict[str, Any], budget: int | None, window: int, layers: int, prompt: int) -> list[int | None]:
    """The budget of each layer; a policy's observation window comes on top of its share."""
    if budget is None or allocation["kind"] != "pyramid":
        return [budget] * layers
    return [part + window for part in pyramid(layers, budget - window, allocation.get("beta", 20), prompt - window)]


def forced(scores: list[np.ndarray], base: list[int], floor: float) -> tuple[list[int], float]:
    """E 3.9: each head's best floor * base are safe, the rest goes to the best of all heads; and the gap of that."""
    rows, counts = [], []
    for head, score in enumerate(scores):
        order = np.argsort(-score, kind="stable")
        counts.append(share(floor, base[head]))
        rows += [(-score[slot], head, slot) for slot in order[counts[-1]:]]
    rows.sort()
    left = sum(base) - sum(counts)
    for _, head, _ in rows[:left]:
        counts[head] += 1
    gap = math.inf
    if 0 < left < len(rows):
        kept, dropped = -rows[left - 1][0], -rows[left][0]
        gap = math.inf if kept == dropped else (kept - dropped) / max(abs(kept), abs(dropped))
    return counts, gap


def share_out(allocation: dict[str, Any]) -> Callable[[list[Verdict], list[int]], tuple[list[int], float]] | None:
    """What is asked at a layer's first compression; None when the budgets are fixed beforehand."""
    if allocation["kind"] != "adaptive":
        return None

    def decide(verdicts: list[Verdict], budget: list[int]) -> tuple[list[int], float]:
        stay = [verdict.sinks | verdict.recent for verdict in verdicts]
        base = [budget[head] - int(stay[head].sum()) for head in range(len(verdicts))]
        free = [verdict.score[~mask] for verdict, mask in zip(verdicts, stay)]
        counts, gap = forced(free, base, allocation.get("floor", 0.2))
        return [budget[head] - base[head] + counts[head] for head in range(len(verdicts))], gap

    return decide
