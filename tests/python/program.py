"""The program from outside, for tests: a config and an output folder of its own, and what its rows say."""
from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
WIKI, RETRIEVAL = "tests/data/smollm2-135m-wikitext2.h5", "tests/data/smollm2-135m-retrieval.h5"

# On the CPU, whatever the machine has: test_backend.py is about GPUs.
QUICK = f"""trace: {WIKI}
backend: cpu
timing.repeats: 0
replay.measure: last:8
sweep:
  - policy: full
  - policy: [h2o, streaming_llm]
    budget: [25%, 50%]
"""
# Some seconds of work in many points, for tests that interrupt it.
LONG = f"""trace: {WIKI}
backend: cpu
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
        lines = 0 if code in (0, 130) else 1
        assert done.stderr.count("\n") == lines, f"not {lines} lines: {done.stderr}"
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


def measured(row: dict) -> dict:
    """What a row must say again whenever the point is run again."""
    volatile = ("us.", "seconds", "memory.", "threads")
    return {key: value for key, value in row.items() if not key.startswith(volatile)}
