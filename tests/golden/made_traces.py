"""Writing kvtrace/1 files for tests through h5py alone (design.md section 3), and a few that use its rarer features."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from oracle_trace import round_to


def _bfloat16() -> h5py.h5t.TypeFloatID:
    """The self-describing 2-byte float: sign bit 15, exponent bits 7 to 14, mantissa bits 0 to 6, bias 127."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_precision(16)
    kind.set_size(2)
    kind.set_ebias(127)
    return kind


def _put(layer: h5py.Group, name: str, data: np.ndarray, dtype: str) -> None:
    """A dataset of stored words, chunked if it has heads; the data must already be `dtype` numbers."""
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if data.ndim == 3:
        create.set_chunk((1, min(data.shape[1], 4096), data.shape[2]))
    kind = _bfloat16() if dtype == "bfloat16" else h5py.h5t.py_create(np.dtype(dtype))
    dataset = h5py.h5d.create(layer.id, name.encode(), kind, h5py.h5s.create_simple(data.shape), dcpl=create)
    dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(data, dtype=np.float32))


def write_trace(path: str | Path, q: np.ndarray, k: np.ndarray, v: np.ndarray, prompt: int, *,
                inv_freq: np.ndarray | list[float] | None = None, rows: list[int] | None = None, dtype: str = "float32",
                softcap: float = 0.0, windows: list[int] | None = None, sink_logit: np.ndarray | None = None,
                rope: str = "pre", recipe: str = "model", style: str = "half", scaling: float = 1.0,
                position: np.ndarray | None = None, e: np.ndarray | None = None,
                wo: np.ndarray | None = None) -> None:
    """Write q [L, Hq, T, D], k [L, Hkv, T, D], v [L, Hkv, T, Dv] with scale 1/sqrt(D), rounded to `dtype`.

    Without `inv_freq` keys are never rotated (rope_type none); `rows` records only these tokens' queries. Optional are
    the gradients e [L, Hq, T, Dv], stored as float32, and the output projections wo [L, Hq * D, Hq * Dv].
    """
    (layers, query_heads, tokens, dim), (kv_heads, value_dim) = q.shape, (v.shape[1], v.shape[3])
    position = np.arange(tokens) if position is None else position
    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        file.attrs.update({"kvtrace_version": "1.0.0", "created_utc": "2026-01-01T00:00:00+00:00", "producer": "tests",
                           "framework": "none", "model_id": "made", "dataset": "made", "license": "Apache-2.0",
                           "tokens": np.int64(tokens), "prompt_tokens": np.int64(prompt), "complete": np.uint8(1)})
        file["tokens/id"] = np.arange(tokens, dtype=np.int32)
        file["tokens/position"] = position.astype(np.int32)
        file["tokens/segment"] = np.where(np.arange(tokens) < prompt, 1, 4).astype(np.uint8)
        file["tokens/segment"].attrs["names"] = "system,context,question,answer,generated,padding"
        model = file.create_group("model")
        model["inv_freq"] = np.asarray([] if inv_freq is None else inv_freq, dtype=np.float32)
        counts = {"layers": layers, "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": dim,
                  "value_dim": value_dim, "hidden_size": query_heads * dim}
        model.attrs.update({name: np.int64(count) for name, count in counts.items()})
        model.attrs.update({"scale": np.float64(1 / math.sqrt(dim)), "softcap": np.float64(softcap),
                            "rope_type": "none" if inv_freq is None else "default", "rope_style": style,
                            "attention_scaling": np.float64(scaling)})
        for index in range(layers):
            layer = file.create_group(f"layers/{index:03d}")
            layer.attrs.update({"layer": np.int64(index), "window": np.int64(windows[index] if windows else 0),
                                "rope": rope, "rope_recipe": recipe})
            recorded = q[index] if rows is None else q[index][:, rows]
            for name, data in (("q", recorded), ("k", k[index]), ("v", v[index])):
                _put(layer, name, round_to(data.astype(np.float64), dtype), dtype)
            if rows is not None:
                layer["q_index"] = np.asarray(rows, dtype=np.int32)
            if e is not None:
                _put(layer, "e", e[index] if rows is None else e[index][:, rows], "float32")
            if wo is not None:
                _put(layer, "wo", round_to(wo[index].astype(np.float64), dtype), dtype)
            if sink_logit is not None:
                layer["sink_logit"] = sink_logit[index].astype(np.float32)


@dataclass(frozen=True)
class Made:
    """A trace drawn from a fixed seed; keys cluster and drift so that attention is uneven, as real attention is."""

    name: str
    tokens: int
    prompt: int
    heads: tuple[int, int]                       # query heads, KV heads
    dim: tuple[int, int] = (16, 16)              # of keys, of values
    layers: int = 2
    rope_dim: int = 16
    positions: tuple[str, ...] = ("absolute", "cache")
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the file into a folder."""
        random = np.random.default_rng(sum(self.name.encode()))
        (hq, hkv), (dim, value_dim), t = self.heads, self.dim, self.tokens
        topics = random.normal(size=(self.layers, hkv, 6, dim))
        topic = random.integers(0, 6, size=t)
        k = 1.2 * topics[:, :, topic] + 0.7 * random.normal(size=(self.layers, hkv, t, dim))
        q = 1.5 * np.repeat(topics[:, :, np.roll(topic, 3)], hq // hkv, axis=1)
        q = q + random.normal(size=(self.layers, hq, t, dim))
        v = random.normal(size=(self.layers, hkv, t, value_dim))
        inv_freq = 1000.0 ** (-np.arange(self.rope_dim // 2) / (self.rope_dim / 2)) if self.rope_dim else None
        path = folder / f"{self.name}.h5"
        write_trace(path, q, k, v, self.prompt, inv_freq=inv_freq, **self.options)
        return path


MADE = (
    Made("gemma_like", 96, 64, (4, 2), (16, 8), rope_dim=8, options={
        "dtype": "float16", "softcap": 6.0, "windows": [0, 24], "style": "interleaved", "scaling": 1.25,
        "position": np.arange(96) + 5 + (np.arange(96) >= 40) * 7}),
    Made("oss_like", 80, 48, (6, 2), options={
        "dtype": "bfloat16", "windows": [16, 0], "recipe": "fp32",
        "sink_logit": np.linspace(-1.0, 4.0, 12).reshape(2, 6)}),
    Made("decode_only", 64, 0, (2, 2), options={"dtype": "float32"}),
    Made("post_rope", 72, 60, (3, 1), positions=("absolute",), options={"dtype": "bfloat16", "rope": "post"}),
    Made("no_rope", 72, 50, (3, 1), (12, 20), rope_dim=0, options={"dtype": "bfloat16"}),
    Made("few_rows", 72, 48, (4, 2), options={"dtype": "bfloat16", "rows": list(range(40, 72))}),
)
