"""Writes a `kvtrace/1` file layer by layer. The file is `NAME.part` until close() and so never looks complete before.

with Writer("x.h5", header) as writer:
    writer.write_layer(LayerData(index=0, q=q, k=k, v=v))
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import h5py
import numpy as np

from kvreplay import __version__, dtypes
from kvreplay.schema import (
    PER_QUERY,
    REQUIRED,
    TENSORS,
    VERSION,
    Header,
    LayerData,
    TraceError,
    check_constants,
    check_layer,
    check_shape,
    check_tokens,
    dtypes_of,
    layer_path,
    shape_of,
)

_CHUNK_WORDS = 1 << 20  # a chunk of a very wide tensor is cut to this many words


@dataclass(frozen=True)
class Matrices:
    """A tensor too large for memory, in place of an array in LayerData: `read(index)` gives its matrix [rows, columns]
    at `index`, all axes but the last two, as floats or as stored words."""

    shape: tuple[int, ...]
    read: Callable[[tuple[int, ...]], np.ndarray]


class Writer:
    """An open `.part` file. Use as a context manager: leaving it writes the hash and renames, an exception removes
    it."""

    def __init__(self, path: str | Path, header: Header, compression: int = 4):
        """Starts `path`.part. `compression` is deflate's level, 0 = stored. Raises TraceError on an inconsistent
        header."""
        self.path = Path(path)
        self._part = self.path.with_name(self.path.name + ".part")
        positions = np.arange(header.tokens) if header.position is None else np.asarray(header.position)
        self.header = replace(header, position=positions)
        check_constants(self.path, self.header)
        check_tokens(self.path, self.header)
        self._level = compression
        self._hash = hashlib.sha256()
        self._last = -1
        try:
            # HDF5 1.10 must be able to read what a newer library writes; this bound also gives metadata checksums.
            self._file = h5py.File(self._part, "w", libver=("v110", "v110"), locking=False)
        except OSError as error:
            raise TraceError(self.path, "/", f"cannot be written: {error}") from error
        self._write_header()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def write_layer(self, layer: LayerData) -> None:
        """Appends one layer; indices must ascend. Raises TraceError when a shape does not fit or a value is not
        finite."""
        where = layer_path(layer.index)
        if layer.index <= self._last:
            raise TraceError(self.path, where, f"comes after layer {self._last}: layers must ascend")
        shape = _shape(layer.q)
        rows = shape[1] if len(shape) == 3 else 0
        q_index = None if layer.q_index is None else np.asarray(layer.q_index)
        check_layer(
            self.path, where, self.header, layer.index, layer.window, layer.rope, layer.rope_recipe, q_index, rows
        )
        tensors = {
            name: self._checked(where, name, values, rows, layer.types.get(name))
            for name in TENSORS
            if (values := getattr(layer, name)) is not None
        }
        group = self._file.create_group(where)
        group.attrs.update(
            layer=np.int64(layer.index), window=np.int64(layer.window), rope=layer.rope, rope_recipe=layer.rope_recipe
        )
        if q_index is not None:
            group["q_index"] = q_index.astype(np.int32)
        for name, (values, dtype) in tensors.items():  # in the order of TENSORS, which is the hash's
            if isinstance(values, Matrices):
                self._stream(group, name, values, dtype)
                continue
            dtypes.write_words(group, name, values, dtype, _chunk(name, values.shape), self._level)
            if name in REQUIRED:
                self._hash.update(values)
        self._last = layer.index

    def close(self) -> None:
        """Writes content_sha256 and complete = 1, flushes to the disk, then renames to the final name."""
        if self._last < 0:
            self.abandon()
            raise TraceError(self.path, "/layers", "no layer was written")
        self._file.attrs["content_sha256"] = self._hash.hexdigest()
        self._file.attrs["complete"] = np.uint8(1)
        self._file.close()
        descriptor = os.open(self._part, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.replace(self._part, self.path)

    def abandon(self) -> None:
        """Closes and removes the `.part` file."""
        self._file.close()
        self._part.unlink(missing_ok=True)

    def _checked(self, where: str, name: str, values, rows: int, dtype: str | None):
        """Tensor `name`, as words unless it is read piece by piece, and the type it is stored in; `dtype` None = the
        default."""
        check_shape(self.path, f"{where}/{name}", _shape(values), shape_of(name, self.header, rows))
        allowed = dtypes_of(name, self.header)
        dtype = dtype or allowed[0]
        if dtype not in allowed:
            raise TraceError(self.path, f"{where}/{name}", f"cannot be stored as {dtype}")
        if name == "wo" and not self.header.model.hidden_size:
            raise TraceError(self.path, f"{where}/wo", "needs a hidden_size above 0")
        return (values if isinstance(values, Matrices) else self._words(f"{where}/{name}", values, dtype)), dtype

    def _words(self, where: str, values: np.ndarray, dtype: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """The words of `values`, at `index` of the dataset `where`; raises at a value that is not finite."""
        values = np.asarray(values)
        is_words = values.dtype.kind == "u" and values.dtype.itemsize == dtypes.word_type(dtype).itemsize
        if not (is_words or values.dtype.kind == "f"):
            raise TraceError(self.path, where, f"{values.dtype} values cannot be stored as {dtype}")
        words = dtypes.to_words(values, dtype)
        if (bad := dtypes.first_not_finite(words, dtype)) is not None:
            raise TraceError(self.path, where, f"value is not finite in {dtype}", (*index, *bad))
        return words

    def _stream(self, group: h5py.Group, name: str, values: Matrices, dtype: str) -> None:
        """Writes and hashes one matrix after the other."""
        where = f"{group.name}/{name}"
        dataset = dtypes.create_dataset(group, name, values.shape, dtype, _chunk(name, values.shape), self._level)
        for index in np.ndindex(values.shape[:-2]):
            words = self._words(where, values.read(index), dtype, index)
            check_shape(self.path, f"{where}{list(index)}", words.shape, values.shape[-2:])
            dtypes.write_matrix(dataset, index, words, dtype)
            if name in REQUIRED:
                self._hash.update(words)

    def _write_header(self) -> None:
        h, file = self.header, self._file
        file.attrs.update(
            kvtrace_version=VERSION,
            complete=np.uint8(0),
            tokens=np.int64(h.tokens),
            prompt_tokens=np.int64(h.prompt_tokens),
            model_id=h.model_id,
            dataset=h.dataset,
            license=h.license,
            producer=h.producer or f"kvreplay {__version__}",
            framework=h.framework,
            created_utc=h.created_utc or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        tokens = file.create_group("tokens")
        tokens["position"] = np.asarray(h.position, np.int32)
        if h.token_id is not None:
            tokens["id"] = np.asarray(h.token_id, np.int32)
        if h.segment is not None:
            tokens["segment"] = np.asarray(h.segment, np.uint8)
            tokens["segment"].attrs["names"] = ",".join(h.segment_names)
        if h.logprob is not None:
            tokens["logprob"] = np.asarray(h.logprob, np.float32)
        if h.text is not None:
            tokens.create_dataset("text", data=list(h.text), dtype=h5py.string_dtype())
        m, model = h.model, file.create_group("model")
        for name in ("layers", "query_heads", "kv_heads", "head_dim", "value_dim", "hidden_size"):
            model.attrs[name] = np.int64(getattr(m, name))
        model.attrs.update(
            scale=float(m.scale),
            softcap=float(m.softcap),
            rope_type=m.rope_type,
            rope_style=m.rope_style,
            attention_scaling=float(m.attention_scaling),
        )
        if m.inv_freq is not None:
            model["inv_freq"] = np.asarray(m.inv_freq, np.float32)
        file.create_group("layers")


def write(path: str | Path, header: Header, layers: Iterable[LayerData], compression: int = 4) -> None:
    """Writes a whole trace; `layers` may be a generator, so that one layer is in memory at a time."""
    with Writer(path, header, compression) as writer:
        for layer in layers:
            writer.write_layer(layer)


def _shape(values) -> tuple[int, ...]:
    """Of an array, of what NumPy makes of a list, or of Matrices."""
    return values.shape if isinstance(values, Matrices) else np.shape(values)


def _chunk(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(1, min(T, 4096), D): one head is one run of chunks. Very wide rows (wo, attention) get fewer rows a chunk."""
    if len(shape) == 1:
        return shape
    rows, columns = shape[-2:]
    limit = 4096 if name in REQUIRED + PER_QUERY and name != "attention" else max(1, _CHUNK_WORDS // columns)
    return (1,) * (len(shape) - 2) + (min(rows, 4096, limit), columns)
