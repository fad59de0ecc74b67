"""Checks that the mask an attention call used is what a trace can say: causal, with or without a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor

from kvreplay.capture.errors import CaptureError

_ROWS = 256  # rows compared at a time


class Masks:
    """The masks of one forward call. Layers share mask tensors: each is compared once per window."""

    def __init__(self):
        self._checked: list[tuple[Tensor, int, int]] = []  # (mask, keys, window) that fitted

    def window(
        self,
        where: str,
        mask: Tensor | None,
        seen: int,
        count: int,
        keys: int,
        declared: int,
        known: int | None,
        causal: bool,
    ) -> int:
        """The window that explains `mask` (0 = full attention): `count` queries after `seen` tokens, over `keys` keys.

        `declared` is what the layer says, `known` what earlier calls settled on, `causal` whether attention without a
        mask is causal. Raises CaptureError when no window explains the mask."""
        for window in self._candidates(mask, seen, declared, known):
            if self._fits(mask, seen, count, keys, window, causal):
                return window
        raise CaptureError(
            f"{where}: the attention mask is neither causal nor a causal sliding window (padding, bidirectional, "
            "chunked or biased attention): a trace cannot hold it"
        )

    @staticmethod
    def _candidates(mask: Tensor | None, seen: int, declared: int, known: int | None) -> list[int]:
        """Windows that earlier calls do not rule out: below a window two rules cannot be told apart."""
        listed = [declared, 0] if known is None else [known, declared, 0]
        if mask is not None:  # as many keys as the last query sees
            last = mask[0, 0, -1]
            listed.append(int((last if mask.dtype == torch.bool else last == 0).sum()))
        return [w for w in dict.fromkeys(listed) if known in (None, w) or all(x == 0 or x >= seen for x in (w, known))]

    def _fits(self, mask: Tensor | None, seen: int, count: int, keys: int, window: int, causal: bool) -> bool:
        if mask is None:
            within = window == 0 or keys <= window
            return within and (count == 1 or (causal and keys == count))
        if any(known is mask and (k, w) == (keys, window) for known, k, w in self._checked):
            return True
        if mask.ndim != 4 or mask.shape[-1] != keys or mask.shape[2] != count:
            return False
        token = torch.arange(seen + count - keys, seen + count, device=mask.device)
        for first in range(0, count, _ROWS):
            query = torch.arange(seen + first, seen + min(first + _ROWS, count), device=mask.device)[:, None]
            expected = token <= query
            if window:
                expected &= query - token < window
            part = mask[0, :, first : first + _ROWS]
            if part.dtype == torch.bool:
                same = part == expected
            else:  # added to the logits: zero, or so low that nothing is left after the softmax
                same = torch.where(expected, part == 0, part <= -1e4)
            if not bool(same.all()):
                return False
        self._checked.append((mask, keys, window))
        return True
