"""The cosines of a trace's keys and values as tables, and what the tables say in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kvreplay import matrices
from kvreplay.matrices import TITLES
from kvreplay.progress import progress
from kvreplay.similarity import cosines
from kvreplay.similarity.cosines import THRESHOLDS
from kvreplay.trace import Trace

ALL = "all"  # in the column `head`: over the heads of a layer
_LEAST_TOKENS = 6  # the fewest that have a pair to rank
_QUANTILES = (5, 25, 50, 75, 95)
_SAID = (0.55, 0.75, 0.95)  # thresholds of the sentence


class SimilarityError(ValueError):
    """A trace is too short to compare its tokens."""


@dataclass
class Tables:
    """What was found. Every table has the columns layer, head, matrix, quantity and value."""

    values: pd.DataFrame  # mean of all pairs; mean and quantiles of adjacent tokens; rank correlation of neighbours
    lags: pd.DataFrame  # mean cosine per `lag`
    sets: pd.DataFrame  # sparsity per `threshold`: of every head, and mean and standard deviation over heads
    maps: dict[int, dict[str, np.ndarray]]  # by layer and matrix: mean cosines float32 [heads, block, block]
    edges: np.ndarray  # first token of each block, and T


def analyse(trace: Trace) -> Tables:
    """Compares the tokens of every layer, KV head and matrix. Raises SimilarityError when there are too few."""
    if trace.tokens < _LEAST_TOKENS:
        raise SimilarityError(f"{trace.file}: {trace.tokens} tokens are too few, {_LEAST_TOKENS} are needed")
    edges, pairs = cosines.block_edges(trace.tokens), cosines.neighbour_pairs(trace.tokens)
    values, lags, sets, maps = [], [], [], {}
    for layer in progress(trace.layers, "similarity of tokens"):
        maps[layer] = {name: [] for name in matrices.recorded(trace, layer)}
        for head, name in ((head, name) for head in range(trace.model.kv_heads) for name in maps[layer]):
            where = {"layer": layer, "head": head, "matrix": name}
            unit = cosines.unit_rows(matrices.blocks(trace, layer, name, head))
            neighbours = cosines.adjacent(unit)
            maps[layer][name].append(cosines.block_means(unit, edges).astype(np.float32))
            correlation = cosines.neighbour_rank_correlation(unit[cosines.ends(trace.tokens)], *pairs)
            values += [{**where, "quantity": "mean", "value": cosines.overall_mean(unit)}]
            values += [{**where, "quantity": quantity, "value": value} for quantity, value in _summary(neighbours)]
            values += [{**where, "quantity": "rank_correlation", "value": correlation}]
            means = enumerate(cosines.lag_means(unit), 1)
            lags += [{**where, "lag": lag, "quantity": "cosine", "value": value} for lag, value in means]
            if name == "k_post":
                shares = [(eps, cosines.sparsity(neighbours, eps)) for eps in THRESHOLDS]
                sets += [{**where, "threshold": eps, "quantity": "sparsity", "value": share} for eps, share in shares]
        maps[layer] = {name: np.stack(of_heads) for name, of_heads in maps[layer].items()}
    return Tables(pd.DataFrame(values), pd.DataFrame(lags), _with_moments(pd.DataFrame(sets)), maps, edges)


def _summary(neighbours: np.ndarray) -> Iterator[tuple[str, float]]:
    """(quantity, value): mean and quantiles of the adjacent cosines."""
    yield "adjacent_mean", float(neighbours.mean(dtype=np.float64))
    for percent, value in zip(_QUANTILES, np.percentile(neighbours, _QUANTILES), strict=True):
        yield f"adjacent_p{percent:02d}", float(value)


def _with_moments(sets: pd.DataFrame) -> pd.DataFrame:
    """`sets`, and for each layer and threshold the mean and the standard deviation over heads."""
    places = sets.groupby(["layer", "matrix", "threshold"], as_index=False)["value"]
    moments = [
        table.assign(head=ALL, quantity=f"sparsity_{moment}")
        for moment, table in (("mean", places.mean()), ("std", places.std(ddof=0)))
    ]
    return pd.concat([sets, *moments], ignore_index=True)


def sentences(tables: Tables) -> Iterator[str]:
    """What the numbers say, one sentence per analysis; means are over layers and heads."""
    values = tables.values
    yield f"All pairs of tokens have a mean cosine of {_means(values, 'mean')}."
    yield (
        f"Adjacent tokens have a mean cosine of {_means(values, 'adjacent_mean')}; "
        f"post-RoPE keys beat values in {_keys_above_values(values, 'adjacent_mean')} heads."
    )
    first, last = (tables.lags[tables.lags["lag"] == lag] for lag in (1, tables.lags["lag"].max()))
    yield (
        f"{last['lag'].iloc[0]} tokens apart the mean cosine is {_means(last, 'cosine')}, "
        f"against {_means(first, 'cosine')} for adjacent ones."
    )
    yield (
        f"Neighbours share their likeness to a third token (AsymKV) with a rank correlation of "
        f"{_means(values, 'rank_correlation')}; post-RoPE keys beat values in "
        f"{_keys_above_values(values, 'rank_correlation')} heads."
    )
    yield _saved(tables.sets[tables.sets["quantity"] == "sparsity_mean"])


def _means(table: pd.DataFrame, quantity: str) -> str:
    """The mean of a quantity for each matrix, as text."""
    found = table[table["quantity"] == quantity].groupby("matrix")["value"].mean()
    return ", ".join(f"{round(found[name], 2) + 0.0:.2f} ({title})" for name, title in TITLES.items() if name in found)


def _keys_above_values(values: pd.DataFrame, quantity: str) -> str:
    """In how many heads post-RoPE keys have the higher value, as text."""
    chosen = values[values["quantity"] == quantity]
    both = chosen.pivot(index=["layer", "head"], columns="matrix", values="value")[["k_post", "v"]].dropna()
    return f"{int((both['k_post'] > both['v']).sum())} of {len(both)}"


def _saved(sets: pd.DataFrame) -> str:
    """What KVMerger's sets save, over layers and by layer."""
    means = sets.groupby("threshold")["value"].mean()
    levels = ", ".join(f"{means[eps]:.1%} above a cosine of {eps}" for eps in _SAID)
    layers = sets[sets["threshold"] == _SAID[1]].set_index("layer")["value"]
    low, high = (f"{layers[layer]:.1%} in layer {layer}" for layer in (layers.idxmin(), layers.idxmax()))
    return (
        f"Merging runs of adjacent post-RoPE keys (KVMerger) saves this share of the slots: {levels}; "
        f"at {_SAID[1]} from {low} to {high}."
    )
