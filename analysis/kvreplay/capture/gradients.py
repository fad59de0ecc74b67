"""Gradients with respect to attention outputs, by a backward pass over one chunk of tokens at a time.

Keys and values of earlier chunks are constants, as in AsymKV's own pass: a gradient flows inside its chunk only. The
chunks start at the first token and again after the prompt, so that no loss over decode tokens reaches prompt rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from kvreplay.capture.errors import CaptureError
from kvreplay.capture.extras import Extras, Logprobs
from kvreplay.capture.hooks import Tap
from kvreplay.capture.layers import device_of, text_config

Sink = Callable[[int, str, int, Tensor], None]  # (layer, tensor name, first token, rows [heads, n, Dv])


def chunk_bounds(tokens: int, prompt: int, chunk: int) -> list[tuple[int, int]]:
    """[first, end) of every chunk: `chunk` tokens each, a new one beginning after the prompt."""
    return [
        (a, min(a + chunk, end)) for start, end in ((0, prompt), (prompt, tokens)) for a in range(start, end, chunk)
    ]


class _Outputs:
    """Listener that keeps an attention output [1, n, Hq, Dv] as part of the graph."""

    def __init__(self):
        self.output: Tensor | None = None

    def attended(self, _query, _key, _value, _mask, output: Tensor, _options) -> None:
        if not output.requires_grad:  # the lowest layer: the graph begins here, parameters are frozen
            output.requires_grad_()
        self.output = output


def run_chunks(
    model: nn.Module,
    ids: Tensor,
    positions: Tensor,
    layers: dict[nn.Module, int],
    bounds: list[tuple[int, int]],
    extras: Extras,
    seed: int,
    sink: Sink,
    progress: bool,
) -> np.ndarray | None:
    """Runs `ids` [T] chunk by chunk and passes gradients of the attention modules in `layers` to `sink`: "e"
    [Hq, n, Dv] and "g" [S * Hq, n, Dv]. Returns log-probabilities [T]."""
    listeners = {module: _Outputs() for module in layers}
    logprobs, generator = Logprobs(), torch.Generator().manual_seed(seed)
    cache, step, device = DynamicCache(config=text_config(model)), step_of(model), device_of(model)
    tap = Tap(model, listeners)
    try:
        with _frozen(model), torch.set_grad_enabled(bool(layers)):
            for first, end in tqdm(bounds, desc="gradients", unit="chunk", disable=not progress):
                chunk = ids[first:end]
                logits = step(chunk[None].to(device), positions[None, first:end].to(device), cache, None)
                logprobs.add(logits.detach(), chunk)
                if layers:
                    outputs = [listener.output for listener in listeners.values()]
                    for name, rows in _gradients(logits, chunk, outputs, extras, generator):
                        for layer, values in zip(layers.values(), rows, strict=True):
                            sink(layer, name, first, values)
                _detach(cache)
    finally:
        tap.close()
    return logprobs.values(len(ids))


def _gradients(logits: Tensor, ids: Tensor, outputs: list[Tensor], extras: Extras, generator: torch.Generator):
    """Yields ("e", [dLoss/do per layer]) and ("g", [the same for every sampled label sequence, stacked])."""
    log_p = torch.log_softmax(logits.float(), -1)
    if extras.gradient:
        if len(ids) == 1:  # no next token to predict inside the chunk
            grads = [torch.zeros_like(output) for output in outputs]
        else:
            labels = ids[1:, None].to(log_p.device)
            grads = _backward(-log_p[:-1].gather(1, labels).mean(), outputs, keep=extras.sampled > 0)
        yield "e", [grad[0].transpose(0, 1) for grad in grads]
    if extras.sampled:
        draws = torch.multinomial(log_p.detach().exp().cpu(), extras.sampled, True, generator=generator)
        labels = draws.to(log_p.device)
        samples = [
            _backward(-log_p.gather(1, labels[:, s : s + 1]).sum(), outputs, keep=s + 1 < extras.sampled)
            for s in range(extras.sampled)
        ]
        yield "g", [torch.cat([grad[0].transpose(0, 1) for grad in layer]) for layer in zip(*samples, strict=True)]


def _backward(loss: Tensor, outputs: list[Tensor], keep: bool) -> list[Tensor]:
    """Gradients of `loss` in the type they are stored in. Float16 would underflow: its loss is scaled up, as far as it
    goes, and the gradients widened before they are scaled back."""
    half = outputs[0].dtype == torch.float16
    for power in range(16, -1, -4) if half else (0,):
        last = power == 0
        scaled = torch.autograd.grad(loss * 2.0**power, outputs, retain_graph=keep or not last)
        if half:
            scaled = [grad.float() / 2.0**power for grad in scaled]
        if all(bool(grad.isfinite().all()) for grad in scaled):
            return list(scaled)
    raise CaptureError("the loss has gradients that are not finite")


def step_of(model: nn.Module) -> Callable[[Tensor, Tensor | None, DynamicCache, int | None], Tensor]:
    """A call (ids [1, n], positions [1, n] or None, cache, logits wanted or None for all) -> logits [n or fewer, V],
    whatever the model calls its arguments."""
    names = inspect.signature(model.forward).parameters
    cache_name = next((name for name in ("cache", "past_key_values", "layer_past") if name in names), "past_key_values")

    def step(ids: Tensor, positions: Tensor | None, cache: DynamicCache, last: int | None) -> Tensor:
        more = {cache_name: cache, "use_cache": True}
        if positions is not None and "position_ids" in names:
            more["position_ids"] = positions
        if last is not None and "logits_to_keep" in names:
            more["logits_to_keep"] = last
        output = model(input_ids=ids, **more)
        if getattr(output, "logits", None) is None:
            raise CaptureError(f"{type(model).__name__} gives no logits: load a model with a language-model head")
        return output.logits[0]

    return step


@contextmanager
def _frozen(model: nn.Module):
    """No parameter needs a gradient: the graph holds activations above the first attention output only."""
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in changed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(True)


def _detach(cache: DynamicCache) -> None:
    """Makes what is cached constant."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            if isinstance(held := getattr(layer, name, None), Tensor):
                setattr(layer, name, held.detach())
