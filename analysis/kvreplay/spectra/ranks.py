"""How concentrated a spectrum is. Energy is e_i = sigma_i^2 / sum sigma^2; nothing is centred.

    top1_energy           e_1
    top10_energy          energy of the largest 10 % of the singular values
    r90                   how many hold 90 % of the energy
    effective_rank        exp(-sum e_i ln e_i), of Shannon's entropy
    stable_rank           sum sigma^2 / sigma_1^2
    participation_ratio   (sum sigma^2)^2 / sum sigma^4

All four ranks are 1 for a rank-1 matrix; the last three are min(dim) for an orthogonal one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

TITLES = {
    "effective_rank": "effective rank",
    "participation_ratio": "participation ratio",
    "stable_rank": "stable rank",
    "r90": "rank of 90 % energy",
    "top1_energy": "top-1 energy",
    "top10_energy": "top-10 % energy",
}
_ENERGIES = ("top1_energy", "top10_energy")  # shares already
ALL = "all"  # in the column `head`: the matrix of all heads


def energy(sigma: np.ndarray) -> np.ndarray:
    """Shares of the energy [n] of singular values `sigma` [n]; NaN for a zero matrix."""
    square = np.square(sigma / sigma[0]) if sigma[0] > 0 else np.full(sigma.shape, np.nan)
    return square / square.sum()


def measures(sigma: np.ndarray) -> dict[str, float]:
    """Every quantity of TITLES, from singular values `sigma` [n] in descending order."""
    e = energy(sigma)
    positive = e[e > 0]
    values = {
        "effective_rank": np.exp(-(positive * np.log(positive)).sum()),
        "participation_ratio": 1 / np.square(e).sum(),
        "stable_rank": 1 / e[0],
        "r90": 1 + np.searchsorted(np.cumsum(e), 0.9 - 1e-12),
        "top1_energy": e[0],
        "top10_energy": e[: -(-e.size // 10)].sum(),
    }
    return {name: float(value) if e[0] > 0 else np.nan for name, value in values.items()}


def gram_singular_values(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Singular values, descending, of the rows [n, d] that `blocks` yields piece by piece: roots of the eigenvalues of
    their d x d Gram matrix in float64, as many as a matrix of n rows has."""
    gram, rows = 0.0, 0
    for block in blocks:
        wide = block.astype(np.float64)
        gram, rows = gram + wide.T @ wide, rows + len(wide)
    values = np.linalg.eigvalsh(gram)[::-1]
    return np.sqrt(np.maximum(values[: min(rows, len(gram))], 0))


def rank_rows(layer: int, head: int | str, matrix: str, sigma: np.ndarray) -> list[dict]:
    """One row per quantity: `value`, and `share`, which is value / dim for ranks and the value itself for energies."""
    where = {"layer": layer, "head": head, "matrix": matrix, "dim": sigma.size}
    return [
        {**where, "quantity": name, "value": value, "share": value if name in _ENERGIES else value / sigma.size}
        for name, value in measures(sigma).items()
    ]


def spectrum_rows(layer: int, head: int | str, matrix: str, sigma: np.ndarray) -> pd.DataFrame:
    """One row per singular value: its index from 1, `relative` to the largest, and cumulative energy."""
    with np.errstate(invalid="ignore"):
        columns = {"singular_value": sigma, "relative": sigma / sigma[0], "cumulative_energy": np.cumsum(energy(sigma))}
    index = np.arange(1, sigma.size + 1)
    return pd.DataFrame({"layer": layer, "head": head, "matrix": matrix, "dim": sigma.size, "index": index, **columns})


def flatter(ranks: pd.DataFrame, one: str, other: str) -> tuple[int, int, float, float]:
    """(where `one` has the higher effective rank, all places, mean share of `one`, of `other`); a place is a layer and
    head that have both."""
    effective = ranks[ranks["quantity"] == "effective_rank"]
    both = effective.pivot(index=["layer", "head"], columns="matrix", values="share")[[one, other]].dropna()
    return int((both[one] > both[other]).sum()), len(both), *both.mean()
