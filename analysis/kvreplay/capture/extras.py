"""What a trace may hold beyond queries, keys, values and outputs: the `--with` option, and log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvreplay.capture.errors import CaptureError
from kvreplay.schema import LIMITS

_BLOCK = 512  # rows of logits widened to float32 at a time


@dataclass(frozen=True)
class Extras:
    """The optional tensors asked for, and for which layers (None = all recorded)."""

    wo: bool = False
    gradient: bool = False
    sampled: int = 0  # labels sampled per token
    logprob: bool = False
    layers: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, words: Sequence[str] | str, layers: Sequence[int] | None = None) -> Extras:
        """Reads a list of wo, gradient, sampled_gradient:S and logprob. Raises CaptureError at any other word."""
        found: dict = {"layers": None if layers is None else tuple(sorted(set(layers)))}
        most = LIMITS["labels"]
        for word in [w for w in words.split(",") if w] if isinstance(words, str) else words:
            sampled = re.fullmatch(r"sampled_gradient:(\d+)", word)
            if word in ("wo", "gradient", "logprob"):
                found[word] = True
            elif sampled and 1 <= int(sampled[1]) <= most:
                found["sampled"] = int(sampled[1])
            else:
                raise CaptureError(
                    f"include: {word!r} is none of wo, gradient, sampled_gradient:S (S = 1 to {most}), logprob"
                )
        return cls(**found)

    @property
    def backward(self) -> bool:
        """Whether a backward pass is needed."""
        return self.gradient or self.sampled > 0

    def check(self, recorded: Collection[int]) -> None:
        """Raises CaptureError when a layer that is not recorded should get extras."""
        if missing := [index for index in self.layers or () if index not in recorded]:
            raise CaptureError(f"include_layers: layer {missing[0]} is not among the recorded {sorted(recorded)}")

    def layers_of(self, recorded: Collection[int]) -> list[int]:
        """Recorded layers that get wo and gradients."""
        return sorted(recorded if self.layers is None else self.layers)


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of `labels` [n] under `logits` [n, V], float32, a block of rows at a time."""
    parts = [
        torch.log_softmax(logits[a : a + _BLOCK].float(), -1).gather(
            1, labels[a : a + _BLOCK].to(logits.device)[:, None]
        )
        for a in range(0, len(labels), _BLOCK)
    ]
    return torch.cat(parts)[:, 0] if parts else logits.new_empty(0, dtype=torch.float32)


class Logprobs:
    """log p(token | tokens before it), in nats, from the logits of successive calls."""

    def __init__(self):
        self._parts: list[np.ndarray] = []
        self._last: Tensor | None = None  # logits after the last token so far
        self.complete = True  # False once a call gave fewer logits than tokens

    def add(self, logits: Tensor | None, ids: Tensor) -> None:
        """A call over tokens `ids` [n] that gave `logits` [n, V], or fewer when the caller asked for fewer."""
        if logits is None or len(logits) != len(ids):
            self.complete = False
        if not self.complete:
            return
        with torch.no_grad():
            # The very first token has nothing before it: 0, as in other traces.
            first = torch.zeros(1) if self._last is None else log_likelihood(self._last, ids[:1]).cpu()
            self._parts += [first.numpy(), log_likelihood(logits[:-1], ids[1:]).cpu().numpy()]
            self._last = logits[-1:].detach().clone()

    def values(self, tokens: int) -> np.ndarray | None:
        """float32 [tokens], None when not every logit was seen."""
        joined = np.concatenate(self._parts) if self._parts else np.empty(0, np.float32)
        return joined.astype(np.float32) if self.complete and len(joined) == tokens else None
