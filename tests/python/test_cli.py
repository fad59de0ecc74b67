"""The program from outside: exit codes, messages, output folders, resuming after every kind of end."""
from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from program import LONG, QUICK, REPO, WIKI, Program, measured


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
    assert manifest["devices"] == [] and all(row["backend"] == "cpu" and row["device"] is None for row in rows)
    assert manifest["device"]["kind"] == "cpu" and manifest["device"]["name"] and manifest["device"]["cores"] >= 1
    assert manifest["metrics"]["nmse"]["better"] == "lower" and manifest["argv"][1] == "run"


def test_a_second_run_does_nothing(program: Program) -> None:
    program.run()
    before = (program.out / "runs.jsonl").read_bytes()
    done = program.run()
    note = "open-loop replay: recorded inputs drive every layer"
    assert done.stdout == f"0 ran, 5 already done; {note}; results in {program.out}\n"
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


def test_only_filters(program: Program) -> None:
    program.run("--only", "policy=h2o", "--only", "policy=full", "--only", "budget=25%", "--only", "budget=100%")
    assert [(r["policy"], r["budget"]) for r in program.rows()] == [("full", "100%"), ("h2o", "25%")]
    program.run("--only", "policy.recent=0.50", "--only", "budget=50%")
    assert [r["budget"] for r in program.rows()][2:] == ["50%"], "0.50 is 0.5"
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


def test_invalid_points_stop_everything_or_become_rows(program: Program) -> None:
    program.write(QUICK.replace("budget: [25%, 50%]", "budget: [25%, 1KiB]"))
    done = program.run(code=2)
    assert re.search(r"config\.yaml:8: budget: 1KiB is less than one slot", done.stderr) and not program.out.exists()
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
    (f"trace: {WIKI}\npolicy: h2o\nbudget: 0\n", "config.yaml:3: budget: expected a share"),
    (f"trace: {WIKI}\npolicy: h2o\nbudget: 1.5\n", "config.yaml:3: budget: expected a share"),
    (f"trace: {WIKI}\npolicy: full\nreplay.measure: last\n", "config.yaml:3: replay.measure: expected decode, prompt"),
    (f"trace: {WIKI}\npolicy: full\nbackend: cpu\nreplay.precision: fast\n",
     "config.yaml:4: replay.precision: fast is for cuda, and this point runs on cpu; use exact"),
    ("trace: [a\n", "config.yaml:"),
    ("policy: full\n", "config.yaml: trace: missing"),
    ("sweep:\n  - policy: full\n  - policy: h2o\n", "config.yaml:2: trace: missing"),
    (f"trace: {WIKI}\n---\npolicy: full\n", "config.yaml: expected one YAML map, found 2 documents"),
])
def test_config_errors(program: Program, text: str, message: str) -> None:
    done = program.write(text).run(code=2)
    assert message in done.stderr and not program.out.exists()


def test_other_exit_codes(program: Program, tmp_path: Path) -> None:
    bad = tmp_path / "bad.h5"
    bad.write_bytes((REPO / WIKI).read_bytes()[:100_000])
    assert "bad.h5" in program.write(f"trace: {bad}\npolicy: full\n").run(code=3).stderr
    assert "bad.h5" in program.call([program.binary, "inspect", str(bad)], 3).stderr
    for path, what in ((str(tmp_path), "is a directory, not a file"), ("/dev/null", "is not a regular file")):
        assert program.write(f"trace: {path}\npolicy: full\n").run(code=3).stderr == f"kvreplay: {path}: {what}\n"
        assert program.call([program.binary, "inspect", path], 3).stderr == f"kvreplay: {path}: {what}\n"


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "A subcommand is required"),
    (["polices"], "no command is called 'polices'; did you mean 'policies'?"),
    (["run"], "config is required"),
    (["run", "x.yaml", "--dryrun"], "did you mean '--dry-run'?"),
    (["run", "x.yaml", "--jobs", "0"], "--jobs"),
    (["run", "configs/smoke.yaml", "--out", ""], "--out: expected a folder, got ''"),
    (["run", "x.yaml", "budget"], "x.yaml"),
    (["run", "x.yaml", "--device-memory", "50%"], "--device-memory: expected bytes such as 8GiB or 512MiB, got '50%'"),
    (["run", "x.yaml", "--device-memory", "8GB"], "--device-memory: expected bytes"),
    (["run", "x.yaml", "--device-memory", "0.0001KiB"], "--device-memory: expected bytes"),
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


def test_synth_writes_a_trace_that_replays(program: Program, tmp_path: Path) -> None:
    shape = ["--layers", "2", "--query-heads", "4", "--kv-heads", "2", "--head-dim", "32", "--tokens", "300", "--prompt", "200"]

    def content(name: str, *options: str) -> str:
        done = program.call([program.binary, "synth", str(tmp_path / name), *shape, "--dtype", "float16", *options])
        assert "layer 2 of 2" in done.stdout and "300 tokens, 4 query and 2 KV heads of 32, float16" in done.stdout
        return re.search(r"sha256 (\w+)", program.call([program.binary, "inspect", str(tmp_path / name)]).stdout)[1]

    assert content("a.h5", "--seed", "3") == content("b.h5", "--seed", "3") != content("c.h5", "--seed", "4")
    program.run(f"trace={tmp_path / 'a.h5'}")
    errors = {(row["policy"], row["budget"]): row["nmse"] for row in program.rows()}
    assert errors["full", "100%"] < 1e-5 < errors["h2o", "50%"] < errors["h2o", "25%"] < errors["streaming_llm", "25%"]
    wrong = program.call([program.binary, "synth", str(tmp_path / "d.h5"), "--query-heads", "3", "--kv-heads", "2"], 2)
    assert "3 is no multiple of the 2 KV heads" in wrong.stderr and not (tmp_path / "d.h5").exists()
