"""W_Q, W_K, W_V of a model by layer, from its weights alone: a .safetensors file or folder, a .gguf file, or an
installed package that carries one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvreplay.capture.errors import CaptureError
from kvreplay.capture.packaged import packaged_gguf
from kvreplay.spectra import weight_files
from kvreplay.spectra.weight_files import ModelError, Tensor

TITLES = {"w_q": "W_Q", "w_k": "W_K", "w_v": "W_V"}

# What a projection is called: group 1 the layer, group 2 q, k or v. Encoders of images and sound are not meant.
_SAFETENSORS = re.compile(r"(?!.*(?:vision|visual|audio)).*\blayers\.(\d+)\.self_attn\.([qkv])_proj\.weight")
_GGUF = re.compile(r"blk\.(\d+)\.attn_([qkv])\.weight")


@dataclass(frozen=True)
class Projections:
    """The projections of a model; weights are read when asked for."""

    title: str
    head_dim: int
    tensors: dict[tuple[int, str], Tensor]  # by layer and name of TITLES

    @property
    def layers(self) -> list[int]:
        """Layers with attention."""
        return sorted({layer for layer, _ in self.tensors})

    def heads(self, layer: int, name: str) -> int:
        """Query heads of w_q, KV heads of w_k and w_v."""
        return self.tensors[layer, "w_q" if name == "w_q" else "w_k"].shape[0] // self.head_dim

    def weight(self, layer: int, name: str) -> np.ndarray:
        """float32 [heads * d, hidden size]."""
        values = self.tensors[layer, name].read()
        if not np.isfinite(values).all():
            raise ModelError(f"{self.title}: {TITLES[name]} of layer {layer} holds values that are not finite")
        return values


def open_model(model: str) -> Projections:
    """The projections of MODEL. Raises ModelError when it is none of the known kinds or lacks projections."""
    path = Path(model).expanduser()
    try:
        packaged = None if path.exists() else packaged_gguf(model)
    except CaptureError as error:
        raise ModelError(str(error)) from error
    if path.is_dir():
        title, found = path.resolve().name, _from_safetensors(sorted(path.glob("*.safetensors")), path)
    elif path.suffix == ".safetensors" and path.is_file():
        title, found = path.name, _from_safetensors([path], path.parent)
    elif packaged or (path.suffix == ".gguf" and path.is_file()):
        path = packaged or path
        title, found = path.name, _from_gguf(path)
    else:
        raise ModelError(f"model: {model} is no .safetensors file or folder, no .gguf file and no package with one")
    return _checked(Projections(title, *found))


def _from_safetensors(files: list[Path], folder: Path) -> tuple[int, dict[tuple[int, str], Tensor]]:
    """(head size, projections) of the `files`; the head size is in config.json."""
    tensors: dict[tuple[int, str], Tensor] = {}
    for file in files:
        found = _named(_SAFETENSORS, weight_files.safetensors(file), file)
        if twice := tensors.keys() & found.keys():
            raise ModelError(f"{file}: another file has the projections of layer {min(twice)[0]} too")
        tensors |= found
    if not files:
        raise ModelError(f"{folder}: holds no .safetensors file")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except OSError as error:
        raise ModelError(f"{path}: is needed for the head size: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"{path}: does not tell the head size") from error
    return head_dim, tensors


def _from_gguf(path: Path) -> tuple[int, dict[tuple[int, str], Tensor]]:
    """(head size, projections) of a GGUF file."""
    tensors, scalars = weight_files.gguf(path)
    if scalars.get("split.count", 1) > 1:
        raise ModelError(f"{path}: is one of {scalars['split.count']} parts; join them (llama-gguf-split --merge)")
    prefix = scalars.get("general.architecture", "")
    try:
        length = scalars.get(f"{prefix}.attention.key_length")
        head_dim = length or scalars[f"{prefix}.embedding_length"] // scalars[f"{prefix}.attention.head_count"]
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ModelError(f"{path}: does not tell the head size") from error
    return head_dim, _named(_GGUF, tensors, path)


def _named(pattern: re.Pattern, tensors: dict[str, Tensor], path: Path) -> dict[tuple[int, str], Tensor]:
    """The projections among `tensors`, by layer and name of TITLES."""
    found: dict[tuple[int, str], Tensor] = {}
    for name, tensor in tensors.items():
        if match := pattern.fullmatch(name):
            key = (int(match[1]), f"w_{match[2]}")
            if key in found:
                raise ModelError(f"{path}: holds {TITLES[key[1]]} of layer {key[0]} twice")
            found[key] = tensor
    return found


def _checked(model: Projections) -> Projections:
    """`model`; raises ModelError unless every layer has three matrices of whole heads."""
    if not model.tensors:
        raise ModelError(f"{model.title}: has no separate W_Q, W_K and W_V (fused projections are not split)")
    if not isinstance(model.head_dim, int) or model.head_dim < 1:
        raise ModelError(f"{model.title}: a head size of {model.head_dim!r}")
    for layer in model.layers:
        for name, title in TITLES.items():
            if (layer, name) not in model.tensors:
                raise ModelError(f"{model.title}: layer {layer} has no {title}; name the folder of all parts")
            shape = model.tensors[layer, name].shape
            if len(shape) != 2 or 0 in shape or not model.heads(layer, name) or shape[0] % model.heads(layer, name):
                raise ModelError(f"{model.title}: {title} of layer {layer} is {list(shape)}: no whole heads")
    return model
