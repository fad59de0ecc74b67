"""kvreplay.compare on made-up curves whose ratios are known: paired, at equal bytes, never outside a line's points."""

import re

import merge_rows
import pytest
import sweep_rows
from kvreplay import compare, results
from kvreplay.results import HELD, LEAK_NOTE, NMSE
from merge_rows import RETRIEVAL, WIKI


def curve(policy: str, factor: float, held: list[int], trace=WIKI, mode="prompt", **more) -> list[dict]:
    """Points on the line nmse = factor / held, a straight one in the figure."""
    points = [{HELD: h * 1024, NMSE: factor / h} for h in held]
    budgets = [f"{h}" for h in held]
    return [sweep_rows.row(policy, trace, mode, b, **(p | more)) for b, p in zip(budgets, points, strict=True)]


def text_of(folder, rows: list[dict], *selectors: str) -> str:
    """What the command prints about a folder with these rows."""
    out = merge_rows.write_folder(folder, rows)
    return compare.compare(results.load(out), results.load_manifest(out), selectors[0], list(selectors[1:]))


def sentences(text: str) -> list[str]:
    """The sentences of an output."""
    return [line for line in text.split("\n") if line.endswith(".")]


def test_equal_bytes(tmp_path):
    rows = curve("h2o", 8, [100, 200, 400]) + curve("tova", 10, [150, 300, 600])
    text = text_of(tmp_path, rows, "h2o", "tova")
    assert sentences(text) == [
        "smollm2-135m-wikitext2, compress prompt: H2O has the lower nmse than TOVA at 3 of 3 byte counts "
        "(0.80 times its error, geometric mean)."
    ]
    points = re.findall(r"(\d+) KiB +(\S+) +(\S+) +(\S+)$", text, re.MULTILINE)
    assert [tuple(map(float, point)) for point in points] == [
        (150, 0.0533, 0.0667, 0.8), (200, 0.04, 0.05, 0.8), (400, 0.02, 0.025, 0.8)]  # fmt: skip


def test_the_other_way_round_is_the_other_way_round(tmp_path):
    rows = curve("h2o", 8, [100, 200]) + curve("tova", 10, [100, 200])
    assert "at 0 of 2 byte counts (1.25 times" in text_of(tmp_path, rows, "tova", "h2o")


def test_no_overlap_is_said_not_extrapolated(tmp_path):
    rows = curve("h2o", 8, [100, 200]) + curve("tova", 10, [300, 400]) + curve("random", 16, [100, 200])
    assert sentences(text_of(tmp_path, rows, "h2o", "tova", "random")) == [
        "smollm2-135m-wikitext2, compress prompt: H2O has the lower nmse than Random at 2 of 2 byte counts "
        "(0.50 times its error, geometric mean); it shares no byte count with TOVA "
        "(100 KiB to 200 KiB against 300 KiB to 400 KiB)."
    ]
    only = sentences(text_of(tmp_path, rows, "h2o", "tova"))
    assert only[0].endswith(": H2O shares no byte count with TOVA (100 KiB to 200 KiB against 300 KiB to 400 KiB).")


def test_traces_and_modes_are_never_mixed(tmp_path):
    rows = curve("h2o", 8, [100, 200]) + curve("tova", 10, [100, 200])
    rows += curve("h2o", 9, [100, 200], RETRIEVAL) + curve("tova", 6, [100, 200], RETRIEVAL)
    rows += curve("h2o", 1, [100, 200], mode="always") + curve("random", 1, [100, 200], RETRIEVAL, "always")
    said = sentences(text_of(tmp_path, rows, "h2o", "tova"))
    assert [(s.split(":")[0], re.search(r"\((\S+) times", s)[1]) for s in said] == [
        ("smollm2-135m-wikitext2, compress prompt", "0.80"), ("smollm2-135m-retrieval, compress prompt", "1.50")
    ]  # fmt: skip
    with pytest.raises(results.ResultsError, match="compress mode and settings in common with random"):
        text_of(tmp_path, rows, "h2o", "random")


def test_common_settings_are_held_equal(tmp_path):
    rows = []
    for policy, factor in (("kv_slimmer", 8), ("asym_kv", 10)):
        for picks, times in (("disjoint", 1), ("fold", 2)):
            rows += curve(policy, factor * times, [100, 200], **{"policy.picks": picks, "policy.merge": True})
    rows += curve("kv_slimmer", 20, [100, 200], **{"policy.picks": "fold", "policy.merge": False})
    rows += curve("h2o", 4, [100, 200])
    said = sentences(text_of(tmp_path, rows, "kv_slimmer", "asym_kv"))
    assert [re.findall(r"kv \(picks (\w+)\)|r \(picks (\w+)\)", s) for s in said] == [
        [("", "disjoint"), ("disjoint", "")], [("", "fold"), ("fold", "")]]  # fmt: skip
    assert all("(0.80 times its error" in s for s in said)
    assert len(sentences(text_of(tmp_path, rows, "kv_slimmer", "h2o"))) == 3, "nothing in common: every variant"
    own = text_of(tmp_path, rows, "kv_slimmer[merge=true]", "kv_slimmer[merge=false]")
    assert len(sentences(own)) == 1 and "(0.80 times" in own and "than kv_slimmer (picks fold, dropped) at" in own
    across = text_of(tmp_path, rows, "kv_slimmer[picks=disjoint]", "asym_kv[picks=fold]")
    assert len(sentences(across)) == 1 and "(0.40 times" in across


def test_seeds_are_averaged_and_exact_points_left_out(tmp_path):
    rows = [row | {"seed": seed, NMSE: row[NMSE] * times, "run": f"{row['run']}{seed}"}
            for row in curve("random", 8, [100, 200]) for seed, times in ((0, 0.5), (1, 1.5))]  # fmt: skip
    rows += curve("h2o", 10, [100, 200]) + [sweep_rows.row("h2o", WIKI, "prompt", "900", nmse=0.0)]
    assert "at 2 of 2 byte counts (0.80 times" in text_of(tmp_path, rows, "random", "h2o")


def test_leaks_are_marked(tmp_path):
    text = text_of(tmp_path, curve("oracle_mass", 1, [100]) + curve("h2o", 2, [100]), "h2o", "oracle_mass")
    assert "than oracle_mass † at 0 of 1" in text and text.endswith(f"\n{LEAK_NOTE}")


@pytest.mark.parametrize(("selector", "message"), [
    ("h20", "no finished run of policy 'h20'; did you mean 'h2o'?"),
    ("h2o[recnt=0.5]", "h2o has no parameter 'recnt'; did you mean 'recent'?"),
    ("h2o[recent=0.6]", "h2o was not run with recent '0.6'; did you mean '0.5'?"),
    ("h2o[recent]", "h2o was not run with recent ''; did you mean '0.5'?"),
    ("h2o[recent=0.5", "expected a policy or policy[parameter=value,...], got 'h2o[recent=0.5'"),
])  # fmt: skip
def test_unknown_names(tmp_path, capsys, selector, message):
    merge_rows.write_folder(tmp_path, curve("h2o", 8, [100]) + curve("tova", 8, [100]))
    assert compare.main([str(tmp_path), selector, "tova"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"kvreplay.compare: {message}\n"


def test_the_command(tmp_path, capsys):
    merge_rows.write_folder(tmp_path, curve("h2o", 8, [100, 200]) + curve("tova", 16, [100, 200]))
    assert compare.main([str(tmp_path), "h2o[recent=0.50]", "tova"]) == 0
    assert "(0.50 times its error" in capsys.readouterr().out
    assert compare.main([str(tmp_path / "no"), "h2o", "tova"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
