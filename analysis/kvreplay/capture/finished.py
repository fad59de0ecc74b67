"""What a recording hands over to be written, apart from the layers' tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class TraceText:
    """What a trace says about its tokens and its origin."""

    tokenizer: object = None  # given: the text of every token is stored
    tokens: bool = True  # False: neither ids nor text
    segments: tuple[tuple[str, int], ...] = ()  # (name, length) from the first token on
    dataset: str = ""
    license: str = ""
    model_id: str | None = None


@dataclass(frozen=True)
class Finished:
    """The tokens of a finished recording."""

    ids: Tensor | None  # int64 [T]
    positions: Tensor  # int64 [T]
    prompt: int
    generated_from: int  # tokens from here on came one at a time
    rows: np.ndarray  # tokens with a recorded query, ascending
    spooled: np.ndarray  # tokens whose query is in the spool: `rows` and perhaps more
    logprob: np.ndarray | None  # float32 [T]

    @property
    def count(self) -> int:
        """T."""
        return len(self.positions)
