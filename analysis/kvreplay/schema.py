"""`kvtrace/1` as data: what a header and a layer hold, which shapes and types fit together, and every rule that both
the reader and the writer enforce. design.md section 3 is the specification; core/trace.hpp is the same in C++.

Letters: T tokens, P prompt tokens, Tq recorded query rows, Hq query heads, Hkv KV heads, D head_dim, Dv value_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from kvreplay import dtypes

VERSION = "1.0.0"
SEGMENTS = ("system", "context", "question", "answer", "generated", "padding")

# A header is only believed below these sizes; nothing is allocated before.
LIMITS = {
    "tokens": 1 << 27,
    "layers": 1 << 14,
    "query_heads": 1 << 14,
    "kv_heads": 1 << 14,
    "head_dim": 1 << 14,
    "value_dim": 1 << 14,
    "hidden_size": 1 << 20,
    "labels": 1 << 12,
}

TENSORS = ("q", "k", "v", "o", "wo", "sink_logit", "e", "g", "attention")
REQUIRED = ("q", "k", "v")
PER_QUERY = ("q", "o", "e", "g", "attention")  # have an axis of Tq rows


class TraceError(ValueError):
    """A trace cannot be read or does not hold what it must: names the file, the dataset and the first bad index."""

    def __init__(self, file, dataset: str, message: str, index: tuple[int, ...] | None = None):
        at = "" if index is None else f" at [{', '.join(map(str, index))}]"
        super().__init__(f"{file}: {dataset}: {message}{at}")
        self.file, self.dataset, self.index = str(file), dataset, index


@dataclass
class Model:
    """Shapes and constants that all layers share (`/model`)."""

    layers: int  # of the model, not of the trace
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    hidden_size: int  # 0 = unknown, then no layer has wo
    scale: float  # softmax logit = scale * q.k
    softcap: float = 0.0  # logit -> softcap * tanh(logit / softcap); 0 = none
    rope_type: str = "none"  # "none": stored queries and keys need no rotation
    rope_style: str = "half"  # pairs (i, i + rope_dim/2), or "interleaved": (2i, 2i + 1)
    attention_scaling: float = 1.0  # factor on cos and sin (YaRN)
    inv_freq: np.ndarray | None = None  # float32 [rope_dim / 2]

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads


@dataclass
class Header:
    """Everything of a trace but its layers."""

    tokens: int
    prompt_tokens: int
    dtype: str  # of q, k and v: "float16", "bfloat16" or "float32"
    model: Model
    position: np.ndarray | None = None  # int32 [T], strictly increasing; None to the writer = 0, 1, 2, ...
    token_id: np.ndarray | None = None  # int32 [T]
    segment: np.ndarray | None = None  # uint8 [T], index into segment_names
    segment_names: tuple[str, ...] = SEGMENTS
    logprob: np.ndarray | None = None  # float32 [T], nats
    text: list[str] | None = None  # [T]
    model_id: str = ""
    dataset: str = ""
    license: str = ""
    producer: str = ""
    framework: str = ""
    created_utc: str = ""  # ISO 8601; "" to the writer = now


@dataclass
class LayerData:
    """One layer as the writer takes it. Tensors are floats, rounded to what the trace stores, or unsigned integers: the
    stored words themselves."""

    index: int  # in the model
    q: np.ndarray  # [Hq, Tq, D]
    k: np.ndarray  # [Hkv, T, D]
    v: np.ndarray  # [Hkv, T, Dv]
    window: int = 0  # token j is visible to token i when i - j < window; 0 = full attention
    rope: str = "pre"  # "post": q and k are stored rotated
    rope_recipe: str = "model"  # every step of the rotation rounded as model code does, or "fp32"
    q_index: np.ndarray | None = None  # int32 [Tq], token of each query row, ascending; None = every token has one
    o: np.ndarray | None = None  # [Hq, Tq, Dv], the model's own attention output before W_o
    wo: np.ndarray | None = None  # [hidden_size, Hq * Dv]
    sink_logit: np.ndarray | None = None  # [Hq]
    e: np.ndarray | None = None  # [Hq, Tq, Dv], dLoss/do per 512-token chunk
    g: np.ndarray | None = None  # [S, Hq, Tq, Dv], gradients of -log p(y) for S labels sampled from the model
    attention: np.ndarray | None = None  # [Hq, Tq, T]
    types: dict[str, str] = field(default_factory=dict)  # how e and g are stored, where not as dtypes_of says first


def layer_path(index: int) -> str:
    """The group of model layer `index`."""
    return f"/layers/{index:03d}"


def shape_of(name: str, header: Header, rows: int) -> tuple[int | None, ...]:
    """The shape that tensor `name` must have with `rows` recorded queries; None = any length."""
    m, tokens = header.model, header.tokens
    return {
        "q": (m.query_heads, rows, m.head_dim),
        "k": (m.kv_heads, tokens, m.head_dim),
        "v": (m.kv_heads, tokens, m.value_dim),
        "o": (m.query_heads, rows, m.value_dim),
        "wo": (m.hidden_size, m.query_heads * m.value_dim),
        "sink_logit": (m.query_heads,),
        "e": (m.query_heads, rows, m.value_dim),
        "g": (None, m.query_heads, rows, m.value_dim),
        "attention": (m.query_heads, rows, tokens),
    }[name]


def dtypes_of(name: str, header: Header) -> tuple[str, ...]:
    """The types that tensor `name` may be stored in, the writer's choice first."""
    if name == "sink_logit":
        return ("float32",)
    if name == "attention":
        return ("float16",)
    if name in ("e", "g"):  # gradients: e would underflow in float16
        first = ("bfloat16", "float32") if header.dtype == "bfloat16" else ("float32", "bfloat16")
        return first if name == "e" else (*first, "float16")
    return (header.dtype,)


def check_shape(file, where: str, shape: tuple[int, ...], expected: tuple[int | None, ...]) -> None:
    """Raises unless `shape` is `expected`; a free axis may hold 1 to LIMITS["labels"]."""
    fits = len(shape) == len(expected) and all(
        have == want or (want is None and 1 <= have <= LIMITS["labels"])
        for have, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("S" if n is None else str(n) for n in expected)
        raise TraceError(file, where, f"has shape [{', '.join(map(str, shape))}], the header asks for [{wanted}]")


def check_constants(file, header: Header) -> None:
    """Raises TraceError unless sizes are bounded and consistent and constants finite."""
    m = header.model
    for where, name, value in (
        ("/", "tokens", header.tokens),
        *(
            ("/model", n, getattr(m, n))
            for n in ("layers", "query_heads", "kv_heads", "head_dim", "value_dim", "hidden_size")
        ),
    ):
        least = 0 if name == "hidden_size" else 1
        if not least <= value <= LIMITS[name]:
            raise TraceError(file, where, f"{name} is {value}, must lie in {least} to {LIMITS[name]}")
    if not 0 <= header.prompt_tokens <= header.tokens:
        raise TraceError(
            file, "/", f"prompt_tokens is {header.prompt_tokens}, must lie in 0 to {header.tokens} (tokens)"
        )
    if header.dtype not in dtypes.NAMES:
        raise TraceError(file, "/", f"dtype is {header.dtype!r}, must be one of {', '.join(dtypes.NAMES)}")
    if m.query_heads % m.kv_heads:
        raise TraceError(file, "/model", f"query_heads {m.query_heads} is not a multiple of kv_heads {m.kv_heads}")
    for name, good in (
        ("scale", m.scale > 0),
        ("softcap", m.softcap >= 0),
        ("attention_scaling", m.attention_scaling > 0),
    ):
        if not (good and math.isfinite(getattr(m, name))):
            raise TraceError(file, "/model", f"{name} is {getattr(m, name)}")
    if m.rope_style not in ("half", "interleaved"):
        raise TraceError(file, "/model", f"rope_style is {m.rope_style!r}, must be half or interleaved")
    _check_frequencies(file, m)


def _check_frequencies(file, m: Model) -> None:
    if m.rope_type == "none" and m.inv_freq is not None:
        raise TraceError(file, "/model/inv_freq", "is given although rope_type is none")
    if m.rope_type != "none" and m.inv_freq is None:
        raise TraceError(file, "/model/inv_freq", f"is missing although rope_type is {m.rope_type!r}")
    if m.inv_freq is None:
        return
    if m.inv_freq.ndim != 1 or not 1 <= m.inv_freq.size <= m.head_dim // 2:
        raise TraceError(
            file,
            "/model/inv_freq",
            f"has shape {list(m.inv_freq.shape)}, must be [rope_dim / 2] with rope_dim at most head_dim {m.head_dim}",
        )
    _check_finite(file, "/model/inv_freq", m.inv_freq)


def check_tokens(file, header: Header) -> None:
    """Raises TraceError unless the token arrays are as long as the sequence, positions increase and numbers are
    finite."""
    for name, values in (
        ("position", header.position),
        ("id", header.token_id),
        ("segment", header.segment),
        ("logprob", header.logprob),
        ("text", header.text),
    ):
        if values is not None:
            check_shape(file, f"/tokens/{name}", np.shape(values), (header.tokens,))
    _check_increasing(file, "/tokens/position", header.position)
    if header.logprob is not None:
        _check_finite(file, "/tokens/logprob", header.logprob)


def _check_finite(file, where: str, values: np.ndarray) -> None:
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        raise TraceError(file, where, "value is not finite", (int(bad[0]),))


def _check_increasing(file, where: str, values: np.ndarray) -> None:
    """Non-negative, below 2^31 and strictly increasing."""
    values = values.astype(np.int64)
    bad = np.concatenate([values[:1] < 0, np.diff(values) <= 0]) | (values >= 1 << 31)
    if bad.any():
        at = int(bad.argmax())
        raise TraceError(file, where, f"{values[at]} is negative, too large or not above the value before it", (at,))


def check_layer(
    file,
    where: str,
    header: Header,
    index: int,
    window: int,
    rope: str,
    rope_recipe: str,
    q_index: np.ndarray | None,
    rows: int,
) -> None:
    """Raises TraceError unless the attributes and query rows of the layer at `where` fit the header. `rows` is the
    length of q's Tq axis."""
    if not 0 <= index < header.model.layers:
        raise TraceError(file, where, f"layer is {index}, the model has {header.model.layers}")
    if not 0 <= window < 1 << 31:
        raise TraceError(file, where, f"window is {window}, must be 0 (full attention) or a number of tokens")
    if rope not in ("pre", "post"):
        raise TraceError(file, where, f"rope is {rope!r}, must be pre or post")
    if rope_recipe not in ("model", "fp32"):
        raise TraceError(file, where, f"rope_recipe is {rope_recipe!r}, must be model or fp32")
    if q_index is None:
        if rows != header.tokens:
            raise TraceError(
                file, f"{where}/q", f"has {rows} rows for {header.tokens} tokens and no q_index says which"
            )
        return
    if q_index.ndim != 1 or q_index.size != rows or not 1 <= rows <= header.tokens:
        raise TraceError(
            file, f"{where}/q_index", f"has shape {list(q_index.shape)} for {rows} rows of q and {header.tokens} tokens"
        )
    _check_increasing(file, f"{where}/q_index", q_index)
    if q_index[-1] >= header.tokens:
        bad = int(np.argmax(q_index >= header.tokens))
        raise TraceError(file, f"{where}/q_index", f"{q_index[bad]} is past the last token {header.tokens - 1}", (bad,))
