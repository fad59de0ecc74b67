"""The oracle against the golden tables (research/eviction-methods.md section 5, merge-methods.md section 1.9)."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from golden_cases import CASES, TABLES, Case
from oracle import Reference, _Cache, attention, fold_right, replay
from oracle_trace import Trace, read_trace, round_to

TOLERANCE = 5e-6
EVENTS = {case.name: case for case in CASES}


def near(got, want) -> bool:
    """Equal within the tolerance; NaN is never near."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    return got.shape == want.shape and bool((np.abs(got - want) <= TOLERANCE).all())


def run(case: Case, folder: Path, watch=None):
    """Replay a case from its file."""
    return replay(read_trace(case.write(folder)), case.policy, case.params, case.budget, protect=case.protect,
                  watch=watch, **case.settings)


def events(name: str, folder: Path, kind: str) -> list[dict]:
    """The watched events of one kind of a case."""
    seen: list[dict] = []
    run(EVENTS[name], folder, lambda event: seen.append(dict(event)))
    return [event for event in seen if event["event"] == kind]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, tmp_path: Path) -> None:
    result = run(case, tmp_path)
    for layer in range(case.q.shape[0]):
        for head in range(case.k.shape[1]):
            if case.kept is not None:
                assert result.kept[layer][head].tolist() == case.kept
            if case.multiplicity is not None:
                assert result.multiplicity[layer][head].tolist() == case.multiplicity
    at = {int(token): i for i, token in enumerate(result.measured)}
    error, norm = np.sqrt(result.error2.sum(axis=1)), np.sqrt(result.output2.sum(axis=1))
    for token, want in case.rel_l2.items():
        assert near(error[0, at[token]] / norm[0, at[token]], want)
    for (layer, token), want in case.distance.items():
        assert near(error[layer, at[token]], want)


def test_g2_weights_scores_outputs(tmp_path: Path) -> None:
    table = TABLES["h2o"]
    prompt, *later = events("G2_errors", tmp_path, "compress")
    assert near(prompt["score"][0, 0], table["prefill_colsum"])
    attends = [event for event in events("G2_errors", tmp_path, "attend") if event["query"][0] >= table["prefill"]]
    assert len(later) == len(attends) == len(table["steps"])
    for step, attend, compress in zip(table["steps"], attends, later):
        assert attend["token"][0, 0].tolist() == step["attended"]
        assert near(attend["weight"][0, 0, 0, 0], step["w"])
        assert near(attend["output"][0, 0, 0, 0], step["out"])
        assert near(attend["full"][0, 0, 0, 0], step["out_full"])
        assert near(compress["score"][0, 0], step["acc"])


def test_g3_weights_outputs(tmp_path: Path) -> None:
    steps = TABLES["tova"]["steps"]
    compressions = events("G3_layer_errors", tmp_path, "compress")
    attends = [event for event in events("G3_layer_errors", tmp_path, "attend") if event["query"][0] >= 6]
    assert len(compressions) == len(steps) and len(attends) == len(steps) - 1
    for step, compress in zip(steps, compressions):
        assert compress["token"][0, 0].tolist() == step["attended"]
        assert near(compress["score"][0, 0], step["mean_w"])
    for step, attend in zip(steps[1:], attends):
        assert near(attend["output"][0, 0, :, 0], step["out"])


@pytest.mark.parametrize("pool", ["avg3", "avg5", "max3"])
def test_g4_pooled_scores(pool: str, tmp_path: Path) -> None:
    table = TABLES["snapkv"]
    (event,) = events(f"G4_{pool}_group_then_pool", tmp_path, "compress")
    assert near(event["score"][0, 0, :table["T"] - table["W"]], table[pool]["group_then_pool"])


def test_g4_window_sums(tmp_path: Path) -> None:
    table = TABLES["snapkv"]
    (event,) = events("G4_none", tmp_path, "compress")
    assert near(event["score"][0, 0, :table["T"] - table["W"]], table["group_mean"])


def test_g5_scores(tmp_path: Path) -> None:
    table = TABLES["knorm"]
    (norms,) = events("G5_knorm_keep4", tmp_path, "compress")
    assert near(norms["score"][0, 0] ** 2, table["sq_norm"])
    (cosines,) = events("G5_keydiff_keep4", tmp_path, "compress")
    assert near(-cosines["score"][0, 0], table["keydiff"]["cos"])


@pytest.mark.parametrize("name,table", [("A2", "A2_m3_sink0_recent1"), ("A3a", "A3a_Q2_m2_sink0_recent1"),
                                        ("A3b", "A3b_Q2_m2_sink1_recent1"), ("A5", "A5_evict_only_m3_sink0_recent1")])
def test_weighted_kv_steps(name: str, table: str, tmp_path: Path) -> None:
    want = TABLES["weighted_kv"][table]
    attends, compressions = (events(name, tmp_path, kind) for kind in ("attend", "compress"))
    for step, attend in zip(want["steps"], attends, strict=True):
        assert attend["token"][0, 0].tolist() == step["ids"]
        assert near(attend["weight"][0, 0, 0, 0], step["attention"])
        assert near(attend["output"][0, 0, 0, 0], step["output"])
    evicting = [step for step in want["steps"] if "evicted_id" in step]
    for step, compress in zip(evicting, compressions, strict=True):
        assert near(compress["score"][0, 0], step["avg"])
        assert set(step["ids"]) - set(compress["token"][0, 0][compress["keep"][0, 0]].tolist()) == {step["evicted_id"]}
    result = run(EVENTS[name], tmp_path)
    assert near(result.value[0, 0], want["final_V"]) and near(result.mass[0, 0, 0], want["final_a"])


def test_weighted_kv_one_shot(tmp_path: Path) -> None:
    want = TABLES["weighted_kv"]["A6_oneshot_m3_sink0_recent1"]
    (event,) = events("A6", tmp_path, "compress")
    assert near(event["score"][0, 0], want["avg"])
    assert near(run(EVENTS["A6"], tmp_path).value[0, 0], want["final_V"])


def one_head_cache(token: list[int], value: np.ndarray) -> _Cache:
    """A cache of one layer and head for the cases that start from given averages."""
    n = len(token)
    return _Cache(np.array(token)[None, None], np.zeros((1, 1, n, 2)), value[None, None].copy(), np.zeros((1, 1, 1, n)),
                  np.ones((1, 1, n), np.int64), np.zeros((1, 1, 9), bool))


def test_weighted_kv_published_toy() -> None:
    """A1: averages are given at each step, values are one-hot, so that entries are mixing coefficients."""
    rows = {5: {1: .3, 2: .1, 3: .5, 4: .3, 5: .5}, 6: {1: .3, 3: .4, 4: .2, 5: .3, 6: .9},
            7: {1: .3, 3: .4, 5: .2, 6: .5, 7: .7}, 8: {1: .2, 3: .4, 6: .3, 7: .4, 8: .6}}
    want = TABLES["weighted_kv"]["A1_published_toy"]
    values = {i: np.eye(8)[i - 1] for i in range(1, 9)}
    for step, victim, into, *_ in want["merges(step,evicted,into,w_evicted,w_into)"]:
        token = sorted(rows[step])
        average = np.array([[rows[step][i] for i in token]])
        assert token[int(np.argmin(average[0, :-1]))] == victim
        cache = one_head_cache(token, np.stack([values[i] for i in token]))
        fold_right(cache, np.array([[token.index(victim)]]), average, "float32")
        values[into] = cache.value[0, 0, token.index(into)]
    assert all(near(values[i], want[f"v{i}"]) for i in (3, 6, 7, 8))


def test_weighted_kv_ideal_merge(tmp_path: Path) -> None:
    """A4: the convex fold weighted by this query's own scores, against full, exact and evict-only outputs."""
    common, want = TABLES["weighted_kv"]["common"], TABLES["weighted_kv"]["A4_ideal_merge"]
    key, value, query = (np.array(common[x]) for x in ("K", "V", "Q"))
    score = np.exp(common["scale"] * key @ query[4])
    cache = one_head_cache(list(range(5)), value)
    fold_right(cache, np.array([[0]]), score[None], "float32")
    assert near(cache.value[0, 0, 1], want["v_convex"])
    trace = read_trace(EVENTS["A2"].write(tmp_path))
    weight = attention(trace, query[None, None, 4:], np.array([4]), key[None, None, 1:], np.arange(1, 5)[None, None])
    exact = np.vstack([want["v_exact"], value[2:]])
    assert near(weight[0, 0, 0, 0] @ exact, want["out_full"])
    assert near(weight[0, 0, 0, 0] @ cache.value[0, 0, 1:], want["out_convex"])
    assert near(weight[0, 0, 0, 0] @ value[1:], want["out_evict_only"])


def test_rounding() -> None:
    """bfloat16: 8 significant bits, ties to even, both word sizes alike; float16 through NumPy."""
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 3 * 2**-8, 255.5, 3.1415927])
    want = [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -1 - 2**-6, 256.0, 3.140625]
    for kind in (np.float32, np.float64):
        assert round_to(x.astype(kind), "bfloat16").tolist() == want
    assert round_to(np.array([1 + 2**-11, 1 + 3 * 2**-11]), "float16").tolist() == [1.0, 1 + 2**-9]


@pytest.mark.parametrize("name", ["smollm2-135m-wikitext2", "smollm2-135m-retrieval"])
def test_full_attention_is_the_models(name: str, data: Path) -> None:
    """design.md section 3: with the "model" rotation the replayed output meets the recorded one within 1.8e-3."""
    trace: Trace = read_trace(data / f"{name}.h5")
    reference = Reference(trace, "last:128")
    recorded = trace.output[:, :, reference.row].reshape(reference.output.shape)
    error = np.linalg.norm(reference.output - recorded, axis=-1) / np.linalg.norm(recorded, axis=-1)
    assert error.mean() < 1.9e-3 and np.percentile(error, 99) < 4e-3
    result = replay(trace, "knorm", budget=trace.tokens, positions="cache", reference=reference)
    assert result.nmse < 1e-12 and result.lost_mass.max() == 0 and not len(result.gaps)
