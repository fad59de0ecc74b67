"""The rows of an output folder: what replaces them, what failures leave, and that nothing finished is ever lost."""
from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from program import LONG, QUICK, REPO, RETRIEVAL, WIKI, Program, measured


def test_force_replaces_rows(program: Program) -> None:
    program.run()
    assert "1 ran" in program.run("--force", "--only", "policy=full").stdout
    assert len(program.rows()) == 5 and program.rows()[-1]["policy"] == "full"


def test_a_failing_point_is_a_row_and_the_sweep_goes_on(program: Program, tmp_path: Path) -> None:
    first, second = tmp_path / "a.h5", tmp_path / "b.h5"
    shutil.copy(REPO / WIKI, first)
    shutil.copy(REPO / RETRIEVAL, second)
    program.write(LONG.replace(WIKI, f"[{first}, {second}]").replace("0.3, 0.4, 0.5, 0.6, 0.7, 0.8", "0.3"))
    process = program.start()
    program.wait_for_rows(1, process)
    os.truncate(second, second.stat().st_size // 3)  # both traces were checked and are open by now
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3 and "9 of them failed" in out, out + err
    first = r"kvreplay: 9 points failed, the first is weighted_kv budget=25% managed=0\.1 b: .*b\.h5.*\n"
    assert re.fullmatch(first, err), err
    failed = [row for row in program.rows() if row["status"] == "error"]
    assert len(program.rows()) == 18 and len(failed) == 9 and all("b.h5" in row["error"] for row in failed)
    assert {row["error.code"] for row in failed} == {3}
    shutil.copy(REPO / RETRIEVAL, second)
    again = program.run(code=3)
    assert "0 ran, 9 already done, 9 failed before (--retry-failed runs them again)" in again.stdout
    assert again.stderr == err
    assert "9 ran, 9 already done" in program.run("--retry-failed").stdout
    assert len(program.rows()) == 18 and {row["status"] for row in program.rows()} == {"ok"}


def test_series_can_be_added_later(program: Program) -> None:
    program.run("--only", "policy=h2o")
    assert "2 ran" in program.run("series=true", "--only", "policy=h2o").stdout
    assert {path.stem for path in (program.out / "series").iterdir()} == {row["run"] for row in program.rows()}
    assert "2 already done" in program.run("--only", "policy=h2o").stdout, "a row may have more than is asked for"


def test_points_that_are_the_same_run_once(program: Program) -> None:
    program.write(QUICK.replace("policy: full", "{policy: full, budget: [10%, 20%]}"))
    assert "(1 duplicates left out)" in program.run("--dry-run").stdout
    assert "5 ran" in program.run().stdout


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("again", [["--force"], ["series=true"], ["timing.repeats=1"]], ids=lambda words: words[0])
def test_a_row_stays_until_its_successor_is_there(program: Program, again: list[str], how: signal.Signals) -> None:
    program.write(LONG.replace("budget: [25%, 50%, 70%]", "budget: 25%"))
    program.run()
    before = {row["run"]: measured(row) for row in program.rows()}
    process = program.start(*again)
    program.wait_for_rows(len(before) + 1, process)
    process.send_signal(how)
    process.communicate(timeout=60)
    rows = program.rows()
    assert {row["run"] for row in rows} == set(before) and {row["status"] for row in rows} == {"ok"}
    assert how == signal.SIGKILL or len(rows) == len(before), "replaced rows are gone at the end"
    assert "0 ran, 8 already done" in program.run().stdout, "each run's last row counts"
    assert len(program.rows()) == len(before)


def test_a_series_that_cannot_be_written_keeps_the_numbers(program: Program) -> None:
    program.write(QUICK + "    series: true\n")
    program.out.mkdir()
    (program.out / "series").write_text("in the way")
    done = program.run(code=2)
    assert done.stderr.startswith("kvreplay: 4 points failed, the first is h2o budget=25% ")
    assert ": --out: the series cannot be written: " in done.stderr
    full, *rows = program.rows()
    assert full["status"] == "ok"
    for row in rows:
        assert row["status"] == "error" and "series cannot be written" in row["error"] and row["error.code"] == 2
        assert 0 < row["nmse"] < 1 and row["bytes.cache_mean"] > 0 and row["count.evictions"] > 0
    (program.out / "series").unlink()
    assert "4 ran, 1 already done" in program.run("--retry-failed").stdout
    assert {row["status"] for row in program.rows()} == {"ok"} and len(list((program.out / "series").iterdir())) == 4


def test_a_reader_that_goes_away_does_not_stop_the_sweep(program: Program) -> None:
    process = program.start()
    assert process.stdout is not None
    assert process.stdout.readline().startswith("[1/5]")
    process.stdout.close()
    assert process.wait(60) == 0
    assert len(program.rows()) == 5


def test_a_full_disk_is_one_line_and_leaves_whole_rows(program: Program) -> None:
    def limit() -> None:  # every file of the process: the manifest and two or three rows fit
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, resource.RLIM_INFINITY))

    done = subprocess.run(program.command(), cwd=REPO, capture_output=True, text=True, timeout=60, check=False,
                          preexec_fn=limit)
    file = program.out / "runs.jsonl"
    assert done.returncode == 2 and done.stderr == f"kvreplay: --out: cannot write {file}: File too large\n"
    kept = file.read_text().count("\n")
    assert 1 <= kept < 5
    assert f"{5 - kept} ran, {kept} already done" in program.run().stdout
    assert len(program.rows()) == 5


def test_a_folder_in_place_of_the_rows(program: Program) -> None:
    (program.out / "runs.jsonl").mkdir(parents=True)
    for options in ([], ["--dry-run"]):
        done = program.run(*options, code=2)
        assert done.stderr.startswith(f"kvreplay: --out: {program.out / 'runs.jsonl'} is not a file")


def test_budgets_and_bytes_of_a_row(program: Program) -> None:
    program.write(f"trace: {WIKI}\ntiming.repeats: 0\nreplay.measure: last:8\nsweep:\n"
                  "  - {policy: full, budget: [25%, 50%]}\n  - {policy: h2o, budget: [25%, 9999999999]}\n")
    program.run()
    full, quarter, huge = program.rows()
    assert [(row["budget"], row["budget_slots"]) for row in (full, quarter, huge)] == [
        ("25%", 1024), ("25%", 192), ("9999999999", 1024)]
    assert full["bytes.full_mean"] == full["bytes.cache_mean"] == quarter["bytes.full_mean"]
    assert full["bytes.full_mean"] == full["bytes.full"] / 1024 * (1024 - 3.5), "of the last 8 steps"
    assert quarter["bytes.cache_mean"] < 0.3 * quarter["bytes.full_mean"]
