"""The merging oracle against every golden value: research pages K section 9, M sections 2 to 5, E G6, G7, G8, G10.

The replay cases first, then what no replay shows: weights, masses, states, given sums and thresholds. Traces are
float32, so numbers that went through one agree to 1e-6, the others to 1e-8.
"""
from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import oracle_links
import oracle_merges
import oracle_scores
import oracle_sets
from merge_cases import CODE, LINK_CASES, SLIMMER, TABLES, MergeCase, stack
from merge_fold_cases import FOLD_CASES, KEY, QUERY, VALUE
from oracle import _rotated
from oracle_allocation import forced, pyramid
from oracle_catalogue import RULES
from oracle_heads import Extras, Head, read_extras
from oracle_layers import Layer, View
from oracle_replay import MergeResult, replay
from oracle_trace import Trace, read_trace, round_to

K, M, E = TABLES["kv_slimmer"], TABLES["common"], TABLES["scores"]
BY_NAME = {case.name: case for case in LINK_CASES}


def equal(got, want, tolerance: float) -> bool:
    """Equal within the tolerance; NaN is never near."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    return got.shape == want.shape and bool((np.abs(got - want) <= tolerance).all())


near = functools.partial(equal, tolerance=1e-6)


def run(case: MergeCase, folder: Path) -> MergeResult:
    """Replay a case from its file."""
    path = case.write(folder)
    return replay(read_trace(path), case.policy, case.params, case.budget, extras=read_extras(path),
                  allocation=case.allocation or None, protect=case.protect, **case.settings)


@pytest.mark.parametrize("case", [*LINK_CASES, *FOLD_CASES], ids=lambda case: case.name)
def test_case(case: MergeCase, tmp_path: Path) -> None:
    result = run(case, tmp_path)
    for layer, head in np.ndindex(case.q.shape[0], case.k.shape[1]):
        if case.kept is not None:
            assert result.kept[layer][head].tolist() == case.kept
        if case.multiplicity is not None:
            assert result.multiplicity[layer][head].tolist() == case.multiplicity
        if case.slots is not None:
            assert len(result.kept[layer][head]) == case.slots[layer][head]
    for name, count in case.counts.items():
        assert result.counts[name] == count, name
    error = dict(zip(result.measured.tolist(), np.sqrt(result.error2.sum(axis=1)).T))
    for (layer, token), want in case.distance.items():
        assert near(error[token][layer], want)


def layer_of(case: MergeCase, folder: Path, policy: str = "kv_slimmer", params: dict | None = None) -> Layer:
    """The layer of a link case before its first block, budget 4; inputs as printed, not rounded to float32."""
    path = case.write(folder)
    trace, rule = read_trace(path), RULES[policy]
    layer = Layer(trace, read_extras(path), 0, case.k[0], case.q[0], rule, rule.defaults | (params or {}), 4, "span")
    layer.value = case.v[0]
    return layer


def chunk_tables(table: dict, one: oracle_links.Probed, layer: Layer, at: tuple[int, int], exact: float) -> None:
    """What tests A, B and C print alike."""
    def near(got, want) -> bool:
        return equal(got, want, exact)

    spans = one.head.multiplicity
    per_copy = one.weight[0] / np.concatenate([spans, np.ones(at[1] - at[0])])
    assert near(per_copy, table["attention"]) and near(one.mass, table["mass"]) and near(one.alpha, table["alpha"])
    score = oracle_links.link_mass(one) / oracle_links.decay(len(one.mass) - 1, layer.params["decay_tokens"])
    assert near(score, table["score_slimmer"])
    if "score_asym" in table:
        assert near(score * (spans[1:-1] + spans[2:]), table["score_asym"])
    output = one.weight[0] @ np.concatenate([one.head.value, layer.value[0, slice(*at)]])
    assert near(output, table["output"])
    assert near(one.h, table["h"])
    left, right = oracle_links.released(one)
    weight = left / (left + right)
    assert near(weight, table["weight_code"])
    apart = one.h / (one.alpha * (1 - 2 * one.alpha))
    assert near(one.alpha[:-1] * one.alpha[1:] * (apart[:-1] + apart[1:]), table["h12"])


def asym_tables(table: dict, layer: Layer, one: oracle_links.Probed, at: tuple[int, int], exact: float) -> None:
    """AsymKV's gradients and keys; `layer` turns into one of asym_kv."""
    layer.rule, layer.params = RULES["asym_kv"], RULES["asym_kv"].defaults | {"sinks": 1}
    assert equal(oracle_links.gradient(layer, one, *at), table["gradient"], exact)
    left, right, _ = oracle_links.pair_weights(layer, one, *at)
    key = one.head.key[1:]
    assert equal(left * key[:-1] + right * key[1:], table["key_asym"], exact)


def merged_keys(one: oracle_links.Probed, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Keys of all links, with EPS where the code has it."""
    key, weight = one.head.key[1:], left / (left + right)
    return weight[:, None] * key[:-1] + (1 - weight)[:, None] * key[1:]


def carried(one: oracle_links.Probed, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The states that merged slots would carry on."""
    share = left / (left + right)
    return share ** 2 * one.h[:-1] + (1 - share) ** 2 * one.h[1:]


@pytest.mark.parametrize("name,table,exact", [("A_code_faithful", "A", 1e-8), ("B_code", "B", 2e-6)])
def test_first_chunk(name: str, table: str, exact: float, tmp_path: Path) -> None:
    """Tests A and B; a rotation works in float32, and B extrapolates from it."""
    want, layer = K[table], layer_of(BY_NAME[name], tmp_path, params=CODE)
    (head,) = layer.heads
    layer.append(head, 0, 5)
    layer.extras = Extras(e=stack(np.zeros((5, 2)), K["inputs"]["e"]))
    one = oracle_links.probe(layer, head, 1, 1, 5, 7)
    chunk_tables(want, one, layer, (5, 7), exact)
    sums = one.value                       # every slot is one token
    assert equal(one.alpha @ sums, want["mean_output"], exact)
    assert equal(np.abs(sums - one.alpha @ sums).sum(axis=1), want["l1"], exact)
    code, paper = oracle_links.released(one), oracle_links.norms(one, means=False)
    assert np.array_equal(paper, oracle_links.norms(one, means=True))
    if table == "A":
        assert equal(merged_keys(one, *code), want["key_code"], exact)
        assert equal(paper[0] / (paper[0] + paper[1]), want["weight_paper"], exact)
        assert equal(merged_keys(one, *paper), want["key_paper"], exact)
        assert equal(carried(one, *code), want["carried_h"], exact)
    else:
        assert equal(merged_keys(one, *code)[0], want["key_code_0"], exact)
        assert equal(merged_keys(one, *paper)[0], want["key_paper_0"], exact)
    asym_tables(want, layer, one, (5, 7), exact)


def test_second_chunk(tmp_path: Path) -> None:
    """Test C from test A's cache; direct calls allow chunks of two after five past tokens."""
    case, more = BY_NAME["A_code_faithful"], K["inputs"]
    longer = {x: np.concatenate([getattr(case, x), stack(more[f"next_{x}"])], axis=2) for x in "qkv"}
    layer = layer_of(MergeCase("C", longer["q"], longer["k"], longer["v"], 9, "kv_slimmer", 4), tmp_path, params=CODE)
    (head,), want = layer.heads, K["C"]
    layer.append(head, 0, 5)
    oracle_links.compress_links(layer, 1, 5, 7)
    assert near(head.state[1:], want["h_old"])
    layer.append(head, 5, 7)
    one = oracle_links.probe(layer, head, 1, 2, 7, 9)
    assert head.multiplicity.tolist() == want["multiplicity"]
    chunk_tables(want, one, layer, (7, 9), 1e-6)
    sums = one.multiplicity[:, None] * one.value
    assert near(one.alpha @ sums, want["mean_output_sums"]) and near(one.alpha @ one.value, want["mean_output_means"])
    assert near(oracle_links.raw_state(one), want["h_raw"])
    code = oracle_links.released(one)
    assert near(merged_keys(one, *code), want["key_code"]) and near(carried(one, *code), want["carried_h"])
    layer.extras = Extras(e=np.concatenate([np.zeros((1, 1, 7, 2)), stack(more["e"])], axis=2))
    asym_tables(want, layer, one, (7, 9), 1e-6)


def test_clip(tmp_path: Path) -> None:
    table = K["clip"]
    layer = layer_of(BY_NAME["A_code_faithful"], tmp_path, params=CODE)
    (head,) = layer.heads
    layer.append(head, 0, 5)
    head.multiplicity[1:] = table["before"]
    one = oracle_links.probe(layer, head, 1, 1, 5, 7)
    oracle_links.join_pairs(layer, one, np.array([table["pick"]]), 5, 7)
    assert head.multiplicity[1:].tolist() == table["after"] and layer.counts["lost_by_clip"] == 1


def test_picks() -> None:
    """Of equal links the older goes first; disjoint links share no slot; K 7.1's overlap."""
    score = np.array([2.0, 1.0, 1.0, 3.0, 1.0])
    assert oracle_links.faithful(score, 2)[0].tolist() == [1, 2]
    assert oracle_links.disjoint(score, 3)[0].tolist() == [1, 4]
    assert oracle_links.disjoint(score, 1)[0].tolist() == [1]
    found, gap = oracle_links.disjoint(np.array([1.0, 1.0 + 1e-7, 5.0]), 1)
    assert found.tolist() == [0] and gap < 1e-6, "a near-tie of two links that shut each other out"


@pytest.mark.parametrize("name", ["B1_mean_dist", "B2_sigma5", "B3_literal_fixed_point"])
def test_kv_merger_weights(name: str) -> None:
    table = TABLES["kv_merger"][name]
    kind = {"B1": "mean_distance", "B2": "fixed", "B3": "literal"}[name[:2]]
    slots, set_ = table["set"]["set"], table["set"]
    apart = np.linalg.norm(KEY[slots] - KEY[1], axis=1)
    assert set_["pivot"] == 1 and equal(apart, set_["dist"], 1e-8)
    assert equal(oracle_sets.sigma(apart, kind, 5.0), set_["sigma"], 1e-8)
    weight = oracle_sets.weights(KEY[slots], 0, np.ones(3), kind, 5.0)
    assert equal(weight, set_["w"], 1e-8) and equal(weight / weight[0], set_["g"], 1e-8)
    assert equal(weight @ KEY[slots], table["K"][1], 1e-8) and equal(weight @ VALUE[slots], table["V_convex"][1], 1e-8)
    assert equal(3 * weight @ VALUE[slots], table["V_times_setsize"][1], 1e-8)
    same = oracle_sets.weights(np.ones((3, 2)), 0, np.array([1, 2, 1]), "mean_distance", 5.0)
    assert equal(same, [0.25, 0.5, 0.25], 1e-12), "equal keys: uniform over tokens"


def five_tokens(policy: str, params: dict, folder: Path, budget: int, in_prompt: bool = False) -> View:
    """M's head of five tokens with the attention of all its queries observed."""
    case = MergeCase("five", stack(QUERY), stack(KEY), stack(VALUE), 5, policy, budget)
    trace: Trace = read_trace(case.write(folder))
    rule = RULES[policy]
    key, query = _rotated(trace, "absolute")
    layer = Layer(trace, Extras(), 0, key[0], query[0], rule, rule.defaults | params, budget, "absolute")
    (head,) = layer.heads
    layer.append(head, 0, 5)
    head.mass = layer.attend(head, np.arange(5)).sum(axis=1)
    assert near(head.mass[0], M["column_sums"])
    return View(layer, head, 4, in_prompt, budget)


def test_cam_given_sums(tmp_path: Path) -> None:
    """C1 and C2: the victim is slot 1, the window slots 2 and 3; in the prompt nothing is folded."""
    table = TABLES["cam"]
    keep, victims = np.array([0, 2, 3, 4]), np.array([table["evict"]])
    for sums, want in ((table["cumulative"], table["M1"]["V_kept"]), (table["C2"]["cumulative"],
                                                                       table["C2"]["M_expected"]["V_kept"])):
        view = five_tokens("cam", {"targets": len(table["window"])}, tmp_path, 4)
        view.head.mass = np.array([sums])
        oracle_merges.cam_fold(view, keep, victims)
        assert near(view.head.value[keep], want)
    view = five_tokens("cam", {"targets": 2, "gate": "threshold"}, tmp_path, 4)
    view.head.mass = np.array([[2.0, 0.31, 0.8, 0.4, 0.1]])      # p just above 1/2 merges
    oracle_merges.cam_fold(view, keep, victims)
    assert near(view.head.value[keep], table["C2"]["M1"]["V_kept"])
    view = five_tokens("cam", {"targets": 2}, tmp_path, 4, in_prompt=True)
    oracle_merges.cam_fold(view, keep, victims)
    assert near(view.head.value[keep], table["M0"]["V_kept"]) and view.head.stands.tolist() == [0, -1, 2, 3, 4]


@pytest.mark.parametrize("weights,name", [("code", "code"), ("softmax", "paper_exp")])
def test_d2o_thresholds(weights: str, name: str, tmp_path: Path) -> None:
    """The first step's cosines and threshold, and the given threshold of 0.9, above which both victims merge."""
    for table, tau in ((TABLES["d2o"][name][0], None), (TABLES["d2o"][f"{name}_forced_tau0.9"][0], 0.9)):
        view = five_tokens("d2o", {"weights": weights, "sinks": 0, "alpha": 1.0, "beta": 0.0}, tmp_path, 3)
        keep, victims = np.array(table["keep_ids"]), np.array(table["evict_ids"])
        target, like = oracle_merges.nearest(view, victims, keep)
        assert near(like, table["max_cos"]) and target.tolist() == table["target_ids"]
        if tau:
            view.head.memory["tau"] = tau
        oracle_merges.d2o_fold(view, keep, victims)
        assert near(view.head.memory["tau"], table["tau"])
        assert [view.head.stands[v] >= 0 for v in victims] == table["merged"]
        assert near(view.head.key[keep], table["K"][:3]) and near(view.head.value[keep], table["V"][:3])


def test_d2o_second_step(tmp_path: Path) -> None:
    """Scores and values after the second compression."""
    for case in FOLD_CASES:
        if case.name in ("D2O_code_6", "D2O_softmax_6"):
            table = TABLES["d2o"]["code" if "code" in case.name else "paper_exp"][1]
            result = run(case, tmp_path)
            kept = [table["scores"][i] for i in (0, 1, 3)]
            assert near(result.mass[0][0][0], kept)
            assert near(result.key[0][0], table["K"]) and near(result.value[0][0], table["V"])


def test_keepkv_row(tmp_path: Path) -> None:
    table, view = TABLES["keepkv"], five_tokens("keepkv", {}, tmp_path, 4)
    logit = view.layer.logits(view.head, np.array([4]))[0, 0]
    key, value = oracle_merges.keepkv_row(view.head, np.array([1, 2]), logit[[1, 2]])
    assert near(key, table["k_r"]) and near(value, table["v_r"])


def test_pyramid() -> None:
    """G6."""
    for table in E["pyramid"].values():
        base, limit = table["capacity"] - table["window"], table["prompt"] - table["window"]
        if base < limit:
            found = pyramid(table["layers"], base, table["beta"], limit)
            assert found == table["exact"] and sum(found) == table["layers"] * base
    assert pyramid(1, 9, 20, 100) == [9]


def test_adaptive() -> None:
    """G7."""
    table = E["adaptive"]
    scores = [np.array(row) for row in table["scores"]]
    for floor, want in table["forced"].items():
        assert forced(scores, [table["base"]] * 2, float(floor))[0] == want


def test_lagkv_spread() -> None:
    """G8."""
    table = E["lagkv"]
    assert near(oracle_scores.spread(np.array(table["keys"])[table["sinks"]:], table["lag"])[0], table["softmax"])
    flat = np.ones((4, 3))
    assert near(oracle_scores.spread(np.vstack([flat[:2], flat[2:]]), 2), [[0.5, 0.5]]), "a channel without range is 0"


def test_r_kv_parts(tmp_path: Path) -> None:
    """G10."""
    table = E["r_kv"]
    assert near(oracle_scores.redundancy(np.array(table["keys"]), 0.5)[:9], table["redundancy"])
    case = next(case for case in FOLD_CASES if case.name == "G10")
    trace, rule = read_trace(case.write(tmp_path)), RULES["r_kv"]
    key, query = _rotated(trace, "absolute")
    layer = Layer(trace, Extras(), 0, key[0], query[0], rule, rule.defaults | case.params, 7, "absolute")
    layer.append(layer.heads[0], 0, 12)
    view = View(layer, layer.heads[0], 11, True, 7)
    verdict = oracle_scores.r_kv(view)
    assert near(verdict.score[:9], table["final"]) and verdict.recent.tolist() == [False] * 9 + [True] * 3
    assert view.choose(verdict).tolist() == table["kept"]


def test_head_follows_its_tokens() -> None:
    """Which slot stands for which token, through merges, drops and taken-back probes."""
    trace = _tiny()
    head = Head(0, trace)
    head.append(0, np.zeros((4, 2)), np.zeros((4, 2)))
    head.join(1, 0)
    head.join(3, 2)
    head.keep(np.array([0, 2]))
    head.append(4, np.zeros((1, 2)), np.zeros((1, 2)))
    head.cut(2)
    head.drop(1)
    assert head.stands[:5].tolist() == [0, 0, -1, -1, -1] and head.token.tolist() == [0, 2]


def test_near_roundings() -> None:
    """Counted where fp32 could round the other way, not in the exact middle."""
    head = Head(0, _tiny("bfloat16"))
    head.append(0, np.zeros((1, 2)), np.zeros((1, 2)))
    step = 2.0 ** -7
    for value, count in ((1 + step / 2, 0), (1 + step / 2 + 1e-9, 1), (1.001, 1), (1 + step / 2 - 1e-9, 2)):
        head.write(0, np.array([value, 1.0]), None)
        assert head.near_roundings == count
        assert head.key[0, 0] == round_to(np.array([value]), "bfloat16")[0]


def _tiny(dtype: str = "float32") -> Trace:
    """A trace of five tokens that only shapes are read from."""
    zeros = np.zeros((1, 1, 5, 2))
    return SimpleNamespace(k=zeros, v=zeros, dtype=dtype, group=1, tokens=5)


def test_consistent_differs_once_slots_stand_for_several() -> None:
    """K 7.5: with value means the rule sees what the slots hold; SLIMMER's default is that rule."""
    head = Head(0, _tiny())
    head.append(0, np.zeros((4, 2)), np.array([[0.0, 0.0], [1.0, -1.0], [0.5, 2.0], [-1.0, 0.3]]))
    head.multiplicity[1] = 3
    one = oracle_links.Probed(head, 1, np.array([0.2, 0.5, 0.3]), np.zeros((1, 1, 4)), np.zeros(0))
    assert not np.allclose(oracle_links.norms(one, True), oracle_links.norms(one, False))
    assert "rule" not in SLIMMER and RULES["kv_slimmer"].defaults["rule"] == "consistent"
