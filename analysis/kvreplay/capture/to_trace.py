"""From the spool of a finished recording to the trace file: header, layers one head at a time, a last check."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from kvreplay.capture.check import check_replay
from kvreplay.capture.errors import CaptureError
from kvreplay.capture.finished import Finished
from kvreplay.capture.layers import output_projection, text_config
from kvreplay.capture.rotation import Recipe, most_common
from kvreplay.capture.spool import tensor_of, words_of
from kvreplay.schema import SEGMENTS, Header, LayerData, Model
from kvreplay.trace_writer import Matrices, Writer

if TYPE_CHECKING:
    from kvreplay.capture.recording import Recorder
    from kvreplay.capture.tape import Tape

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def write_trace(recorder: Recorder, done: Finished) -> dict[int, str]:
    """Writes the file. Returns {layer: reason} of layers whose queries and keys are stored rotated."""
    tapes = [recorder.tapes[index] for index in sorted(recorder.tapes)]
    _check_alike(tapes)
    plain = _is_plain(recorder, tapes)
    recipe = None if plain else most_common((tape.recipe, tape.window == 0) for tape in tapes)
    header = _header(recorder, done, tapes, recipe, plain)
    post: dict[int, str] = {}
    with Writer(recorder.path, header, recorder.compression) as writer:
        for tape in tqdm(tapes, desc="write", unit="layer", disable=not recorder.progress):
            stored = None if plain else _stored_recipe(tape, recipe)
            if not plain and stored is None:
                post[tape.index] = tape.post_reason or "another rotation than the header's (most layers')"
            layer = _Layer(recorder, done, tape, rotated=tape.index in post)
            check_replay(tape, layer.tensor, done, stored)
            writer.write_layer(layer.data())
            recorder.spool.drop(tape.index)
    return post


def _is_plain(recorder: Recorder, tapes: list[Tape]) -> bool:
    """Whether the model has no rotary embedding at all, so that keys need no rotation. Anything that hints at one, and
    be it in the configuration, is taken for one."""
    named = vars(text_config(recorder.model))
    hints = [name for name, value in named.items() if name.startswith(("rope", "rotary")) and value]
    return not (recorder.frequencies.modules or hints or any(tape.rotates for tape in tapes))


def _stored_recipe(tape: Tape, recipe: Recipe | None) -> Recipe | None:
    """The header's rotation if every row of the layer was reproduced by it, else None: the layer is stored rotated."""
    return recipe if recipe is not None and tape.recipe == recipe and tape.post_from is None else None


def _check_alike(tapes: list[Tape]) -> None:
    first = tapes[0]
    for tape in tapes[1:]:
        if tape.geometry != first.geometry:
            raise CaptureError(
                f"{tape.where} has {tape.geometry}, {first.where} has {first.geometry}: a trace has one shape, scale "
                "and softcap; record such layers into two traces"
            )
    if first.geometry.dtype not in DTYPES:
        raise CaptureError(f"{first.where}: {first.geometry.dtype}; a trace holds {', '.join(DTYPES.values())}")


def _header(recorder: Recorder, done: Finished, tapes: list[Tape], recipe: Recipe | None, plain: bool) -> Header:
    text, shape, config = recorder.text, tapes[0].geometry, text_config(recorder.model)
    model = Model(
        layers=config.num_hidden_layers,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        hidden_size=config.hidden_size,
        scale=shape.scale,
        softcap=shape.softcap,
    )
    if recipe is None and not plain:
        # Every layer is stored rotated. The header says as much as is known, and never "none", which would mean that
        # stored keys are unrotated; a frequency of zero rotates nothing.
        fitting = (r for r in recorder.frequencies.recipes() if 2 * len(r.inv_freq) <= shape.head_dim)
        recipe = next(fitting, Recipe((0.0,), rope_type="unknown"))
    if recipe is not None:
        model.rope_type, model.rope_style = recipe.rope_type, recipe.style
        model.attention_scaling = recipe.attention_scaling
        model.inv_freq = np.array(recipe.inv_freq, np.float32)
    ids = done.ids if text.tokens else None
    words = None
    if ids is not None and text.tokenizer is not None:
        words = [text.tokenizer.decode([token]) for token in ids.tolist()]
    device = next(recorder.model.parameters()).device.type
    return Header(
        tokens=done.count,
        prompt_tokens=done.prompt,
        dtype=DTYPES[shape.dtype],
        model=model,
        position=done.positions.numpy().astype(np.int32),
        token_id=None if ids is None else ids.numpy().astype(np.int32),
        segment=_segments(text.segments, done),
        logprob=done.logprob,
        text=words,
        model_id=text.model_id if text.model_id is not None else str(config.name_or_path or config.model_type),
        dataset=text.dataset,
        license=text.license,
        framework=f"transformers {transformers.__version__}, torch {torch.__version__}, {device}, {recorder.attention}",
    )


def _segments(named: tuple[tuple[str, int], ...], done: Finished) -> np.ndarray:
    """uint8 [T]: the named lengths, then the prompt as context, what was fed after it as answer, the rest generated."""
    segment = np.full(done.count, SEGMENTS.index("context"), np.uint8)
    segment[done.prompt :] = SEGMENTS.index("answer")
    segment[done.generated_from :] = SEGMENTS.index("generated")
    at = 0
    for name, length in named:
        if name not in SEGMENTS:
            raise CaptureError(f"segments: {name!r} is none of {', '.join(SEGMENTS)}")
        if not 0 <= length <= done.count - at:
            raise CaptureError(f"segments: {name} of {length} tokens does not fit {done.count - at} that are left")
        segment[at : at + length] = SEGMENTS.index(name)
        at += length
    return segment


class _Layer:
    """One layer of the spool as the writer takes it."""

    def __init__(self, recorder: Recorder, done: Finished, tape: Tape, rotated: bool):
        self._recorder, self._done, self._tape, self._rotated = recorder, done, tape, rotated
        self._keep = None if len(done.spooled) == len(done.rows) else np.isin(done.spooled, done.rows)

    def data(self) -> LayerData:
        """Tensors that are read from the spool when the writer asks."""
        tape, done, extras, shape = self._tape, self._done, self._recorder.extras, self._tape.geometry
        rows = len(done.rows)
        per_query = (shape.query_heads, rows, shape.value_dim)
        layer = LayerData(
            index=tape.index,
            q=self._matrices("q", (shape.query_heads, rows, shape.head_dim)),
            k=self._matrices("k", (shape.kv_heads, done.count, shape.head_dim)),
            v=self._matrices("v", (shape.kv_heads, done.count, shape.value_dim)),
            o=self._matrices("o", per_query),
            window=tape.window,
            rope="post" if self._rotated else "pre",
            q_index=None if rows == done.count else done.rows.astype(np.int32),
            sink_logit=tape.sink_logit,
        )
        if tape.index not in extras.layers_of(self._recorder.tapes):
            return layer
        if extras.wo:
            hidden = text_config(self._recorder.model).hidden_size
            matrix = output_projection(tape.where, tape.module, hidden, shape.query_heads * shape.value_dim)
            layer.wo = words_of(matrix.to(shape.dtype))
        # Gradients of a float16 model are computed in float32.
        kept = DTYPES[torch.float32 if shape.dtype == torch.float16 else shape.dtype]
        if extras.gradient:
            layer.e = self._matrices("e", per_query)
            layer.types["e"] = kept
        if extras.sampled:
            layer.g = self._matrices("g", (extras.sampled, *per_query))
            layer.types["g"] = kept
        return layer

    def tensor(self, name: str, head: int) -> Tensor:
        """[rows, columns] of one head as the trace stores it."""
        words = self._recorder.spool.head(self._tape.index, name, head)
        return tensor_of(self._finish(name, words), self._tape.geometry.dtype)

    def _matrices(self, name: str, shape: tuple[int, ...]) -> Matrices:
        heads = shape[:-2]

        def read(index: tuple[int, ...]) -> np.ndarray:
            words = self._recorder.spool.head(self._tape.index, name, int(np.ravel_multi_index(index, heads)))
            return self._finish(name, words)

        return Matrices(shape, read)

    def _finish(self, name: str, words: np.ndarray) -> np.ndarray:
        """Drops query rows that are not wanted and rotates what was spooled unrotated but must be stored rotated."""
        tape, done = self._tape, self._done
        tokens = np.arange(done.count)
        if name in ("q", "o"):
            tokens = done.spooled
            if self._keep is not None:
                words, tokens = words[self._keep], tokens[self._keep]
        if name not in ("q", "k") or not self._rotated or tape.recipe is None:
            return words
        early = len(tokens) if tape.post_from is None else int(np.searchsorted(tokens, tape.post_from))
        if early:
            values = tensor_of(words[:early], tape.geometry.dtype).to(tape.device)
            positions = done.positions[torch.from_numpy(tokens[:early])].to(tape.device)
            words[:early] = words_of(tape.recipe.rotate(values, positions))
        return words
