"""Rules of the house that a command can see: arrows between folders, sizes, and nothing hidden."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
CODE = ("core", "policies", "kernels", "experiments", "analysis", "tests")
ALLOWED_INCLUDES = {
    "core": {"core"},
    "policies": {"core", "policies"},
    "kernels": {"core", "policies", "kernels"},
    "experiments": {"core", "policies", "kernels", "experiments"},
}


def sources(*folders: str) -> list[Path]:
    """The files of these folders that git knows."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=REPO, capture_output=True, text=True, check=True).stdout
    files = [REPO / line for line in listed.splitlines() if re.search(r"\.(cpp|hpp|cu|cuh|py|in)$", line)]
    assert files, "this test needs a git checkout"
    return [path for path in files if path.exists()]


@pytest.mark.parametrize("folder", sorted(ALLOWED_INCLUDES))
def test_arrows_between_folders(folder: str) -> None:
    for path in sources(folder):
        for name in re.findall(r'#include "(\w+)/', path.read_text()):
            assert name in ALLOWED_INCLUDES[folder], f"{path}: {folder} must not include {name}"


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        (r"hdf5\.h>", r"core/hdf5"),
        (r"yaml-cpp/", r"experiments/config\.cpp"),
        (r"cuda_", r"kernels/"),
    ],
)
def test_libraries_have_one_door(header: str, allowed: str) -> None:
    for path in sources("core", "policies", "kernels", "experiments"):
        if re.search(rf"#include <{header}", path.read_text()):
            assert re.search(allowed, str(path)), f"{path} includes <{header}"


def test_sizes() -> None:
    for path in sources(*CODE):
        assert len(path.read_text().splitlines()) <= 400, f"{path}: more than one room"
    for path in sources("policies"):
        if path.suffix == ".cpp":
            assert len(path.read_text().splitlines()) < 100, f"{path}: a policy fits on a page"


@pytest.mark.parametrize(
    "hidden",
    [r"getenv\(", r"random_device", r"\btime\((NULL|nullptr|0)\)", r"[^a-z_]rand\(\)"],
    ids=["environment", "device chance", "clock seed", "rand"],
)
def test_nothing_is_configured_or_drawn_in_hiding(hidden: str) -> None:
    for path in sources("core", "policies", "kernels", "experiments"):
        assert not re.search(hidden, path.read_text()), f"{path}: {hidden}"


def test_cuda_words_stay_in_kernels() -> None:
    for path in sources("core", "policies", "experiments"):
        assert not re.search(r"__global__|cuda_runtime|cudaMalloc", path.read_text()), path
