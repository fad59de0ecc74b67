"""Further scorers of the NumPy oracle: lagkv, expected_attention, critical_kv, r_kv, oracle_mass.

E = research/eviction-methods.md. Each looks at one head (`View`) and answers with a `Verdict`; nothing is changed.
"""
from __future__ import annotations

from typing import Any, Callable

import numpy as np

from oracle_heads import softmax
from oracle_layers import Layer, View
from oracle_merges import no_slots
from oracle_policies import Moment, Verdict, _pool, share, snapkv
from oracle_trace import Rope

SNAPKV_BASE = {"window": 32, "kernel": 7, "pool": "avg", "group": "mean", "order": "group_then_pool"}


def one_head(judge: Callable[[Moment], Verdict], **fixed: Any) -> Callable[[View], Verdict]:
    """A scorer of oracle_policies.py, asked about one head alone."""
    def ask(view: View) -> Verdict:
        head = view.head
        moment = Moment(head.token[None, None], head.key[None, None], head.mass[None, None], view.now, view.in_prompt,
                        view.budget, len(head.stands), view.params | fixed, head.memory,
                        lambda count: view.last_queries(count)[None, None])
        verdict = judge(moment)
        return Verdict(verdict.score[0, 0], verdict.sinks[0, 0], verdict.recent[0, 0])
    return ask


def spread(states: np.ndarray, lag: int) -> np.ndarray:
    """E 3.14: how unevenly the channels of a token fill the range of the next block [block - 1, lag]."""
    blocks = states.reshape(-1, lag, states.shape[1])
    this, after = blocks[:-1], blocks[1:]
    low, high = after.min(axis=1, keepdims=True), after.max(axis=1, keepdims=True)
    range_ = np.where(high > low, high - low, 1.0)
    scaled = np.where(high > low, (this - low) / range_, 0.0)
    return softmax(scaled.std(axis=2, ddof=1))


def lagkv(view: View) -> Verdict:
    """E 3.14, kvpress's form: the rank of a token's spread inside its block; sinks, last block and remainder are 1."""
    head, sinks, lag = view.head, view.params["sinks"], view.params["lag"]
    n = len(head)
    score = np.ones(n)
    if n < sinks + 2 * lag:
        score[sinks:] = np.arange(max(0, n - sinks)) / max(1, n - sinks)
        return Verdict(score, no_slots(view), no_slots(view))
    end = sinks + (n - sinks) // lag * lag
    fine = (spread(head.key[sinks:end], lag) + spread(head.value[sinks:end], lag)) / 2
    score[sinks:end - lag] = (fine.argsort(axis=1, kind="stable").argsort(axis=1) / lag).ravel()
    verdict = Verdict(score, no_slots(view), no_slots(view))
    kept = np.isin(np.arange(sinks, end - lag), view.choose(verdict)).reshape(fine.shape)
    for row, stays in zip(fine, kept):      # equal ranks tie for good; what matters is who has which rank
        if stays.any() and not stays.all():
            view.note(row[stays].min(), row[~stays].max())
    return verdict


def mean_rotation(rope: Rope, dim: int, first: int, count: int) -> np.ndarray:
    """The mean of the rotation matrices of the positions first .. first + count - 1 [dim, dim]."""
    if rope.recipe == "none":
        return np.eye(dim)
    angle = np.arange(first, first + count)[:, None].astype(np.float32) * rope.inv_freq.astype(np.float32)
    cos, sin = (rope.scaling * f(angle.astype(np.float64)).mean(axis=0) for f in (np.cos, np.sin))
    half, matrix = len(rope.inv_freq), np.eye(dim)
    step = np.arange(half)
    a, b = (step, step + half) if rope.style == "half" else (2 * step, 2 * step + 1)
    matrix[a, a], matrix[b, b], matrix[a, b], matrix[b, a] = cos, cos, -sin, sin
    return matrix


def expected_attention(view: View) -> Verdict:
    """E 3.12: attention expected from Gaussian queries at the coming positions, times the value's length."""
    p, head, layer = view.params, view.head, view.layer
    trace = layer.trace
    if not trace.pre_rope and trace.rope.recipe != "none" or layer.positions != "absolute":
        raise ValueError("expected_attention needs queries stored before rotation and absolute positions")
    seen = (trace.row_token >= p["sinks"]) & (trace.row_token <= view.now)
    queries = trace.q[layer.index].reshape(len(layer.heads), trace.group, *trace.q.shape[2:])[head.index][:, seen]
    turn = mean_rotation(trace.rope, head.key.shape[1], int(trace.position[view.now]) + 1, p["future"])
    sinks = head.token < p["sinks"]
    masses = []
    for query in queries.astype(np.float64):
        mean = query.mean(axis=0)
        logit = trace.scale * head.key @ (turn @ mean)
        if p["covariance"]:
            spread_ = turn @ ((query - mean).T @ (query - mean) / len(query)) @ turn.T
            logit = logit + trace.scale ** 2 / 2 * ((head.key @ spread_) * head.key).sum(axis=1)
        masses.append(softmax(np.where(sinks, -np.inf, logit)))
    score = np.mean(masses, axis=0) + p["epsilon"]
    if p["value_norm"]:
        score = score * np.linalg.norm(head.value, axis=1)
    return Verdict(score, sinks, no_slots(view))


def critical_base(view: View) -> Verdict:
    """The scores that critical_kv starts from: SnapKV's, as a mean over the window, or accumulated mass."""
    if view.params["base"] == "h2o":
        return Verdict(view.mass, no_slots(view), view.age < view.budget // 2)
    verdict = one_head(snapkv, **SNAPKV_BASE)(view)
    verdict.score = verdict.score / min(SNAPKV_BASE["window"], view.now + 1)
    return verdict


def critical_kv(view: View) -> Verdict:
    """E 3.13: a share of the budget by attention, the rest by attention times the length of W_o v."""
    verdict, head, layer = critical_base(view), view.head, view.layer
    stays = verdict.recent.copy()
    free = np.flatnonzero(~stays)
    order = free[np.argsort(-verdict.score[free], kind="stable")]
    first = max(0, share(view.params["share"], view.budget) - int(stays.sum()))
    if 0 < first < len(order):
        view.note(*verdict.score[order[first - 1:first + 1]])
    stays[order[:first]] = True
    wo, group, dim = layer.extras.wo[layer.index], len(head.mass), head.value.shape[1]
    heads = range(head.index * group, (head.index + 1) * group)
    length = np.mean([np.abs(head.value @ wo[:, h * dim:(h + 1) * dim].T).sum(axis=1) for h in heads], axis=0)
    score = np.where(stays, 0.0, (np.where(stays, 0.0, verdict.score) + 1e-4) * length)
    return Verdict(score, no_slots(view), stays)


def redundancy(key: np.ndarray, similarity: float) -> np.ndarray:
    """E 3.16: how like the other keys each key is, the newest look-alike of every key not counted."""
    unit = key / (np.linalg.norm(key, axis=1, keepdims=True) + 1e-8)
    like = unit @ unit.T
    np.fill_diagonal(like, 0.0)
    for row in like:
        above = np.flatnonzero(row > similarity)
        row[above[-1] if len(above) else 0] = 0.0
    return softmax(like.mean(axis=0))


def r_kv(view: View) -> Verdict:
    """E 3.16: pooled attention of the last queries to the slots before them, less the redundancy of their keys.

    A softmax over these slots alone: the rest's share is taken out, a sink logit's stays (E 1, kernel extras).
    """
    p, head = view.params, view.head
    past = head.token < view.now - p["window"] + 1
    weight = view.last_queries(p["window"])
    total = 1 - weight[:, :, ~past].sum(axis=2, keepdims=True)
    weight = weight[:, :, past]
    total = np.where(np.isfinite(view.layer.sink[head.index]), total, weight.sum(axis=2, keepdims=True))
    importance = np.divide(weight, total, out=np.zeros_like(weight), where=total > 1e-12).mean(axis=1).max(axis=0)
    score = np.zeros(len(head))
    if past.any():
        pooled = _pool(importance, p["kernel"], "max")
        score[past] = p["lambda"] * pooled - (1 - p["lambda"]) * redundancy(head.key, p["similarity"])[past]
    return Verdict(score, no_slots(view), ~past)


def future_mass(layer: Layer) -> list[np.ndarray]:
    """Full attention of the recorded rows from each one on, summed over rows, group mean [row + 1, T] a head."""
    trace, tokens = layer.trace, np.arange(layer.trace.tokens)
    sums = []
    for head in range(len(layer.heads)):
        logit = trace.scale * (layer.query[head] @ layer.key[head].T)
        if trace.softcap:
            logit = trace.softcap * np.tanh(logit / trace.softcap)
        distance = trace.row_token[:, None] - tokens
        window = trace.window[layer.index]
        seen = (distance >= 0) & ((window == 0) | (distance < window))
        mass = softmax(np.where(seen, logit, -np.inf), layer.sink[head]).mean(axis=0)
        sums.append(np.concatenate([np.cumsum(mass[::-1], axis=0)[::-1], np.zeros((1, trace.tokens))]))
    return sums


def oracle_mass(view: View) -> Verdict:
    """Peeks: the mass that the remaining recorded queries give to a token under full attention."""
    layer = view.layer
    if layer.positions != "absolute":
        raise ValueError("the oracle looks at full attention, whose keys are rotated at their own positions")
    if "future" not in layer.memory:
        layer.memory["future"] = future_mass(layer)
    row = np.searchsorted(layer.trace.row_token, view.now, side="right")
    return Verdict(layer.memory["future"][view.head.index][row][view.head.token], no_slots(view), no_slots(view))
