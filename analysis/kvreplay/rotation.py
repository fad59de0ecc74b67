"""The rotation of a trace (RoPE) in NumPy: stored queries and keys turned to their positions, rounded as the model did.
`kvreplay.capture.rotation` is the same in torch, for recording."""

from __future__ import annotations

import numpy as np

from kvreplay import dtypes
from kvreplay.schema import Model


def rotate(x: np.ndarray, positions: np.ndarray, model: Model, dtype: str, recipe: str = "model") -> np.ndarray:
    """`x` float32 [..., n, D] turned to `positions` [n]; channels past rope_dim pass. Recipe "model" rounds cos, sin,
    every product and every sum to `dtype`, "fp32" rounds nothing."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return values if recipe == "fp32" else dtypes.widen(dtypes.to_words(values, dtype), dtype)

    angle = (positions.astype(np.float32)[:, None] * model.inv_freq).astype(np.float64)
    scaling, pairs = np.float32(model.attention_scaling), model.inv_freq.size
    cos, sin = (rounded(f(angle).astype(np.float32) * scaling) for f in (np.cos, np.sin))
    if model.rope_style == "half":
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    else:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    a, b, turned = x[..., first], x[..., second], x.copy()
    turned[..., first] = rounded(rounded(a * cos) + rounded(-b * sin))
    turned[..., second] = rounded(rounded(b * cos) + rounded(a * sin))
    return turned
