"""Spectra of W_Q, W_K and W_V: each whole, and head by head."""

from __future__ import annotations

import numpy as np
import pandas as pd

from kvreplay.progress import progress
from kvreplay.spectra.projections import TITLES, Projections
from kvreplay.spectra.ranks import ALL, flatter, rank_rows, spectrum_rows


def analyse(model: Projections) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(spectra of the whole matrices, ranks of the whole matrices and of every head); see kvreplay.spectra.ranks for
    the columns."""
    spectra, ranks = [], []
    for layer in progress(model.layers, "spectra of the weights"):
        for name in TITLES:
            weight = model.weight(layer, name).astype(np.float64)
            whole = np.linalg.svd(weight, compute_uv=False)
            spectra.append(spectrum_rows(layer, ALL, name, whole))
            ranks += rank_rows(layer, ALL, name, whole)
            by_head = weight.reshape(model.heads(layer, name), -1, weight.shape[1])
            for head, values in enumerate(np.linalg.svd(by_head, compute_uv=False)):
                ranks += rank_rows(layer, head, name, values)
    return pd.concat(spectra, ignore_index=True), pd.DataFrame(ranks)


def sentence(ranks: pd.DataFrame) -> str:
    """What the numbers say, in words. Of heads, each layer's mean counts: there are more query heads than KV heads."""
    heads = ranks[ranks["head"] != ALL].groupby(["layer", "matrix", "quantity"], as_index=False)["share"].mean()
    parts = [_flatter(ranks[ranks["head"] == ALL], "of min(dim)"), _flatter(heads.assign(head=ALL), "of d")]
    return f"Whole: {parts[0]}. Head by head: {parts[1]}."


def _flatter(ranks: pd.DataFrame, unit: str) -> str:
    """W_V against W_K and W_Q by effective rank, means over layers."""
    count, layers, value, key = flatter(ranks, "w_v", "w_k")
    count_q, _, _, query = flatter(ranks, "w_v", "w_q")
    return (
        f"W_V is flatter than W_K in {count} of {layers} layers (effective rank {value:.3f} against {key:.3f} {unit}) "
        f"and than W_Q in {count_q} ({query:.3f})"
    )
