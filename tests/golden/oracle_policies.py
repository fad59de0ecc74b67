"""The policies of the NumPy oracle, one function each (policies.md; E = eviction-methods.md, M = merge-methods.md).

A policy is asked once per compression. It sees a `Moment` and answers with a `Verdict`; it changes nothing.
Axes: [layer, KV head, ...]; `slot` runs in ascending token order, `member` over the query heads of a KV head's group.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np


@dataclass
class Moment:
    """What a policy may look at when a compression is due."""

    token: np.ndarray                                  # [L, Hkv, slot] token index of each slot
    key: np.ndarray                                    # [L, Hkv, slot, D] rotated under `absolute`, unrotated otherwise
    mass: np.ndarray                                   # [L, Hkv, member, slot] attention observed so far
    now: int                                           # newest token
    in_prompt: bool
    budget: int
    tokens: int                                        # length of the trace
    params: dict[str, Any]
    memory: dict[str, Any]                             # survives from one compression to the next
    last_queries: Callable[[int], np.ndarray]          # W -> attention of the last W queries [L, Hkv, member, W, slot]

    @property
    def age(self) -> np.ndarray:
        """Tokens appended since each slot's own; 0 for the newest."""
        return self.now - self.token


@dataclass
class Verdict:
    """Scores (higher = keep) and protected slots."""

    score: np.ndarray
    sinks: np.ndarray
    recent: np.ndarray


@dataclass(frozen=True)
class Policy:
    """A scorer with its defaults. `observes(params, in_prompt)`: is the attention of a block added to `mass`?"""

    judge: Callable[[Moment], Verdict] | None
    defaults: dict[str, Any] = field(default_factory=dict)
    observes: Callable[[dict[str, Any], bool], bool] = lambda params, in_prompt: False
    exact_ties: bool = True  # equal scores are equal in any precision (zeros, plateaus); False: rounding may part them
    folds: bool = False      # victims' values go to their right neighbours, unless merge is false


def share(part: float, budget: int) -> int:
    """A policy's share of the budget in slots (design.md section 6)."""
    return math.floor(part * budget + 1e-9)


def _none(m: Moment) -> np.ndarray:
    return np.zeros(m.token.shape, dtype=bool)


def streaming_llm(m: Moment) -> Verdict:
    """E 3.3: the sinks and the newest others; nothing is scored."""
    sinks = m.params["sinks"]
    return Verdict(np.zeros(m.token.shape), m.token < sinks, m.age < max(1, m.budget - sinks))


def h2o(m: Moment) -> Verdict:
    """E 3.4: attention mass received so far, group mean; the newest floor(recent * budget) are protected."""
    score = m.mass.mean(axis=2)
    if m.params["score"] == "mean_visible":
        score = score / (m.age + 1)
    return Verdict(score, _none(m), m.age < share(m.params["recent"], m.budget))


def tova(m: Moment) -> Verdict:
    """E 3.6: attention of the newest query over the present slots; `layer`: mean of all query heads, one shared set."""
    mass = m.last_queries(1)[:, :, :, 0]
    score = mass.mean(axis=2)
    if m.params["share"] == "layer":
        score = np.broadcast_to(mass.mean(axis=(1, 2))[:, None], score.shape)
    return Verdict(score, _none(m), _none(m))


def _pool(x: np.ndarray, kernel: int, kind: str) -> np.ndarray:
    """1-D pooling over the last axis, stride 1, padding kernel // 2: zeros that count (avg) or -inf (max)."""
    if kernel % 2 == 0:
        raise ValueError(f"kernel {kernel} is even")
    pad = [(0, 0)] * (x.ndim - 1) + [(kernel // 2, kernel // 2)]
    padded = np.pad(x, pad, constant_values=0.0 if kind == "avg" else -np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=-1)
    return windows.sum(axis=-1) / kernel if kind == "avg" else windows.max(axis=-1)


def snapkv(m: Moment) -> Verdict:
    """E 3.7 and policies.md: pooled attention of the last `window` queries to the slots before them; the window stays.

    Every prompt compression scores anew. A decode compression uses the scores and the window start of the last
    compression that scored, and protects all tokens since; when there was none it scores once itself.
    """
    p, memory = m.params, m.memory
    if m.in_prompt or "score" not in memory:
        start = m.now - p["window"] + 1
        mass = m.last_queries(p["window"]).sum(axis=3)
        # Slots ascend by token, so the prefix leads and filling the rest with the padding value pools the prefix alone.
        prefix = (m.token < start)[:, :, None]
        mass = np.where(prefix, mass, 0.0 if p["pool"] == "avg" else -np.inf)
        group = (lambda x: x.mean(axis=2)) if p["group"] == "mean" else (lambda x: x.max(axis=2))
        if p["order"] == "group_then_pool":
            score = _pool(group(mass), p["kernel"], p["pool"])
        else:
            score = group(_pool(mass, p["kernel"], p["pool"]))
        memory["start"] = start
        memory["score"] = np.full(m.token.shape[:2] + (m.tokens,), -np.inf)
        np.put_along_axis(memory["score"], m.token, score, axis=2)
    frozen = np.take_along_axis(memory["score"], m.token, axis=2)
    return Verdict(frozen, _none(m), m.token >= memory["start"])


def knorm(m: Moment) -> Verdict:
    """E 3.10: short keys stay."""
    return Verdict(-np.linalg.norm(m.key, axis=-1), _none(m), _none(m))


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)


def keydiff(m: Moment) -> Verdict:
    """E 3.11: keys least like the mean direction of all present keys stay."""
    unit = _unit(m.key)
    anchor = _unit(unit.mean(axis=2, keepdims=True))
    return Verdict(-(unit * anchor).sum(axis=-1), _none(m), _none(m))


def weighted_kv(m: Moment) -> Verdict:
    """M 1.2: average attention mass per query that could see the slot; sinks and the unmanaged newest are protected."""
    sinks = m.params["sinks"]
    recent = max(1, m.budget - sinks - share(m.params["managed"], m.budget))
    return Verdict(m.mass.mean(axis=2) / (m.age + 1), m.token < sinks, m.age < recent)


SNAPKV = {"window": 32, "kernel": 7, "pool": "avg", "group": "mean", "order": "group_then_pool"}
POLICIES = {
    "full": Policy(None),
    "streaming_llm": Policy(streaming_llm, {"sinks": 4}),
    "h2o": Policy(h2o, {"recent": 0.5, "score": "sum"},
                  observes=lambda p, in_prompt: p["score"] != "decode_only" or not in_prompt),
    "tova": Policy(tova, {"share": "layer"}),
    "snapkv": Policy(snapkv, SNAPKV),
    "knorm": Policy(knorm, exact_ties=False),
    "keydiff": Policy(keydiff, exact_ties=False),
    "weighted_kv": Policy(weighted_kv, {"sinks": 4, "managed": 0.5, "merge": True},
                          observes=lambda p, in_prompt: True, folds=True),
}
