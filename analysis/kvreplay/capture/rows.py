"""Which tokens get a recorded query row: the `--queries` option."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from kvreplay.capture.errors import CaptureError


@dataclass(frozen=True)
class Queries:
    """A choice of query rows. `last` prompt rows (None = all) and, if `decode`, all rows after the prompt."""

    last: int | None = None
    decode: bool = True

    @classmethod
    def parse(cls, text: str) -> Queries:
        """Reads `all`, or a list of `last:N` (the last N prompt tokens), `prompt` (all of them) and `decode`."""
        last: int | None = 0
        decode = False
        for word in text.split(","):
            if word == "decode":
                decode = True
            elif word in ("all", "prompt"):
                last, decode = None, decode or word == "all"
            elif found := re.fullmatch(r"last:([1-9]\d*)", word):
                last = None if last is None else max(last, int(found[1]))
            else:
                raise CaptureError(
                    f"queries: {word!r} is none of all, prompt, last:N, decode (a list such as last:64,decode)"
                )
        return cls(last, decode)

    def select(self, tokens: np.ndarray, prompt_tokens: int) -> np.ndarray:
        """Mask over token indices `tokens`: who is chosen when the prompt has `prompt_tokens`."""
        first = 0 if self.last is None else prompt_tokens - self.last
        return np.where(tokens < prompt_tokens, tokens >= first, self.decode)
