"""The golden tables as replay cases: inputs, settings and the expected kept sets and errors.

One list serves the oracle (test_oracle_golden.py) and the program (test_engine_golden.py). The numbers come from
golden_tables.json; a table of steps becomes one case for the errors and one truncated trace per step for the kept sets.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from made_traces import write_trace

TABLES = json.loads((Path(__file__).parent / "golden_tables.json").read_text())
PROBE = ([0.9, 0.3], [0.6, 0.7], [-1.0, 3.0])  # q, k, v of a further token, whose output shows the values left behind


@dataclass(frozen=True)
class Case:
    """One replay with known outcome. Errors join all query heads: rel_l2 = sqrt(sum |d|^2 / sum |o|^2) of a token."""

    name: str
    q: np.ndarray                       # [L, Hq, T, D]
    k: np.ndarray                       # [L, Hkv, T, D]
    v: np.ndarray                       # [L, Hkv, T, Dv]
    prompt: int
    policy: str
    budget: int
    params: dict[str, Any] = field(default_factory=dict)
    replay: dict[str, Any] = field(default_factory=dict)   # block, compress, positions, measure
    protect: dict[str, int] = field(default_factory=dict)
    inv_freq: list[float] | None = None
    rows: list[int] | None = None                          # recorded query rows, None = all
    kept: list[int] | None = None                          # of every head
    multiplicity: list[int] | None = None
    rel_l2: dict[int, float] = field(default_factory=dict)                  # token -> value, layer 0
    distance: dict[tuple[int, int], float] = field(default_factory=dict)    # (layer, token) -> |d|

    @property
    def settings(self) -> dict[str, Any]:
        """All replay settings, defaults included; by default every recorded query is measured."""
        return {"block": "all", "compress": "always", "positions": "absolute", "measure": "all", **self.replay}

    def write(self, folder: Path) -> Path:
        """Write the inputs as a trace file named after the case."""
        path = folder / f"{self.name}.h5"
        write_trace(path, self.q, self.k, self.v, self.prompt, inv_freq=self.inv_freq, rows=self.rows)
        return path


def _inputs(q: list, k: list, v: list, tokens: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[head][token][channel] lists -> arrays with a layer axis, cut to the first `tokens` tokens."""
    return tuple(np.array(x, dtype=np.float64)[None, :, :tokens] for x in (q, k, v))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over one axis, for the expected values of this file only."""
    weight = np.exp(logits - logits.max())
    return weight / weight.sum()


def output(query: list[float], keys: list, values: list) -> np.ndarray:
    """Attention output of one query over the given slots, scale 1/sqrt(d)."""
    return softmax(np.array(keys) @ np.array(query) / math.sqrt(len(query))) @ np.array(values)


def _relative(got: np.ndarray, full: np.ndarray) -> float:
    return float(np.linalg.norm(np.subtract(got, full)) / np.linalg.norm(full))


def streaming_llm() -> Iterator[Case]:
    """G1: kept sets of every step, the prompt form, and the weights under both position rules."""
    table = TABLES["streaming_llm"]
    base = {"policy": "streaming_llm", "budget": table["sink"] + table["recent"], "params": {"sinks": table["sink"]}}
    source = [TABLES["snapkv"][name][:1] for name in "qkv"]
    for step in table["steps"]:
        inputs = _inputs(*source, tokens=step["t"] + 1)
        yield Case(f"G1_t{step['t']}", *inputs, prompt=0, **base, kept=step["kept"])
    form = table["ratio_form"]
    yield Case("G1_prompt", *_inputs(*source, tokens=form["k_len"]), prompt=form["k_len"], **base, kept=form["kept"])

    rope, tokens = table["rope_t9"], 10
    ones = np.broadcast_to([1.0, 0.0], (len(rope["attended"]), 1, tokens, 2))
    values = np.zeros_like(ones)
    for layer, token in enumerate(rope["attended"]):   # layer l shows the weight of the l-th attended token alone
        values[layer, 0, token, 0] = 1.0
    full = softmax(np.cos(tokens - 1 - np.arange(tokens)) / math.sqrt(2))[rope["attended"]]
    for positions, weights in (("absolute", rope["w_absolute"]), ("cache", rope["w_cache_relative"])):
        distance = {(layer, tokens - 1): abs(w - f) for layer, (w, f) in enumerate(zip(weights, full))}
        yield Case(f"G1_rope_{positions}", ones, ones, values, prompt=0, **base, replay={"positions": positions},
                   inv_freq=[1.0], kept=table["steps"][-1]["kept"], distance=distance)


def _steps(name: str, table: dict, policy: str, budget: int, params: dict, first: list[int]) -> Iterator[Case]:
    """A decode table: the errors of all steps at once, then the kept set after each step from a truncated trace."""
    inputs = [table[x] for x in "qkv"]
    common = {"prompt": table["prefill"], "policy": policy, "budget": budget, "params": params}
    decode = [step for step in table["steps"] if step["t"] >= table["prefill"]]
    errors = {step["t"]: step["rel_l2"] for step in decode} | {t: 0.0 for t in range(table["prefill"])}
    yield Case(f"{name}_errors", *_inputs(*inputs), **common, kept=decode[-1]["kept"], rel_l2=errors)
    yield Case(f"{name}_prompt", *_inputs(*inputs, tokens=table["prefill"]), **common, kept=first)
    for step in decode:
        yield Case(f"{name}_t{step['t']}", *_inputs(*inputs, tokens=step["t"] + 1), **common, kept=step["kept"])


def h2o() -> Iterator[Case]:
    """G2."""
    table = TABLES["h2o"]
    budget = table["hh"] + table["recent"]
    return _steps("G2", table, "h2o", budget, {"score": "sum", "recent": table["recent"] / budget},
                  table["after_prefill"]["kept"])


def tova() -> Iterator[Case]:
    """G3; with one KV head both ways of sharing agree."""
    table = TABLES["tova"]
    for share in ("layer", "kv_head"):
        yield from _steps(f"G3_{share}", table, "tova", table["budget"], {"share": share}, table["steps"][0]["kept"])


def snapkv() -> Iterator[Case]:
    """G4: every pooling, both orders, each query head alone, and a trace that records the window's queries only."""
    table = TABLES["snapkv"]
    pools = {"none": ("avg", 1), "avg3": ("avg", 3), "avg5": ("avg", 5), "max3": ("max", 3)}

    def case(name: str, pool: str, kept: list[int], order: str = "group_then_pool", head: int | None = None,
             rows: list[int] | None = None) -> Case:
        q = table["q"] if head is None else [table["q"][head]]
        params = {"window": table["W"], "kernel": pools[pool][1], "pool": pools[pool][0], "order": order}
        return Case(f"G4_{name}", *_inputs(q, table["k"], table["v"]), prompt=table["T"], policy="snapkv", rows=rows,
                    budget=table["capacity"], params=params, replay={"measure": f"last:{table['W']}"}, kept=kept)

    yield case("none", "none", table["no_pool_kept"])
    for pool in ("avg3", "avg5", "max3"):
        for order in ("group_then_pool", "pool_then_group"):
            yield case(f"{pool}_{order}", pool, table[pool][f"{order}_kept"], order)
        for head, kept in enumerate(table[pool]["per_qhead_kept"]):
            yield case(f"{pool}_head{head}", pool, kept, head=head)
    rows = list(range(table["T"] - table["W"], table["T"]))
    yield case("avg3_window_rows", "avg3", table["avg3"]["group_then_pool_kept"], rows=rows)


def knorm() -> Iterator[Case]:
    """G5: Knorm and KeyDiff."""
    table = TABLES["knorm"]
    tie = [[math.sqrt(x), 0.0, 0.0, 0.0] for x in table["tie"]["sq_norm"]]

    def case(name: str, policy: str, keys: list, kept: list[int], **more: Any) -> Case:
        return Case(f"G5_{name}", *_inputs([keys], [keys], [keys]), prompt=len(keys), policy=policy, budget=len(kept),
                    kept=kept, **more)

    for count in (3, 4, 6):
        yield case(f"knorm_keep{count}", "knorm", table["keys"], table[f"keep{count}"])
    yield case("knorm_protected", "knorm", table["keys"], table["protect_sink1_recent2_keep5"],
               protect={"sinks": 1, "recent": 2})
    yield case("knorm_tie", "knorm", tie, table["tie"]["keep3_smaller_index"])
    yield case("keydiff_keep4", "keydiff", table["keys"], table["keydiff"]["keep4"])


def weighted_kv() -> Iterator[Case]:
    """WeightedKV A2, A3, A5, A6. The values left behind are read through the output of a sixth token."""
    tables = TABLES["weighted_kv"]
    common = tables["common"]

    def cases(name: str, table: dict, q: list, prompt: int, params: dict, multiplicity: list[int]) -> Iterator[Case]:
        keys, values, ids = common["K"], common["V"], table["final_ids"]
        full = [output(q[t], keys[:t + 1], values[:t + 1]) for t in range(5)]
        outputs = {step["step"] - 1: step["output"] for step in table.get("steps", [])}
        errors = {t: _relative(got, full[t]) for t, got in outputs.items()} or {t: 0.0 for t in range(prompt)}
        settings = {"prompt": prompt, "policy": "weighted_kv", "params": params, "budget": len(ids)}
        yield Case(name, *_inputs([q], [keys], [values]), **settings, kept=ids, multiplicity=multiplicity,
                   rel_l2=errors)
        probe_q, probe_k, probe_v = PROBE
        seen = output(probe_q, [keys[i] for i in ids] + [probe_k], table["final_V"] + [probe_v])
        errors = errors | {5: _relative(seen, output(probe_q, keys + [probe_k], values + [probe_v]))}
        yield Case(f"{name}_values", *_inputs([q + [probe_q]], [keys + [probe_k]], [values + [probe_v]]), **settings,
                   rel_l2=errors)

    free = {"sinks": 0, "managed": 0.7}     # budget 3: floor(2.1) managed, 1 recent
    yield from cases("A2", tables["A2_m3_sink0_recent1"], common["Q"], 0, free, [1, 1, 3])
    yield from cases("A3a", tables["A3a_Q2_m2_sink0_recent1"], tables["Q2"], 0, {"sinks": 0, "managed": 0.5}, [2, 3])
    yield from cases("A3b", tables["A3b_Q2_m2_sink1_recent1"], tables["Q2"], 0, {"sinks": 1, "managed": 0.5}, [1, 4])
    yield from cases("A5", tables["A5_evict_only_m3_sink0_recent1"], common["Q"], 0, free | {"merge": False}, [1, 1, 1])
    yield from cases("A6", tables["A6_oneshot_m3_sink0_recent1"], common["Q"], 5, free, [1, 1, 3])


CASES = [case for table in (streaming_llm, h2o, tova, snapkv, knorm, weighted_kv) for case in table()]
