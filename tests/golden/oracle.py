"""An independent float64 replay of a kvtrace/1 file: the referee between the engines (design.md sections 4, 7 and 10).

Written from design.md, policies.md and the research pages alone, plainly, for all layers and heads at once. Use:

    trace = read_trace("tests/data/smollm2-135m-wikitext2.h5")
    result = replay(trace, "h2o", {"score": "sum"}, budget=96, block=128, compress="always")
    result.nmse, result.kept[layer][kv_head]

`random` is absent on purpose: its draws belong to the engine, only its invariants can be tested.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np

from oracle_policies import POLICIES, Moment, Policy, Verdict
from oracle_trace import Trace, round_to

ROWS_AT_ONCE = 128
UNDERFLOW = 1e-30  # scores this small may vanish in fp32: unequal ones count as a near-tie


@dataclass
class Result:
    """Outcome of one replay. Arrays over queries are [L, Hq, measured]; rel_l2 is NaN where |o| = 0 but d is not."""

    measured: np.ndarray                    # token of each measured query
    error2: np.ndarray
    output2: np.ndarray
    rel_l2: np.ndarray
    lost_mass: np.ndarray
    slots: np.ndarray                       # [L, Hkv, block] held while the block attends
    slots_after: np.ndarray                 # [L, Hkv, block] held after its compression
    kept: list[list[np.ndarray]]            # [layer][kv_head] -> token indices, ascending
    multiplicity: list[list[np.ndarray]]
    value: np.ndarray                       # [L, Hkv, slot, Dv] final values
    mass: np.ndarray                        # [L, Hkv, member, slot] final observed mass
    gaps: np.ndarray                        # [compression, L, Hkv] (last kept - first dropped) / size; inf = no choice

    @property
    def nmse(self) -> float:
        """sqrt(sum |d|^2 / sum |o|^2) over everything measured."""
        return math.sqrt(self.error2.sum() / self.output2.sum())

    @property
    def rel_l2_mean(self) -> float:
        """Mean of |d| / |o| over the queries where it is defined."""
        return float(np.nanmean(self.rel_l2))

    def near_ties(self, threshold: float = 1e-5) -> np.ndarray:
        """[L, Hkv] compressions that chose between scores closer than `threshold`: fp32 may choose otherwise."""
        return (self.gaps < threshold).sum(axis=0)


class Reference:
    """Full attention of the measured queries, at the trace's own positions."""

    def __init__(self, trace: Trace, measure: str = "decode") -> None:
        """`measure` is decode, prompt, all or last:N (the last N recorded rows)."""
        rows = np.arange(len(trace.row_token))
        kind, _, count = measure.partition(":")
        chosen = {"decode": trace.row_token >= trace.prompt, "prompt": trace.row_token < trace.prompt,
                  "all": rows >= 0, "last": rows >= len(rows) - int(count or 0)}[kind]
        self.measure, self.row = measure, rows[chosen]
        self.token = trace.row_token[chosen]
        if not len(self.row):
            raise ValueError(f"measure: {measure} measures nothing")
        key, query = _rotated(trace, "absolute")
        token = np.broadcast_to(np.arange(trace.tokens), key.shape[:3])
        parts = [attention(trace, query[:, :, part], trace.row_token[part], key, token)
                 for part in _chunks(self.row)]
        self.probability = np.concatenate(parts, axis=3)                      # [L, Hkv, member, measured, T]
        self.output = self.probability @ trace.v.astype(np.float64)[:, :, None]  # [L, Hkv, member, measured, Dv]


@dataclass
class _Cache:
    """The slots of all layers and KV heads; every head holds equally many."""

    token: np.ndarray          # [L, Hkv, slot]
    key: np.ndarray            # [L, Hkv, slot, D] rotated once under `absolute`, as stored otherwise
    value: np.ndarray          # [L, Hkv, slot, Dv]
    mass: np.ndarray           # [L, Hkv, member, slot]
    multiplicity: np.ndarray   # [L, Hkv, slot]
    lost: np.ndarray           # [L, Hkv, T] tokens no slot stands for
    gaps: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def empty(cls, trace: Trace) -> "_Cache":
        heads, (dim, value_dim) = trace.k.shape[:2], (trace.k.shape[3], trace.v.shape[3])
        return cls(np.zeros((*heads, 0), np.int64), np.zeros((*heads, 0, dim)), np.zeros((*heads, 0, value_dim)),
                   np.zeros((*heads, trace.group, 0)), np.zeros((*heads, 0), np.int64),
                   np.zeros((*heads, trace.tokens), bool))

    @property
    def slots(self) -> int:
        """Slots of every head."""
        return self.token.shape[2]

    def append(self, first: int, key: np.ndarray, value: np.ndarray) -> None:
        """Add the tokens from `first` on, each a slot of its own."""
        heads, n = key.shape[:2], key.shape[2]
        self.token = np.concatenate([self.token, np.broadcast_to(np.arange(first, first + n), (*heads, n))], axis=2)
        self.key = np.concatenate([self.key, key], axis=2)
        self.value = np.concatenate([self.value, value], axis=2)
        self.mass = np.concatenate([self.mass, np.zeros((*heads, self.mass.shape[2], n))], axis=3)
        self.multiplicity = np.concatenate([self.multiplicity, np.ones((*heads, n), np.int64)], axis=2)

    def keep(self, slot: np.ndarray) -> None:
        """Drop all but the slots [L, Hkv, kept]."""
        layers, heads, slots = self.token.shape
        row = (np.arange(layers * heads) * slots).reshape(layers, heads, 1) + slot
        for name in ("token", "key", "value", "multiplicity"):
            full = getattr(self, name)
            setattr(self, name, full.reshape(layers * heads * slots, *full.shape[3:])[row])
        self.mass = np.take_along_axis(self.mass, slot[:, :, None], axis=3)


def _rotated(trace: Trace, positions: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys and queries as they are cached: rotated at their own positions under `absolute`, untouched otherwise."""
    if positions == "absolute" and trace.pre_rope:
        return trace.rope.rotate(trace.k, trace.position), trace.rope.rotate(trace.q, trace.position[trace.row_token])
    if positions == "cache" and not trace.pre_rope and trace.rope.recipe != "none":
        raise ValueError("positions: cache needs keys stored before rotation")
    return trace.k.astype(np.float64), trace.q.astype(np.float64)


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[i:i + ROWS_AT_ONCE] for i in range(0, len(rows), ROWS_AT_ONCE)]


def attention(trace: Trace, query: np.ndarray, query_token: np.ndarray, key: np.ndarray,
              token: np.ndarray) -> np.ndarray:
    """Softmax of queries [L, Hq, row, D] over slots [L, Hkv, slot, D] -> [L, Hkv, member, row, slot] (design.md 4).

    Causal and sliding-window masks go by token index; softcap precedes the softmax; a sink logit joins the denominator
    only. A query that sees no slot gives a row of zeros.
    """
    layers, heads, slots = token.shape
    rows = query.shape[2]
    query = query.reshape(layers, heads, trace.group * rows, -1)
    logit = (trace.scale * (query @ key.swapaxes(2, 3))).reshape(layers, heads, trace.group, rows, slots)
    if trace.softcap:
        logit = trace.softcap * np.tanh(logit / trace.softcap)
    distance = query_token[:, None] - token[:, :, None, :]                   # [L, Hkv, row, slot]
    window = trace.window[:, None, None, None]
    visible = (distance >= 0) & ((window == 0) | (distance < window))
    logit = np.where(visible[:, :, None], logit, -np.inf)
    sink = trace.sink_logit.reshape(layers, heads, trace.group, 1, 1)
    top = np.maximum(logit.max(axis=-1, keepdims=True), sink)
    top = np.where(np.isfinite(top), top, 0.0)
    weight = np.exp(logit - top)
    total = weight.sum(axis=-1, keepdims=True) + np.exp(sink - top)
    return np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)


def select(verdict: Verdict, budget: int, exact_ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Slots to keep [L, Hkv, budget], ascending, and the relative gap of the choice [L, Hkv] (design.md section 4).

    Protected slots stay and the best others join them, the older of equals first. If more are protected than fit, the
    oldest sinks stay up to budget - 1, then the newest of the other protected ones.
    """
    protected = verdict.sinks | verdict.recent
    if np.isnan(verdict.score).any():
        raise ValueError("NaN score")
    order = np.argsort(-np.where(protected, np.inf, verdict.score), axis=2, kind="stable")
    keep = np.sort(order[:, :, :budget], axis=2)
    gap = np.full(keep.shape[:2], np.inf)
    for head in np.ndindex(gap.shape):
        count = int(protected[head].sum())
        if count < budget:
            gap[head] = _relative_gap(*verdict.score[head][order[head][budget - 1:budget + 1]], exact_ties)
        elif count > budget:
            oldest = np.flatnonzero(verdict.sinks[head])[:budget - 1]
            others = np.setdiff1d(np.flatnonzero(protected[head]), oldest)
            keep[head] = np.sort(np.concatenate([oldest, others[len(others) - (budget - len(oldest)):]]))
    return keep, gap


def _relative_gap(kept: float, dropped: float, exact_ties: bool) -> float:
    if kept == dropped:
        return np.inf if exact_ties else 0.0
    size = max(abs(kept), abs(dropped))
    return 0.0 if size < UNDERFLOW else (kept - dropped) / size


def _victims(verdict: Verdict, keep: np.ndarray) -> np.ndarray:
    """Dropped slots [head, victim] in the order a one-at-a-time policy drops them.

    Ascending score, the newer of equals first (the older is kept); protected victims of an overflow come last by token.
    """
    layers, heads, slots = verdict.score.shape
    score, keep = verdict.score.reshape(layers * heads, slots), keep.reshape(layers * heads, -1)
    protected = (verdict.sinks | verdict.recent).reshape(layers * heads, slots)
    rows = []
    for head in range(layers * heads):
        dropped = np.setdiff1d(np.arange(slots), keep[head])
        free, forced = dropped[~protected[head][dropped]], dropped[protected[head][dropped]]
        newest_first = free[::-1]
        rows.append(np.concatenate([newest_first[np.argsort(score[head][newest_first], kind="stable")], forced]))
    return np.array(rows)


def fold_right(cache: _Cache, victims: np.ndarray, average: np.ndarray, dtype: str) -> None:
    """M 1.2: fold each victim's value into the next present slot, weighted by the (unchanging) averages; keys go."""
    heads = np.arange(len(victims))
    slots = cache.slots
    value = cache.value.reshape(len(heads), slots, -1)           # views: the cache is changed in place
    multiplicity = cache.multiplicity.reshape(len(heads), slots)
    average = average.reshape(len(heads), slots)
    after = np.tile(np.arange(1, slots + 2), (len(heads), 1))  # after[slots] absorbs writes of a missing left slot
    before = np.tile(np.arange(-1, slots), (len(heads), 1))
    for victim in victims.T:
        target = after[heads, victim]
        total = average[heads, victim] + average[heads, target]
        equal = total == 0
        total = np.where(equal, 2.0, total)
        parts = [np.where(equal, 1.0, average[heads, slot]) / total for slot in (victim, target)]
        folded = parts[0][:, None] * value[heads, victim] + parts[1][:, None] * value[heads, target]
        value[heads, target] = round_to(folded, dtype)
        multiplicity[heads, target] += multiplicity[heads, victim]
        left = before[heads, victim]
        before[heads, target], after[heads, left] = left, target


def _blocks(trace: Trace, block: int | str) -> list[tuple[int, int]]:
    size = max(1, trace.prompt) if block == "all" else int(block)
    prompt = [(a, min(a + size, trace.prompt)) for a in range(0, trace.prompt, size)]
    return prompt + [(t, t + 1) for t in range(trace.prompt, trace.tokens)]


class _Replay:
    """One replay in progress."""

    def __init__(self, trace: Trace, policy: Policy, params: dict[str, Any], budget: int | None, positions: str,
                 protect: dict[str, int], reference: Reference, watch: Callable[[dict[str, Any]], None]) -> None:
        self.trace, self.policy, self.params, self.budget, self.positions = trace, policy, params, budget, positions
        self.protect, self.reference, self.watch = protect, reference, watch
        self.key, self.query = _rotated(trace, positions)
        self.value = trace.v.astype(np.float64)
        self.cache = _Cache.empty(trace)
        self.memory: dict[str, Any] = {}
        self.measured_at = np.full(len(trace.row_token), -1)        # recorded row -> index among the measured ones
        self.measured_at[reference.row] = np.arange(len(reference.row))
        self.error2, self.output2, self.lost = (np.zeros((*trace.q.shape[:2], len(reference.row))) for _ in range(3))

    def attend(self, rows: np.ndarray) -> np.ndarray:
        """Attention of recorded query rows over the present cache; under `cache` positions are slot indices."""
        trace, cache = self.trace, self.cache
        query_token, query, key = trace.row_token[rows], self.query[:, :, rows], cache.key
        if self.positions == "cache" and trace.pre_rope:
            key = trace.rope.rotate(key, np.arange(cache.slots))
            index = (cache.token[:, :, None, :] <= query_token[:, None]).sum(axis=-1) - 1  # newest slot, token <= t
            query = trace.rope.rotate(query, np.repeat(np.maximum(index, 0), trace.group, axis=1))
        return attention(trace, query, query_token, key, cache.token)

    def last_queries(self, now: int, count: int) -> np.ndarray:
        """Attention of the last `count` tokens' queries over the present cache (an observation window)."""
        wanted = np.arange(max(0, now - count + 1), now + 1)
        if not np.isin(wanted, self.trace.row_token).all():
            raise ValueError("the observation window needs query rows that the trace does not hold (q_index)")
        return self.attend(np.searchsorted(self.trace.row_token, wanted))

    def block(self, a: int, b: int, in_prompt: bool) -> None:
        """Append the tokens [a, b), attend their queries, observe and measure."""
        cache, token = self.cache, self.trace.row_token
        cache.append(a, self.key[:, :, a:b], self.value[:, :, a:b])
        observe = self.policy.observes(self.params, in_prompt)
        if observe and not np.isin(np.arange(a, b), token).all():
            raise ValueError("the policy observes query rows that the trace does not hold (q_index)")
        for rows in _chunks(np.flatnonzero((token >= a) & (token < b) & (observe | (self.measured_at >= 0)))):
            weight = self.attend(rows)
            if observe:
                cache.mass += weight.sum(axis=3)
            measured = self.measured_at[rows] >= 0
            if measured.any():
                self.measure(rows[measured], weight[:, :, :, measured])

    def measure(self, rows: np.ndarray, weight: np.ndarray) -> None:
        """Compare the outputs of query rows with full attention (design.md section 7)."""
        at, cache = self.measured_at[rows], self.cache
        output, full = weight @ cache.value[:, :, None], self.reference.output[:, :, :, at]
        lost = (self.reference.probability[:, :, :, at] * cache.lost[:, :, None, None]).sum(axis=-1)
        error2, output2 = ((x ** 2).sum(axis=-1) for x in (output - full, full))
        for total, part in ((self.error2, error2), (self.output2, output2), (self.lost, lost)):
            total[:, :, at] = part.reshape(*self.trace.q.shape[:2], len(at))
        self.watch({"event": "attend", "query": self.trace.row_token[rows], "token": cache.token, "weight": weight,
                    "output": output, "full": full})

    def compress(self, now: int, in_prompt: bool) -> None:
        """Bring every head to the budget."""
        cache = self.cache
        moment = Moment(cache.token, cache.key, cache.mass, now, in_prompt, self.budget, self.trace.tokens, self.params,
                        self.memory, lambda count: self.last_queries(now, count))
        verdict = self.policy.judge(moment)
        verdict.sinks = verdict.sinks | (cache.token < self.protect.get("sinks", 0))
        verdict.recent = verdict.recent | (moment.age < self.protect.get("recent", 0))
        keep, gap = select(verdict, self.budget, self.policy.exact_ties)
        cache.gaps.append(gap)
        self.watch({"event": "compress", "now": now, "token": cache.token, "score": verdict.score, "keep": keep})
        if self.policy.folds and self.params["merge"]:
            fold_right(cache, _victims(verdict, keep), verdict.score, self.trace.dtype)
        else:
            gone = np.ones(cache.token.shape, dtype=bool)
            np.put_along_axis(gone, keep, False, axis=2)
            for head in np.ndindex(gone.shape[:2]):
                cache.lost[head][cache.token[head][gone[head]]] = True
        cache.keep(keep)


def replay(trace: Trace, policy: str, params: dict[str, Any] | None = None, budget: int | None = None, *,
           block: int | str = "all", compress: str = "always", positions: str = "absolute", measure: str = "decode",
           protect: dict[str, int] | None = None, reference: Reference | None = None,
           watch: Callable[[dict[str, Any]], None] | None = None) -> Result:
    """Replay a trace under one policy (design.md section 4); `budget` in slots, None = unlimited.

    `reference` may be shared by all replays of one trace and `measure`; `watch` sees blocks and compressions.
    """
    rule = POLICIES[policy]
    unknown = set(params or {}) - set(rule.defaults)
    if unknown or compress not in ("always", "prompt") or positions not in ("absolute", "cache"):
        raise ValueError(f"bad setting: {unknown or (compress, positions)}")
    reference = reference or Reference(trace, measure)
    run = _Replay(trace, rule, {**rule.defaults, **(params or {})}, budget, positions, protect or {}, reference,
                  watch or (lambda event: None))
    held, held_after, cache = [], [], run.cache
    for a, b in _blocks(trace, block):
        in_prompt = b <= trace.prompt
        run.block(a, b, in_prompt)
        held.append(cache.slots)
        if rule.judge and budget is not None and cache.slots > budget and (compress == "always" or in_prompt):
            run.compress(b - 1, in_prompt)
        held_after.append(cache.slots)
    zero_norm = np.where(run.error2 == 0, 0.0, np.nan)
    rel_l2 = np.divide(np.sqrt(run.error2), np.sqrt(run.output2), out=zero_norm, where=run.output2 > 0)
    heads = trace.k.shape[:2]
    held, held_after = (np.broadcast_to(np.array(steps), (*heads, len(steps))) for steps in (held, held_after))
    kept, multiplicity = ([list(layer) for layer in x] for x in (cache.token, cache.multiplicity))
    return Result(reference.token, run.error2, run.output2, rel_l2, run.lost, held, held_after, kept, multiplicity,
                  cache.value, cache.mass, np.array(cache.gaps).reshape(-1, *heads))
