"""kvreplay.results and kvreplay.figures on a made-up sweep: what is drawn is what the rows say, nothing is mixed."""

import csv
import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import sweep_rows
from kvreplay import canvas, figures, pareto, results, style
from kvreplay.results import HELD, MODE, NMSE, POLICY, TRACE, ResultsError
from matplotlib.colors import to_rgb

CATALOGUE = """full random streaming_llm h2o tova snapkv knorm keydiff lagkv expected_attention r_kv critical_kv pyramid
    adaptive scissorhands quest duo_attention kvzip kv_slimmer kv_slimmer_released asym_kv mean_merge weighted_kv
    kv_merger cam d2o keepkv look_m zsmerge oracle_mass oracle_greedy least_squares_merge""".split()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The 9 x 4 x 2 x 2 sweep, drawn once: (folder, paths)."""
    out = sweep_rows.write_folder(tmp_path_factory.mktemp("sweep"), sweep_rows.grid())
    return out, figures.draw(out)


@pytest.fixture(autouse=True)
def closed_figures():
    """Leaves no figure open for the next test."""
    yield
    plt.close("all")


def by_run(out) -> dict[str, dict]:
    """Raw rows of a folder by run."""
    return {row["run"]: row for row in map(json.loads, (out / "runs.jsonl").read_text().splitlines())}


def read_csv(path) -> pd.DataFrame:
    """A CSV with every number parsed exactly (pandas' own parser may be off in the last bit)."""

    def value(text: str):
        try:
            return {"True": True, "False": False, "": None}.get(text) if text in ("True", "False", "") else float(text)
        except ValueError:
            return text

    with open(path, newline="") as file:
        lines = [{k: v if k == "run" else value(v) for k, v in line.items()} for line in csv.DictReader(file)]
    return pd.DataFrame(lines)


def test_files(sweep):
    out, paths = sweep
    assert not plt.get_fignums()
    stems = ["pareto"] + [
        f"{kind}-smollm2-135m-{text}-{mode}"
        for text, mode, kind in itertools.product(
            ("wikitext2", "retrieval"), ("prompt", "always"), ("heatmap", "tails")
        )
    ]
    assert {p.name for p in paths} == {f"{stem}.{kind}" for stem in stems for kind in ("pdf", "png", "csv")}
    for path in paths:
        assert path.parent == out / "figures" and path.stat().st_size > 500
        if path.suffix == ".png":
            assert plt.imread(path).shape[1] == 1650  # 5.5 inches of NeurIPS at 300 dpi
        if path.suffix == ".pdf":
            assert b"/Type3" not in path.read_bytes() and b"/FontFile2" in path.read_bytes()  # fonttype 42


def test_pareto_numbers_are_the_rows(sweep):
    rows, table = by_run(sweep[0]), read_csv(sweep[0] / "figures/pareto.csv")
    assert set(table["run"]) == set(rows) and len(table) == len(rows)
    for line in table.to_dict("records"):
        row = rows[line["run"]]
        for name in (TRACE, MODE, POLICY, NMSE, HELD, "bytes.full_mean", "budget_slots", "noise_floor.nmse", "leaks"):
            assert line[name] == row[name], name


def test_tails_and_heat_numbers_are_the_rows(sweep):
    rows = by_run(sweep[0])
    seen = set()
    for trace, mode in itertools.product(sweep_rows.TRACES, sweep_rows.MODES):
        name = f"{trace.split('/')[-1][:-3]}-{mode}"
        tails = read_csv(sweep[0] / f"figures/tails-{name}.csv")
        assert sorted(tails[POLICY]) == sorted(sweep_rows.ERROR)
        for line in tails.to_dict("records"):
            row = rows[line["run"]]
            assert (row[TRACE], row[MODE], row["budget"]) == (trace, mode, "12.5%")
            for column in ("rel_l2.p50", "rel_l2.p95", "rel_l2.p99", NMSE, HELD):
                assert line[column] == row[column]
            seen.add(line["run"])
        heat = read_csv(sweep[0] / f"figures/heatmap-{name}.csv")
        assert (set(heat[TRACE]), set(heat[MODE]), set(heat["budget"])) == ({trace}, {mode}, {"12.5%"})
        for policy, part in heat.groupby(POLICY):
            row = next(
                r
                for r in rows.values()
                if (r[TRACE], r[MODE], r[POLICY], r["budget"]) == (trace, mode, policy, "12.5%")
            )
            error2, output2 = np.array(row["sums.error2"]), np.array(row["sums.output2"])
            np.testing.assert_array_equal(part["sums.error2"].to_numpy().reshape(4, 9), error2)
            np.testing.assert_array_equal(part["relative"].to_numpy().reshape(4, 9), np.sqrt(error2 / output2))
            assert list(part["layer"].unique()) == [0, 9, 19, 29] and list(part["query_head"][:9]) == list(range(9))
    assert len(seen) == 4 * len(sweep_rows.ERROR)


def test_panels_never_mix(tmp_path, monkeypatch):
    """Looks into the drawn axes: every point of a panel is a row of its trace and mode, and all of them are there."""
    rows = sweep_rows.grid()
    out = sweep_rows.write_folder(tmp_path, rows)
    kept = []
    monkeypatch.setattr(canvas, "save", lambda fig, numbers, stem: kept.append(fig) or [])
    with plt.rc_context(style.venue_params("icml2024")):
        pareto.draw(results.add_variants(results.load(out)), results.load_manifest(out), out / "pareto")
    grid = [ax for ax in kept[0].axes if ax.get_ylabel() or ax.get_xlabel() == "mean bytes held" or ax.lines]
    expected = [(trace, mode) for mode in ("prompt", "always") for trace in sweep_rows.TRACES]
    for ax, (trace, mode) in zip(grid[:4], expected, strict=True):
        drawn = sorted(y for line in ax.lines if line.get_marker() not in ("None", "none") for y in line.get_ydata())
        own = [r for r in rows if (r[TRACE], r[MODE]) == (trace, mode) and r[POLICY] != "full"]
        np.testing.assert_allclose(drawn, sorted(r[NMSE] for r in own), rtol=1e-12)
    plt.close(kept[0])


def test_panels_give_full_to_every_mode():
    rows = pd.DataFrame(sweep_rows.grid())
    for trace, mode, panel in results.panels(rows):
        assert set(panel[TRACE]) == {trace}
        assert set(panel[panel[POLICY] != "full"][MODE]) == {mode}
        assert (panel[POLICY] == "full").sum() == 1
    only_full = rows[rows[POLICY] == "full"]
    assert [(trace, mode) for trace, mode, _ in results.panels(only_full)] == [(t, "always") for t in sweep_rows.TRACES]


def test_variants_are_separate_lines(tmp_path):
    trace = next(iter(sweep_rows.TRACES))
    rows = [
        sweep_rows.row("snapkv", trace, "prompt", budget, **{"policy.window": window, "policy.kernel": kernel})
        for budget in ("25%", "50%")
        for window, kernel in ((16, 7), (32, 7), (32, 5))
    ] + [
        sweep_rows.row("h2o", trace, "prompt", "25%"),
        sweep_rows.row("tova", trace, "always", "25%", **{"replay.block": 1}),
    ]
    rows += [sweep_rows.row("tova", trace, "prompt", "25%")]  # another mode: its block is no reason for a name
    frame = results.add_variants(results.load(sweep_rows.write_folder(tmp_path, rows)))
    lines = {key: same for key, same in canvas.lines(frame)}
    names = {variant for policy, variant in lines if policy == "snapkv"}
    assert names == {"kernel 7, window 16", "kernel 7, window 32", "kernel 5, window 32"} or names == {
        "window 16, kernel 7", "window 32, kernel 7", "window 32, kernel 5"}  # fmt: skip
    assert ("h2o", "") in lines and ("tova", "") in lines and len(lines) == 5
    looks = [canvas.look_of(same) for (policy, _), same in lines.items() if policy == "snapkv"]
    assert len({(look.color, look.dash) for look in looks}) == 3 and {look.marker for look in looks} == {"D"}
    assert figures.draw(tmp_path)


def test_hard_cases_draw(tmp_path, capsys):
    """Leaks, unknown policies, seeds, exact points, undefined values, missing sums, two traces of one name."""
    rows = []
    for folder, budget in itertools.product(("a", "b"), ("25%", 512, "1MiB")):
        trace = f"{folder}/t.h5"
        for policy in ("oracle_mass", "my_new_policy", "random"):
            rows.append(sweep_rows.row(policy, trace, "prompt", budget))
        rows.append(sweep_rows.row("random", trace, "prompt", budget, seed=1, nmse=0.9))
        rows.append(sweep_rows.row("h2o", trace, "prompt", budget, nmse=0.0))
        rows.append(sweep_rows.row("tova", trace, "prompt", budget, **{"nmse": None, "rel_l2.p99": None}))
        missing = sweep_rows.row("knorm", trace, "prompt", budget)
        rows.append({k: v for k, v in missing.items() if not k.startswith(("sums.", "noise_floor."))})
    assert figures.main([str(sweep_rows.write_folder(tmp_path, rows)), "--venue", "icml2024"]) == 0
    text = capsys.readouterr().out
    assert "leaks" in text and "6 points without any error" in text and "tails-t-2-prompt.pdf" in text
    heat = read_csv(tmp_path / "figures/heatmap-t-1-prompt.csv")
    assert "knorm" not in set(heat[POLICY]) and "my_new_policy" in set(heat[POLICY])


def test_only_a_full_cache_draws(tmp_path):
    out = sweep_rows.write_folder(tmp_path, [sweep_rows.row("full", "t.h5", "always", "100%")])
    assert [p.name for p in figures.draw(out)] == ["pareto.pdf", "pareto.png", "pareto.csv"]


def test_many_traces_are_spread_over_figures(tmp_path):
    rows = [sweep_rows.row("h2o", f"{i}.h5", "prompt", "25%") for i in range(7)]
    frame = results.add_variants(results.load(sweep_rows.write_folder(tmp_path, rows)))
    assert [(name, len(some)) for name, some in pareto.pages(frame)] == [
        ("pareto-1", 3),
        ("pareto-2", 3),
        ("pareto-3", 1),
    ]


def test_same_rows_same_bytes(tmp_path):
    rows = [sweep_rows.row(policy, "t.h5", "prompt", "25%") for policy in ("h2o", "tova")]
    drawn = [figures.draw(sweep_rows.write_folder(tmp_path / name, rows)) for name in "ab"]
    for first, second in zip(*drawn, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_footer():
    note = canvas.note(results.Manifest({"git": {"sha": "0123456789abcdef", "dirty": True}}), ["x.h5"])
    assert note == "open-loop replay, teacher-forced; 0123456789+dirty; x.h5; budget = mean held bytes"


def test_torn_last_line_and_repeated_runs(tmp_path):
    rows = [sweep_rows.row(policy, "t.h5", "prompt", "25%") for policy in ("h2o", "tova", "snapkv")]
    out = sweep_rows.write_folder(tmp_path, [rows[0] | {"status": "error", "nmse": None}, *rows])
    with open(out / "runs.jsonl", "a") as file:
        file.write(json.dumps(sweep_rows.row("knorm", "t.h5", "prompt", "25%"))[:100])
    assert list(results.load(out)[POLICY]) == ["h2o", "tova", "snapkv"]  # the retried run counts once
    with open(out / "runs.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ResultsError, match="runs.jsonl:5"):  # torn, but not at the end
        results.load(out)
    whole = sweep_rows.write_folder(tmp_path / "whole", rows)
    text = (whole / "runs.jsonl").read_text()
    (whole / "runs.jsonl").write_text(text[:-1])  # whole, only its newline is missing
    assert len(results.load(whole)) == 3


def test_status(tmp_path, capsys):
    rows = [
        sweep_rows.row("h2o", "t.h5", "prompt", "25%"),
        {"run": "x", "status": "error", "error": "no", "policy": "cam"},
    ]
    out = sweep_rows.write_folder(tmp_path, rows)
    assert len(results.load(out)) == 1 and len(results.load(out, None)) == 2
    assert results.main([str(out)]) == 0
    printed = capsys.readouterr()
    assert "H2O" in printed.out and "cam" not in printed.out and printed.err == "not shown: 1 with status error\n"


@pytest.mark.parametrize("content", [None, "", json.dumps({"run": "x", "status": "error"}) + "\n", '{"torn'])
@pytest.mark.parametrize("module", [figures, results])
def test_nothing_to_show(tmp_path, capsys, module, content):
    if content is not None:
        (tmp_path / "runs.jsonl").write_text(content)
    assert module.main([str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "runs.jsonl" in printed.err
    assert not (tmp_path / "figures").exists()


def test_csv_has_every_row(sweep, tmp_path, capsys):
    assert results.main([str(sweep[0]), "--csv"]) == 0
    (tmp_path / "rows.csv").write_text(capsys.readouterr().out)
    table, rows = read_csv(tmp_path / "rows.csv"), by_run(sweep[0])
    assert len(table) == len(rows)
    for line in table.to_dict("records"):
        assert line[NMSE] == rows[line["run"]][NMSE]
        assert json.loads(line["sums.error2"]) == rows[line["run"]]["sums.error2"]


def test_csv_into_a_file(sweep, tmp_path, capsys):
    assert results.main([str(sweep[0]), "--csv"]) == 0
    printed = capsys.readouterr().out
    assert results.main([str(sweep[0]), "--csv", str(tmp_path / "runs.csv")]) == 0
    assert (tmp_path / "runs.csv").read_text() == printed
    assert capsys.readouterr().out == f"{tmp_path / 'runs.csv'}\n"
    assert results.main([str(sweep[0]), "--csv", str(tmp_path / "no" / "runs.csv")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_shares_are_of_the_full_cache_over_the_same_steps(sweep):
    """The full cache holds all tokens only at the end: 100 % is what it held on average, in table and figure."""
    rows = results.load(sweep[0])
    lines = results.table(rows, results.load_manifest(sweep[0])).split("\n")
    full = [line.split() for line in lines if line.startswith("Full cache")]
    assert len(full) == 4 and all(cells[2] == "-" and "100.0%" in cells for cells in full)
    half = next(line for line in lines if line.startswith("H2O") and " 50% " in line)
    assert f"{100 * (384 + 128) / 896.5:.1f}%" in half
    assert canvas.full_bytes(rows) == 896.5 * sweep_rows.SLOT_BYTES
    with plt.rc_context(style.venue_params("icml2024")):
        ax, (_, _, panel) = plt.figure().subplots(), next(results.panels(results.add_variants(rows)))
        pareto._panel(ax, panel, results.Manifest(), 0)
        assert any(set(line.get_xdata()) == {896.5 * sweep_rows.SLOT_BYTES} for line in ax.lines)


def test_table(sweep):
    text = results.table(results.load(sweep[0]), results.load_manifest(sweep[0]))
    *blocks, last = text.split("\n\n")
    assert last.startswith("prompt, step, memory: ") and "\n" not in last  # nothing leaks
    assert len(blocks) == 4 and blocks[0].startswith("tests/data/smollm2-135m-wikitext2.h5, compress prompt")
    for block in blocks:
        lines = block.split("\n")
        assert len(lines) == 2 + 1 + 4 * len(sweep_rows.ERROR) and max(map(len, lines)) < 100


def test_budgets_sort_and_the_middle_is_taken():
    mixed = ["64MiB", "512", "12.5%", "1.0", "100%", "6.25%", "32MiB", 64, "0.25"]
    order = sorted(mixed, key=results.budget_key)
    assert order == ["6.25%", "12.5%", "0.25", "1.0", "100%", 64, "512", "32MiB", "64MiB"]
    rows = pd.DataFrame([sweep_rows.row(p, "t", "prompt", b) for p in ("h2o", "tova") for b in ("50%", "6.25%", "25%")])
    rows = pd.concat([rows, pd.DataFrame([sweep_rows.row("h2o", "t", "prompt", "12.5%")])]).assign(variant="")
    assert set(results.common_budget(rows)["budget"]) == {"25%"}


@pytest.mark.parametrize("count, text", [
    (0, "0 B"), (65536, "64 KiB"), (1000 * 1024, "1000 KiB"), (1.5 * 2**20, "1.5 MiB"), (2**40, "1 TiB"),
    (2.0**52, "4096 TiB"), (float("nan"), "-"),
])  # fmt: skip
def test_format_bytes(count, text):
    assert results.format_bytes(count) == text


def test_every_catalogue_policy_has_its_own_style():
    assert set(CATALOGUE) == set(style.POLICIES)
    assert len({(look.color, look.marker) for look in style.POLICIES.values()}) == len(CATALOGUE)
    demo = ["random", "streaming_llm", "h2o", "tova", "snapkv", "knorm", "keydiff", "weighted_kv", "full"]
    for one, other in itertools.combinations(demo, 2):  # apart in colour, not only in marker
        distance = np.abs(np.subtract(to_rgb(style.POLICIES[one].color), to_rgb(style.POLICIES[other].color))).sum()
        assert distance > 0.25, (one, other)


def test_unknown_policies_get_a_stable_style():
    look = style.policy_style("my_new_policy")
    assert look == style.policy_style("my_new_policy") == style.Style("#EE3377", "p", style.SOLID)
    assert look.color not in {known.color for known in style.POLICIES.values()}
    assert len({style.policy_style(f"policy_{i}") for i in range(40)}) > 25


@pytest.mark.parametrize("venue", style.venues())
def test_venues(venue):
    params = style.venue_params(venue)
    assert params["pdf.fonttype"] == 42 and not params["text.usetex"] and 4 < params["figure.figsize"][0] < 8
    with plt.rc_context(params):
        pass
