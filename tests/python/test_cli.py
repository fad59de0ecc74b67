"""The program from outside: exit codes, messages, output folders, resuming after every kind of end."""
from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
WIKI, RETRIEVAL = "tests/data/smollm2-135m-wikitext2.h5", "tests/data/smollm2-135m-retrieval.h5"

QUICK = f"""trace: {WIKI}
timing.repeats: 0
replay.measure: last:8
sweep:
  - policy: full
  - policy: [h2o, streaming_llm]
    budget: [25%, 50%]
"""
# Some seconds of work in many points, for tests that interrupt it.
LONG = f"""trace: {WIKI}
timing.repeats: 0
policy: {{name: weighted_kv, managed: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}}
budget: [25%, 50%, 70%]
"""


class Program:
    """kvreplay with a config and an output folder of its own."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self.binary, self.config, self.out = str(binary), folder / "config.yaml", folder / "out"

    def write(self, text: str) -> Program:
        self.config.write_text(text)
        return self

    def command(self, *options: str) -> list[str]:
        return [self.binary, "run", str(self.config), *options, "--out", str(self.out)]

    def run(self, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.call(self.command(*options), code)

    @staticmethod
    def call(command: list[str], code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == code, f"exit {done.returncode}: {done.stdout}{done.stderr}"
        assert code in (0, 130) or done.stderr.count("\n") <= 1, f"more than one line: {done.stderr}"
        return done

    def start(self, *options: str) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command(*options), cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True)

    def wait_for_rows(self, count: int, process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 60
        while len(self.lines()) < count:
            assert time.monotonic() < end and process.poll() is None, "the sweep ended before it was interrupted"
            time.sleep(0.005)

    def lines(self) -> list[str]:
        file = self.out / "runs.jsonl"
        return file.read_text().splitlines() if file.exists() else []

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.lines()]


@pytest.fixture
def program(kvreplay_binary: Path, tmp_path: Path) -> Program:
    return Program(kvreplay_binary, tmp_path).write(QUICK)


def measured(row: dict) -> dict:
    """What a row must say again whenever the point is run again."""
    volatile = ("us.", "seconds", "memory.", "threads")
    return {key: value for key, value in row.items() if not key.startswith(volatile)}


def test_a_sweep_leaves_rows_and_a_manifest(program: Program) -> None:
    done = program.run()
    assert done.stderr == ""
    assert re.match(r"\[1/5\] full budget=100% \S+ nmse=\S+ \S+ \wiB .* s eta ", done.stdout)
    rows = program.rows()
    assert [(r["policy"], r["budget"], r["status"]) for r in rows] == [
        ("full", "100%", "ok"), ("h2o", "25%", "ok"), ("h2o", "50%", "ok"),
        ("streaming_llm", "25%", "ok"), ("streaming_llm", "50%", "ok")]
    assert rows[0]["nmse"] < 1e-5 and not rows[0]["acted"]
    assert 1 > rows[1]["nmse"] > rows[2]["nmse"] > 0 and rows[1]["acted"]
    assert rows[1]["bytes.cache_mean"] < rows[2]["bytes.cache_mean"] < rows[0]["bytes.cache_mean"]
    assert rows[1]["policy.recent"] == 0.5
    assert rows[1]["replay.block"] == "all" and rows[1]["replay.compress"] == "always"
    assert rows[3]["replay.positions"] == "cache" and rows[3]["policy.sinks"] == 4
    assert rows[1]["us.attend.p50"] is None and rows[1]["layers"] == [0, 9, 19, 29] and rows[1]["budget_slots"] == 192
    assert all(not isinstance(value, dict) for row in rows for value in row.values()), "rows are flat"
    manifest = json.loads((program.out / "manifest.json").read_text())
    assert manifest["schema"] == "kvreplay/1" and manifest["config"]["text"] == QUICK
    assert set(manifest["policies"]) == {"full", "h2o", "streaming_llm"} and manifest["traces"][WIKI]["tokens"] == 1024
    assert manifest["metrics"]["nmse"]["better"] == "lower" and manifest["argv"][1] == "run"


def test_a_second_run_does_nothing(program: Program) -> None:
    program.run()
    before = (program.out / "runs.jsonl").read_bytes()
    done = program.run()
    assert done.stdout == f"0 ran, 5 already done; results in {program.out}\n"
    assert (program.out / "runs.jsonl").read_bytes() == before


def test_an_extended_config_runs_only_what_is_new(program: Program) -> None:
    program.run()
    before = program.lines()
    program.write(QUICK + "  - {policy: tova, budget: [25%, 50%]}\n")
    assert "2 ran, 5 already done" in program.run().stdout
    assert program.lines()[:5] == before and len(program.lines()) == 7


def test_results_do_not_depend_on_jobs_or_order(program: Program) -> None:
    program.run("--jobs", "1")
    one = {row["run"]: measured(row) for row in program.rows()}
    program.run("--jobs", "2", "--force")
    assert {row["run"]: measured(row) for row in program.rows()} == one


def test_force_replaces_rows(program: Program) -> None:
    program.run()
    assert "1 ran" in program.run("--force", "--only", "policy=full").stdout
    assert len(program.rows()) == 5 and program.rows()[-1]["policy"] == "full"


def test_only_filters(program: Program) -> None:
    program.run("--only", "policy=h2o", "--only", "policy=full", "--only", "budget=25%", "--only", "budget=100%")
    assert [(r["policy"], r["budget"]) for r in program.rows()] == [("full", "100%"), ("h2o", "25%")]
    assert "no point has policy=h2p; did you mean 'h2o'?" in program.run("--only", "policy=h2p", code=2).stderr
    assert "no point has a key 'polcy'; did you mean 'policy'?" in program.run("--only", "polcy=h2o", code=2).stderr
    assert "no point passes all" in program.run("--only", "policy=full", "--only", "budget=25%", code=2).stderr


def test_overrides(program: Program) -> None:
    program.run("budget=64", "policy=[tova, {name: h2o, recent: 0.25}]", "replay.compress=prompt")
    assert [(r["policy"], r["budget_slots"], r["replay.compress"], r.get("policy.recent")) for r in program.rows()] == [
        ("tova", 64, "prompt", None), ("h2o", 64, "prompt", 0.25)]


def test_dry_run_writes_nothing(program: Program) -> None:
    done = program.run("--dry-run")
    assert not program.out.exists() and "5 to run, 0 done" in done.stdout and "of memory" in done.stdout
    program.run("--only", "policy=h2o")
    stamp = (program.out / "manifest.json").stat().st_mtime_ns
    with (program.out / "runs.jsonl").open("a") as file:
        file.write('{"run": "torn')
    torn = (program.out / "runs.jsonl").read_bytes()
    assert "3 to run, 2 done" in program.run("--dry-run").stdout
    assert (program.out / "runs.jsonl").read_bytes() == torn
    assert (program.out / "manifest.json").stat().st_mtime_ns == stamp


def test_resume_after_a_torn_line(program: Program) -> None:
    program.run()
    lines = program.lines()
    (program.out / "runs.jsonl").write_text("\n".join([*lines[:3], lines[3][:200]]))
    assert "2 ran, 3 already done" in program.run().stdout
    assert [measured(row) for row in program.rows()] == [measured(json.loads(line)) for line in lines]


def test_resume_after_being_killed(program: Program) -> None:
    program.write(LONG)
    process = program.start()
    program.wait_for_rows(3, process)
    process.kill()
    process.wait(60)
    kept = len([line for line in (program.out / "runs.jsonl").read_text().split("\n")[:-1] if line])
    assert 3 <= kept < 24
    assert f"{24 - kept} ran, {kept} already done" in program.run().stdout
    assert len({row["run"] for row in program.rows()}) == len(program.rows()) == 24


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_running_point(program: Program, how: signal.Signals) -> None:
    program.write(LONG)
    process = program.start()
    program.wait_for_rows(2, process)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == ""
    rows = program.rows()
    assert 2 <= len(rows) < 24 and all(row["status"] == "ok" for row in rows)
    assert f"{24 - len(rows)} left after the interrupt" in out
    assert f"{24 - len(rows)} ran, {len(rows)} already done" in program.run().stdout


def test_a_second_ctrl_c_ends_at_once(program: Program) -> None:
    program.write(LONG.replace("budget: [25%, 50%, 70%]", "budget: 90%\nreplay.measure: all"))
    process = program.start()
    program.wait_for_rows(1, process)
    time.sleep(0.05)  # into the next point
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    program.run()
    assert len(program.rows()) == 8


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
    failed = [row for row in program.rows() if row["status"] == "error"]
    assert len(program.rows()) == 18 and len(failed) == 9 and all("b.h5" in row["error"] for row in failed)
    shutil.copy(REPO / RETRIEVAL, second)
    assert "0 ran, 9 already done, 9 failed before (--retry-failed runs them again)" in program.run().stdout
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


def test_invalid_points_stop_everything_or_become_rows(program: Program) -> None:
    program.write(QUICK.replace("budget: [25%, 50%]", "budget: [25%, 1KiB]"))
    done = program.run(code=2)
    assert re.search(r"config\.yaml:7: budget: 1KiB is less than one slot", done.stderr) and not program.out.exists()
    assert "3 ran, 2 skipped as invalid" in program.run("on_invalid=skip").stdout
    skipped = [row for row in program.rows() if row["status"] == "skipped"]
    assert len(skipped) == 2 and all("less than one slot" in row["error"] for row in skipped)
    assert "0 ran, 3 already done, 2 skipped as invalid" in program.run("on_invalid=skip").stdout
    assert len(program.rows()) == 5


@pytest.mark.parametrize(("text", "message"), [
    ("trace: nowhere.h5\npolicy: full\n", "config.yaml:1: trace: no such file: nowhere.h5"),
    (f"trace: {WIKI[:-4]}.h5\npolicy: full\n", "did you mean 'smollm2-135m-wikitext2.h5'?"),
    (f"trace: {WIKI}\npolicy: h20\nbudget: 1\n", "config.yaml:2: policy: no policy is called 'h20'; did you mean"),
    (f"trace: {WIKI}\npolicy: h2o\nbudgt: 1\n", "config.yaml:3: budgt: unknown key; did you mean 'budget'?"),
    (f"trace: {WIKI}\npolicy: h2o\nbudget: 1.5\n", "config.yaml:3: budget: expected a share"),
    (f"trace: {WIKI}\npolicy: full\nreplay.measure: last\n", "config.yaml:3: replay.measure: expected decode, prompt"),
    ("trace: [a\n", "config.yaml:"),
])
def test_config_errors(program: Program, text: str, message: str) -> None:
    done = program.write(text).run(code=2)
    assert message in done.stderr and not program.out.exists()


def test_other_exit_codes(program: Program, tmp_path: Path) -> None:
    bad = tmp_path / "bad.h5"
    bad.write_bytes((REPO / WIKI).read_bytes()[:100_000])
    assert "bad.h5" in program.write(f"trace: {bad}\npolicy: full\n").run(code=3).stderr
    assert "bad.h5" in program.call([program.binary, "inspect", str(bad)], 3).stderr
    cuda = program.write(QUICK).run("backend=cuda", code=4).stderr
    assert "backend: " in cuda and "cpu" in cuda and not program.out.exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "A subcommand is required"),
    (["polices"], "no command is called 'polices'; did you mean 'policies'?"),
    (["run"], "config is required"),
    (["run", "x.yaml", "--dryrun"], "did you mean '--dry-run'?"),
    (["run", "x.yaml", "--jobs", "0"], "--jobs"),
    (["run", "x.yaml", "budget"], "x.yaml"),
    (["policies", "h20"], "did you mean 'h2o'?"),
    (["docs", "nothing"], "nothing"),
])
def test_usage_errors(program: Program, arguments: list[str], message: str) -> None:
    assert message in program.call([program.binary, *arguments], 2).stderr


def test_a_locked_folder(program: Program) -> None:
    program.run("--only", "policy=full")
    with (program.out / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another kvreplay is writing to" in program.run(code=2).stderr
    program.run()


def test_another_programs_folder_is_left_alone(program: Program) -> None:
    program.out.mkdir()
    (program.out / "manifest.json").write_text('{"schema": "other"}')
    assert "is not a manifest of schema kvreplay/1" in program.run(code=2).stderr


def test_a_terminal_gets_a_bar_and_a_pipe_plain_lines(program: Program) -> None:
    assert "\r" not in program.run().stdout
    parent, child = pty.openpty()
    process = subprocess.Popen(program.command("--force"), cwd=REPO, stdout=child, stderr=child)
    os.close(child)
    seen = b""
    try:
        while chunk := os.read(parent, 4096):
            seen += chunk
    except OSError:  # the other side is closed
        pass
    os.close(parent)
    assert process.wait(60) == 0
    assert b"\r\x1b[K" in seen and re.search(rb"#+\.+ \d/5", seen) and b"[5/5]" in seen


def test_policies_and_inspect_tell_what_there_is(program: Program) -> None:
    listed = program.call([program.binary, "policies"]).stdout
    assert all(name in listed for name in ("full", "h2o", "snapkv", "weighted_kv"))
    one = program.call([program.binary, "policies", "snapkv"]).stdout
    assert re.search(r"window +32 +int in \[1, 4096\] +\S", one) and "compress prompt" in one and "arXiv" in one
    assert "| window | 32 |" in program.call([program.binary, "policies", "snapkv", "--markdown"]).stdout
    seen = program.call([program.binary, "inspect", WIKI]).stdout
    assert "1024: 768 of the prompt, 256 decoded" in seen and "bfloat16" in seen and "noise floor" in seen
    assert re.search(r"policies that run with default settings: .*h2o", seen)
    floors = [float(mean) for mean in re.findall(r"^ +\d+ +(\S+e-\d+) +\S+e-\d+$", seen, re.MULTILINE)]
    assert len(floors) == 4 and all(floor <= 2.5e-3 for floor in floors)


def test_the_page_of_config_keys_is_current(program: Program) -> None:
    page = program.call([program.binary, "docs", "configs"]).stdout
    assert (REPO / "configs" / "README.md").read_text() == page, "build/kvreplay docs configs > configs/README.md"


@pytest.mark.parametrize("page", ["policies", "metrics"])
def test_readme_tables_are_current(program: Program, page: str) -> None:
    table = program.call([program.binary, "docs", page]).stdout
    mark = f"<!-- generated by: build/kvreplay docs {page} -->\n"
    shown = (REPO / "README.md").read_text().partition(mark)[2].partition("<!-- end -->")[0]
    assert shown.strip() == table.strip(), f"paste the output of `build/kvreplay docs {page}` into README.md"


@pytest.mark.parametrize("config", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_plans(kvreplay_binary: Path, tmp_path: Path, config: Path) -> None:
    Program.call([str(kvreplay_binary), "run", str(config), "--dry-run", "--out", str(tmp_path / "out")])
