"""Seeing what a model's attention sees: attention and mask functions registered under our own names, which call the
stock ones, and the rotation function that each attention module looks up.

The stock functions do all arithmetic, so a model computes the same bits with and without us.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvreplay.capture.errors import CaptureError
from kvreplay.capture.layers import configs_of, globals_of

BASES = ("eager", "sdpa")  # implementations whose arithmetic is the model's own, with a mask we can check
_PREFIX = "kvreplay_"
_ROTATION = re.compile(r"apply_\w*(rotary|rope)\w*")


class Listener(Protocol):
    """What the hooks of one attention module report to."""

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, output: Tensor, options: dict[str, Any]
    ) -> None:
        """One call of the attention function: query [B, Hq, n, D], key and value [B, Hkv, keys, .], output
        [B, n, Hq, Dv]."""


class Tap:
    """Listens to the attention modules of one model until close()."""

    def __init__(self, model: nn.Module, listeners: dict[nn.Module, Listener]):
        """Installs everything. Raises CaptureError for attention implementations other than eager and sdpa, and on a
        model that is being recorded already."""
        self._listeners = listeners
        self._rotations: list[tuple[Tensor, Tensor]] = []
        self._current: nn.Module | None = None
        self._undo: list[Callable[[], None]] = []
        configs = configs_of(model)
        self._before = [config._attn_implementation for config in configs]
        for base in self._before:
            if base not in BASES:
                why = "is recorded already" if str(base).startswith(_PREFIX) else f"uses {base!r} attention"
                raise CaptureError(f"the model {why}; load it with attn_implementation='sdpa' or 'eager'")
        for base in BASES:
            _register(base)
        for module in listeners:
            _TAPS[module] = self
            self._undo.append(module.register_forward_pre_hook(self._enter).remove)
        for names in {id(names): names for names in map(globals_of, listeners)}.values():
            self._watch_rotation(names)
        for config, base in zip(configs, self._before, strict=True):
            config._attn_implementation = _PREFIX + base
        self._configs = configs

    def close(self) -> None:
        """Restores the model."""
        for config, base in zip(self._configs, self._before, strict=True):
            config._attn_implementation = base
        for undo in reversed(self._undo):
            undo()
        for module in self._listeners:
            _TAPS.pop(module, None)

    def take_rotations(self) -> list[tuple[Tensor, Tensor]]:
        """(before, after) of every tensor that was rotated since the present attention module was entered."""
        taken, self._rotations = self._rotations, []
        return taken

    def hear(self, module: nn.Module, *call) -> None:
        """Passes a call of the attention function on."""
        self._listeners[module].attended(*call)
        self._rotations, self._current = [], None

    def _enter(self, module: nn.Module, _args) -> None:
        self._rotations, self._current = [], module

    def _watch_rotation(self, names: dict) -> None:
        """Wraps the rotation functions among the globals of a model's source file."""
        for name, function in list(names.items()):
            if not (_ROTATION.fullmatch(name) and callable(function)):
                continue
            names[name] = self._watched(function)
            self._undo.append(lambda names=names, name=name, function=function: names.__setitem__(name, function))

    def _watched(self, function: Callable) -> Callable:
        def rotate(*args, **kwargs):
            turned = function(*args, **kwargs)
            if self._current is not None:
                before = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                after = turned if isinstance(turned, tuple) else (turned,)
                self._rotations += zip(before[: len(after)], after, strict=False)
            return turned

        return rotate


_TAPS: dict[nn.Module, Tap] = {}  # of modules that are being listened to


def _register(base: str) -> None:
    """Our attention function and our mask function for `base`: without the mask a model would not be causal."""

    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        names = globals_of(module)
        stock = names.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS).get(
            base, names.get("eager_attention_forward")
        )
        result = stock(module, query, key, value, attention_mask, *args, **kwargs)
        if (tap := _TAPS.get(module)) is not None:
            tap.hear(module, query, key, value, attention_mask, result[0], kwargs)
        return result

    AttentionInterface.register(_PREFIX + base, attention)
    AttentionMaskInterface.register(_PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
