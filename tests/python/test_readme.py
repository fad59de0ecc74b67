"""Every command of README.md, verbatim, in a folder that looks like the repository but takes the output. Blocks marked
`bash` and `py` are about recording and weights: they need packages that kvreplay itself does not, and
tests/python/test_capture*.py and test_spectra.py run them."""
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from program import REPO

SKIPPED = re.compile(r"make |cmake |.*\bpip install\b")  # they build; whoever runs this test has done so
# README lets the reader write the policy recent_heavy first; this kvreplay is built without it and must say so.
UNKNOWN_POLICY = "recent_heavy"


def blocks(language: str) -> list[str]:
    """The fenced blocks of README.md in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (REPO / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkout(kvreplay_binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the repository's parts as links, and the program under test as build/kvreplay."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "tests", "policies", ".venv"):
        (folder / name).symlink_to(REPO / name)
    (folder / "build").mkdir()
    (folder / "build" / "kvreplay").symlink_to(kvreplay_binary.resolve())
    return folder


def test_every_command_runs(checkout: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line and not SKIPPED.match(line)]
    assert len(commands) >= 8, "README.md has lost its commands, or this test its eyes"
    assert any(UNKNOWN_POLICY in command for command in commands)
    for command in commands:
        done = subprocess.run(["bash", "-c", command], cwd=checkout, capture_output=True, text=True, timeout=600,
                              check=False)
        if UNKNOWN_POLICY in command:
            assert done.returncode == 2 and f"'{UNKNOWN_POLICY}'" in done.stderr, f"{command}: {done.stderr}"
        else:
            assert done.returncode == 0, f"{command}: exit {done.returncode}: {done.stderr}"
    assert (checkout / "out" / "demo" / "runs.csv").stat().st_size > 1000


def test_the_python_example_runs(checkout: Path) -> None:
    for block in blocks("python"):
        done = subprocess.run([".venv/bin/python", "-c", block], cwd=checkout, capture_output=True, text=True,
                              timeout=60, check=False)
        assert done.returncode == 0 and done.stdout, f"{block}{done.stderr}"
