"""KVMerger: runs of similar neighbouring keys become one slot each (M 2 = research/merge-methods.md section 2)."""
from __future__ import annotations

import math

import numpy as np

from oracle_layers import View
from oracle_policies import _unit, share


def protected(view: View) -> np.ndarray:
    """M 2.2: the newest slots and those of the largest mass; shares of the budget, without one of the slots present."""
    p, of = view.params, view.budget or len(view.head)
    heavy = np.argsort(-view.mass, kind="stable")
    count = share(p["heavy"], of)
    if 0 < count < len(heavy):
        view.note(*view.mass[heavy[count - 1:count + 1]])
    mask = view.age < share(p["recent"], of)
    mask[heavy[:count]] = True
    return mask


def links(view: View) -> np.ndarray:
    """Links to join: above the threshold, or the most similar ones that bring the head to its budget."""
    unit, mask = _unit(view.head.key), protected(view)
    cosine = (unit[:-1] * unit[1:]).sum(axis=1)
    free = np.flatnonzero(~(mask[:-1] | mask[1:]))
    threshold = view.params["threshold"]
    if threshold != "exact":
        for value in cosine[free]:
            view.note(value, threshold)
        return free[cosine[free] > threshold]
    order = free[np.argsort(-cosine[free], kind="stable")]
    forced = np.setdiff1d(np.arange(len(cosine)), free)      # only when the budget cannot be reached without them
    count = len(view.head) - view.budget
    if count < len(order):
        view.note(*cosine[order[count - 1:count + 1]])
    return np.sort(np.concatenate([order, forced])[:count])


def sigma(distance: np.ndarray, kind: str, value: float) -> float:
    """M 2.4: the width of the Gaussian of a set."""
    size = math.sqrt(2) * len(distance)
    if kind == "mean_distance":
        return float(distance.sum() / size)
    if kind == "fixed":
        return value
    found = 1 / math.sqrt(2)
    for _ in range(500):
        found = float(np.exp(-distance ** 2 / (2 * found ** 2)).sum() / size)
    return found


def weights(key: np.ndarray, pivot: int, count: np.ndarray, kind: str, value: float) -> np.ndarray:
    """M 2.4 and 2.5: Gaussian of the distance from the pivot's key, times the tokens a slot stands for."""
    apart = np.linalg.norm(key - key[pivot], axis=1)
    width = sigma(apart, kind, value)
    bell = np.exp(-apart ** 2 / (2 * width ** 2)) if width > 0 else np.ones(len(key))
    return bell * count / (bell * count).sum()


def settle(view: View) -> None:
    """Join the chosen links; a set lives on at its pivot, the slot of the largest mass."""
    head, p = view.head, view.params
    picked = links(view)
    runs = [run for run in np.split(picked, np.flatnonzero(np.diff(picked) > 1) + 1) if len(run)]
    gone: list[int] = []
    for run in runs:
        slots = np.arange(run[0], run[-1] + 2)
        mass = view.mass[slots]
        pivot = int(np.argmax(mass))
        view.note(*np.sort(mass)[-2:])
        victims = np.delete(slots, pivot)
        gone += victims.tolist()
        if not p["merge"]:      # the pivot counts as if merged, as with all links (policies.md)
            head.multiplicity[slots[pivot]] = head.multiplicity[slots].sum()
            view.drop(victims)
            continue
        weight = weights(head.key[slots], pivot, head.multiplicity[slots], p["sigma"], p["sigma_value"])
        count = head.multiplicity[slots] if p["value_scale"] == "set_size" else np.ones(len(slots))
        mean = head.value[slots] / count[:, None]      # slots merged before hold their mean times their count
        scale = count.sum() if p["value_scale"] == "set_size" else 1
        head.write(slots[pivot], weight @ head.key[slots], scale * (weight @ mean))
        for victim in victims:
            view.merge(victim, slots[pivot])
    head.keep(np.setdiff1d(np.arange(len(head)), gone))
