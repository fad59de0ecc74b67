"""The golden values of the other merging policies and of the further scorers as replay cases (see merge_cases.py).

M = research/merge-methods.md: five tokens of one head; a sixth asks the fifth's query and shows no key of its own, so
that its output is the page's. E = research/eviction-methods.md section 5.
"""
from __future__ import annotations

import math
from typing import Any, Iterator

import numpy as np

from merge_cases import TABLES, MergeCase, stack

M, E = TABLES["common"], TABLES["scores"]
FULL = np.array(M["full_output_last"])
FAR = [-1e5, 0.0]            # a key that the query Q[4] does not see
ONCE, ALWAYS = {"compress": "prompt"}, {"compress": "always"}
KEY, VALUE, QUERY = (np.array(M[x]) for x in "KVQ")


def attend(query: Any, keys: Any, values: Any, counts: Any = None) -> np.ndarray:
    """Output of one query over slots of these multiplicities (a logit gains their logarithm), scale 1/sqrt(d)."""
    weight = np.exp(np.asarray(keys) @ np.asarray(query) / math.sqrt(len(query))) * (1 if counts is None else counts)
    return weight / weight.sum() @ np.asarray(values)


def case(name: str, policy: str, budget: int | None, params: dict, got: Any, kept: list[int], multiplicity: list[int],
         prompt: int = 5, replay: dict | None = None, query: Any = QUERY, key: Any = KEY, value: Any = VALUE,
         full: Any = None, counts: dict | None = None) -> Iterator[MergeCase]:
    """The five tokens alone, whose slots are checked, and with the sixth, whose output is `got`."""
    common = {"prompt": prompt, "policy": policy, "budget": budget, "params": params, "replay": replay or ONCE}
    yield MergeCase(name, stack(query), stack(key), stack(value), kept=kept, multiplicity=multiplicity,
                    counts=counts or {}, **common)
    full = attend(query[4], key, value) if full is None else full
    yield MergeCase(f"{name}_sixth", stack(query, [query[4]]), stack(key, [FAR]), stack(value, [[9.0, 9.0]]), **common,
                    distance={(0, 5): float(np.linalg.norm(np.subtract(got, full)))})


def kv_merger() -> Iterator[MergeCase]:
    """B1 to B3: every width, value scaling and count bias, with the exact budget and with a threshold."""
    table = TABLES["kv_merger"]
    modes = {"convex": {"value_scale": "none", "count_bias": False},
             "times_setsize": {"value_scale": "set_size", "count_bias": False},
             "logcount_bias": {"value_scale": "none", "count_bias": True}}
    widths = {"B1_mean_dist": {"sigma": "mean_distance"}, "B2_sigma5": {"sigma": "fixed", "sigma_value": 5.0},
              "B3_literal_fixed_point": {"sigma": "literal"}}
    free = {"recent": 0.0, "heavy": 0.0}
    for width, sigma in widths.items():
        for mode, scale in modes.items():
            out = table[width]["out_" + {"logcount_bias": "convex_logcount_bias"}.get(mode, mode)]
            assert abs(np.linalg.norm(np.subtract(out, FULL)) - table[width]["l2_err"][mode]) < 1e-8
            for budget, threshold in ((3, "exact"), (None, 0.75)):
                params = free | sigma | scale | {"threshold": threshold}
                yield from case(f"{width}_{mode}_{threshold}", "kv_merger", budget, params, out, [0, 1, 4], [1, 3, 1],
                                counts={"merges": 2})
    far = {"key": 30 * KEY, "query": QUERY / 30}        # so far apart that all weights but the pivot's vanish
    for scale, size in (("none", 1), ("set_size", 3)):
        params = free | {"sigma": "literal", "count_bias": False, "value_scale": scale}
        got = attend(QUERY[4], KEY[[0, 1, 4]], VALUE[[0, 1, 4]] * [[1], [size], [1]])
        yield from case(f"B3_far_{scale}", "kv_merger", 3, params, got, [0, 1, 4], [1, 3, 1], **far)
    dropped = attend(QUERY[4], KEY[[0, 1, 4]], VALUE[[0, 1, 4]])
    yield from case("B_pivots", "kv_merger", 3, free | {"merge": False}, dropped, [0, 1, 4], [1, 3, 1])


def kv_merger_sets() -> Iterator[MergeCase]:
    """M 2.10: the sets of other thresholds, budgets and protections."""
    free, table = {"recent": 0.0, "heavy": 0.0}, TABLES["kv_merger"]
    heavy_2 = np.vstack([QUERY[:2], 30 * KEY[2:3], [[0.3, 1.9]], [[0.3, 1.9]]])     # slot 2 gathers the most
    cases = (("eps0.99", None, {"threshold": 0.99}, QUERY),
             ("eps0.75_recent2", None, {"threshold": 0.75, "recent": 0.4}, QUERY),
             ("exact_t4", 4, {}, QUERY), ("exact_t3", 3, {}, QUERY),
             ("eps0.75_protect2", None, {"threshold": 0.75, "heavy": 0.2}, heavy_2))
    for name, budget, params, query in cases:
        sets = table[f"sets_{name}"]
        yield MergeCase(f"sets_{name}", stack(query), stack(KEY), stack(VALUE), 5, "kv_merger", budget, free | params,
                        ONCE, kept=[s[0] for s in sets], multiplicity=[len(s) for s in sets])


def cam() -> Iterator[MergeCase]:
    """C1; C2 starts from given sums, so the fractional gate is reached by other queries here."""
    table = TABLES["cam"]
    base = {"host": "streaming_llm", "sinks": 1, "targets": 2}
    kept, counts = [0, 2, 3, 4], [1, 2, 1, 1]
    for gate in ("expected", "threshold"):
        yield from case(f"C1_{gate}", "cam", 4, base | {"gate": gate}, table["M1"]["out_same_query_renormalised"], kept,
                        counts, prompt=4, replay=ALWAYS, counts={"merges": 1})
    yield from case("C1_dropped", "cam", 4, base | {"merge": False}, table["M0"]["out_same_query_renormalised"], kept,
                    [1, 1, 1, 1], prompt=4, replay=ALWAYS, counts={"merges": 0})
    for name, size in (("low", 12.0), ("high", 8.0)):       # how far token 1 falls behind tokens 2 and 3
        query = np.array([[0.5, 0.1], [2.5, -1.5], [size, size], [size, size], QUERY[4]])
        rows = [np.exp(KEY[:t + 1] @ query[t] / math.sqrt(2)) for t in range(5)]
        mass = sum(np.pad(row / row.sum(), (0, 4 - t)) for t, row in enumerate(rows))
        chance = mass[1] / mass[2:4].mean()
        assert 0.4 < chance < 0.45 if name == "low" else 0.55 < chance < 0.6
        for gate, part in (("expected", chance), ("threshold", float(name == "high"))):
            value = VALUE.copy()
            value[2:4] += part / 2 * VALUE[1]
            got = attend(QUERY[4], KEY[kept], value[kept])
            yield from case(f"C2_{name}_{gate}", "cam", 4, base | {"gate": gate}, got, kept,
                            counts if part else [1, 1, 1, 1], prompt=4, replay=ALWAYS, query=query)


def d2o() -> Iterator[MergeCase]:
    """M 4.5: both weightings over two compressions; with two equal victims (n = 2); without merging."""
    table, base = TABLES["d2o"], {"recent": 0.34, "sinks": 0}
    more = table["next"]
    for weights, name in (("code", "code"), ("softmax", "paper_exp")):
        first, second = table[name]
        for step, tokens, kept, counts in ((first, 5, [0, 1, 4], [1, 2, 1]), (second, 6, [0, 1, 5], [1, 2, 1])):
            inputs = [stack(x, [more[k]])[:, :, :tokens] for x, k in ((QUERY, "q"), (KEY, "k"), (VALUE, "v"))]
            settings = {"prompt": 5, "policy": "d2o", "budget": 3, "params": base | {"weights": weights},
                        "replay": ALWAYS}
            assert step["keep_ids"] == kept
            yield MergeCase(f"D2O_{weights}_{tokens}", *inputs, kept=kept, multiplicity=counts, counts={"merges": 1},
                            **settings)
            full = attend(QUERY[4], inputs[1][0, 0], inputs[2][0, 0])
            got = attend(QUERY[4], np.array(step["K"])[:3], np.array(step["V"])[:3])
            sixth = [np.reshape(x, (1, 1, 1, 2)) for x in (QUERY[4], FAR, [9.0, 9.0])]
            inputs = [np.append(x, y, axis=2) for x, y in zip(inputs, sixth)]
            yield MergeCase(f"D2O_{weights}_{tokens}_values", *inputs, **settings,
                            distance={(0, tokens): float(np.linalg.norm(got - full))})
    key = KEY.copy()
    key[3] = key[2]                     # equal cosines are their own mean: both merge
    like = float(key[1] @ key[2] / np.linalg.norm(key[1]) / np.linalg.norm(key[2]))
    for weights, weight in (("code", np.array([1, like, like]) / 3),
                            ("softmax", np.exp([1, like, like]) / np.exp([1, like, like]).sum())):
        rows = [np.array([x[0], weight @ x[1:4], x[4]]) for x in (key, VALUE)]
        yield from case(f"D2O_both_{weights}", "d2o", 3, base | {"weights": weights}, attend(QUERY[4], *rows),
                        [0, 1, 4], [1, 3, 1], key=key, counts={"merges": 2})
    gone = attend(QUERY[4], KEY[[0, 1, 4]], VALUE[[0, 1, 4]])
    yield from case("D2O_dropped", "d2o", 3, base | {"merge": False}, gone, [0, 1, 4], [1, 1, 1], counts={"merges": 0})


def keepkv() -> Iterator[MergeCase]:
    """M 5.1: after the fold the newest query gets its full output; below the threshold the victim goes."""
    assert np.allclose(TABLES["keepkv"]["out"], FULL)
    kept = [0, 1, 3, 4]
    yield from case("KeepKV", "keepkv", 4, {}, FULL, kept, [1, 2, 1, 1], counts={"merges": 1, "evictions": 0})
    rows = [x[[0, 1, 3, 4]] for x in (KEY, VALUE)]
    gone = attend(QUERY[4], *rows)
    yield from case("KeepKV_threshold", "keepkv", 4, {"threshold": 0.998}, gone, kept, [1, 1, 1, 1],
                    counts={"merges": 0, "evictions": 1})
    yield from case("KeepKV_dropped", "keepkv", 4, {"merge": False}, gone, kept, [1, 1, 1, 1])
    query = np.vstack([QUERY[:4], [[0.0, 0.0]]])         # no logit to stretch to: convex key, votes still count
    rows = [np.array([x[0], (x[1] + x[2]) / 2, x[3], x[4]]) for x in (KEY, VALUE)]
    wide = np.vstack([KEY, [[0.0, 50.0]]])
    last = [0.0, -20.0]
    far = float(np.linalg.norm(attend(last, *rows, [1, 2, 1, 1]) - attend(last, KEY, VALUE)))
    yield MergeCase("KeepKV_convex", stack(query, [last]), stack(wide), stack(VALUE, [[9.0, 9.0]]), 5, "keepkv", 4, {},
                    ONCE, distance={(0, 5): far})


def look_m() -> Iterator[MergeCase]:
    """M 5.3: slots 2 and 3 both go to slot 1."""
    unit = KEY / np.linalg.norm(KEY, axis=1, keepdims=True)
    like = unit[2:4] @ unit[1]
    rules = {"average": [1, 1, 1], "weighted": [1, *like], "pivot": [2, 0.5, 0.5]}
    for rule, weight in rules.items():
        rows = [np.array([x[0], np.array(weight) @ x[1:4] / 3, x[4]]) for x in (KEY, VALUE)]
        yield from case(f"LookM_{rule}", "look_m", 3, {"recent": 0.34, "rule": rule}, attend(QUERY[4], *rows),
                        [0, 1, 4], [1, 3, 1])
    yield from case("LookM_dropped", "look_m", 3, {"recent": 0.34, "merge": False},
                    attend(QUERY[4], KEY[[0, 1, 4]], VALUE[[0, 1, 4]]), [0, 1, 4], [1, 1, 1])


def zsmerge() -> Iterator[MergeCase]:
    """M 5.5: tail 1, the best two, and slots 2 and 3 as one residual; then slot 4 joins it."""
    params = {"tail": 0.4, "dense": 1, "bias": 0.6}
    rows = [np.array([x[0], x[1], (x[2] + x[3]) / 2, x[4]]) for x in (KEY, VALUE)]
    got = attend(QUERY[4], *rows, [1, 1, 2 ** 0.6, 1])
    yield from case("ZSMerge", "zsmerge", 4, params, got, [0, 1, 2, 4], [1, 1, 2, 1], replay=ALWAYS)
    yield from case("ZSMerge_dropped", "zsmerge", 4, params | {"merge": False},
                    attend(QUERY[4], KEY[[0, 1, 2, 4]], VALUE[[0, 1, 2, 4]]), [0, 1, 2, 4], [1, 1, 1, 1], replay=ALWAYS)
    rows = [np.array([x[0], x[1], (x[2] + x[3] + x[4]) / 3]) for x in (KEY, VALUE)]
    got = attend(QUERY[4], *rows, [1, 1, 3 ** 0.6])
    six = {"q": stack(QUERY, [QUERY[4]] * 2), "k": stack(KEY, [FAR] * 2), "v": stack(VALUE, [[9.0, 9.0]] * 2)}
    yield MergeCase("ZSMerge_later", *six.values(), 5, "zsmerge", 4, params, ALWAYS,
                    distance={(0, 6): float(np.linalg.norm(got - FULL))})
    yield MergeCase("ZSMerge_later_kept", *(x[:, :, :6] for x in six.values()), 5, "zsmerge", 4, params, ALWAYS,
                    kept=[0, 1, 2, 5], multiplicity=[1, 1, 3, 1])


def shares() -> Iterator[MergeCase]:
    """G6 and G7 through kept counts: the pyramid by layer, adaptive shares by head."""
    draw = np.random.default_rng(6)
    for name in ("small", "clipped", "short"):
        table = E["pyramid"][name]
        shape = (table["layers"], 1, table["prompt"], 2)
        slots = [[min(part + table["window"], table["prompt"])] for part in table["exact"]]
        yield MergeCase(f"G6_{name}", *(draw.normal(size=shape) for _ in range(3)), table["prompt"], "snapkv",
                        table["capacity"], {"window": table["window"], "kernel": 5}, ONCE | {"measure": "last:8"},
                        allocation={"kind": "pyramid", "beta": table["beta"]}, slots=slots)
    table = E["adaptive"]
    norms = 2 - np.array(table["scores"])            # knorm scores -|k|: the page's scores less 2
    key = np.stack([norms, np.zeros_like(norms)], axis=2)[None]
    for floor, counts in table["forced"].items():
        yield MergeCase(f"G7_{floor}", key, key, key, 6, "knorm", table["base"], {}, ONCE,
                        allocation={"kind": "adaptive", "floor": float(floor)}, slots=[counts])


def scorers() -> Iterator[MergeCase]:
    """G8, G10, and by hand CriticalKV, the oracle and ExpectedAttention."""
    table = E["lagkv"]
    keys = stack(table["keys"])
    kept = [0, 1, *table["kept_half"], 6, 7, 8, 9]
    yield MergeCase("G8", keys, keys, keys, 10, "lagkv", 8, {"sinks": 2, "lag": 4}, ONCE, kept=kept)
    yield MergeCase("G8_short", *(x[:, :, :9] for x in (keys, keys, keys)), 9, "lagkv", 5, {"sinks": 2, "lag": 4}, ONCE,
                    kept=[0, 1, 6, 7, 8])
    table = E["r_kv"]
    keys = stack(table["keys"])
    params = {"window": table["W"], "kernel": table["kernel"], "lambda": table["lam"]}
    query = np.concatenate([np.zeros((1, 1, 9, 4)), stack(table["queries"])], axis=2)
    yield MergeCase("G10", query, keys, keys, 12, "r_kv", table["budget"], params, ONCE | {"measure": "last:3"},
                    rows=[9, 10, 11], kept=table["kept"])
    five = [stack(x) for x in (QUERY, KEY, VALUE)]
    mass = np.array(M["column_sums"])
    wo = np.array([[[2.0, -1.0], [0.0, 0.0]]])
    second = np.argsort(-(mass + 1e-4) * np.abs(VALUE @ wo[0].T).sum(axis=1))
    both = sorted([4, *[s for s in second.tolist() if s != 4][:2]])
    for part, kept in ((0.5, both), (1.0, [0, 1, 4])):
        yield MergeCase(f"critical_{part}", *five, 5, "critical_kv", 3, {"base": "h2o", "share": part}, ONCE, wo=wo,
                        kept=kept)
    last = np.exp(KEY @ QUERY[4] / math.sqrt(2))
    kept = sorted([*np.argsort(-last[:4])[:3].tolist(), 4])
    yield MergeCase("oracle", *five, 4, "oracle_mass", 3, {}, ONCE, kept=kept, leaks=True)
    for covariance in (True, False):
        query = QUERY[1:]
        logit = KEY @ query.mean(axis=0) / math.sqrt(2)
        if covariance:
            logit = logit + np.einsum("jc,cd,jd->j", KEY, np.cov(query.T, bias=True), KEY) / 4
        score = np.exp(logit[1:]) / np.exp(logit[1:]).sum() * np.linalg.norm(VALUE[1:], axis=1)
        kept = sorted([0, *(1 + np.argsort(-score)[:2]).tolist()])
        yield MergeCase(f"expected_{covariance}", *five, 5, "expected_attention", 3,
                        {"sinks": 1, "covariance": covariance}, ONCE, kept=kept)


FOLD_CASES = [case for table in (kv_merger, kv_merger_sets, cam, d2o, keepkv, look_m, zsmerge, shares, scorers)
              for case in table()]
