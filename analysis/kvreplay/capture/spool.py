"""Tensors on their way to the trace: written as they come, in slabs on disk beside the final file, so that memory does
not grow with tokens; read back one head at a time once their length is known."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SLAB_ROWS = 64  # decode tokens wait in memory until there are this many
_WORDS = {
    torch.bfloat16: (torch.int16, "<u2"),
    torch.float16: (torch.int16, "<u2"),
    torch.float32: (torch.int32, "<u4"),
}


def words_of(values: Tensor) -> np.ndarray:
    """The stored words of a tensor, in main memory."""
    signed, unsigned = _WORDS[values.dtype]
    return values.detach().contiguous().view(signed).cpu().numpy().view(unsigned)


def tensor_of(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The tensor whose stored words these are (the memory is shared)."""
    signed = {"<u2": np.int16, "<u4": np.int32}[_WORDS[dtype][1]]
    return torch.from_numpy(words.view(signed)).view(dtype)


@dataclass
class _Stream:
    """One tensor [heads, rows, columns] that grows along rows: slabs [heads, n, columns] one behind the other."""

    path: Path
    heads: int
    columns: int
    dtype: torch.dtype
    slabs: list[int] = field(default_factory=list)  # rows of each slab on disk
    waiting: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(self.slabs) + sum(slab.shape[1] for slab in self.waiting)

    def append(self, values: Tensor) -> None:
        if values.shape[1] < SLAB_ROWS:
            self.waiting.append(values.detach().to("cpu", copy=True))
            if sum(slab.shape[1] for slab in self.waiting) >= SLAB_ROWS:
                self.flush()
            return
        self.flush()
        self._write(values)

    def flush(self) -> None:
        if self.waiting:
            slab, self.waiting = torch.cat(self.waiting, 1), []
            self._write(slab)

    def _write(self, slab: Tensor) -> None:
        with open(self.path, "ab") as file:
            for head in slab:  # one by one: the copy that makes a head contiguous stays small
                file.write(words_of(head))
        self.slabs.append(slab.shape[1])

    def head(self, index: int) -> np.ndarray:
        """Words [rows, columns] of one head."""
        self.flush()
        width = self.columns * np.dtype(_WORDS[self.dtype][1]).itemsize
        words = np.empty((self.rows, self.columns), _WORDS[self.dtype][1])
        at = offset = 0
        with open(self.path, "rb") as file:
            for rows in self.slabs:
                file.seek(offset + index * rows * width)
                if file.readinto(words[at : at + rows]) != rows * width:
                    raise OSError(f"{self.path} is shorter than what was written to it")
                at, offset = at + rows, offset + self.heads * rows * width
        return words


class Spool:
    """A folder of growing tensors named by (layer, tensor)."""

    def __init__(self, folder: Path):
        """Starts empty: what a crashed recording left in `folder` goes."""
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._streams: dict[tuple[int, str], _Stream] = {}

    def append(self, layer: int, name: str, values: Tensor) -> None:
        """Adds rows: `values` [heads, n, columns]."""
        key = (layer, name)
        if key not in self._streams:
            path = self.folder / f"{layer:03d}.{name}"
            self._streams[key] = _Stream(path, values.shape[0], values.shape[2], values.dtype)
        self._streams[key].append(values)

    def has(self, layer: int, name: str) -> bool:
        """Whether anything was added."""
        return (layer, name) in self._streams

    def shape(self, layer: int, name: str) -> tuple[int, int, int]:
        """(heads, rows so far, columns)."""
        stream = self._streams[layer, name]
        return stream.heads, stream.rows, stream.columns

    def head(self, layer: int, name: str, index: int) -> np.ndarray:
        """The words [rows, columns] of one head."""
        return self._streams[layer, name].head(index)

    def drop(self, layer: int) -> None:
        """Removes a layer that has reached the trace."""
        for key in [key for key in self._streams if key[0] == layer]:
            self._streams.pop(key).path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
