"""Tiny models with random weights from transformers' own configurations: every kind of attention a trace holds."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
import transformers as tf

VOCAB, TOKENS = 64, 80
torch.set_num_threads(1)  # tiny models gain nothing from more
# what models call the cache they are given
CACHE = "cache" if "cache" in inspect.signature(tf.LlamaForCausalLM.forward).parameters else "past_key_values"
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How to build a model, and what its trace must say."""

    model: str
    config: str
    more: dict
    windows: tuple[int, ...] = (0, 0, 0)
    post: tuple[int, ...] = ()  # layers stored rotated
    pairs: int = 4  # rotated channel pairs, 0 = none
    head_dim: int = 8
    rope_type: str = "default"
    style: str = "half"
    softcap: float = 0.0
    sinks: bool = False
    attentions: tuple[str, ...] = ("sdpa", "eager")
    heads: tuple[int, int] = (6, 2)


def rope(kind: str, **more) -> dict:
    """rope_parameters (transformers 5) of one type."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def _kind(name: str, **more) -> Kind:
    return Kind(f"{name}ForCausalLM", f"{name}Config", **more)


_LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
_YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
_LONG = rope(
    "longrope", factor=4.0, original_max_position_embeddings=64, short_factor=[1.0, 1.2, 1.5, 2.0],
    long_factor=[2.0, 3.0, 4.0, 8.0],
)  # fmt: skip
_GEMMA3 = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    }
}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_MIXED = {"layer_types": _TYPES, "sliding_window": 24, "head_dim": 8}

ZOO: dict[str, Kind] = {
    "llama": _kind("Llama", more={}),
    "llama_mha": _kind("Llama", more={"num_key_value_heads": 6}, heads=(6, 6)),
    "llama3_rope": _kind("Llama", more=_LLAMA3, rope_type="llama3"),
    "yarn": _kind("Llama", more=_YARN, rope_type="yarn"),
    "mistral": _kind("Mistral", more={"sliding_window": 24}, windows=(24, 24, 24)),
    "qwen2": _kind("Qwen2", more={}),
    "qwen3": _kind("Qwen3", more={"head_dim": 16}, pairs=8, head_dim=16),
    "gemma2": _kind(
        "Gemma2", more={**_MIXED, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 12},
        windows=(24, 0, 24), softcap=3.0, attentions=("eager",),
    ),
    "gemma3": Kind(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**_MIXED, **_GEMMA3, "query_pre_attn_scalar": 12},
        windows=(24, 0, 24), post=(0, 2),
    ),
    "phi3_longrope": _kind("Phi3", more={**_LONG, "original_max_position_embeddings": 64}, rope_type="longrope"),
    "gpt_oss": _kind(
        "GptOss", more={**_MIXED, **_YARN, "num_local_experts": 2, "num_experts_per_tok": 1},
        windows=(24, 0, 24), sinks=True, rope_type="yarn", attentions=("eager",),
    ),
    "stablelm": _kind("StableLm", more=rope("default", partial_rotary_factor=0.5), pairs=2),
    "stablelm_qk_norm": _kind(
        "StableLm", more={**rope("default", partial_rotary_factor=0.5), "qk_layernorm": True}, pairs=2
    ),
    "gpt_neox": _kind(
        "GPTNeoX", more={**rope("default", partial_rotary_factor=0.5), "rotary_pct": 0.5}, pairs=2, heads=(6, 6)
    ),
    "glm": _kind(
        "Glm", more={**rope("default", partial_rotary_factor=0.5), "head_dim": 8}, pairs=2, style="interleaved"
    ),
    "gpt2": Kind(
        "GPT2LMHeadModel", "GPT2Config", {"n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 256},
        pairs=0, rope_type="none", heads=(6, 6),
    ),
    "smollm3_nope": _kind("SmolLM3", more={"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2}, post=(1,)),
}  # fmt: skip


def build(kind: Kind, attention: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0):
    """A model in eval mode, its weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    config = getattr(tf, kind.config)(**{**_SIZES, **kind.more})
    config._attn_implementation = attention
    model = getattr(tf, kind.model)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.normal_(0, 0.25)
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.5)
    return model.to(dtype).eval()


def sequence(tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    """Random ids [1, tokens]."""
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))
