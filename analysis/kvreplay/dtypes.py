"""The storage types of a trace as raw words: naming HDF5 types, reading and writing without conversion, widening,
rounding.

HDF5 converts bfloat16 at 30 MB/s, while reading words as they lie runs at memory speed; so every read and write here
passes the file's own type as the memory type, and the widening to float32 is ours.
"""

from __future__ import annotations

import math

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t, h5z

# (sign bit, exponent at, exponent bits, mantissa at, mantissa bits), exponent bias, bytes
_LAYOUTS = {
    "float16": ((15, 10, 5, 0, 10), 15, 2),
    "bfloat16": ((15, 7, 8, 0, 7), 127, 2),
    "float32": ((31, 23, 8, 0, 23), 127, 4),
}
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}
_MAX_CHUNK_BYTES = 1 << 30  # HDF5 holds one decoded chunk in memory

NAMES = tuple(_LAYOUTS)


def word_type(dtype: str) -> np.dtype:
    """The unsigned integer that holds one stored value of `dtype`."""
    return np.dtype("<u4") if dtype == "float32" else np.dtype("<u2")


def hdf5_type(dtype: str) -> h5t.TypeFloatID:
    """The self-describing little-endian HDF5 float of `dtype`: h5dump and h5py print true numbers, bfloat16
    included."""
    fields, bias, size = _LAYOUTS[dtype]
    kind = h5t.IEEE_F32LE.copy()
    kind.set_fields(*fields)
    kind.set_ebias(bias)
    kind.set_precision(8 * size)
    kind.set_size(size)
    return kind


def dtype_of(dataset: h5py.Dataset) -> str | None:
    """ "float16", "bfloat16" or "float32"; None when the dataset holds anything else."""
    kind = dataset.id.get_type()
    if not isinstance(kind, h5t.TypeFloatID) or kind.get_order() != h5t.ORDER_LE:
        return None
    found = (kind.get_fields(), kind.get_ebias(), kind.get_size())
    return next((name for name, layout in _LAYOUTS.items() if layout == found), None)


def read_words(dataset: h5py.Dataset, dtype: str, first: int | None = None) -> np.ndarray:
    """The stored words of the whole dataset, or of `dataset[first]`."""
    space, shape = dataset.id.get_space(), dataset.shape
    if first is not None:  # the block keeps its rank: for unlike ranks HDF5 goes element by element
        shape = (1,) + shape[1:]
        space.select_hyperslab((first,) + (0,) * (len(shape) - 1), shape)
    words = np.empty(shape, word_type(dtype))
    dataset.id.read(h5s.create_simple(shape), space, words, mtype=dataset.id.get_type())
    return words if first is None else words[0]


def storage_problem(dataset: h5py.Dataset) -> str | None:
    """Why the file cannot hold what the dataset's shape claims, None when it can. Asked before any memory is
    allocated."""
    properties, stored, logical = dataset.id.get_create_plist(), dataset.id.get_storage_size(), dataset.nbytes
    if properties.get_layout() == h5d.VIRTUAL or properties.get_external_count():
        return "keeps its values in another file"
    if stored > dataset.file.id.get_filesize():
        return f"claims {stored} stored bytes, more than the file has"
    if dataset.chunks is None:
        return None if stored == logical else f"has {stored} stored bytes, its shape needs {logical}"
    if math.prod(dataset.chunks) * dataset.dtype.itemsize > _MAX_CHUNK_BYTES:
        return f"has chunks of {list(dataset.chunks)}, more than {_MAX_CHUNK_BYTES} bytes each"
    expected = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
    if (present := dataset.id.get_num_chunks()) != expected:
        return f"has {present} of {expected} chunks: it was not written completely"
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    ratio = 1100 if filters <= {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32} else 1 << 20
    return f"needs {logical} bytes, {stored} stored bytes cannot hold them" if logical // ratio > stored else None


def create_dataset(
    group: h5py.Group, name: str, shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...], level: int
) -> h5d.DatasetID:
    """An empty chunked dataset with shuffle, deflate of `level` (0 = stored) and fletcher32."""
    layout = h5p.create(h5p.DATASET_CREATE)
    layout.set_chunk(chunk)
    if level:
        layout.set_shuffle()
        layout.set_deflate(level)
    layout.set_fletcher32()
    return h5d.create(group.id, name.encode(), hdf5_type(dtype), h5s.create_simple(shape), dcpl=layout)


def write_words(
    group: h5py.Group, name: str, words: np.ndarray, dtype: str, chunk: tuple[int, ...], level: int
) -> None:
    """A whole dataset of `words` as create_dataset makes it."""
    dataset = create_dataset(group, name, words.shape, dtype, chunk, level)
    dataset.write(h5s.ALL, h5s.ALL, words, mtype=hdf5_type(dtype))


def write_matrix(dataset: h5d.DatasetID, index: tuple[int, ...], words: np.ndarray, dtype: str) -> None:
    """The words of `dataset[index]`, a matrix: `index` has all axes but the last two."""
    space, shape = dataset.get_space(), (1,) * len(index) + words.shape
    space.select_hyperslab((*index, 0, 0), shape)
    dataset.write(h5s.create_simple(shape), space, words.reshape(shape), mtype=hdf5_type(dtype))


def widen(words: np.ndarray, dtype: str) -> np.ndarray:
    """Stored words as float32, exactly."""
    if dtype == "bfloat16":
        return (words.astype(np.uint32) << 16).view(np.float32)
    if dtype == "float16":
        return words.view(np.float16).astype(np.float32)
    return words.view(np.float32)


def to_words(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds float values to the nearest that `dtype` can store, ties to even; unsigned integers pass as words already.

    What overflows becomes infinite: `first_not_finite` finds it.
    """
    values = np.ascontiguousarray(values)
    if values.dtype.kind == "u":
        if values.dtype.itemsize != word_type(dtype).itemsize:
            raise ValueError(f"{values.dtype} words cannot hold {dtype}")
        return values.astype(word_type(dtype), copy=False)
    with np.errstate(over="ignore"):
        if dtype == "float16":
            return values.astype(np.float16).view(np.uint16)
        single = values.astype(np.float32, copy=False)
    bits = single.view(np.uint32)
    if dtype == "float32":
        return bits
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def first_not_finite(words: np.ndarray, dtype: str) -> tuple[int, ...] | None:
    """The row-major first index of an infinity or NaN, None when every value is finite."""
    mask = _EXPONENT[dtype]
    bad = (words & words.dtype.type(mask)) == mask
    return tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape)) if bad.any() else None
