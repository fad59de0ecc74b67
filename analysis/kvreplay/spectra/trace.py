"""Spectra of a trace's keys, after and before RoPE, and values: per layer and KV head, over all tokens."""

from __future__ import annotations

import pandas as pd

from kvreplay import matrices
from kvreplay.progress import progress
from kvreplay.spectra.ranks import flatter, gram_singular_values, rank_rows, spectrum_rows
from kvreplay.trace import Trace


def analyse(trace: Trace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(spectra, ranks) of every layer, KV head and matrix; see kvreplay.spectra.ranks for the columns."""
    spectra, ranks = [], []
    for layer in progress(trace.layers, "spectra of keys and values"):
        for head in range(trace.model.kv_heads):
            for name in matrices.recorded(trace, layer):
                sigma = gram_singular_values(matrices.blocks(trace, layer, name, head))
                spectra.append(spectrum_rows(layer, head, name, sigma))
                ranks += rank_rows(layer, head, name, sigma)
    return pd.concat(spectra, ignore_index=True), pd.DataFrame(ranks)


def sentence(ranks: pd.DataFrame) -> str:
    """What the numbers say, in words: V against K after RoPE and, where the trace has it, before."""
    count, heads, value, key = flatter(ranks, "v", "k_post")
    text = (
        f"V spectra are flatter than post-RoPE K spectra in {count} of {heads} heads "
        f"(effective rank {value:.2f} against {key:.2f} of d)"
    )
    if "k_pre" in set(ranks["matrix"]):
        count, heads, value, key = flatter(ranks, "v", "k_pre")
        text += f" and than pre-RoPE K spectra in {count} of {heads} ({value:.2f} against {key:.2f})"
    return f"{text}."
