"""Groups, datasets and attributes of an HDF5 file; whatever is missing or not as it should be is a TraceError that
names the place."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from kvreplay import dtypes
from kvreplay.schema import TraceError


def group_at(file: Path, parent: h5py.Group, name: str) -> h5py.Group:
    """The subgroup `name`."""
    where = f"{parent.name.rstrip('/')}/{name}"
    try:
        node = parent.get(name)
    except (OSError, RuntimeError, KeyError) as error:
        raise TraceError(file, where, f"cannot be read: {error}") from error
    if not isinstance(node, h5py.Group):
        raise TraceError(file, where, "is missing")
    return node


def dataset_at(file: Path, group: h5py.Group, name: str) -> h5py.Dataset:
    """The dataset `name`."""
    where = f"{group.name.rstrip('/')}/{name}"
    try:
        node = group.get(name)
    except (OSError, RuntimeError, KeyError) as error:
        raise TraceError(file, where, f"cannot be read: {error}") from error
    if not isinstance(node, h5py.Dataset) or node.shape is None:
        raise TraceError(file, where, "is missing")
    return node


def array_at(file: Path, group: h5py.Group, name: str, dtype: str, limit: int) -> np.ndarray:
    """A small one-dimensional dataset of `dtype` ("O" = strings); its length is bounded by `limit` before it is
    read."""
    dataset = dataset_at(file, group, name)
    if dataset.dtype != np.dtype(dtype) or dataset.ndim != 1 or not 1 <= dataset.shape[0] <= limit:
        raise TraceError(
            file,
            dataset.name,
            f"is {dataset.dtype} {list(dataset.shape)}, must be one-dimensional "
            f"{'text' if dtype == 'O' else np.dtype(dtype)}, 1 to {limit} long",
        )
    if dtype != "O" and (problem := dtypes.storage_problem(dataset)):
        raise TraceError(file, dataset.name, problem)
    try:
        return dataset[()]
    except (OSError, RuntimeError) as error:
        raise TraceError(file, dataset.name, f"cannot be read: {error}") from error


def _attribute(file: Path, node, name: str, default):
    """A scalar attribute; raises when it is missing and has no default."""
    try:
        value = node.attrs.get(name)
    except (OSError, RuntimeError) as error:
        raise TraceError(file, node.name, f"attribute {name} cannot be read: {error}") from error
    if value is None:
        if default is None:
            raise TraceError(file, node.name, f"attribute {name} is missing")
        return default
    if np.ndim(value):
        raise TraceError(file, node.name, f"attribute {name} is not a scalar")
    return value


def integer_of(file: Path, node, name: str, default: int | None = None) -> int:
    """The integer attribute `name`; `default` None = it must be there."""
    value = _attribute(file, node, name, default)
    if not isinstance(value, (int, np.integer)):
        raise TraceError(file, node.name, f"attribute {name} is {value!r}, must be an integer")
    return int(value)


def number_of(file: Path, node, name: str, default: float | None = None) -> float:
    """The number attribute `name`; `default` None = it must be there."""
    value = _attribute(file, node, name, default)
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise TraceError(file, node.name, f"attribute {name} is {value!r}, must be a number")
    return float(value)


def text_of(file: Path, node, name: str, default: str | None = None) -> str:
    """The text attribute `name`; `default` None = it must be there."""
    value = _attribute(file, node, name, default)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise TraceError(file, node.name, f"attribute {name} is {value!r}, must be a string")
    return str(value)
