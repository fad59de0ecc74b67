"""Every rule of oracle_replay.py with its parameters and published settings (policies.md)."""
from __future__ import annotations

from typing import Any

import oracle_merges as merges
import oracle_scores as scores
import oracle_sets as sets
from oracle_layers import Rule
from oracle_links import compress_links
from oracle_policies import SNAPKV, h2o, knorm, snapkv

LINKS = {"picks": "disjoint", "sinks": 32, "decay_tokens": 656.586543053466, "clip": 0}
KV_SLIMMER = {"rule": "consistent", **LINKS, "smoothing": False, "guard": "clamp", "merge": True}
RELEASED = KV_SLIMMER | {"rule": "released", "picks": "faithful", "clip": 5, "smoothing": True, "guard": "none"}


def counted(params: dict[str, Any]) -> float:
    """The multiplicity enters the softmax, unless nothing is folded."""
    return 1.0 if params.get("merge", True) else 0.0


def _links(defaults: dict[str, Any]) -> Rule:
    return Rule(defaults, links=compress_links, bias=counted)


def _h2o_based(defaults: dict[str, Any], fold: Any, **more: Any) -> Rule:
    return Rule({"recent": 0.5, **defaults, "merge": True}, judge=merges.h2o_host, fold=fold, observes=True, **more)


RULES: dict[str, Rule] = {
    "kv_slimmer": _links(KV_SLIMMER),
    "kv_slimmer_released": _links(RELEASED),
    "asym_kv": _links({"gradient": "recorded", **LINKS, "merge": True}),
    "mean_merge": _links(LINKS),
    "kv_merger": Rule({"threshold": "exact", "sigma": "mean_distance", "sigma_value": 5.0, "value_scale": "none",
                       "count_bias": True, "recent": 0.34, "heavy": 0.24, "merge": True}, settle=sets.settle,
                      observes=True, bias=lambda p: float(p["count_bias"] and p["merge"])),
    "cam": Rule({"host": "streaming_llm", "sinks": 4, "recent": 0.5, "targets": 32, "gate": "expected", "merge": True},
                judge=merges.cam_host, fold=merges.cam_fold, observes=True),
    "d2o": Rule({"recent": 0.25, "weights": "softmax", "alpha": 0.5, "beta": 0.5, "sinks": 4, "merge": True},
                judge=merges.d2o_judge, fold=merges.d2o_fold, observes=True),
    "keepkv": _h2o_based({"threshold": 0.8}, merges.keepkv_fold, bias=lambda p: 1.0),
    "look_m": _h2o_based({"rule": "pivot"}, merges.look_m_fold),
    "zsmerge": Rule({"tail": 0.4, "dense": 1, "decay": 0.98, "bias": 0.6, "merge": True}, settle=merges.zsmerge,
                    observes=True, bias=lambda p: p["bias"]),
    "lagkv": Rule({"sinks": 4, "lag": 128}, judge=scores.lagkv),
    "expected_attention": Rule({"sinks": 4, "future": 512, "covariance": True, "value_norm": True, "epsilon": 0.0},
                               judge=scores.expected_attention, exact_ties=False),
    "critical_kv": Rule({"base": "snapkv", "share": 0.5}, judge=scores.critical_kv, observes=True,
                        window=lambda p: 32 if p["base"] == "snapkv" else 0),
    "r_kv": Rule({"window": 8, "kernel": 7, "lambda": 0.07, "similarity": 0.5, "interval": 128}, judge=scores.r_kv,
                 due=lambda p, step, in_prompt: in_prompt or step % p["interval"] == 0, window=lambda p: p["window"]),
    "oracle_mass": Rule({}, judge=scores.oracle_mass),
    # Policies of oracle.py, here for the allocations.
    "h2o": Rule({"recent": 0.5, "score": "sum"}, judge=scores.one_head(h2o), observes=True),
    "knorm": Rule({}, judge=scores.one_head(knorm), exact_ties=False),
    "snapkv": Rule(SNAPKV, judge=scores.one_head(snapkv), window=lambda p: p["window"]),
}
BEFORE = {"block": 512, "compress": "prompt", "positions": "span"}
ONCE = {"compress": "prompt"}
PUBLISHED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("kv_slimmer", "kv_slimmer_released", "asym_kv", "mean_merge"), BEFORE),
    **dict.fromkeys(("kv_merger", "look_m", "lagkv", "expected_attention", "critical_kv", "snapkv"), ONCE),
}
