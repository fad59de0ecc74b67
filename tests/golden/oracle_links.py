"""Policies that join a slot with its right neighbour before a block comes: kv_slimmer, asym_kv, mean_merge.

K = research/kvslimmer-asymkv.md. The picks are one set for all heads of a layer; links are counted from the first slot
after the sinks. Stored values are means: slot value = (sum of the values it stands for) / multiplicity.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from oracle_heads import Head
from oracle_layers import Layer
from oracle_trace import Rope

EPS = 1e-21


@dataclass
class Probed:
    """What the queries of the coming block saw of a head's slots after the sinks."""

    head: Head
    sinks: int
    mass: np.ndarray          # [slot] column mass, multiplicity included, group mean
    weight: np.ndarray        # [member, row, slot + token of the block], sinks included
    h: np.ndarray             # [slot] KVSlimmer's state, smoothed

    @property
    def alpha(self) -> np.ndarray:
        """Mass normalised over the slots after the sinks."""
        return self.mass / (self.mass.sum() + EPS)

    @property
    def value(self) -> np.ndarray:
        """Mean values."""
        return self.head.value[self.sinks:]

    @property
    def multiplicity(self) -> np.ndarray:
        """Tokens a slot stands for, clipped ones not."""
        return self.head.multiplicity[self.sinks:]


def compress_links(layer: Layer, number: int, a: int, b: int) -> None:
    """Rounds of probe, score and pick before the block [a, b), block `number` of the prompt (K 2.2, 3)."""
    p, budget = layer.params, layer.budget[0]
    if budget is None:
        return
    sinks = min(p["sinks"], budget - 1)
    probed = [probe(layer, head, sinks, number, a, b) for head in layer.heads]
    while (excess := len(layer.heads[0]) - budget) > 0:
        score = sum(link_mass(one) for one in probed) / decay(len(probed[0].mass) - 1, p["decay_tokens"])
        if "gradient" in p:    # K 2.3 step 4
            score = score * (probed[0].multiplicity[:-1] + probed[0].multiplicity[1:])
        picked, gap = PICKS[p["picks"]](score, excess)
        for one in probed:
            one.head.gaps.append(gap)
            join = join_runs if p["picks"] == "fold" else join_pairs
            join(layer, one, picked, a, b)
        if len(layer.heads[0]) > budget:
            probed = [probe(layer, head, sinks, number, a, b) for head in layer.heads]


def probe(layer: Layer, head: Head, sinks: int, number: int, a: int, b: int) -> Probed:
    """Attention of the coming block, and KVSlimmer's state brought up to date (K 3.2, 3.3)."""
    weight = layer.probe(head, a, b)
    one = Probed(head, sinks, weight.sum(axis=1).mean(axis=0)[sinks:len(head)], weight, np.zeros(0))
    if layer.params.get("rule") == "released":
        one.h = raw_state(one)
        if layer.params["smoothing"]:
            old = head.state[sinks:]
            one.h = np.where(np.isnan(old), one.h, one.h / number + (number - 1) / number * old)
            head.state[sinks:] = one.h
    return one


def raw_state(one: Probed) -> np.ndarray:
    """K 3.2: alpha (1 - 2 alpha) D, D the L1 distance of a value sum from the mean value sum."""
    sums = one.multiplicity[:, None] * one.value
    distance = np.abs(sums - one.alpha @ sums).sum(axis=1)
    return one.alpha * (1 - 2 * one.alpha) * distance


def link_mass(one: Probed) -> np.ndarray:
    """Mass of both ends of each link."""
    return one.mass[:-1] + one.mass[1:]


def decay(links: int, tokens: float) -> np.ndarray:
    """K 2.3 step 3: what the masses are divided by; 0 tokens = nothing."""
    return np.exp((np.arange(links) + 1) / tokens) if tokens else np.ones(links)


def distance(low: float, high: float) -> float:
    """Relative gap of two link scores that were told apart."""
    return (high - low) / max(abs(high), abs(low), 1e-300) if high != low else math.inf


def faithful(score: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The lowest links, overlaps and all; of equal links the older first."""
    order = np.argsort(score, kind="stable")
    gap = distance(*score[order[count - 1:count + 1]]) if count < len(order) else math.inf
    return np.sort(order[:count]), gap


def disjoint(score: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """Ascending, skipping links that touch a slot already used; at most `count`."""
    picked: list[int] = []
    used, gap = np.zeros(len(score) + 1, bool), math.inf      # slots
    for link in np.argsort(score, kind="stable"):
        if used[link] or used[link + 1]:
            continue
        if len(picked) == count:
            return np.sort(picked), min(gap, distance(score[picked[-1]], score[link]))
        for other in (link - 1, link + 1):      # shut out now, as it would have shut this one out
            if 0 <= other < len(score) and not used[other] and not used[other + 1]:
                gap = min(gap, distance(score[link], score[other]))
        picked.append(int(link))
        used[link:link + 2] = True
    return np.sort(picked), gap


PICKS = {"faithful": faithful, "fold": faithful, "disjoint": disjoint}


def pair_weights(layer: Layer, one: Probed, a: int, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of the left and the right key of every link [link, 1 or channel], and where they leave [0, 1]."""
    p = layer.params
    if "gradient" in p:
        left, right = squares(layer, one, a, b)
        total = left + right
        share = np.divide(left, total, out=np.full_like(left, 0.5), where=total > 0)
        return share, 1 - share, np.zeros(len(share), bool)
    if "rule" not in p:
        half = np.full((len(one.mass) - 1, 1), 0.5)
        return half, half, np.zeros(len(half), bool)
    left, right = released(one) if p["rule"] == "released" else norms(one, p["rule"] == "consistent")
    total = left + right
    if p["guard"] == "none":
        share, other = left / (total + EPS), right / (total + EPS)
        return share[:, None], other[:, None], (share < 0) | (share > 1)
    flat = np.abs(total) <= EPS
    share = np.where(flat, 0.5, left / np.where(flat, 1.0, total))
    clamped = np.clip(share, 0.0, 1.0)
    return clamped[:, None], 1 - clamped[:, None], share != clamped


def released(one: Probed) -> tuple[np.ndarray, np.ndarray]:
    """K 3.5, the authors' code."""
    alpha = one.alpha
    apart = one.h / (alpha * (1 - 2 * alpha) + EPS)
    both = alpha[:-1] * alpha[1:] * (apart[:-1] + apart[1:])
    return one.h[:-1] - both, one.h[1:] - both


def norms(one: Probed, means: bool) -> tuple[np.ndarray, np.ndarray]:
    """K 3.1, the paper's L2 norms; with value means instead of sums the consistent form (K 7.5)."""
    alpha = one.alpha[:, None]
    value = one.value if means else one.multiplicity[:, None] * one.value
    output = (alpha * value).sum(axis=0)
    own = np.linalg.norm(alpha * (1 - 2 * alpha) * (value - output), axis=1)
    both = np.linalg.norm(alpha[:-1] * alpha[1:] * (value[:-1] + value[1:] - 2 * output), axis=1)
    return own[:-1] - both, own[1:] - both


def squares(layer: Layer, one: Probed, a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
    """K 2.4: squared loss gradients of both keys of each link, per channel."""
    squared = gradient(layer, one, a, b)[one.sinks:] ** 2
    return squared[:-1], squared[1:]


def gradient(layer: Layer, one: Probed, a: int, b: int) -> np.ndarray:
    """K 2.4: gradient of the loss with respect to the cached keys [slot, channel].

    The recorded gradient of the output, or the output itself as a named surrogate.
    """
    head, rows = one.head, layer.rows(a, b)
    output = one.weight @ np.concatenate([head.value, layer.value[head.index, a:b]])          # [member, row, Dv]
    outer = output
    if layer.params["gradient"] == "recorded":
        e = layer.extras.e[layer.index]
        outer = e.reshape(len(layer.heads), -1, *e.shape[1:])[head.index][:, rows]
    along = outer @ head.value.T - (outer * output).sum(axis=-1, keepdims=True)               # E.(v - o)
    factor = layer.trace.scale * one.weight[:, :, :len(head)] * along * capped_slope(layer, head, rows, a, b)
    query = layer.query[head.index][:, rows]
    if not layer.rotates:
        return np.einsum("gtj,gtc->jc", factor, query)
    layer.append(head, a, b)
    slots, queries = layer.places(head, rows, b - a)
    head.cut(factor.shape[2])
    turned = np.einsum("gtj,gtc->jc", factor, layer.trace.rope.rotate(query, queries))
    return turn_back(layer.trace.rope, turned, slots[:len(head)])


def capped_slope(layer: Layer, head: Head, rows: np.ndarray, a: int, b: int) -> np.ndarray | float:
    """What the softcap leaves of a logit's change, 1 - tanh^2 [member, row, slot]; K 2.4 has none."""
    if not layer.trace.softcap:
        return 1.0
    slots = len(head)
    layer.append(head, a, b)
    logit = layer.logits(head, rows, b - a)[:, :, :slots]
    head.cut(slots)
    return 1 - (logit / layer.trace.softcap) ** 2


def turn_back(rope: Rope, x: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The transpose of the rotation, with the cosines and sines that the recipe rotates by."""
    angle = position[:, None].astype(np.float32) * rope.inv_freq.astype(np.float32)
    cos, sin = (rope._rounded(f(angle.astype(np.float64)).astype(np.float32) * np.float32(rope.scaling))
                for f in (np.cos, np.sin))
    half = len(rope.inv_freq)
    first, second = (slice(0, half), slice(half, 2 * half)) if rope.style == "half" else (
        slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    out = x.copy()
    out[:, first] = x[:, first] * cos + x[:, second] * sin
    out[:, second] = x[:, second] * cos - x[:, first] * sin
    return out


def stand_for(layer: Layer, total: int) -> int:
    """Multiplicity after a merge: clipped, the rest counted as lost."""
    clip = layer.params["clip"]
    kept = min(total, clip) if clip else total
    layer.counts["lost_by_clip"] += int(total - kept)
    return kept


def join_pairs(layer: Layer, one: Probed, picked: np.ndarray, a: int, b: int) -> None:
    """K 2.5: every pair from the arrays before the round; a victim whose left neighbour goes too is lost."""
    head, merge = one.head, layer.params.get("merge", True)
    left, right, outside = pair_weights(layer, one, a, b) if merge else (None, None, None)
    key, value, span, state = head.key.copy(), head.value.copy(), head.multiplicity.copy(), head.state.copy()
    gone = set((picked + one.sinks + 1).tolist())
    for link in picked.tolist():
        j, victim = link + one.sinks, link + one.sinks + 1
        if j in gone:
            head.drop(victim)
            layer.counts["lost_in_folds"] += int(span[victim]) if merge else 0
            layer.counts["evictions"] += 1
            continue
        head.multiplicity[j] = stand_for(layer, span[j] + span[victim])
        if not merge:
            head.drop(victim)
            layer.counts["evictions"] += 1
            continue
        total = span[j] * value[j] + span[victim] * value[victim]
        head.write(j, left[link] * key[j] + right[link] * key[victim], total / head.multiplicity[j])
        head.state[j] = left[link, 0] ** 2 * state[j] + right[link, 0] ** 2 * state[victim]
        head.join(victim, j)
        layer.counts["merges"] += 1
        layer.counts["weights_outside"] += int(outside[link])
    head.keep(np.array([slot for slot in range(len(head)) if slot not in gone]))


def run_weights(layer: Layer, one: Probed, a: int, b: int) -> np.ndarray:
    """Weights of the keys of a run [slot, 1 or channel]."""
    p = layer.params
    if "gradient" in p:
        return gradient(layer, one, a, b)[one.sinks:] ** 2
    return (one.mass if "rule" in p else np.ones(len(one.mass)))[:, None]


def join_runs(layer: Layer, one: Probed, picked: np.ndarray, a: int, b: int) -> None:
    """Each run of consecutive links becomes one slot, at its first slot."""
    head, merge = one.head, layer.params.get("merge", True)
    weight = run_weights(layer, one, a, b) if merge else None
    runs = np.split(picked, np.flatnonzero(np.diff(picked) > 1) + 1)
    for run in runs:
        inside = np.arange(run[0], run[-1] + 2)
        slots = inside + one.sinks
        span = head.multiplicity[slots]
        kept = stand_for(layer, int(span.sum()))
        if merge:
            share = weight[inside]
            total = share.sum(axis=0)
            share = np.where(total > 0, share / np.where(total > 0, total, 1.0), 1 / len(inside))
            head.write(slots[0], (share * head.key[slots]).sum(axis=0), span @ head.value[slots] / kept)
        head.multiplicity[slots[0]] = kept
        for victim in slots[1:]:
            head.join(victim, slots[0]) if merge else head.drop(victim)
            layer.counts["merges" if merge else "evictions"] += 1
    gone = picked + one.sinks + 1
    head.keep(np.setdiff1d(np.arange(len(head)), gone))
