"""The golden values of the link policies as replay cases (K = kv_slimmer in merge_tables.json, not edited by hand).

One list serves the oracle (test_oracle_merges_golden.py) and the program (test_engine_merge_golden.py). What a fold
left in the cache shows in the output of a later query. Where a page gives no number, the expected output is computed
here from its numbers by the plain formulas below, never by the oracle.
"""
from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from golden_cases import Case
from made_traces import write_trace

TABLES = json.loads((Path(__file__).parent / "merge_tables.json").read_text())
K = TABLES["kv_slimmer"]
CHUNK = {"block": 5, "compress": "prompt", "positions": "span"}     # five past tokens, then what is left of the prompt
SLIMMER = {"sinks": 1}
CODE = SLIMMER | {"rule": "released", "picks": "faithful", "clip": 5, "smoothing": True, "guard": "none"}


@dataclass(frozen=True)
class MergeCase(Case):
    """A case of a merging policy; a budget of None is none."""

    e: np.ndarray | None = None                             # [L, Hq, T, Dv]
    wo: np.ndarray | None = None                            # [L, hidden, Hq * Dv]
    allocation: dict[str, Any] = field(default_factory=dict)
    slots: list[list[int]] | None = None                    # [layer][KV head] held in the end
    counts: dict[str, int] = field(default_factory=dict)
    leaks: bool | None = None

    def write(self, folder: Path) -> Path:
        """Write the inputs as a trace file named after the case."""
        path = folder / f"{self.name}.h5"
        write_trace(path, self.q, self.k, self.v, self.prompt, inv_freq=self.inv_freq, rows=self.rows, e=self.e,
                    wo=self.wo)
        return path


def stack(*rows: list) -> np.ndarray:
    """Lists of vectors, one after the other, as a tensor of one layer and head."""
    return np.concatenate([np.asarray(part, dtype=np.float64).reshape(len(part), -1) for part in rows])[None, None]


def turn(x: np.ndarray, position: np.ndarray) -> np.ndarray:
    """RoPE of K 9.1: two channels, one frequency of 1."""
    cos, sin = np.cos(position), np.sin(position)
    return np.stack([x[:, 0] * cos - x[:, 1] * sin, x[:, 1] * cos + x[:, 0] * sin], axis=1)


def outputs(query: list, keys: list, sums: list, counts: list[int], own_k: list, own_v: list, rope: bool = False,
            voices: list | None = None) -> np.ndarray:
    """K 2.1: outputs of a block of queries over slots (value sums and their multiplicities) and causally over itself.

    `voices` are the counts that enter the softmax, where they are not the multiplicities.
    """
    query, keys, own_k = (np.asarray(x, float) for x in (query, keys, own_k))
    voice = np.concatenate([counts if voices is None else voices, np.ones(len(own_k))])
    value = np.concatenate([np.asarray(sums, float) / np.asarray(counts)[:, None], np.asarray(own_v, float)])
    past = np.sum(counts) + np.arange(len(own_k))
    at = np.concatenate([np.cumsum(counts) - counts[0], past])
    key = np.concatenate([keys, own_k])
    if rope:
        query, key = turn(query, past), turn(key, at)
    weight = voice * np.exp(query @ key.T / math.sqrt(query.shape[1])) * (at <= past[:, None])
    return weight / weight.sum(axis=1, keepdims=True) @ value


def distances(got: np.ndarray | list, full: np.ndarray | list, first: int) -> dict[tuple[int, int], float]:
    """|d| of consecutive tokens of layer 0."""
    return {(0, first + i): float(np.linalg.norm(d)) for i, d in enumerate(np.subtract(got, full))}


def chunk_case(name: str, policy: str, params: dict, got: np.ndarray, kept: list[int], multiplicity: list[int],
               table: str = "A", **more: Any) -> MergeCase:
    """K's tests A and B: five past tokens, then a chunk of two that is probed, merged for and measured."""
    zeros = np.zeros((5, 2))
    e = stack(zeros, K["inputs"]["e"]) if policy == "asym_kv" else None
    inputs = [stack(zeros, K["inputs"]["chunk_q"])]
    inputs += [stack(K["inputs"][f"past_{x}"], K["inputs"][f"chunk_{x}"]) for x in "kv"]
    settings = {"prompt": 7, "policy": policy, "params": params, "budget": 4, "replay": CHUNK, "leaks": True,
                "inv_freq": [1.0] if table == "B" else None, "e": e} | more
    full = outputs(K["inputs"]["chunk_q"], *(K["inputs"][f"past_{x}"] for x in "kv"), [1] * 5,
                   *(K["inputs"][f"chunk_{x}"] for x in "kv"), rope=table == "B")
    assert np.allclose(full, K[table]["output"], atol=1e-8)
    return MergeCase(name, *inputs, distance=distances(got, full, 5) | {(0, t): 0.0 for t in range(5)}, kept=kept,
                     multiplicity=multiplicity, **settings)


def merged_chunk(first: int, key: list, table: str = "A", count: int = 2, sums: Any = None) -> np.ndarray:
    """Outputs of the chunk when slots first, first + 1, ... (`count` of them) have become one with this key."""
    past = [list(K["inputs"][f"past_{x}"]) for x in "kv"]
    sums = np.sum(past[1][first:first + count], axis=0) if sums is None else sums
    keys, values = past[0][:first] + [key] + past[0][first + count:], past[1][:first] + [sums] + past[1][first + count:]
    counts = [1] * first + [count] + [1] * (5 - first - count)
    return outputs(K["inputs"]["chunk_q"], keys, values, counts, K["inputs"]["chunk_k"], K["inputs"]["chunk_v"],
                   rope=table == "B")


def mix(weight: list, keys: list) -> np.ndarray:
    """Average of keys, weights as they come."""
    weight = np.asarray(weight, float)
    return weight @ np.asarray(keys, float) / weight.sum()


def surrogate_key(table: dict) -> np.ndarray:
    """K 2.4 of slots 2 and 3 with the output in the place of the recorded gradient, RoPE off."""
    output, weight = np.array(table["output"]), np.array(table["attention"])
    value, query = np.array(K["inputs"]["past_v"]), np.array(K["inputs"]["chunk_q"])
    squared = [sum(weight[t, j] * (output[t] @ (value[j] - output[t])) * query[t] for t in (0, 1)) ** 2 for j in (2, 3)]
    keys = np.array(K["inputs"]["past_k"])
    return (squared[0] * keys[2] + squared[1] * keys[3]) / (squared[0] + squared[1])


def tests_a() -> Iterator[MergeCase]:
    """K 9.2: pair 1 (slots 2 and 3) is the lowest for every rule; keys by the rules, values and counts alike."""
    table, kept, counts = K["A"], [0, 1, 2, 4, 5, 6], [1, 1, 2, 1, 1, 1]
    got = {name: np.array(x) for name, x in table["merged_output"].items()}
    pair = K["inputs"]["past_k"][2:4]
    key = {"code": table["key_code"][1], "asym": table["key_asym"][1], "paper": table["key_paper"][1]}
    assert all(np.allclose(merged_chunk(2, key[name]), got[name], atol=1e-8) for name in key)
    for picks in ("faithful", "disjoint"):
        yield chunk_case(f"A_code_{picks}", "kv_slimmer", CODE | {"picks": picks}, got["code"], kept, counts)
        yield chunk_case(f"A_asym_{picks}", "asym_kv", SLIMMER | {"picks": picks}, got["asym"], kept, counts)
        for rule in ("paper", "consistent"):
            for guard in ("none", "clamp"):
                params = SLIMMER | {"rule": rule, "picks": picks, "guard": guard}
                yield chunk_case(f"A_{rule}_{picks}_{guard}", "kv_slimmer", params, got["paper"], kept, counts)
        mean = merged_chunk(2, mix([1, 1], pair))
        yield chunk_case(f"A_mean_{picks}", "mean_merge", SLIMMER | {"picks": picks}, mean, kept, counts)
    yield chunk_case("A_preset", "kv_slimmer_released", SLIMMER, got["code"], kept, counts)
    by_mass = merged_chunk(2, mix(table["mass"][1:3], pair))
    for rule in ("released", "paper", "consistent"):
        params = SLIMMER | {"rule": rule, "picks": "fold"}
        yield chunk_case(f"A_fold_{rule}", "kv_slimmer", params, by_mass, kept, counts)
    squared = np.array(table["gradient"])[2:4] ** 2
    by_gradient = (squared * pair).sum(axis=0) / squared.sum(axis=0)
    yield chunk_case("A_fold_asym", "asym_kv", SLIMMER | {"picks": "fold"}, merged_chunk(2, by_gradient), kept, counts)
    yield chunk_case("A_surrogate", "asym_kv", SLIMMER | {"gradient": "surrogate"},
                     merged_chunk(2, surrogate_key(table)), kept, counts, e=None)
    past = {x: [row for i, row in enumerate(K["inputs"][f"past_{x}"]) if i != 3] for x in "kv"}
    dropped = outputs(K["inputs"]["chunk_q"], past["k"], past["v"], [1] * 4, K["inputs"]["chunk_k"],
                      K["inputs"]["chunk_v"])
    yield chunk_case("A_dropped", "kv_slimmer", SLIMMER | {"merge": False}, dropped, kept, counts)


def overlap() -> Iterator[MergeCase]:
    """K 9.2, picks {0, 1}: faithful loses the token of slot 3, fold joins three slots into one."""
    table, past = K["overlap"], K["inputs"]
    assert sorted(np.argsort(K["A"]["score_slimmer"])[:2].tolist()) == table["picks"]
    keys, sums = [past["past_k"][0], *table["k"]], [past["past_v"][0], *table["v_sums"]]
    got = outputs(past["chunk_q"], keys, sums, [1, *table["multiplicity"]], past["chunk_k"], past["chunk_v"])
    kept, counts = [0, 1, 4, 5, 6], [1, *table["multiplicity"], 1, 1]
    yield chunk_case("A_overlap", "kv_slimmer", CODE, got, kept, counts, budget=3,
                     counts={"lost_in_folds": 1, "merges": 1})
    joined = merged_chunk(1, mix(K["A"]["mass"][:3], past["past_k"][1:4]), count=3)
    yield chunk_case("A_overlap_fold", "kv_slimmer", SLIMMER | {"picks": "fold"}, joined, kept, [1, 3, 1, 1, 1],
                     budget=3, counts={"lost_in_folds": 0, "merges": 2})


def lossless() -> Iterator[MergeCase]:
    """K 2.1 step 5: two tokens with one key become a slot of multiplicity 2 and no output moves."""
    case = next(tests_a())
    k = case.k.copy()
    k[0, 0, 2:4] = K["A"]["key_code"][1]
    for rule in ("released", "paper", "consistent"):
        for guard in ("none", "clamp"):
            params = CODE | {"rule": rule, "guard": guard}
            yield MergeCase(f"lossless_{rule}_{guard}", case.q, k, case.v, 7, "kv_slimmer", 4, params, CHUNK,
                            kept=case.kept, multiplicity=case.multiplicity, distance={(0, t): 0.0 for t in range(7)})


def tests_b() -> Iterator[MergeCase]:
    """K 9.3: RoPE on; pair 0 (slots 1 and 2) merges and everything behind it keeps its position."""
    table, kept, counts = K["B"], [0, 1, 3, 4, 5, 6], [1, 2, 1, 1, 1, 1]
    got = {name: np.array(x) for name, x in table["merged_output"].items()}
    assert np.allclose(merged_chunk(1, table["key_code_0"], "B"), got["code"], atol=1e-8)
    yield chunk_case("B_code", "kv_slimmer", CODE, got["code"], kept, counts, "B", counts={"weights_outside": 1})
    yield chunk_case("B_asym", "asym_kv", SLIMMER, got["asym"], kept, counts, "B")
    for rule in ("paper", "consistent"):
        yield chunk_case(f"B_{rule}", "kv_slimmer", SLIMMER | {"rule": rule}, got["paper"], kept, counts, "B")
    left = merged_chunk(1, K["inputs"]["past_k"][1], "B")
    yield chunk_case("B_clamped", "kv_slimmer", CODE | {"guard": "clamp"}, left, kept, counts, "B")
    key = mix(table["mass"][:2], K["inputs"]["past_k"][1:3])
    yield chunk_case("B_fold", "kv_slimmer", SLIMMER | {"picks": "fold"}, merged_chunk(1, key, "B"), kept, counts, "B")
    past = {x: [row for i, row in enumerate(K["inputs"][f"past_{x}"]) if i != 2] for x in "kv"}
    sums = np.array(past["v"]) * [[1], [2], [1], [1]]
    dropped = outputs(K["inputs"]["chunk_q"], past["k"], sums, [1, 2, 1, 1], K["inputs"]["chunk_k"],
                      K["inputs"]["chunk_v"], rope=True, voices=[1, 1, 1, 1])
    yield chunk_case("B_dropped", "kv_slimmer", SLIMMER | {"merge": False}, dropped, kept, counts, "B")


def long_inputs() -> list[np.ndarray]:
    """K 9.4 in blocks of five: two real tokens, then three that no real query sees and that see the sink alone.

    Channel 2 belongs to the fillers' queries and the sink, channel 3 to the fillers' keys; the queries make up for the
    scale of 1/sqrt(4).
    """
    root = math.sqrt(2)
    real = {x: K["inputs"][f"chunk_{x}"] + K["inputs"][f"next_{x}"] for x in "qkv"}
    q, k, v = np.zeros((15, 4)), np.zeros((15, 4)), np.zeros((15, 2))
    at, fillers = [5, 6, 10, 11], [7, 8, 9, 12, 13, 14]
    k[:5, :2], v[:5] = K["inputs"]["past_k"], K["inputs"]["past_v"]
    q[at, :2], k[at, :2], v[at] = root * np.array(real["q"]), real["k"], real["v"]
    q[at, 3], k[0, 2] = 100.0, 100.0
    q[[*range(5), *fillers], 2], k[fillers, 3] = 100.0, -100.0
    return [stack(x) for x in (q, k, v)]


def tests_c() -> Iterator[MergeCase]:
    """K 9.4: the second chunk. Five links go, three of them the fillers'; which of the real ones, the decay decides."""
    table, inputs = K["C"], K["inputs"]
    past_k, past_v = inputs["past_k"] + inputs["chunk_k"], inputs["past_v"] + inputs["chunk_v"]
    full = outputs(inputs["next_q"], past_k, past_v, [1] * 7, inputs["next_k"], inputs["next_v"])
    second = np.add(past_v[2], past_v[3])       # slot 2 after the first chunk, with the key of test A

    def case(name: str, keys: list, sums: list, counts: list[int], kept: list[int], params: dict) -> MergeCase:
        got = outputs(inputs["next_q"], [past_k[0], past_k[1], *keys], [past_v[0], past_v[1], *sums], [1, 1, *counts],
                      inputs["next_k"], inputs["next_v"])
        return MergeCase(name, *long_inputs(), 15, "kv_slimmer", 4, CODE | params, CHUNK,
                         kept=[0, 1, *kept, *range(10, 15)], multiplicity=[1, 1, *counts] + [1] * 5,
                         distance=distances(got, full, 10))

    def keys_of(h: np.ndarray, params: dict, name: str, checked: bool) -> Iterator[MergeCase]:
        """Weights from a state; without decay links 1 and 3 go (slots 2 + 4 and 5 + 6), with it links 2 and 3."""
        alpha = np.array(table["alpha"])
        apart = h / (alpha * (1 - 2 * alpha))
        both = alpha[:-1] * alpha[1:] * (apart[:-1] + apart[1:])
        weight = (h[:-1] - both) / (h[:-1] + h[1:] - 2 * both)
        own = [past_k[1], K["A"]["key_code"][1], past_k[4], *inputs["chunk_k"]]
        key = [w * np.array(a) + (1 - w) * np.array(b) for w, a, b in zip(weight, own[:-1], own[1:])]
        assert not checked or np.allclose(weight, table["weight_code"]) and np.allclose(key, table["key_code"])
        yield case(f"C_{name}", [own[1], key[2]], [second, np.add(past_v[4], past_v[5])], [2, 2], [2, 4], params)
        sums = [second + past_v[4], np.add(past_v[5], past_v[6])]
        yield case(f"C_{name}_no_decay", [key[1], key[3]], sums, [3, 2], [2, 5], params | {"decay_tokens": 0})
        yield case(f"C_{name}_clip", [key[1], key[3]], sums, [2, 2], [2, 5], params | {"decay_tokens": 0, "clip": 2})

    yield from keys_of(np.array(table["h"]), {}, "smoothed", True)
    yield from keys_of(np.array(table["h_raw"]), {"smoothing": False}, "fresh", False)


LINK_CASES = [case for table in (tests_a, overlap, lossless, tests_b, tests_c) for case in table()]
