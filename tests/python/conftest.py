"""Options and fixtures of the Python tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from program import QUICK, Program

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests" / "golden"))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported: the oracle's processes share the cores


def pytest_addoption(parser: pytest.Parser) -> None:
    """--full compares engine and oracle on the whole product of settings, --kvreplay names another binary."""
    parser.addoption("--full", action="store_true", help="engine against oracle: every combination of settings")
    parser.addoption("--kvreplay", default=str(REPO / "build" / "kvreplay"), help="the program to test")


@pytest.fixture(scope="session")
def kvreplay_binary(request: pytest.FixtureRequest) -> Path:
    """The built program; a missing one is a failure, never a skip."""
    path = Path(request.config.getoption("--kvreplay"))
    if not path.is_file():
        pytest.fail(f"{path} does not exist: build it first (cmake --build build), or name it with --kvreplay")
    return path


@pytest.fixture(scope="session")
def why_no_gpu(kvreplay_binary: Path) -> str:
    """Why the program finds no device that works, in its own words; "" when it finds one."""
    command = [str(kvreplay_binary), "run", "configs/smoke.yaml", "backend=cuda", "--dry-run", "--out", "/nowhere"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 4), done.stderr
    return "" if done.returncode == 0 else done.stderr.strip()


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def backend(request: pytest.FixtureRequest, why_no_gpu: str) -> str:
    """Each engine that can run here; `pytest -k cuda` takes one alone."""
    if request.param == "cuda" and why_no_gpu:
        pytest.skip(why_no_gpu)
    return request.param


@pytest.fixture
def program(kvreplay_binary: Path, tmp_path: Path) -> Program:
    """The program with a small sweep and an output folder of its own."""
    return Program(kvreplay_binary, tmp_path).write(QUICK)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of the sample traces."""
    return REPO / "tests" / "data"
