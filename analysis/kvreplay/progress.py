"""Progress of long work on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
_EVERY = 5.0  # seconds between lines


def progress(layers: Sequence[Item], what: str) -> Iterator[Item]:
    """Yields `layers` and says at most every five seconds how far it is: short work prints nothing."""
    start = said = time.monotonic()
    for done, layer in enumerate(layers):
        now = time.monotonic()
        if now - said >= _EVERY and done:
            left = (now - start) / done * (len(layers) - done)
            print(f"{what}: {done} of {len(layers)} layers, about {left:.0f} s left", file=sys.stderr, flush=True)
            said = now
        yield layer
