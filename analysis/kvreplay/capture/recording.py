"""The recorder: a context manager around calls of a model, which leaves a trace behind."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kvreplay.capture.errors import CaptureError
from kvreplay.capture.extras import Extras, Logprobs
from kvreplay.capture.finished import Finished, TraceText
from kvreplay.capture.gradients import chunk_bounds, run_chunks
from kvreplay.capture.hooks import Tap
from kvreplay.capture.layers import check_model, decoder_of, find_layers
from kvreplay.capture.rotation import Frequencies
from kvreplay.capture.rows import Queries
from kvreplay.capture.spool import Spool
from kvreplay.capture.tape import Call, Tape
from kvreplay.capture.to_trace import write_trace


class Recorder:
    """Records every call of `model` inside the `with` block as one sequence.

    with Recorder(model, "trace.h5", layers=[0, 9]) as rec:
        model(input_ids)
    rec.layers_post      # {layer: why its queries and keys are stored rotated}
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | Path,
        layers: Sequence[int] | None = None,
        *,
        prompt_tokens: int | None = None,
        queries: str = "all",
        include: Sequence[str] | str = (),
        include_layers: Sequence[int] | None = None,
        tokenizer=None,
        tokens: bool = True,
        segments: Sequence[tuple[str, int]] = (),
        dataset: str = "",
        license: str = "",
        model_id: str | None = None,
        compression: int = 1,
        chunk: int = 512,
        seed: int = 0,
        progress: bool | None = None,
    ):
        """A recording of `model` to the file `path`.

        layers: model indices, None = all. prompt_tokens: None = everything before the last run of one-token calls.
        queries: rows to keep, `all` or a list of `prompt`, `last:N` (of the prompt) and `decode`.
        include: any of `wo` (output projections), `gradient` (e: dLoss/do per `chunk` tokens), `sampled_gradient:S`
        (g), `logprob`; include_layers: which layers get wo and gradients, None = all recorded.
        tokenizer: given, the text of every token is stored. tokens=False keeps ids and text out of the file.
        segments: (name, length) from the first token on; the rest is context, then answer or generated.
        compression: 0 to 9, deflate. chunk: tokens of a loss, for gradients. seed: for sampled labels.
        progress: a bar on stderr, None = on a terminal.
        Raises CaptureError for what a trace cannot hold."""
        check_model(model)
        self.attention = str(model.config._attn_implementation)
        self.path = Path(path)
        self.model = model
        self.extras = Extras.parse(include, include_layers)
        self.queries = Queries.parse(queries)
        self.prompt_tokens = prompt_tokens
        self.text = TraceText(tokenizer, tokens, tuple(segments), dataset, license, model_id)
        self.compression, self.chunk, self.seed = compression, chunk, seed
        self.layers_post: dict[int, str] = {}
        self._modules = find_layers(model, layers)
        self.extras.check(self._modules)
        self.progress = sys.stderr.isatty() if progress is None else progress
        self._tokens = 0
        self._ids: list[Tensor] | None = []  # None: embeddings came without ids
        self._positions: list[Tensor] = []
        self._counts: list[int] = []  # tokens of each call
        self._rows: list[np.ndarray] = []  # tokens whose query is in the spool
        self._logprobs = Logprobs()
        self._outer_ids: Tensor | None = None
        self._call: Call | None = None

    def __enter__(self) -> Recorder:
        self.frequencies = Frequencies(decoder_of(self.model))
        try:
            self.spool = Spool(self.path.with_name(self.path.name + ".spool"))
        except OSError as error:
            raise CaptureError(f"{self.path} cannot be written: {error}") from error
        self.tapes = {
            index: Tape(index, name, module, self.spool, self.frequencies, self._present_call, self._rotations)
            for index, (name, module) in self._modules.items()
        }
        try:
            self._tap = Tap(self.model, {tape.module: tape for tape in self.tapes.values()})
        except CaptureError:
            self.spool.close()
            raise
        self._hooks = [
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            self.model.register_forward_hook(self._after_model),
            decoder_of(self.model).register_forward_pre_hook(self._before_call, with_kwargs=True),
            decoder_of(self.model).register_forward_hook(self._after_call),
            *self.frequencies.on_positions(self._see_positions),
        ]
        self._bar = tqdm(desc="record", unit="token", disable=not self.progress)
        return self

    def __exit__(self, kind, value, traceback) -> None:
        try:
            self._release()
            if kind is None:
                self._finish()
        finally:
            self.spool.close()

    def _release(self) -> None:
        """Takes every hook off the model."""
        self._bar.close()
        for hook in self._hooks:
            hook.remove()
        self._tap.close()

    # --- what the model calls -----------------------------------------------------------------------------------

    def _present_call(self) -> Call:
        if self._call is None:
            raise CaptureError("attention was called outside the model: call the whole model inside the `with` block")
        return self._call

    def _rotations(self) -> list[tuple[Tensor, Tensor]]:
        return self._tap.take_rotations()

    def _before_model(self, _module, args, kwargs) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self._outer_ids = ids if isinstance(ids, Tensor) else None

    def _before_call(self, _module, args, kwargs) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        given = ids if ids is not None else embeds
        if given is None:
            raise CaptureError("the model was called without input_ids and without inputs_embeds")
        if given.shape[0] != 1:
            raise CaptureError(f"batch of {given.shape[0]}: a trace holds one sequence, use batch size 1")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.bool().all()):
            raise CaptureError("the attention mask hides tokens (left padding?): pass one sequence without padding")
        if ids is None and self._outer_ids is not None and self._outer_ids.shape[:2] == given.shape[:2]:
            ids = self._outer_ids
        count = given.shape[1]
        self._note_ids(ids)
        tokens = np.arange(self._tokens, self._tokens + count)
        keep = self.queries.select(tokens, self._tokens if self.prompt_tokens is None else self.prompt_tokens)
        if self.prompt_tokens is None and (count > 1 or not self._tokens):
            keep[:] = True  # the prompt may go on or end in this call: nothing can be left out yet
        self._rows.append(tokens[keep])
        positions = torch.arange(self._tokens, self._tokens + count, device=given.device)
        self._call = Call(self._tokens, count, positions, torch.from_numpy(np.flatnonzero(keep)))

    def _note_ids(self, ids: Tensor | None) -> None:
        if ids is None:
            self._ids = None
        elif self._ids is not None:
            self._ids.append(ids[0].detach().to("cpu", torch.int64))

    def _see_positions(self, positions: Tensor) -> None:
        """Positions as the rotary embedding gets them, [n], [1, n] or, for several axes, [3, 1, n]."""
        if self._call is None:
            return
        if positions.ndim == 3:
            if not bool((positions == positions[:1]).all()):
                raise CaptureError("positions have several axes that differ (images or video): a trace holds one")
            positions = positions[0]
        positions = positions.reshape(-1, positions.shape[-1])
        if positions.shape != (1, self._call.count):
            raise CaptureError(f"{positions.numel()} positions for {self._call.count} tokens")
        self._call.positions = positions[0].detach()

    def _after_call(self, _module, _args, _output) -> None:
        call, self._call = self._call, None
        late = [tape.where for tape in self.tapes.values() if tape.tokens != call.seen + call.count]
        if late:
            raise CaptureError(f"{late[0]}: its attention was not called through transformers' attention interface")
        positions = call.positions.to("cpu", torch.int64)
        last = self._positions[-1][-1:] if self._positions else torch.tensor([-1])
        if not bool((torch.cat([last, positions]).diff() > 0).all()):
            raise CaptureError(
                f"positions do not increase after token {call.seen}: a second sequence? A trace holds one"
            )
        self._positions.append(positions)
        self._counts.append(call.count)
        self._tokens += call.count
        self._bar.update(call.count)

    def _after_model(self, _module, _args, output) -> None:
        if not self.extras.logprob or self._ids is None:
            return
        logits = getattr(output, "logits", None)
        self._logprobs.add(None if logits is None else logits[0], self._ids[-1])

    # --- after the last call ------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if not self._tokens:
            raise CaptureError("nothing was recorded: the model was not called inside the `with` block")
        decoded = self._decoded_from()
        prompt = decoded if self.prompt_tokens is None else self.prompt_tokens
        if not 0 <= prompt <= self._tokens:
            raise CaptureError(f"prompt_tokens is {prompt}, {self._tokens} tokens were recorded")
        rows = np.flatnonzero(self.queries.select(np.arange(self._tokens), prompt))
        if not len(rows):
            raise CaptureError("queries leaves no row: record some of the prompt's or some of decode's")
        ids = None if self._ids is None else torch.cat(self._ids)
        positions = torch.cat(self._positions)
        logprob = self._logprobs.values(self._tokens) if self.extras.logprob else None
        layers = self.extras.layers_of(self.tapes)
        late = self.extras.logprob and logprob is None
        if self.extras.backward or late:
            if ids is None:
                raise CaptureError("gradients and log-probabilities need token ids: call the model with input_ids")
            bounds = chunk_bounds(self._tokens, prompt, self.chunk)
            done = run_chunks(
                self.model,
                ids,
                positions,
                {self.tapes[index].module: index for index in layers} if self.extras.backward else {},
                bounds,
                self.extras,
                self.seed,
                lambda layer, name, first, rows: self._keep_gradient(layer, name, first, rows, prompt),
                self.progress,
            )
            logprob = done if late else logprob
        done = Finished(ids, positions, prompt, max(decoded, prompt), rows, np.concatenate(self._rows), logprob)
        self.layers_post = write_trace(self, done)

    def _keep_gradient(self, layer: int, name: str, first: int, values: Tensor, prompt: int) -> None:
        """Rows [heads, n, Dv] of a gradient from token `first` on; only those with a recorded query stay."""
        tokens = np.arange(first, first + values.shape[1])
        keep = torch.from_numpy(np.flatnonzero(self.queries.select(tokens, prompt)))
        if len(keep):
            self.spool.append(layer, name, values if len(keep) == len(tokens) else values[:, keep.to(values.device)])

    def _decoded_from(self) -> int:
        """The first token of the last run of one-token calls; the first call is never decode."""
        ones = next((i for i, count in enumerate(reversed(self._counts)) if count > 1), len(self._counts))
        return max(self._counts[0], self._tokens - ones)
