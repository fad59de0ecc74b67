"""A float64 replay head by head, for policies that merge, share a budget out or look ahead (design.md section 4).

Written from design.md, policies.md and the research pages alone, plainly. The rules are in oracle_catalogue.py. Use:

    trace, extras = read_trace(path), read_extras(path)
    result = replay(trace, "kv_slimmer", {"picks": "fold"}, budget=96, block=128, extras=extras)
    result.nmse, result.kept[layer][head], result.multiplicity[layer][head], result.counts["merges"]
"""
from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np

from oracle import Reference, Result, _blocks, _rotated
from oracle_allocation import budgets, share_out
from oracle_catalogue import PUBLISHED, RULES
from oracle_heads import Extras, Head
from oracle_layers import Layer, View
from oracle_trace import Trace

AT_ONCE = 64     # decode tokens


@dataclass
class MergeResult(Result):
    """A result whose heads may hold different numbers of slots; `value` and `mass` are nested lists then."""

    key: list[list[np.ndarray]] = field(default_factory=list)     # final keys, as cached
    counts: Counter = field(default_factory=Counter)              # evictions, merges, lost_in_folds, ...
    near_roundings: np.ndarray | None = None                      # [L, Hkv] folded rows that fp32 may round otherwise


class Run:
    """A replay in progress."""

    def __init__(self, trace: Trace, layers: list[Layer], reference: Reference, share_out: Callable | None,
                 protect: dict[str, int]) -> None:
        self.trace, self.layers, self.reference, self.share_out, self.protect = (
            trace, layers, reference, share_out, protect)
        self.measured_at = np.full(len(trace.row_token), -1)       # recorded row -> index among the measured ones
        self.measured_at[reference.row] = np.arange(len(reference.row))
        self.held, self.held_after = ([[[] for _ in layer.heads] for layer in layers] for _ in range(2))
        self.error2, self.output2, self.lost = (np.zeros((*trace.q.shape[:2], len(reference.row))) for _ in range(3))

    def block(self, layer: Layer, a: int, b: int, in_prompt: bool) -> None:
        """Append the tokens [a, b), attend their queries, observe and measure."""
        token = self.trace.row_token
        rows = np.flatnonzero((token >= a) & (token < b))
        if layer.rule.observes:
            rows = layer.rows(a, b)
        else:
            rows = rows[self.measured_at[rows] >= 0]
        for head in layer.heads:
            layer.append(head, a, b)
            weight = layer.attend(head, rows, b - a)
            if layer.rule.observes:
                head.mass = head.mass * (1.0 if in_prompt else layer.params.get("decay", 1.0)) + weight.sum(axis=1)
            measured = self.measured_at[rows] >= 0
            if measured.any():
                self.measure(layer, head, rows[measured], weight[:, measured])

    def measure(self, layer: Layer, head: Head, rows: np.ndarray, weight: np.ndarray) -> None:
        """Compare the outputs of query rows with full attention (design.md section 7)."""
        at, reference = self.measured_at[rows], self.reference
        full = reference.output[layer.index, head.index][:, at]
        error, lost = weight @ head.value - full, reference.probability[layer.index, head.index][:, at]
        group = self.trace.group
        heads = np.arange(head.index * group, (head.index + 1) * group)[:, None]
        self.error2[layer.index, heads, at] = (error ** 2).sum(axis=-1)
        self.output2[layer.index, heads, at] = (full ** 2).sum(axis=-1)
        self.lost[layer.index, heads, at] = lost @ (head.stands < 0)

    def hold(self, layer: Layer, before: list[int], steps: int, tokens: int) -> None:
        """Note the slots of each head while a block attends and after it; a block of decode tokens is many steps."""
        for head, slots in zip(layer.heads, before):
            attended = [slots + tokens - steps + 1 + i for i in range(steps)]
            self.held[layer.index][head.index] += attended
            self.held_after[layer.index][head.index] += attended[:-1] + [len(head)]

    def compress(self, layer: Layer, now: int, in_prompt: bool) -> None:
        """Bring every head of a layer to its budget, after a block."""
        rule, views = layer.rule, {}
        if not rule.due(layer.params, now - self.trace.prompt + 1, in_prompt):
            return
        for head in layer.heads:
            budget = layer.budget[head.index]
            if budget is None or len(head) > budget:
                views[head.index] = View(layer, head, now, in_prompt, budget)
        verdicts = {}
        for index, view in views.items():
            if rule.settle:
                rule.settle(view)
                view.head.gaps.append(view.gap)
                continue
            verdict = verdicts[index] = rule.judge(view)
            verdict.sinks = verdict.sinks | (view.head.token < self.protect.get("sinks", 0))
            verdict.recent = verdict.recent | (view.age < self.protect.get("recent", 0))
        if verdicts and self.share_out and not layer.shared_out:
            layer.budget, gap = self.share_out([verdicts[head] for head in range(len(layer.heads))], layer.budget)
            layer.shared_out = True
            for index, view in views.items():
                view.budget, view.gap = layer.budget[index], min(view.gap, gap)
        for index, verdict in verdicts.items():
            view = views[index]
            if len(view.head) > view.budget:
                view.apply(view.choose(verdict))
            view.head.gaps.append(view.gap)

    def result(self) -> MergeResult:
        """Everything measured and what the heads hold in the end."""
        zero_norm = np.where(self.error2 == 0, 0.0, np.nan)
        rel_l2 = np.divide(np.sqrt(self.error2), np.sqrt(self.output2), out=zero_norm, where=self.output2 > 0)
        heads = [layer.heads for layer in self.layers]
        count = max(len(head.gaps) for layer in heads for head in layer)
        gaps = np.array([[head.gaps + [math.inf] * (count - len(head.gaps)) for head in layer] for layer in heads])
        of = {name: [[getattr(head, name) for head in layer] for layer in heads]
              for name in ("token", "multiplicity", "value", "mass", "key")}
        return MergeResult(
            self.reference.token, self.error2, self.output2, rel_l2, self.lost, np.array(self.held),
            np.array(self.held_after), of["token"], of["multiplicity"], of["value"], of["mass"],
            gaps.reshape(*gaps.shape[:2], count).transpose(2, 0, 1), of["key"],
            sum((layer.counts for layer in self.layers), Counter()),
            np.array([[head.near_roundings for head in layer] for layer in heads]))


def replay(trace: Trace, policy: str, params: dict[str, Any] | None = None, budget: int | None = None, *,
           block: int | str | None = None, compress: str | None = None, positions: str | None = None,
           measure: str = "decode", protect: dict[str, int] | None = None, allocation: dict[str, Any] | None = None,
           reference: Reference | None = None, extras: Extras = Extras()) -> MergeResult:
    """Replay a trace under one policy; settings left out are the published ones. `budget` in slots, None = none."""
    settings = {"block": "all", "compress": "always", "positions": "absolute", **PUBLISHED.get(policy, {})}
    settings |= {k: v for k, v in (("block", block), ("compress", compress), ("positions", positions)) if v is not None}
    rule, allocation = RULES[policy], allocation or {"kind": "uniform"}
    unknown = set(params or {}) - set(rule.defaults)
    if unknown or (rule.links and settings["compress"] == "always"):
        raise ValueError(f"bad setting: {unknown or settings}")
    params = {**rule.defaults, **(params or {})}
    reference = reference or Reference(trace, measure)
    key, query = _rotated(trace, "absolute" if settings["positions"] == "absolute" else "cache")
    slots = budgets(allocation, budget, rule.window(params), len(key), trace.prompt)
    layers = [Layer(trace, extras, i, key[i], query[i], rule, params, slots[i], settings["positions"])
              for i in range(len(key))]
    run = Run(trace, layers, reference, share_out(allocation), protect or {})
    for layer in layers:
        for number, (a, b) in enumerate(_steps(trace, settings, params, budget)):
            in_prompt = b <= trace.prompt
            if rule.links and in_prompt and len(layer.heads[0]):
                rule.links(layer, number, a, b)
            before = [len(head) for head in layer.heads]
            run.block(layer, a, b, in_prompt)
            if not rule.links and (in_prompt or settings["compress"] == "always"):
                run.compress(layer, b - 1, in_prompt)
            run.hold(layer, before, 1 if in_prompt else b - a, b - a)
    return run.result()


def _steps(trace: Trace, settings: dict[str, Any], params: dict[str, Any], budget: int | None) -> list[tuple[int, int]]:
    """The blocks of a replay. When nothing happens during decode, many of its tokens are attended at once.

    Causal attention makes that the same, and much faster. The span positions of slots and of the newest block agree
    only while the first slot stands for one token, that is, with sinks.
    """
    blocks = _blocks(trace, settings["block"])
    no_sinks = settings["positions"] == "span" and (params.get("sinks", 0) == 0 or budget == 1)
    if settings["compress"] == "always" or no_sinks:
        return blocks
    prompt = [(a, b) for a, b in blocks if b <= trace.prompt]
    return prompt + [(a, min(a + AT_ONCE, trace.tokens)) for a in range(trace.prompt, trace.tokens, AT_ONCE)]
