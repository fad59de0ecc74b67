"""The matrices of a trace that analyses look at, one KV head at a time: keys after and before RoPE, values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvreplay import __version__, dtypes
from kvreplay.rotation import rotate
from kvreplay.trace import Trace

TITLES = {"k_post": "K post-RoPE", "k_pre": "K pre-RoPE", "v": "V"}
BLOCK = 4096  # tokens widened and rotated at a time


def recorded(trace: Trace, index: int) -> tuple[str, ...]:
    """Names (of TITLES) that layer `index` has. `k_pre` is missing where the trace stores rotated keys, and in a model
    without RoPE, where it would be `k_post` again."""
    return tuple(name for name in TITLES if name != "k_pre" or _rotates(trace, index))


def blocks(trace: Trace, index: int, name: str, head: int, size: int = BLOCK) -> Iterator[np.ndarray]:
    """Matrix `name` of a layer's KV head, float32 [at most `size` tokens, D] at a time. Of the head, only the stored
    words are ever in memory whole."""
    layer, header, tensor = trace.layer(index), trace.header, "v" if name == "v" else "k"
    words, turn = layer.words(tensor, head), name == "k_post" and _rotates(trace, index)
    for first in range(0, trace.tokens, size):
        rows = dtypes.widen(words[first : first + size], trace.dtype)
        if turn:
            positions = header.position[first : first + size]
            rows = rotate(rows, positions, trace.model, trace.dtype, layer.rope_recipe)
        yield rows


def provenance(trace: Trace) -> str:
    """What a figure's footer says about its trace."""
    header = trace.header
    parts = (header.model_id, header.dataset, f"{trace.tokens} tokens", f"content {trace.content_sha256[:10]}")
    return "; ".join((f"kvreplay {__version__}", trace.file.name, *filter(None, parts)))


def _rotates(trace: Trace, index: int) -> bool:
    return trace.layer(index).rope == "pre" and trace.model.rope_type != "none"
