"""Tensors of weight files, read when asked for: safetensors (8 bytes header length, JSON header, values) and GGUF."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvreplay import dtypes

_SAFETENSORS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
_MAX_HEADER = 100 << 20  # as the safetensors library


class ModelError(ValueError):
    """A model cannot be found or read; the message names the file."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # float32 of that shape


def safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file by name. Raises ModelError when the header does not fit the file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size - 8 - length
            if length > _MAX_HEADER or size < 0:
                raise ModelError(f"{path}: is no safetensors file, or was cut")
            header = json.loads(file.read(length))
        return {
            name: _stored(path, name, entry, 8 + length, size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: is no safetensors file: its header is damaged") from error


def _stored(path: Path, name: str, entry: dict, start: int, size: int) -> Tensor:
    """The tensor `name` whose values lie in the `size` bytes from `start`."""
    (first, last), shape, kind = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    if not all(isinstance(n, int) and n >= 0 for n in (first, last, *shape)):
        raise ValueError(name)

    def read() -> np.ndarray:
        if kind not in _SAFETENSORS:
            raise ModelError(f"{path}: {name} is stored as {kind}; readable are {', '.join(_SAFETENSORS)}")
        dtype = _SAFETENSORS[kind]
        word = dtypes.word_type(dtype)
        if not first <= last <= size or last - first != math.prod(shape) * word.itemsize:
            raise ModelError(f"{path}: {name} lies outside the file, or does not fit its shape")
        words = np.fromfile(path, word, math.prod(shape), offset=start + first)
        return dtypes.widen(words, dtype).reshape(shape)

    return Tensor(shape, read)


def gguf(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(every tensor by name, scalar metadata by key) of a .gguf file; quantised tensors are dequantised. Raises
    ModelError when it cannot be parsed."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    def stored(tensor) -> Tensor:
        shape = tuple(int(n) for n in reversed(tensor.shape))

        def read() -> np.ndarray:
            try:
                return dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
            except (NotImplementedError, ValueError) as error:
                raise ModelError(f"{path}: {tensor.name} cannot be dequantised: {error}") from error

        return Tensor(shape, read)

    try:
        reader = GGUFReader(path)
        scalars = {
            key: field.contents()
            for key, field in reader.fields.items()
            if key.startswith(("general.", "split.")) or ".attention." in key or key.endswith(".embedding_length")
        }
        return {tensor.name: stored(tensor) for tensor in reader.tensors}, scalars
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ModelError(f"{path}: cannot be read as GGUF: {error}") from error
