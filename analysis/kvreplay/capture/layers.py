"""The attention layers of a model: finding them, refusing what a trace cannot hold, their output projections."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvreplay.capture.errors import CaptureError

_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "proj")


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack of layers whose attention is meant: a language model inside, without heads and image towers."""
    getter = getattr(model, "get_decoder", None)
    return (getter() if getter is not None else None) or model


def text_config(model: nn.Module):
    """The configuration of the language model."""
    return model.config.get_text_config(decoder=True)


def globals_of(module: nn.Module) -> dict:
    """The names that the module's forward sees: where its rotation and its eager attention are looked up."""
    return inspect.unwrap(type(module).forward).__globals__


def _uses_attention_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    own = f"{name.rsplit('.', 1)[-1]} {type(module).__name__}".lower()
    return bool(getattr(module, "is_cross_attention", False)) or "cross" in own or "encoder_attn" in own


def _is_latent(module: nn.Module) -> bool:
    return getattr(module, "kv_lora_rank", None) is not None or hasattr(module, "kv_a_proj_with_mqa")


def find_layers(model: nn.Module, wanted: Sequence[int] | None) -> dict[int, tuple[str, nn.Module]]:
    """{layer index: (qualified name, attention module)} of `wanted` (None = all), ascending.

    Raises CaptureError naming the layer for cross-attention and multi-head latent attention, for indices that are no
    attention layers, and for models that bypass transformers' attention interface."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for module in decoder_of(model).modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and _uses_attention_interface(module):
            found.setdefault(index, []).append((names.get(id(module), type(module).__name__), module))
    if not found:
        raise CaptureError(
            f"{type(model).__name__} does not use the attention interface of transformers: its attention cannot be seen"
        )
    chosen = sorted(found) if wanted is None else sorted(set(wanted))
    if not chosen:
        raise CaptureError("layers is empty: name at least one, or leave it out for all")
    for index in chosen:
        if index not in found:
            raise CaptureError(f"layer {index} has no softmax attention; layers that have: {_ranges(sorted(found))}")
        _refuse(index, found[index])
    return {index: found[index][0] for index in chosen}


def _refuse(index: int, modules: list[tuple[str, nn.Module]]) -> None:
    for name, module in modules:
        if _is_cross_attention(name, module):
            raise CaptureError(f"layer {index} ({name}): cross-attention; a trace holds self-attention of one sequence")
        if _is_latent(module):
            raise CaptureError(
                f"layer {index} ({name}): multi-head latent attention; what it caches is not keys and values per head"
            )
    if len(modules) > 1:
        listed = ", ".join(name for name, _ in modules)
        raise CaptureError(f"layer {index}: more than one attention module carries this index ({listed})")


def _ranges(indices: list[int]) -> str:
    """0-3, 5 for [0, 1, 2, 3, 5]."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], index]
        else:
            parts.append([index])
    return ", ".join("-".join(map(str, part)) for part in parts)


def output_projection(where: str, module: nn.Module, hidden: int, width: int) -> Tensor:
    """W_o [hidden, width] of an attention module, width = Hq * Dv. Raises CaptureError where it is no plain matrix."""
    for name in _PROJECTIONS:
        child = getattr(module, name, None)
        weight = getattr(child, "weight", None)
        if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or weight.ndim != 2:
            continue
        matrix = weight.detach()
        if type(child).__name__ == "Conv1D":  # GPT-2 keeps [in, out]
            matrix = matrix.T
        if tuple(matrix.shape) == (hidden, width):
            return matrix
    raise CaptureError(f"{where}: no output projection [{hidden}, {width}] found (quantised?): record without wo")


def check_model(model: nn.Module) -> None:
    """Raises CaptureError for a compiled model, whose hooks do not run, and in training mode, where dropout would
    change the attention."""
    if hasattr(model, "_orig_mod"):
        raise CaptureError("the model is compiled: record the one torch.compile was given")
    if model.training:
        raise CaptureError("the model is in training mode: call model.eval() first")


def configs_of(model: nn.Module) -> list:
    """Every distinct configuration that carries an attention implementation, parents first."""
    seen = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            seen.setdefault(id(config), config)
    return list(seen.values())


def device_of(model: nn.Module) -> torch.device:
    """Where token ids go."""
    return next(model.parameters()).device
