"""Policies that fold victims into kept slots: cam, d2o, keepkv, look_m, zsmerge.

M = research/merge-methods.md. A fold is made from the rows as they were before it; a row that is written is rounded.
"""
from __future__ import annotations

import math

import numpy as np

from oracle_heads import Head
from oracle_layers import View
from oracle_policies import Verdict, _unit, share

STRETCH = (0.9, 1.1)     # of KeepKV's keys; beyond, the convex key


def no_slots(view: View) -> np.ndarray:
    """Nothing protected."""
    return np.zeros(len(view.head), bool)


def h2o_host(view: View) -> Verdict:
    """E 3.4: accumulated mass, the newest floor(recent * budget) protected."""
    return Verdict(view.mass, no_slots(view), view.age < share(view.params["recent"], view.budget))


def cam_host(view: View) -> Verdict:
    """M 3.2: StreamingLLM or H2O."""
    if view.params["host"] == "h2o":
        return h2o_host(view)
    sinks = view.params["sinks"]
    return Verdict(np.zeros(len(view.head)), view.head.token < sinks, view.age < max(1, view.budget - sinks))


def cam_fold(view: View, keep: np.ndarray, victims: np.ndarray) -> None:
    """M 3.2: a share of the victim's value goes to each of the next kept slots; in the prompt victims just go."""
    head, mass = view.head, view.mass
    added = np.zeros_like(head.value)
    for victim in victims:
        window = keep[keep > victim][:view.params["targets"]]
        part = cam_gate(view, mass[victim], mass[window]) if len(window) and not view.in_prompt else 0.0
        if part == 0:
            view.drop([victim])
            continue
        added[window] += part / len(window) * head.value[victim]
        view.merge(victim, window[0])
    changed = np.flatnonzero(added.any(axis=1))
    head.write(changed, None, head.value[changed] + added[changed])


def cam_gate(view: View, victim: float, window: np.ndarray) -> float:
    """M 3.2: the probability that a victim is merged, or what the gate makes of it."""
    mean = window.mean()
    chance = min(victim / mean, 1.0) if mean > 0 else float(victim > 0)
    if view.params["gate"] == "threshold":
        view.note(chance, 0.5)
        return float(chance >= 0.5)
    if view.params["gate"] != "expected":
        raise ValueError("the draws of `sample` belong to the engine")
    return chance


def nearest(view: View, victims: np.ndarray, keep: np.ndarray, unit: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """For each victim the kept slot whose key is most like its own, and how much: cosine, or dot product."""
    key = _unit(view.head.key) if unit else view.head.key
    like = key[victims] @ key[keep].T
    if len(keep) > 1:
        for row in np.sort(like, axis=1)[:, -2:]:
            view.note(*row)
    best = like.argmax(axis=1)
    return keep[best], like[np.arange(len(victims)), best]


def by_target(victims: np.ndarray, target: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Kept slots that receive something, with the numbers of their victims."""
    return [(int(slot), np.flatnonzero(target == slot)) for slot in np.unique(target)]


def d2o_judge(view: View) -> Verdict:
    """M 4.2: accumulated mass; the first tokens and the newest are protected."""
    verdict = h2o_host(view)
    verdict.sinks = view.head.token < view.params["sinks"]
    return verdict


def d2o_fold(view: View, keep: np.ndarray, victims: np.ndarray) -> None:
    """M 4.3: to the most similar kept key if similar enough, for a threshold that follows the mean."""
    head, p = view.head, view.params
    target, like = nearest(view, victims, keep)
    mean = float(like.mean())
    old = head.memory.get("tau")
    tau = head.memory["tau"] = mean if old is None else p["alpha"] * old + p["beta"] * mean
    merged = like >= tau
    if len(victims) > 1 or old is not None:
        for value in like:
            view.note(value, tau)
    for slot, at in by_target(victims[merged], target[merged]):
        from_, similar = victims[merged][at], like[merged][at]
        rows = np.concatenate([[slot], from_])
        if p["weights"] == "code":
            weight = np.concatenate([[1.0], similar]) / len(rows)
        else:
            weight = np.exp(np.concatenate([[1.0], similar]))
            weight = weight / weight.sum()
        head.write(slot, weight @ head.key[rows], weight @ head.value[rows])
        for victim in from_:
            view.merge(victim, slot)
    view.drop(victims[~merged])


def keepkv_fold(view: View, keep: np.ndarray, victims: np.ndarray) -> None:
    """M 5.1: to the most similar kept key; the merged slot answers the newest query as the parts did."""
    head = view.head
    target, like = nearest(view, victims, keep)
    merged = like > view.params["threshold"]
    for value in like:
        view.note(value, view.params["threshold"])
    rows = view.layer.rows(view.now, view.now + 1)
    window = view.layer.trace.window[view.layer.index]
    seen = (window == 0) | (view.now - head.token < window)     # what the query cannot see has no weight
    logit = np.where(seen, view.layer.logits(head, rows)[:, 0].mean(axis=0), -np.inf)
    for slot, at in by_target(victims[merged], target[merged]):
        members = np.concatenate([[slot], victims[merged][at]])
        stretch = keepkv_stretch(head.multiplicity[members], logit[members])
        for bound in STRETCH:
            view.note(stretch, bound)
        head.write(slot, *keepkv_row(head, members, logit[members]))
        for victim in members[1:]:
            view.merge(victim, slot)
    view.drop(victims[~merged])


def keepkv_row(head: Head, members: np.ndarray, logit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Key and value of a merged slot; the key's length keeps the parts' joint mass unless that is out of reach."""
    votes = head.multiplicity[members]
    convex = votes * attention_of(logit)
    convex = convex / convex.sum()
    stretch = keepkv_stretch(votes, logit)
    if not STRETCH[0] <= stretch <= STRETCH[1]:
        stretch = 1.0
    return stretch * (convex @ head.key[members]), convex @ head.value[members]


def attention_of(logit: np.ndarray) -> np.ndarray:
    """exp(logit) up to a factor; all alike when the query sees none."""
    return np.exp(logit - logit.max()) if np.isfinite(logit.max()) else np.ones_like(logit)


def keepkv_stretch(votes: np.ndarray, logit: np.ndarray) -> float:
    """How much longer than the convex key: log of the mean weight over the weighted mean logit."""
    if not np.isfinite(logit.max()):
        return math.inf
    weight = votes * attention_of(logit)
    mean = float(weight @ np.where(np.isfinite(logit), logit, 0.0) / weight.sum())
    return (math.log(weight.sum() / votes.sum()) + logit.max()) / mean if mean else math.inf


def look_m_fold(view: View, keep: np.ndarray, victims: np.ndarray) -> None:
    """M 5.3: every victim to its most similar kept key."""
    head, rule = view.head, view.params["rule"]
    target, like = nearest(view, victims, keep)
    for slot, at in by_target(victims, target):
        n, from_ = len(at), victims[at]
        share_of = like[at] if rule == "weighted" else np.full(n, 0.5 if rule == "pivot" else 1.0)
        own = 1 + n / 2 if rule == "pivot" else 1.0
        head.write(slot, *((own * x[slot] + share_of @ x[from_]) / (1 + n) for x in (head.key, head.value)))
        for victim in from_:
            view.merge(victim, slot)


def zsmerge(view: View) -> None:
    """M 5.5: residual slots hold what left the tail without a score; `state` is 1 where a slot is residual."""
    head, p = view.head, view.params
    residual = head.state == 1
    recent = view.age < share(p["tail"], view.budget)
    if residual.any():
        keep = view.choose(Verdict(view.mass, residual, recent))
        victims = np.setdiff1d(np.arange(len(head)), keep)
        if p["merge"]:
            home = np.flatnonzero(head.state == 1)
            target, _ = nearest(view, victims, home, unit=False)
            groups = [(slot, victims[at]) for slot, at in by_target(victims, target)]
    else:
        keep, groups = first_residuals(view, recent)
        victims = np.setdiff1d(np.arange(len(head)), keep)
    if not p["merge"]:
        view.drop(victims)
        groups = []
    for slot, from_ in groups:
        members = np.concatenate([[slot], from_])
        count = head.multiplicity[members]
        head.write(slot, *(count @ x[members] / count.sum() for x in (head.key, head.value)))
        for victim in from_:
            view.merge(victim, slot)
    head.keep(keep)


def first_residuals(view: View, recent: np.ndarray) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """The first compression: tail and best others stay, the rest is cut into runs, each led by a residual slot."""
    dense = min(view.params["dense"], view.budget)
    other = np.flatnonzero(~recent)
    best = other[np.argsort(-view.mass[other], kind="stable")]
    top = max(0, view.budget - dense - int(recent.sum()))
    if 0 < top < len(best):
        view.note(*view.mass[best[top - 1:top + 1]])
    runs = np.array_split(np.sort(best[top:]), dense)
    view.head.state[[run[0] for run in runs]] = 1
    keep = np.sort(np.concatenate([np.flatnonzero(recent), best[:top], [run[0] for run in runs]]))
    return keep.astype(np.int64), [(int(run[0]), run[1:]) for run in runs if len(run) > 1]
