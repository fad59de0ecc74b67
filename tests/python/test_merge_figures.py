"""What merging policies add to names, tables and figures: variants, marks, the policy's own cost, lost tokens."""

import matplotlib.pyplot as plt
import merge_rows
import numpy as np
import pandas as pd
import pytest
import sweep_rows
from kvreplay import canvas, figures, pareto, results
from kvreplay.results import LEAK_NOTE, POLICY
from matplotlib.colors import to_hex
from matplotlib.text import Text
from merge_rows import RETRIEVAL, WIKI, dropped, row


@pytest.fixture(autouse=True)
def closed_figures():
    """Leaves no figure open for the next test."""
    yield
    plt.close("all")


def variants(rows: list[dict], folder) -> dict[str, set[str]]:
    """The variants of every policy."""
    named = results.add_variants(results.load(merge_rows.write_folder(folder, rows)))
    return {policy: set(same["variant"]) for policy, same in named.groupby(POLICY)}


def words(fig) -> str:
    """Every text of a figure."""
    return "\n".join(text.get_text() for text in fig.findobj(Text)).replace("-\n", "-")


def drawn(out, monkeypatch) -> dict[str, plt.Figure]:
    """Every figure of a folder by name, as drawn."""
    kept = {}
    real = canvas.save

    def save(fig, numbers, stem):
        kept[stem.name] = fig
        return real(fig, numbers, stem)

    monkeypatch.setattr(canvas, "save", save)
    figures.draw(out)
    return kept


def test_controls_and_surrogates_are_always_named(tmp_path):
    rows = [row("mean_merge", WIKI, "prompt", "25%"), dropped("cam", WIKI, "prompt", "25%")]
    rows += [row("asym_kv", WIKI, "prompt", "25%", **{"policy.gradient": "surrogate"})]
    assert variants(rows, tmp_path) == {
        "mean_merge": {""}, "cam": {"dropped"}, "asym_kv": {"surrogate gradient"}}  # fmt: skip
    rows += [row("asym_kv", WIKI, "prompt", "25%", **{"policy.gradient": "recorded"})]
    rows += [dropped("asym_kv", WIKI, "prompt", "25%", **{"policy.gradient": "surrogate"})]
    assert variants(rows, tmp_path)["asym_kv"] == {
        "gradient recorded", "surrogate gradient", "surrogate gradient, dropped"}  # fmt: skip


def test_settings_that_change_with_the_budget_alone_stay_on_one_line(tmp_path):
    shares = {"25%": (0.2, 0.1), "50%": (0.3, 0.2)}
    rows = [
        make("kv_merger", WIKI, "prompt", budget, **{"policy.recent": recent, "policy.heavy": heavy})
        for budget, (recent, heavy) in shares.items()
        for make in (row, dropped)
    ]
    zipped = "recent and heavy by budget"
    assert variants(rows, tmp_path)["kv_merger"] == {zipped, f"{zipped}, dropped"}
    rows += [row("kv_merger", WIKI, "prompt", "25%", **{"policy.recent": 0.5, "policy.heavy": 0.1})]
    assert variants(rows, tmp_path)["kv_merger"] == {
        "recent 0.2, heavy by budget", "recent 0.3, heavy by budget", "recent 0.5, heavy by budget",
        "recent 0.2, heavy by budget, dropped", "recent 0.3, heavy by budget, dropped"}  # fmt: skip


def test_every_figure_and_table_marks_leaks_surrogates_and_controls(tmp_path, monkeypatch):
    rows = [row("oracle_mass", WIKI, "prompt", "25%"), dropped("mean_merge", WIKI, "prompt", "25%", leaks=True)]
    rows += [row("asym_kv", WIKI, "prompt", "25%", 9, leaks=True, **{"policy.gradient": "surrogate"})]
    out = merge_rows.write_folder(tmp_path, rows)
    names = ["oracle_mass †", "mean_merge (dropped) †", "asym_kv (surrogate gradient) †"]
    for name, fig in drawn(out, monkeypatch).items():
        text = " ".join(words(fig).split())
        assert LEAK_NOTE in text, name
        for label in names[2:] if name == "losses" else names:  # only one of them lost anything
            assert label in text, name
        table = pd.read_csv(out / "figures" / f"{name}.csv")
        assert table["leaks"].all() and ("losses" == name or {"dropped", "surrogate gradient"} <= set(table["variant"]))
    text = results.table(results.load(out), results.load_manifest(out))
    assert all(f"\n{name}  " in text for name in names) and text.endswith(f"\n{LEAK_NOTE}")


def test_nothing_is_marked_when_nothing_leaks(tmp_path, monkeypatch):
    out = merge_rows.write_folder(tmp_path, [row("h2o", WIKI, "prompt", "25%", 9)])
    assert not any("†" in words(fig) for fig in drawn(out, monkeypatch).values())
    assert "†" not in results.table(results.load(out), results.load_manifest(out))


def test_cost_shows_the_policys_own_time(tmp_path, monkeypatch):
    twice = {f"us.prompt.{phase}": 2000 * us for phase, us in merge_rows.PHASES.items()}
    rows = [row("h2o", WIKI, "prompt", "25%"), row("kv_slimmer", WIKI, "prompt", "25%", **twice)]
    out = merge_rows.write_folder(tmp_path, rows)
    fig = drawn(out, monkeypatch)["cost-smollm2-135m-wikitext2-prompt"]
    colors = ["#0072b2", "#009e73", "#cc79a7", "#e69f00", "#999999"]  # observe, score, select, compact, attention
    once = [merge_rows.PHASES[phase] for phase in ("observe", "score", "select", "compact", "attend")]
    for ax, factors in zip(fig.axes, ((2, 1), (1, 1)), strict=True):  # prompt in ms, step in us; the first is on top
        bars = sorted(ax.patches, key=lambda bar: (round(bar.get_y()), colors.index(to_hex(bar.get_facecolor()))))
        np.testing.assert_allclose([bar.get_width() for bar in bars], np.outer(factors, once).ravel())
        assert bars[3].get_x() == pytest.approx(factors[0] * sum(once[:3]))
    assert [text.get_text() for text in fig.axes[0].get_yticklabels()] == ["kv_slimmer", "H2O"]
    assert words(fig).count("1.5 MiB") == 2
    table = pd.read_csv(out / "figures/cost-smollm2-135m-wikitext2-prompt.csv").set_index(POLICY)
    assert table.loc["kv_slimmer", "us.prompt.observe"] == 18000 and table.loc["h2o", "us.compact.p50"] == 5
    lines = results.table(results.load(out), results.load_manifest(out)).split("\n")
    assert "  38 ms  19 us  1.5 MiB" in lines[3] and "  19 ms  19 us  1.5 MiB" in lines[2]


def test_cost_needs_times(tmp_path):
    rows = [row("h2o", WIKI, "prompt", "25%", **{"us.prompt.score": None})]
    assert not [path for path in figures.draw(merge_rows.write_folder(tmp_path, rows)) if "cost" in path.name]


def test_losses_are_shares_of_what_could_be_compressed(tmp_path, monkeypatch):
    prompt, all_tokens = (merge_rows.HEADS * tokens for tokens in (merge_rows.PROMPT, merge_rows.TOKENS))
    rows = [row("kv_slimmer_released", WIKI, "prompt", "25%", prompt // 4)]
    rows += [row("kv_slimmer_released", WIKI, "always", "25%", all_tokens // 4)]
    rows += [row("mean_merge", trace, "prompt", "25%") for trace in (WIKI, RETRIEVAL)]
    rows += [dropped("cam", WIKI, "prompt", "25%", lost=99)]
    out = merge_rows.write_folder(tmp_path, rows)
    fig = drawn(out, monkeypatch)["losses"]
    table = pd.read_csv(out / "figures/losses.csv").set_index(POLICY)
    assert list(table.loc["kv_slimmer_released", "lost_share"]) == [0.25, 0.25] and "cam" not in table.index
    assert set(table.loc["mean_merge", "lost_share"]) == {0}
    text = words(fig)
    assert "smollm2-135m-wikitext2" in text and "retrieval" not in text, "there nothing is lost"
    assert "1 other merging lines" in text and "compress: always" in text and "prompt tokens lost" in text
    assert "loses 25% of its tokens" in results.table(results.load(out), results.load_manifest(out))


def test_no_losses_no_figure(tmp_path):
    rows = [row("mean_merge", WIKI, "prompt", "25%"), sweep_rows.row("h2o", WIKI, "prompt", "25%")]
    assert not [path for path in figures.draw(merge_rows.write_folder(tmp_path, rows)) if "losses" in path.name]


def test_many_lines_are_spread_over_figures(tmp_path, monkeypatch):
    rows = [sweep_rows.row("full", WIKI, "always", "100%"), row("h2o", WIKI, "prompt", "25%")]
    for make in (row, dropped):
        rows += [make("kv_slimmer", WIKI, "prompt", "25%", **{"policy.clip": clip}) for clip in range(7)]
    out = merge_rows.write_folder(tmp_path, rows)
    pages = dict(pareto.pages(results.add_variants(results.load(out))))
    assert set(pages) == {"pareto", "pareto-kv_slimmer"}
    assert list(pages["pareto"]["variant"]) == ["", "", "clip 0", "clip 0, dropped"]
    assert set(pages["pareto-kv_slimmer"][POLICY]) == {"full", "kv_slimmer"} and len(pages["pareto-kv_slimmer"]) == 15
    fig = drawn(out, monkeypatch)["pareto-kv_slimmer"]
    lines = [line for line in fig.axes[0].lines if len(line.get_xdata()) == 1]
    looks = {(line.get_color(), line.get_marker()) for line in lines if line.get_marker() not in ("None", "none", "*")}
    assert len(looks) == 14
    few = [r for r in rows if r.get("policy.clip", 0) < 6]
    assert set(dict(pareto.pages(results.add_variants(pd.DataFrame(few))))) == {"pareto"}
