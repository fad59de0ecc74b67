"""configs/kvslimmer, weightedkv and kvmerger: what they plan, and that `make NAME` has all it needs, on a short run."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from kvreplay import compare, figures
from program import REPO, WIKI, Program

POINTS = {"kvslimmer": 154, "weightedkv": 98, "kvmerger": 62}
# One trace and a quarter or half of its points: seconds instead of a minute.
SHORT = {
    "kvslimmer": ["budget=[12.5%, 50%]", "timing.repeats=1"],
    "weightedkv": ["budget=[12.5%, 25%]", "timing.repeats=0"],
    "kvmerger": ["--only", "replay.compress=always", "timing.repeats=0"],
}


def compared(name: str) -> list[str]:
    """What `make NAME` compares."""
    line = re.search(rf"^{name}: compared = (.*)$", (REPO / "Makefile").read_text(), re.MULTILINE)
    return shlex.split(line[1])


@pytest.mark.parametrize("name", POINTS)
def test_plans(kvreplay_binary: Path, tmp_path: Path, name: str) -> None:
    command = [str(kvreplay_binary), "run", f"configs/{name}.yaml", "--dry-run", "--out", str(tmp_path)]
    planned = Program.call(command).stdout
    assert f"{POINTS[name]} to run" in planned
    assert "wikitext2" in planned and "retrieval" in planned
    first = (REPO / "configs" / f"{name}.yaml").read_text().split("\ntrace:")[0].splitlines()
    assert all(line.startswith("#") for line in first) and "?" in first[0], "asks first"


@pytest.mark.parametrize("name", POINTS)
def test_a_short_run_is_compared(kvreplay_binary: Path, tmp_path: Path, capsys, name: str) -> None:
    command = [str(kvreplay_binary), "run", f"configs/{name}.yaml", f"trace={WIKI}", "replay.measure=last:8"]
    Program.call([*command, *SHORT[name], "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert {row["status"] for row in rows} == {"ok"} and all(row["acted"] for row in rows if row["policy"] != "full")
    assert not any(row["leaks"] for row in rows)
    assert compare.main([str(tmp_path), *compared(name)]) == 0
    said = [line for line in capsys.readouterr().out.split("\n") if " has the lower nmse than " in line]
    assert said and all(line.startswith("smollm2-135m-wikitext2, compress ") for line in said)
    check = {"kvslimmer": check_kvslimmer, "weightedkv": check_weightedkv, "kvmerger": check_kvmerger}[name]
    check(rows)


def check_kvslimmer(rows: list[dict]) -> None:
    """Only overlapping picks lose tokens; every rule was run; times and memory are there."""
    assert {row["replay.compress"] for row in rows if row["policy"] != "full"} == {"prompt"}
    for row in rows:
        merges = row["policy"] not in ("full", "h2o", "streaming_llm") and row["policy.merge"]
        assert (row["count.lost_in_folds"] > 0) == bool(merges and row["policy.picks"] == "faithful")
        assert row["us.prompt.observe"] is not None and row["memory.workspace_bytes"] > 0
    assert len({(r["policy.rule"], r["policy.picks"]) for r in rows if r["policy"] == "kv_slimmer"}) == 7


def check_weightedkv(rows: list[dict]) -> None:
    """Every policy steps token by token, with both kinds of positions."""
    count = Counter((row["policy"], row["replay.positions"]) for row in rows if row["policy"] != "full")
    assert set(count.values()) == {2, 4} and len(count) == 10
    assert {(row["replay.block"], row["replay.compress"]) for row in rows} == {(1, "always")}


def check_kvmerger(rows: list[dict]) -> None:
    """Shares go with the budget."""
    shares = {(r["budget"], r["policy.recent"], r["policy.heavy"]) for r in rows if r["policy"] == "kv_merger"}
    assert shares == {("50%", 0.34, 0.24), ("35%", 0.23, 0.06)}
    assert {row["replay.compress"] for row in rows if row["policy"] == "cam"} == {"always"}


def test_some_points_are_drawn(kvreplay_binary: Path, tmp_path: Path) -> None:
    """The released picking alone: at a small budget most of the prompt is lost, and the figures say so."""
    command = [str(kvreplay_binary), "run", "configs/kvslimmer.yaml", "--out", str(tmp_path), "timing.repeats=1"]
    only = ("policy=kv_slimmer_released", "budget=12.5%", f"trace={WIKI}")
    Program.call([*command, *(word for key in only for word in ("--only", key))])
    (row,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert row["policy"] == "kv_slimmer_released" and row["count.lost_in_folds"] > 768 * 12 / 2
    drawn = {path.name.split("-")[0] for path in figures.draw(tmp_path) if path.suffix == ".pdf"}
    assert drawn == {"pareto.pdf", "heatmap", "tails", "cost", "losses.pdf"}
