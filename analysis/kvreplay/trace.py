"""Reads, checks and cuts recordings (`kvtrace/1`, HDF5). `write` and `Writer` make them.

trace = Trace("x.h5")
trace.tokens, trace.prompt_tokens, trace.model, trace.layers      # 1024, 768, Model(...), (0, 9, 19, 29)
trace.layer(9).k                                                  # float32 [Hkv, T, D]
trace.layer(9).words("k")                                         # the stored words, bfloat16 as uint16

python -m kvreplay.trace slice IN OUT --layers 0,9 --tokens 512
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from kvreplay import dtypes
from kvreplay.nodes import array_at, dataset_at, group_at, integer_of, number_of, text_of
from kvreplay.schema import (
    LIMITS,
    PER_QUERY,
    REQUIRED,
    TENSORS,
    VERSION,
    Header,
    LayerData,
    Model,
    TraceError,
    check_constants,
    check_layer,
    check_shape,
    check_tokens,
    dtypes_of,
    layer_path,
    shape_of,
)
from kvreplay.trace_writer import Writer, write

__all__ = ["Header", "Layer", "LayerData", "Model", "Trace", "TraceError", "Writer", "slice_trace", "write"]


class Layer:
    """One recorded layer. Tensors are read when asked for, as float32; those not recorded are None."""

    def __init__(self, file: Path, group: h5py.Group, header: Header):
        self._file, self._group = file, group
        self.index = integer_of(file, group, "layer")  # in the model
        self.window = integer_of(file, group, "window", 0)  # 0 = full attention
        self.rope = text_of(file, group, "rope", "pre")  # "pre" or "post"
        self.rope_recipe = text_of(file, group, "rope_recipe", "model")  # "model" or "fp32"
        self.names = tuple(name for name in TENSORS if name in group)
        for name in dict.fromkeys((*REQUIRED, *self.names)):
            dataset_at(file, group, name)
        rows = group["q"].shape[1] if group["q"].ndim == 3 else 0
        self.has_q_index = "q_index" in group
        stored = array_at(file, group, "q_index", "<i4", header.tokens) if self.has_q_index else None
        check_layer(file, group.name, header, self.index, self.window, self.rope, self.rope_recipe, stored, rows)
        self.q_index = np.arange(rows, dtype=np.int32) if stored is None else stored  # token of a row
        for name in self.names:
            where, dataset = f"{group.name}/{name}", group[name]
            check_shape(file, where, dataset.shape, shape_of(name, header, rows))
            if self.dtype(name) not in dtypes_of(name, header):
                raise TraceError(
                    file,
                    where,
                    f"is stored as {self.dtype(name) or dataset.dtype}, must be {' or '.join(dtypes_of(name, header))}",
                )
            if problem := dtypes.storage_problem(dataset):
                raise TraceError(file, where, problem)

    q = property(lambda self: self.tensor("q"), doc="Queries [Hq, Tq, D], before RoPE unless rope is post.")
    k = property(lambda self: self.tensor("k"), doc="Keys [Hkv, T, D], before RoPE unless rope is post.")
    v = property(lambda self: self.tensor("v"), doc="Values [Hkv, T, Dv].")
    o = property(lambda self: self.tensor("o"), doc="The model's own attention output before W_o [Hq, Tq, Dv].")
    wo = property(lambda self: self.tensor("wo"), doc="Output projection [hidden_size, Hq * Dv].")
    sink_logit = property(lambda self: self.tensor("sink_logit"), doc="Learned sink logits [Hq].")
    e = property(lambda self: self.tensor("e"), doc="dLoss/do per 512-token chunk [Hq, Tq, Dv].")
    g = property(lambda self: self.tensor("g"), doc="Gradients of -log p(y), y sampled [S, Hq, Tq, Dv].")
    attention = property(lambda self: self.tensor("attention"), doc="Attention probabilities [Hq, Tq, T].")

    def dtype(self, name: str) -> str | None:
        """The stored type of tensor `name`: "float16", "bfloat16" or "float32"."""
        return dtypes.dtype_of(self._group[name])

    def tensor(self, name: str) -> np.ndarray | None:
        """Tensor `name` as float32, None when it was not recorded."""
        return dtypes.widen(self.words(name), self.dtype(name)) if name in self.names else None

    def words(self, name: str, first: int | None = None) -> np.ndarray:
        """The stored words of tensor `name` (uint16 or uint32), or of its `first` row along axis 0."""
        where = f"{self._group.name}/{name}"
        if name not in self.names:
            raise TraceError(self._file, where, "was not recorded")
        try:
            return dtypes.read_words(self._group[name], self.dtype(name), first)
        except (OSError, RuntimeError) as error:
            raise TraceError(self._file, where, f"cannot be read: {error}") from error

    def check_values(self, total) -> None:
        """Raises TraceError at the first value that is not finite; feeds the words of q, k, v to the hash `total`.
        Reads one head at a time, and a matrix whole: its rows share chunks."""
        for name in self.names:
            shape = self._group[name].shape
            for first in range(shape[0]) if len(shape) > 2 else [None]:
                words = self.words(name, first)
                if (bad := dtypes.first_not_finite(words, self.dtype(name))) is not None:
                    at = bad if first is None else (first, *bad)
                    raise TraceError(self._file, f"{self._group.name}/{name}", "value is not finite", at)
                if name in REQUIRED:
                    total.update(words)


class Trace:
    """A validated trace, open for reading. `values=False` skips the pass over all tensors that looks for values that
    are not finite and compares the content with its hash."""

    def __init__(self, path: str | Path, values: bool = True):
        self.file = Path(path)
        try:
            self._h5 = _open(self.file)
        except OSError as error:
            raise TraceError(self.file, "/", f"cannot be opened: {error}") from error
        try:
            self.header = _read_header(self.file, self._h5)
            self._layers = self._open_layers()
            self._sha256 = self._check_content() if values else text_of(self.file, self._h5, "content_sha256", "")
        except TraceError:
            self.close()
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
            self.close()
            raise TraceError(self.file, "/", f"is damaged: {error}") from error

    tokens = property(lambda self: self.header.tokens, doc="Tokens T of the sequence.")
    prompt_tokens = property(lambda self: self.header.prompt_tokens, doc="Tokens P of the prompt; the rest is decode.")
    model = property(lambda self: self.header.model, doc="Shapes and constants all layers share.")
    dtype = property(lambda self: self.header.dtype, doc="Stored type of q, k and v.")
    layers = property(lambda self: tuple(self._layers), doc="Model indices of the recorded layers, ascending.")

    def layer(self, index: int) -> Layer:
        """The recorded layer with model index `index`."""
        if index not in self._layers:
            raise TraceError(
                self.file, layer_path(index), f"is not recorded; recorded are {', '.join(map(str, self._layers))}"
            )
        return self._layers[index]

    @property
    def content_sha256(self) -> str:
        """SHA-256 over the stored words of q, k, v of every layer, in this order, layers ascending."""
        self._sha256 = self._sha256 or self._check_content()
        return self._sha256

    def close(self) -> None:
        """Closes the file; tensors not read yet are out of reach."""
        self._h5.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _check_content(self) -> str:
        """The hash of the content, having checked every value."""
        total = hashlib.sha256()
        for layer in self._layers.values():
            layer.check_values(total)
        stored, found = text_of(self.file, self._h5, "content_sha256", ""), total.hexdigest()
        if stored not in ("", found):
            raise TraceError(
                self.file, "/", f"content_sha256 is {stored}, but q, k and v have {found}: they were changed"
            )
        return found

    def _open_layers(self) -> dict[int, Layer]:
        layers = [
            Layer(self.file, group_at(self.file, self._h5, f"layers/{name}"), self.header)
            for name in group_at(self.file, self._h5, "layers")
        ]
        found = {layer.index: layer for layer in sorted(layers, key=lambda layer: layer.index)}
        if len(found) != len(layers):
            raise TraceError(self.file, "/layers", "two groups hold the same layer")
        return found


def _open(path: Path) -> h5py.File:
    """The file, read-only and without locks, so that network and read-only disks work."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        if "locking flag" not in str(error):
            raise
        return h5py.File(path, "r")  # this process has it open already, with locks


def _read_header(file: Path, h5: h5py.File) -> Header:
    version = text_of(file, h5, "kvtrace_version")
    if version.split(".")[0] != VERSION.split(".")[0]:
        raise TraceError(file, "/", f"kvtrace_version is {version!r}, this reader knows {VERSION.split('.')[0]}.x")
    if integer_of(file, h5, "complete") != 1:
        raise TraceError(file, "/", "is not complete: its writer did not finish")
    node = group_at(file, h5, "model")
    sizes = {
        n: integer_of(file, node, n)
        for n in ("layers", "query_heads", "kv_heads", "head_dim", "value_dim", "hidden_size")
    }
    model = Model(
        **sizes,
        scale=number_of(file, node, "scale"),
        softcap=number_of(file, node, "softcap", 0.0),
        rope_type=text_of(file, node, "rope_type"),
        rope_style=text_of(file, node, "rope_style", "half"),
        attention_scaling=number_of(file, node, "attention_scaling", 1.0),
    )
    if model.rope_type != "none":  # else it would not be used
        model.inv_freq = array_at(file, node, "inv_freq", "<f4", min(model.head_dim, LIMITS["head_dim"]) // 2)
    header = Header(
        integer_of(file, h5, "tokens"),
        integer_of(file, h5, "prompt_tokens"),
        _first_dtype(file, h5),
        model,
        **{
            name: text_of(file, h5, name, "")
            for name in ("model_id", "dataset", "license", "producer", "framework", "created_utc")
        },
    )
    check_constants(file, header)
    if "tokens" in h5:
        _read_tokens(file, group_at(file, h5, "tokens"), header)
    if header.position is None:
        header.position = np.arange(header.tokens, dtype=np.int32)
    check_tokens(file, header)
    return header


def _read_tokens(file: Path, node: h5py.Group, header: Header) -> None:
    for name, key, dtype in (
        ("position", "position", "<i4"),
        ("id", "token_id", "<i4"),
        ("segment", "segment", "u1"),
        ("logprob", "logprob", "<f4"),
    ):
        if name in node:
            setattr(header, key, array_at(file, node, name, dtype, header.tokens))
    if "segment" in node and (names := text_of(file, node["segment"], "names", "")):
        header.segment_names = tuple(names.split(","))
    if "text" in node:
        values = array_at(file, node, "text", "O", header.tokens)
        header.text = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]


def _first_dtype(file: Path, h5: h5py.File) -> str:
    """The type of the first layer's queries: all of q, k and v share it."""
    layers = group_at(file, h5, "layers")
    if not len(layers):
        raise TraceError(file, "/layers", "holds no layer")
    first = group_at(file, layers, min(layers))
    dataset = dataset_at(file, first, "q")
    if (dtype := dtypes.dtype_of(dataset)) is None:
        raise TraceError(file, dataset.name, f"is stored as {dataset.dtype}, must be one of {', '.join(dtypes.NAMES)}")
    return dtype


def slice_trace(
    source: str | Path, target: str | Path, layers: list[int] | None = None, tokens: int | None = None
) -> None:
    """Writes `layers` (model indices, default all) and the first `tokens` tokens (default all) of `source` to `target`,
    word for word. The prompt shrinks to at most `tokens`. A gradient `e` is kept as recorded: in a 512-token chunk that
    the cut splits it still is the gradient of the whole chunk's loss."""
    with Trace(source) as trace:
        keep = trace.tokens if tokens is None else tokens
        if not 1 <= keep <= trace.tokens:
            raise TraceError(source, "/", f"cannot keep {keep} of {trace.tokens} tokens")
        h = trace.header
        cut = {
            name: None if (values := getattr(h, name)) is None else values[:keep]
            for name in ("position", "token_id", "segment", "logprob", "text")
        }
        chosen = [trace.layer(index) for index in (trace.layers if layers is None else sorted(set(layers)))]
        header = replace(h, tokens=keep, prompt_tokens=min(h.prompt_tokens, keep), **cut)
        write(target, header, (_cut_layer(layer, keep) for layer in chosen))


def _cut_layer(layer: Layer, tokens: int) -> LayerData:
    rows = int(np.searchsorted(layer.q_index, tokens))
    words = {name: layer.words(name) for name in layer.names}
    for name in PER_QUERY:
        if name in words:
            words[name] = words[name][..., :rows, :]
    words["k"], words["v"] = words["k"][:, :tokens], words["v"][:, :tokens]
    if "attention" in words:
        words["attention"] = words["attention"][..., :tokens]
    return LayerData(
        index=layer.index,
        window=layer.window,
        rope=layer.rope,
        rope_recipe=layer.rope_recipe,
        q_index=layer.q_index[:rows] if layer.has_q_index else None,
        types={name: layer.dtype(name) for name in ("e", "g") if name in words},
        **words,
    )


def _layer_list(text: str) -> list[int]:
    """[0, 9] for 0,9."""
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 0,9") from None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code (3 for a bad trace, as the C++ program)."""
    parser = argparse.ArgumentParser(prog="python -m kvreplay.trace", description="cut a trace")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cut = commands.add_parser("slice", help="write some layers and the first tokens of a trace to a new file")
    cut.add_argument("source", metavar="IN", type=Path)
    cut.add_argument("target", metavar="OUT", type=Path)
    cut.add_argument(
        "--layers", metavar="0,9", type=_layer_list, help="model indices of the layers to keep (default: all recorded)"
    )
    cut.add_argument("--tokens", metavar="N", type=int, help="keep the first N tokens (default: all)")
    options = parser.parse_args(arguments)
    try:
        slice_trace(options.source, options.target, options.layers, options.tokens)
    except TraceError as error:
        print(f"kvreplay.trace: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
