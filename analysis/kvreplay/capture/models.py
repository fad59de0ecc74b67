"""Loading a model by what a user has: a folder, a GGUF file, an installed package that carries one, a hub name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvreplay.capture.errors import CaptureError
from kvreplay.capture.packaged import packaged_gguf

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


@dataclass(frozen=True)
class Source:
    """What from_pretrained is told, and the name a trace gives the model."""

    name: str  # a folder or a hub name
    gguf: str | None = None  # a file in that folder
    title: str = ""

    def model_id(self, dtype: torch.dtype) -> str:
        """SmolLM2-135M-Instruct (Q4_1 GGUF, run in bfloat16) for SmolLM2-135M-Instruct.Q4_1.gguf."""
        if self.gguf is None:
            return self.title
        stem, _, kind = Path(self.gguf).stem.rpartition(".")
        return f"{stem or kind} ({f'{kind} ' if stem else ''}GGUF, run in {str(dtype).removeprefix('torch.')})"


def find(name: str) -> Source:
    """Resolves MODEL. Raises CaptureError when it is none of the known kinds."""
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(str(path), title=path.resolve().name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CaptureError(f"model: {name} is a file but no .gguf; name the folder of a model instead")
        return Source(str(path.parent), path.name)
    if (file := packaged_gguf(name)) is not None:
        return Source(str(file.parent), file.name)
    if name.count("/") == 1 and not path.is_absolute() and not name.startswith("."):
        return Source(name, title=name)
    raise CaptureError(f"model: {name} is no folder, no GGUF file, no installed package and no hub name (owner/model)")


def load_model(name: str, dtype: str = "auto", device: str = "cpu", attention: str | None = None):
    """(model in eval mode, tokenizer, model id for the trace) of MODEL `name`. `dtype` is float32, bfloat16, float16 or
    auto (the model's own); `attention` sdpa, eager or None (the model's default)."""
    source = find(name)
    options = {} if source.gguf is None else {"gguf_file": source.gguf}
    tokenizer = AutoTokenizer.from_pretrained(source.name, **options)
    if attention is not None:
        options["attn_implementation"] = attention
    if source.gguf is not None and hasattr(transformers, "GgufConfig"):
        # Newer versions would keep the weights packed and compute in float32, whatever the dtype.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source.name, dtype=DTYPES[dtype], **options)
    model = model.to(device).eval()
    return model, tokenizer, source.model_id(model.dtype)
