"""Cosines between the tokens of one head, without a T x T matrix. `unit` is float32 [T, D]: rows of length 1, or 0
where the token's own row is 0 (its cosines count as 0)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

LAGS = 100
MAP_BLOCKS = 128  # along each side of a map
THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # 0.5 to 0.95
END = 500  # tokens of each end among which ranks are taken, as AsymKV does
_PAIRS = 2000  # AsymKV: 100 of each of 20 documents


def unit_rows(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """The rows [n, D] that `blocks` yields piece by piece, each divided by its length."""
    parts = []
    for block in blocks:
        length = np.linalg.norm(block.astype(np.float64), axis=1, keepdims=True)
        parts.append((block / np.where(length > 0, length, 1)).astype(np.float32))
    return np.concatenate(parts)


def adjacent(unit: np.ndarray) -> np.ndarray:
    """Cosine of every token with the one before it, [T - 1]."""
    return np.einsum("td,td->t", unit[1:], unit[:-1])


def lag_means(unit: np.ndarray, block: int = 512) -> np.ndarray:
    """Mean cosine of tokens 1, 2, ... LAGS apart (at most T - 1), a block of tokens at a time."""
    tokens = len(unit)
    lags = np.arange(1, min(LAGS, tokens - 1) + 1)
    sums = np.zeros(lags.size)
    for first in range(1, tokens, block):
        start, end = max(0, first - LAGS), min(first + block, tokens)
        cosines = unit[first:end] @ unit[start:end].T  # row i is token first + i, column j token start + j
        sums += [np.trace(cosines, first - start - lag, dtype=np.float64) for lag in lags]
    return sums / (tokens - lags)


def block_edges(tokens: int) -> np.ndarray:
    """First token of each of at most MAP_BLOCKS equal blocks (the last may be shorter), and `tokens`."""
    size = -(-tokens // MAP_BLOCKS)
    return np.append(np.arange(0, tokens, size), tokens)


def block_means(unit: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean cosine of all pairs of tokens in each pair of blocks, [blocks, blocks], exactly: the mean of products is the
    product of sums. A token with itself does not count, except alone in its block."""
    wide = unit.astype(np.float64)
    sums = np.add.reduceat(wide, edges[:-1], axis=0)
    selves = np.add.reduceat(np.square(wide).sum(1), edges[:-1])
    size = np.diff(edges).astype(np.float64)
    means = sums @ sums.T / np.outer(size, size)
    alone = size == 1
    inside = (np.square(sums).sum(1) - selves) / np.where(alone, 1, size * (size - 1))
    np.fill_diagonal(means, np.where(alone, selves, inside))
    return means


def overall_mean(unit: np.ndarray) -> float:
    """Mean cosine of all pairs of different tokens."""
    return float(block_means(unit, np.array([0, len(unit)]))[0, 0])


def merging_sets(cosines: np.ndarray, threshold: float) -> np.ndarray:
    """KVMerger's sets: the number of each token's set, [T], from the adjacent cosines [T - 1]. A set is a run of tokens
    whose neighbours all have a cosine above `threshold`; nothing is protected."""
    return np.concatenate([[0], np.cumsum(~(cosines > threshold))])


def sparsity(cosines: np.ndarray, threshold: float) -> float:
    """Share of the slots that merging every set into one would save: 1 - sets / T."""
    sets = merging_sets(cosines, threshold)
    return 1 - (int(sets[-1]) + 1) / sets.size


def neighbour_pairs(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Random i in 5 ... n - 1 and j in 1 ... i - 2 among the n tokens of `ends`, the same for every head."""
    rng, n = np.random.default_rng(0), len(ends(tokens))
    i = rng.integers(5, n, _PAIRS)
    return i, rng.integers(1, i - 1)


def ends(tokens: int) -> np.ndarray:
    """The first and last END tokens, all when there are no more."""
    return np.arange(tokens) if tokens <= 2 * END else np.r_[:END, tokens - END : tokens]


def neighbour_rank_correlation(unit: np.ndarray, i: np.ndarray, j: np.ndarray) -> float:
    """AsymKV: whether i is as alike to j + 1 as it is to j. Pearson correlation of the ranks that cos(i, j) and
    cos(i, j + 1) have among all pairs of different tokens; NaN when either never varies."""
    cosines = unit @ unit.T
    all_pairs = np.sort(cosines[np.tril_indices(len(unit), -1)])
    ranks = [
        (np.searchsorted(all_pairs, chosen, "left") + np.searchsorted(all_pairs, chosen, "right")) / 2
        for chosen in (cosines[i, j], cosines[i, j + 1])
    ]
    if min(np.ptp(rank) for rank in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])
