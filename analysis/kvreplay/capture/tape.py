"""One attention layer being recorded: checks every call, finds the rotation, passes rows on to the spool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvreplay.capture.errors import CaptureError
from kvreplay.capture.masks import Masks
from kvreplay.capture.rotation import Frequencies, Recipe
from kvreplay.capture.spool import Spool

_REFUSED = ("position_bias", "head_mask", "alibi")  # change the logits in a way no trace can say


@dataclass
class Call:
    """One forward call of the model: n new tokens after `seen` earlier ones."""

    seen: int
    count: int
    positions: Tensor  # [n]
    rows: Tensor  # of the n tokens, those whose query is recorded: int64
    masks: Masks = field(default_factory=Masks)
    angles: dict = field(default_factory=dict)  # of the rotations in use, computed once per call

    def angles_of(self, recipe: Recipe, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the call's positions, on the device and in the type of `like`."""
        key = (recipe, like.device, like.dtype)
        if key not in self.angles:
            self.angles[key] = recipe.angles(self.positions.to(like.device), like.dtype)
        return self.angles[key]


@dataclass(frozen=True)
class Geometry:
    """What all layers of a trace must share."""

    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float
    dtype: torch.dtype


class Tape:
    """The recording of one layer."""

    def __init__(
        self, index: int, name: str, module: nn.Module, spool: Spool, frequencies: Frequencies,
        call: Callable[[], Call], rotations: Callable[[], list[tuple[Tensor, Tensor]]],
    ):  # fmt: skip
        self.index, self.where, self.module = index, f"layer {index} ({name})", module
        self.geometry: Geometry | None = None
        self.device = torch.device("cpu")  # where the model rotates
        self.window: int | None = None  # 0 = full attention; None = not called yet
        self.sink_logit: np.ndarray | None = None  # float32 [Hq]
        self.recipe: Recipe | None = None
        self.post_from: int | None = None  # rows from this token on are stored rotated
        self.post_reason = ""
        self.rotates = False  # a rotation was seen, whether or not it could be described
        self.tokens = 0
        self._spool, self._frequencies, self._call, self._rotations = spool, frequencies, call, rotations

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, output: Tensor, options: dict[str, Any]
    ) -> None:
        """Listener of the attention function. Raises CaptureError on anything the trace could not replay."""
        call = self._call()
        self._check_call(query, key, call, options)
        self._check_geometry(query, key, value, options)
        self._check_window(query, key, mask, call, options)
        fresh_key, fresh_value = key[0, :, -call.count :], value[0, :, -call.count :]
        query, fresh_key = self._before_rotation(query, fresh_key[None], call)
        rows = call.rows.to(query.device)
        with torch.no_grad():
            every = len(rows) == call.count
            self._spool.append(self.index, "k", fresh_key[0])
            self._spool.append(self.index, "v", fresh_value)
            if len(rows):
                attended = output[0].transpose(0, 1)
                self._spool.append(self.index, "q", query[0] if every else query[0][:, rows])
                self._spool.append(self.index, "o", attended if every else attended[:, rows])
        self.tokens += call.count

    def _check_call(self, query: Tensor, key: Tensor, call: Call, options: dict[str, Any]) -> None:
        if query.shape[0] != 1:
            raise CaptureError(f"{self.where}: batch of {query.shape[0]}: a trace holds one sequence, use batch size 1")
        if options.get("dropout"):
            raise CaptureError(f"{self.where}: attention dropout is on: call model.eval() first")
        if found := [name for name in _REFUSED if options.get(name) is not None]:
            raise CaptureError(f"{self.where}: {found[0]} changes the attention logits, a trace cannot say so")
        if query.shape[2] != call.count or call.seen != self.tokens:
            raise CaptureError(
                f"{self.where}: attention over {query.shape[2]} queries after {self.tokens} tokens, the model was "
                f"called with {call.count} after {call.seen}"
            )
        if key.shape[2] > call.seen + call.count:
            raise CaptureError(
                f"{self.where}: {key.shape[2]} keys for {call.seen + call.count} tokens: cross-attention or a "
                "preallocated (static) cache; use the default dynamic cache"
            )
        if key.shape[2] < call.count:
            raise CaptureError(f"{self.where}: {key.shape[2]} keys for {call.count} queries: not causal self-attention")

    def _check_geometry(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        scale = options.get("scaling")
        now = Geometry(
            query.shape[1], key.shape[1], query.shape[3], value.shape[3],
            float(query.shape[3] ** -0.5 if scale is None else scale), float(options.get("softcap") or 0), query.dtype,
        )  # fmt: skip
        if self.geometry is None:
            self.geometry = now
            if (sinks := options.get("s_aux")) is not None:
                self.sink_logit = sinks.detach().float().cpu().numpy()
            self.device = query.device
            if not query.dtype == key.dtype == value.dtype:
                raise CaptureError(f"{self.where}: queries are {query.dtype}, keys {key.dtype}, values {value.dtype}")
        elif now != self.geometry:
            raise CaptureError(f"{self.where}: attention changed from {self.geometry} to {now} within the sequence")

    def _check_window(
        self, query: Tensor, key: Tensor, mask: Tensor | None, call: Call, options: dict[str, Any]
    ) -> None:
        declared = options.get("sliding_window") or 0
        causal = options.get("is_causal")
        causal = getattr(self.module, "is_causal", True) if causal is None else causal
        sdpa = self.module.config._attn_implementation.endswith("sdpa")
        self.window = call.masks.window(
            self.where, mask, call.seen, call.count, key.shape[2], declared, self.window, bool(causal and sdpa)
        )
        held = call.seen if self.window == 0 else min(call.seen, self.window - 1)
        if key.shape[2] < held + call.count:
            raise CaptureError(
                f"{self.where}: {key.shape[2]} keys, {held + call.count} are in sight: the call does not continue the "
                "sequence (pass the cache of the call before)"
            )

    def _before_rotation(self, query: Tensor, key: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Query and key as they are stored: unrotated if the recipe reproduces what was attended, else as they are."""
        pairs = None if self.post_from is not None else self._pairs(query, key)
        if pairs is not None:
            if self.recipe is None and call.seen == 0:
                self.recipe = self._frequencies.find(pairs, call.positions.to(query.device))
            if self.recipe and self.recipe.reproduces(pairs, call.angles_of(self.recipe, query)):
                return pairs[0][0], pairs[1][0]
            self.post_reason = "the header's rotation does not reproduce the model's"
        if self.post_from is None:
            self.post_from = call.seen
            self.post_reason = self.post_reason or (
                "what was rotated is not what was attended" if self.rotates else "no rotation was seen"
            )
        return query, key

    def _pairs(self, query: Tensor, key: Tensor) -> list[tuple[Tensor, Tensor]] | None:
        """[(query before, after), (key before, after)] with all channels; None when the rotation was not seen."""
        rotations = self._rotations()
        self.rotates = self.rotates or bool(rotations)
        if len(rotations) != 2:
            return None
        pairs = []
        for (before, after), whole in zip(rotations, (query, key), strict=True):
            if before.ndim != 4 or before.shape != after.shape:
                return None
            if after.shape[1] != whole.shape[1]:  # [B, n, H, D]
                before, after = before.transpose(1, 2), after.transpose(1, 2)
            turned = after.shape[-1]
            if after.shape[:3] != whole.shape[:3] or not torch.equal(after, whole[..., :turned]):
                return None
            if turned < whole.shape[-1]:  # only the rotary part went through the rotation
                before = torch.cat([before, whole[..., turned:]], -1)
            pairs.append((before, whole))
        return pairs
