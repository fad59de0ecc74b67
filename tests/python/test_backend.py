"""`backend: auto | cpu | cuda`: what each becomes, and that a sweep says the same on both. Half of it needs a GPU."""
from __future__ import annotations

import json
import math
import re
import signal
import subprocess
from pathlib import Path

import pytest
from program import QUICK, REPO, WIKI, Program, measured

SMOKE = f"""trace: {WIKI}
timing.repeats: 0
replay.measure: last:32
policy: [full, random, streaming_llm, h2o, tova, snapkv, knorm, keydiff, weighted_kv]
budget: 25%
"""


@pytest.fixture
def with_gpu(why_no_gpu: str) -> None:
    if why_no_gpu:
        pytest.skip(why_no_gpu)


@pytest.fixture
def without_gpu(why_no_gpu: str) -> None:
    if not why_no_gpu:
        pytest.skip("there is a CUDA device")


@pytest.mark.usefixtures("without_gpu")
def test_cuda_without_a_device_is_one_line_with_place_and_reason(program: Program) -> None:
    in_file = program.write(QUICK.replace("backend: cpu", "backend: cuda")).run(code=4).stderr
    place, reason = rf"{re.escape(str(program.config))}:2", r"\S[^\n]+"
    assert re.fullmatch(rf"kvreplay: {place}: backend: no CUDA device: {reason}; use backend: cpu or auto\n", in_file)
    given = program.write(QUICK).run("backend=[cpu, cuda]", "--dry-run", code=4).stderr
    assert given.startswith("kvreplay: command line: backend: no CUDA device: "), given
    assert not program.out.exists()


@pytest.mark.usefixtures("without_gpu")
def test_auto_without_a_device_is_the_same_run_as_cpu(program: Program) -> None:
    program.run("backend=auto", "--device-memory", "1GiB")
    assert {(row["backend"], row["device"]) for row in program.rows()} == {("cpu", None)}
    assert "0 ran, 5 already done" in program.run("backend=cpu").stdout


@pytest.mark.usefixtures("without_gpu")
def test_bench_without_a_device_times_the_cpu_engine_and_says_why(kvreplay_binary: Path, tmp_path: Path) -> None:
    peers, out = tmp_path / "peers.json", tmp_path / "bench.json"
    peers.write_text('{"eager_cpu_h2o_us": 5000}')
    command = [str(kvreplay_binary), "bench", "--peers", str(peers), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    work = "h2o 1024 slots on the CPU, a token and layer"
    assert done.returncode == 4, done
    assert re.fullmatch(rf"{work}: [^\n]+\nkvreplay: bench: [^\n]*no GPU: [^\n]+\n", done.stderr), done.stderr
    header, line = done.stdout.splitlines()
    assert header.split()[0] == "work" and line.startswith(work)
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert result["device"] is None and row["work"] == work and row["cold_us"] is None
    assert row["us"] > 0 and row["noise"] >= 0 and row["floor_us"] == 5000 and row["must"] == 0.2
    assert math.isclose(row["ratio"], row["us"] / 5000)


@pytest.mark.usefixtures("without_gpu")
def test_bench_without_a_device_leaves_out_what_is_not_asked_for(kvreplay_binary: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [str(kvreplay_binary), "bench", "--only", "snapkv", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 4 and json.loads(out.read_text()) == {"device": None, "rows": []}, done


def test_the_eager_loop_runs_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(REPO / "tests" / "bench")
    import peers

    assert 0 < peers.eager_h2o_us("cpu", slots=32, steps=2) < 1e6


def close(mine: object, theirs: object) -> bool:
    """Whether two engines' numbers, or lists of them, agree; NaN never does."""
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(close, mine, theirs))
    if isinstance(mine, float) and isinstance(theirs, float):
        return math.isclose(mine, theirs, rel_tol=1e-3, abs_tol=2e-5)
    return mine == theirs


@pytest.mark.usefixtures("with_gpu")
def test_rows_of_both_backends_agree(program: Program) -> None:
    program.write(SMOKE).run("backend=[cpu, cuda]", "series=true")
    rows = program.rows()
    assert len(rows) == len({row["run"] for row in rows}) == 18 and {row["status"] for row in rows} == {"ok"}
    manifest = json.loads((program.out / "manifest.json").read_text())
    assert all(d["name"] and d["memory_bytes"] > 0 and d["multiprocessors"] > 0 for d in manifest["devices"])
    assert manifest["devices"] and manifest["build"]["cuda"]
    for cpu in (row for row in rows if row["backend"] == "cpu"):
        cuda = next(row for row in rows if row["backend"] == "cuda" and row["policy"] == cpu["policy"])
        assert cpu["device"] is None and cuda["device"] in {device["name"] for device in manifest["devices"]}
        assert list(cpu) == list(cuda), "the same keys in the same order"
        own = ("run", "backend", "device", "seconds", "threads", "us.", "memory.", "nmse.early_ratio")
        differing = [key for key in cpu if not key.startswith(own) and not close(cpu[key], cuda[key])]
        assert not differing, (cpu["policy"], [(key, cpu[key], cuda[key]) for key in differing])


@pytest.mark.usefixtures("with_gpu")
def test_auto_with_a_device_is_cuda_and_repeats_to_the_bit(program: Program) -> None:
    program.write(SMOKE).run()
    once = {row["run"]: measured(row) for row in program.rows()}
    assert {row["backend"] for row in once.values()} == {"cuda"}
    assert "0 ran, 9 already done" in program.run("backend=cuda").stdout
    program.run("--force", "--device-memory", "1GiB", "--jobs", "1")
    assert {row["run"]: measured(row) for row in program.rows()} == once
    assert "9 to run, 9 done" in program.run("backend=[cpu, cuda]", "--dry-run").stdout


@pytest.mark.usefixtures("with_gpu")
def test_errors_are_those_of_the_cpu(program: Program) -> None:
    program.write(f"trace: {WIKI}\npolicy: h2o\nbudget: 0\n")
    cpu, cuda = (program.run(f"backend={backend}", code=2).stderr for backend in ("cpu", "cuda"))
    assert cpu == cuda and "config.yaml:3: budget: expected a share" in cuda


@pytest.mark.usefixtures("with_gpu")
def test_too_little_memory_is_an_error_that_says_what_to_change(program: Program) -> None:
    done = program.write(QUICK.replace("backend: cpu", "backend: cuda")).run("--device-memory", "1MiB", code=4)
    assert "give more with --device-memory" in done.stderr
    assert {row["status"] for row in program.rows()} == {"error"}
    assert "5 ran" in program.run("--retry-failed").stdout


@pytest.mark.usefixtures("with_gpu")
def test_fast_is_a_run_of_its_own_that_keeps_the_same(program: Program) -> None:
    program.write(f"trace: {WIKI}\nbackend: cuda\ntiming.repeats: 0\nseries: true\nreplay.measure: all\n"
                  "policy: snapkv\nbudget: 25%\n").run("replay.precision=[exact, fast]")
    exact, fast = sorted(program.rows(), key=lambda row: row["replay.precision"])
    assert exact["run"] != fast["run"] and 0 < abs(exact["nmse"] - fast["nmse"]) < 4e-3
    assert exact["slots.decode_mean"] == fast["slots.decode_mean"]


@pytest.mark.usefixtures("with_gpu")
def test_dry_run_shows_the_backend_when_it_varies(program: Program) -> None:
    shown = program.run("backend=[cpu, cuda]", "--dry-run").stdout.splitlines()
    assert shown[0].split()[-1] == "backend" and {line.split()[-1] for line in shown[1:11]} == {"cpu", "cuda"}
    assert "backend" not in program.run("backend=cuda", "--dry-run").stdout


@pytest.mark.usefixtures("with_gpu")
def test_ctrl_c_keeps_what_ended_and_the_rest_is_run_later(program: Program) -> None:
    budgets = ", ".join(str(slots) for slots in range(20, 420))
    program.write(f"trace: {WIKI}\nbackend: cuda\ntiming.repeats: 0\npolicy: weighted_kv\nbudget: [{budgets}]\n")
    process = program.start()
    program.wait_for_rows(1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    done = len(program.rows())
    assert err == "" and process.returncode == 130 and f"{done} ran" in out
    assert {row["status"] for row in program.rows()} == {"ok"}
    assert f"{400 - done} ran, {done} already done" in program.run().stdout
    assert len({row["run"] for row in program.rows()}) == 400
