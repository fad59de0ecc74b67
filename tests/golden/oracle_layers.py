"""What a rule of the NumPy oracle works on: a layer with its heads, and one head at a compression (design.md 4)."""
from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np

from oracle import select
from oracle_heads import Extras, Head, softmax
from oracle_policies import Verdict
from oracle_trace import Trace


@dataclass(frozen=True)
class Rule:
    """How a policy acts. Exactly one of `judge`, `links` and `settle` is given.

    `judge` scores the slots of a head; the victims are folded by `fold` if the policy merges. `links` compresses a
    whole layer before a block comes, `settle` a whole head after it.
    """

    defaults: dict[str, Any]
    judge: Callable[[View], Verdict] | None = None
    fold: Callable[[View, np.ndarray, np.ndarray], None] | None = None      # view, kept slots, victims
    links: Callable[[Layer, int, int, int], None] | None = None             # layer, number of the block, its tokens
    settle: Callable[[View], None] | None = None
    observes: bool = False                                                  # is the attention added to `mass`?
    bias: Callable[[dict[str, Any]], float] = lambda params: 0.0            # logit += bias * log(multiplicity)
    due: Callable[[dict[str, Any], int, bool], bool] = lambda params, step, in_prompt: True  # step: decoded tokens
    exact_ties: bool = True
    window: Callable[[dict[str, Any]], int] = lambda params: 0              # observation window, for the pyramid


class Layer:
    """One layer of a replay in progress: its inputs, its heads, its rule."""

    def __init__(self, trace: Trace, extras: Extras, index: int, key: np.ndarray, query: np.ndarray, rule: Rule,
                 params: dict[str, Any], budget: int | None, positions: str) -> None:
        self.trace, self.extras, self.index, self.rule, self.params = trace, extras, index, rule, params
        self.positions, self.rotates = positions, positions != "absolute" and trace.pre_rope
        self.key, self.value = key, trace.v[index].astype(np.float64)
        self.query = query.reshape(len(key), trace.group, *query.shape[1:])       # [Hkv, member, row, D]
        self.sink = trace.sink_logit[index].reshape(len(key), trace.group, 1, 1)
        self.heads = [Head(head, trace) for head in range(len(key))]
        self.budget = [budget] * len(key)
        self.shared_out = False
        self.counts: Counter = Counter()
        self.memory: dict[str, Any] = {}

    def append(self, head: Head, a: int, b: int) -> None:
        """The tokens [a, b) join a head."""
        head.append(a, self.key[head.index, a:b], self.value[head.index, a:b])

    def rows(self, a: int, b: int) -> np.ndarray:
        """The recorded query rows of the tokens [a, b), which must all be there."""
        token = self.trace.row_token
        if not np.isin(np.arange(a, b), token).all():
            raise ValueError("the policy observes query rows that the trace does not hold (q_index)")
        return np.flatnonzero((token >= a) & (token < b))

    def places(self, head: Head, rows: np.ndarray, fresh: int) -> tuple[np.ndarray, np.ndarray]:
        """RoPE positions of slots and queries; the newest `fresh` slots are the block being processed."""
        token = self.trace.row_token[rows]
        if self.positions == "cache":
            return np.arange(len(head)), np.maximum(np.searchsorted(head.token, token, side="right") - 1, 0)
        past = len(head) - fresh
        spans = head.multiplicity[:past]
        slots = np.concatenate([np.cumsum(spans) - spans[:1].sum(), spans.sum() + np.arange(fresh)])
        return slots, spans.sum() + token - head.token[past]

    def logits(self, head: Head, rows: np.ndarray, fresh: int = 0) -> np.ndarray:
        """Scaled and capped logits [member, row, slot], without bias and mask."""
        key, query = head.key, self.query[head.index][:, rows]
        if self.rotates:
            slots, queries = self.places(head, rows, fresh)
            key, query = head.rotated(self.trace.rope, slots), self.trace.rope.rotate(query, queries)
        logit = self.trace.scale * (query @ key.T)
        cap = self.trace.softcap
        return cap * np.tanh(logit / cap) if cap else logit

    def attend(self, head: Head, rows: np.ndarray, fresh: int = 0) -> np.ndarray:
        """Softmax over the present slots [member, row, slot], multiplicities included as the policy wants."""
        logit = self.logits(head, rows, fresh) + self.rule.bias(self.params) * np.log(head.multiplicity)
        distance = self.trace.row_token[rows][:, None] - head.token
        window = self.trace.window[self.index]
        logit = np.where((distance >= 0) & ((window == 0) | (distance < window)), logit, -np.inf)
        return softmax(logit, self.sink[head.index])

    def probe(self, head: Head, a: int, b: int) -> np.ndarray:
        """Attention of the block [a, b) over the cache and itself before it is appended [member, row, slot]."""
        slots = len(head)
        self.append(head, a, b)
        weight = self.attend(head, self.rows(a, b), b - a)
        head.cut(slots)
        return weight


@dataclass
class View:
    """A head when a compression is due, as rules see it."""

    layer: Layer
    head: Head
    now: int
    in_prompt: bool
    budget: int | None
    gap: float = math.inf     # smallest relative distance between two values that a choice depended on

    @property
    def params(self) -> dict[str, Any]:
        """The policy's parameters."""
        return self.layer.params

    @property
    def age(self) -> np.ndarray:
        """Tokens appended since each slot's own; 0 for the newest."""
        return self.now - self.head.token

    @property
    def mass(self) -> np.ndarray:
        """Observed attention, group mean."""
        return self.head.mass.mean(axis=0)

    def last_queries(self, count: int) -> np.ndarray:
        """Attention of the last `count` tokens' queries over the present cache [member, row, slot]."""
        return self.layer.attend(self.head, self.layer.rows(max(0, self.now - count + 1), self.now + 1))

    def note(self, better: float, worse: float) -> None:
        """Two values that were told apart; equal ones are no tie if they are equal in any precision."""
        size = max(abs(better), abs(worse))
        if np.isfinite(size) and better != worse:
            self.gap = min(self.gap, abs(better - worse) / size)

    def choose(self, verdict: Verdict) -> np.ndarray:
        """Kept slots, ascending, by the engine's rules of selection (oracle.select)."""
        one = Verdict(*(x[None, None] for x in (verdict.score, verdict.sinks, verdict.recent)))
        keep, gap = select(one, self.budget, self.layer.rule.exact_ties)
        self.gap = min(self.gap, float(gap[0, 0]))
        return keep[0, 0]

    def apply(self, keep: np.ndarray) -> None:
        """Fold or drop all other slots and remove them."""
        victims = np.setdiff1d(np.arange(len(self.head)), keep)
        fold = self.layer.rule.fold
        if fold and self.params.get("merge", True):
            fold(self, keep, victims)
        else:
            self.drop(victims)
        self.head.keep(keep)

    def drop(self, victims: np.ndarray) -> None:
        """Nothing stands for the victims."""
        for victim in victims:
            self.head.drop(victim)
        self.layer.counts["evictions"] += len(victims)

    def merge(self, victim: int, into: int) -> None:
        """Count a victim as folded into a slot that then stands for its tokens."""
        self.head.join(victim, into)
        self.head.multiplicity[into] += self.head.multiplicity[victim]
        self.layer.counts["merges"] += 1
