"""The cache of one KV head in the NumPy oracle: slots that may stand for several tokens (design.md section 4).

oracle.py replays all heads at once and only evicts; here a head has a cache of its own (see oracle_replay.py).
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from oracle_trace import Rope, Trace, round_to

SIDES = np.array([1 - 2.5e-7, 1.0, 1 + 2.5e-7])      # two units in the last place of fp32


@dataclass(frozen=True)
class Extras:
    """What only some policies need from a trace, per layer; None where the trace has none."""

    e: np.ndarray | None = None      # [L, Hq, rows, Dv] gradient of the loss with respect to the attention output
    wo: np.ndarray | None = None     # [L, hidden, Hq * Dv] output projection


def read_extras(path: str | Path) -> Extras:
    """The optional tensors of a kvtrace/1 file."""
    with h5py.File(path, "r") as file:
        layers = [file["layers"][name] for name in sorted(file["layers"])]
        found = {name: np.stack([layer[name][:].astype(np.float64) for layer in layers])
                 for name in ("e", "wo") if all(name in layer for layer in layers)}
    return Extras(**found)


def softmax(logit: np.ndarray, sink: np.ndarray | float = -np.inf) -> np.ndarray:
    """Over the last axis, with a sink logit in the denominator; a row that sees nothing is zero."""
    top = np.maximum(logit.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    top = np.where(np.isfinite(top), top, 0.0)
    weight = np.exp(logit - top)
    total = weight.sum(axis=-1, keepdims=True) + np.exp(sink - top)
    return np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)


class Head:
    """The slots of one KV head of one layer, in token order."""

    def __init__(self, index: int, trace: Trace) -> None:
        self.index, self.dtype = index, trace.dtype
        self.token = np.zeros(0, np.int64)
        self.key, self.value = np.zeros((0, trace.k.shape[3])), np.zeros((0, trace.v.shape[3]))
        self.mass = np.zeros((trace.group, 0))
        self.multiplicity = np.zeros(0, np.int64)
        self.state = np.zeros(0)                                  # one further number a slot, NaN when appended
        self.stands = np.full(trace.tokens, -1)                   # token -> the token of its slot, -1 = none
        self.memory: dict[str, Any] = {}
        self.gaps: list[float] = []
        self.near_roundings = 0
        self._seat, self._rotated = np.zeros(0, np.int64), np.zeros((0, trace.k.shape[3]))

    def __len__(self) -> int:
        return len(self.token)

    def append(self, first: int, key: np.ndarray, value: np.ndarray) -> None:
        """Add the tokens from `first` on, each a slot of its own."""
        fresh = np.arange(first, first + len(key))
        self.token = np.concatenate([self.token, fresh])
        self.key, self.value = np.concatenate([self.key, key]), np.concatenate([self.value, value])
        self.mass = np.concatenate([self.mass, np.zeros((len(self.mass), len(key)))], axis=1)
        self.multiplicity = np.concatenate([self.multiplicity, np.ones(len(key), np.int64)])
        self.state = np.concatenate([self.state, np.full(len(key), np.nan)])
        self._seat = np.concatenate([self._seat, np.full(len(key), -1)])
        self._rotated = np.concatenate([self._rotated, np.zeros(key.shape)])
        self.stands[fresh] = fresh

    def cut(self, slots: int) -> None:
        """Take the newest slots back, down to `slots`."""
        self.stands[self.token[slots:]] = -1
        self.keep(np.arange(slots))

    def keep(self, slot: np.ndarray) -> None:
        """Drop all but these slots. Their tokens must have been merged or dropped before."""
        for name in ("token", "key", "value", "multiplicity", "state", "_seat", "_rotated"):
            setattr(self, name, getattr(self, name)[slot])
        self.mass = self.mass[:, slot]

    def write(self, slot: int | np.ndarray, key: np.ndarray | None, value: np.ndarray | None) -> None:
        """Overwrite a row or several, rounded to the trace's type; None leaves them."""
        if key is not None:
            self.key[slot], self._seat[slot] = self._round(key), -1
        if value is not None:
            self.value[slot] = self._round(value)

    def _round(self, row: np.ndarray) -> np.ndarray:
        """Rounded; counts a row of which fp32 arithmetic could round some number the other way.

        The very middle between two numbers is no such case: means of stored numbers hit it exactly, in fp32 too.
        """
        row = np.asarray(row, np.float64)
        low, here, high = round_to(row * SIDES.reshape(3, *(1,) * row.ndim), self.dtype)
        near = (low != high) & (row != (low + high) / 2)
        self.near_roundings += int(self.dtype != "float32" and near.any())
        return here

    def join(self, victim: int, into: int) -> None:
        """The slot `into` stands for the victim's tokens from now on; multiplicities are the caller's."""
        self.stands[self.stands == self.token[victim]] = self.token[into]

    def drop(self, victim: int) -> None:
        """Nothing stands for the victim's tokens from now on."""
        self.stands[self.stands == self.token[victim]] = -1

    def rotated(self, rope: Rope, position: np.ndarray) -> np.ndarray:
        """Keys rotated by slot positions; only rows that moved or changed are computed anew."""
        stale = self._seat != position
        if stale.any():
            self._rotated[stale] = rope.rotate(self.key[stale], position[stale])
            self._seat = position.copy()
        return self._rotated
