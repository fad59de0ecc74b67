"""A last look before a layer is written: full attention from what the trace stores must give the model's output."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvreplay.capture.errors import CaptureError
from kvreplay.capture.rotation import Recipe

if TYPE_CHECKING:
    from kvreplay.capture.finished import Finished
    from kvreplay.capture.tape import Tape

ROWS = 8  # query rows that are replayed, spread over the recorded ones
LIMIT = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # |o' - o| / |o| over these rows and all heads


def check_replay(tape: Tape, read: Callable[[str, int], Tensor], done: Finished, recipe: Recipe | None) -> float:
    """|o' - o| / |o| of a few rows, o' replayed in float32 from `read(tensor, head)`; `recipe` rotates, None = stored
    as attended. Raises CaptureError when the model does something to its attention that the trace does not say."""
    shape = tape.geometry
    picked = np.unique(np.linspace(0, len(done.rows) - 1, ROWS).astype(int)) if len(done.rows) else np.empty(0, int)
    error = total = 0.0
    group = shape.query_heads // shape.kv_heads
    for kv_head in range(shape.kv_heads if len(picked) else 0):
        key, value = read("k", kv_head), read("v", kv_head).float()
        key = (recipe.rotate(key, done.positions) if recipe else key).float()
        for head in range(kv_head * group, (kv_head + 1) * group):
            query, tokens = read("q", head)[picked], torch.from_numpy(done.rows[picked])
            query = (recipe.rotate(query, done.positions[tokens]) if recipe else query).float()
            replayed = _attend(tape, head, query, key, value, tokens)
            recorded = read("o", head)[picked].float()
            error += float((replayed - recorded).double().square().sum())
            total += float(recorded.double().square().sum())
    relative = (error / total) ** 0.5 if total > 0 else 0.0
    if not relative <= LIMIT[shape.dtype]:
        raise CaptureError(
            f"{tape.where}: full attention replayed from the recording is {relative:.1e} off the model's own output: "
            "the model does something to its attention that a trace cannot say"
        )
    return relative


def _attend(tape: Tape, head: int, query: Tensor, key: Tensor, value: Tensor, tokens: Tensor) -> Tensor:
    """Full attention [n, Dv] of queries of `tokens` [n], float32."""
    shape = tape.geometry
    logits = shape.scale * query @ key.T
    if shape.softcap:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    distance = tokens[:, None] - torch.arange(len(key))
    hidden = distance < 0
    if tape.window:
        hidden |= distance >= tape.window
    logits = logits.masked_fill(hidden, -torch.inf)
    if tape.sink_logit is not None:
        sink = torch.full((len(query), 1), float(tape.sink_logit[head]))
        return torch.softmax(torch.cat([logits, sink], 1), 1)[:, :-1] @ value
    return torch.softmax(logits, 1) @ value
