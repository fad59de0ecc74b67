"""Reading kvtrace/1 files and rotating keys and queries, for the NumPy oracle (design.md sections 3 and 4).

Independent of the Python package and of the C++ reader: h5py alone reads the files and widens the stored words exactly.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

STORED_TYPES = {(2, 8): "bfloat16", (2, 5): "float16", (4, 8): "float32"}  # (bytes, exponent bits) -> name


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 or float64 numbers to the nearest `dtype` number, ties to even; the array keeps its own type.

    bfloat16 is float32 with the low 16 bits cut off, so rounding is an integer addition (too fine below 2^-126).
    """
    if dtype == "float32":
        return x.astype(np.float32).astype(x.dtype, copy=False)
    if dtype == "float16":
        return x.astype(np.float16).astype(x.dtype)
    words, dropped = {4: (np.uint32, 16), 8: (np.uint64, 45)}[x.dtype.itemsize]
    bits = np.ascontiguousarray(x).view(words)
    even = (bits >> words(dropped)) & words(1)
    bits = (bits + (words((1 << dropped - 1) - 1) + even)) & ~words((1 << dropped) - 1)
    return bits.view(x.dtype)


@dataclass(frozen=True)
class Rope:
    """The rotation of a trace. `recipe` is "model" (every intermediate rounded to `dtype`), "fp32" or "none"."""

    inv_freq: np.ndarray
    style: str
    scaling: float
    recipe: str
    dtype: str

    def rotate(self, x: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Rotate x [..., D] by `position`, which broadcasts against x without its last axis. float64 out."""
        if self.recipe == "none":
            return x.astype(np.float64)
        x = x.astype(np.float32)
        angle = np.asarray(position)[..., None].astype(np.float32) * self.inv_freq.astype(np.float32)
        cos, sin = (self._rounded(f(angle.astype(np.float64)).astype(np.float32) * np.float32(self.scaling))
                    for f in (np.cos, np.sin))
        half = self.inv_freq.size
        if self.style == "half":
            first, second = slice(0, half), slice(half, 2 * half)
        elif self.style == "interleaved":
            first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        else:
            raise ValueError(f"rope_style {self.style!r}")
        out = np.broadcast_to(x, np.broadcast_shapes(x.shape[:-1], cos.shape[:-1]) + x.shape[-1:]).copy()
        out[..., first] = self._rounded(self._rounded(x[..., first] * cos) + self._rounded(-x[..., second] * sin))
        out[..., second] = self._rounded(self._rounded(x[..., second] * cos) + self._rounded(x[..., first] * sin))
        return out.astype(np.float64)

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        return round_to(x, self.dtype) if self.recipe == "model" else x


@dataclass(frozen=True)
class Trace:
    """One recorded forward pass; layers are stacked, so they must share shapes, rotation and recorded rows."""

    prompt: int
    position: np.ndarray      # [T] RoPE positions of the tokens
    scale: float
    softcap: float            # 0 = none
    dtype: str                # of the stored keys and values
    pre_rope: bool            # q and k stored before rotation
    rope: Rope
    q: np.ndarray             # [L, Hq, rows, D] as stored
    k: np.ndarray             # [L, Hkv, T, D] as stored
    v: np.ndarray             # [L, Hkv, T, Dv]
    row_token: np.ndarray     # [rows] token of each recorded query row
    window: np.ndarray        # [L] sliding window, 0 = full attention
    sink_logit: np.ndarray    # [L, Hq], -inf where the trace has none
    output: np.ndarray | None  # [L, Hq, rows, Dv] the model's own attention output, if recorded

    @property
    def tokens(self) -> int:
        """Number of tokens T."""
        return self.k.shape[2]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]


def _stored_type(dataset: h5py.Dataset) -> str:
    kind = dataset.id.get_type()
    return STORED_TYPES[kind.get_size(), kind.get_fields()[2]]


def _common(values: list, what: str):
    if any(v != values[0] for v in values):
        raise ValueError(f"the oracle stacks layers, but {what} differs: {values}")
    return values[0]


def read_trace(path: str | Path) -> Trace:
    """Read a whole kvtrace/1 file into memory."""
    with h5py.File(path, "r") as file:
        model = file["model"].attrs
        layers = [file["layers"][name] for name in sorted(file["layers"])]
        dtype = _common([_stored_type(layer[name]) for layer in layers for name in ("k", "v", "q")], "dtype")
        recipe = _common([str(layer.attrs.get("rope_recipe", "model")) for layer in layers], "rope_recipe")
        pre = _common([str(layer.attrs["rope"]) for layer in layers], "rope") == "pre"
        rotates = str(model["rope_type"]) != "none"
        tokens = int(file.attrs["tokens"])
        rows = [tuple(layer["q_index"][:].tolist()) if "q_index" in layer else tuple(range(tokens)) for layer in layers]

        def stack(name: str) -> np.ndarray:
            return np.stack([layer[name][:].astype(np.float32) for layer in layers])

        no_sink = np.full(int(model["query_heads"]), -np.inf)
        inv_freq = file["model/inv_freq"][:] if rotates else np.zeros(0, np.float32)
        rope = Rope(inv_freq, str(model.get("rope_style", "half")), float(model.get("attention_scaling", 1.0)),
                    recipe if rotates else "none", dtype)
        return Trace(
            prompt=int(file.attrs["prompt_tokens"]), position=file["tokens/position"][:].astype(np.int64),
            scale=float(model["scale"]), softcap=float(model.get("softcap", 0.0)), dtype=dtype,
            pre_rope=pre and rotates, rope=rope,
            q=stack("q"), k=stack("k"), v=stack("v"), row_token=np.array(_common(rows, "q_index"), dtype=np.int64),
            window=np.array([int(layer.attrs.get("window", 0)) for layer in layers]),
            sink_logit=np.stack([layer["sink_logit"][:].astype(np.float64) if "sink_logit" in layer else no_sink
                                 for layer in layers]),
            output=stack("o") if all("o" in layer for layer in layers) else None)
