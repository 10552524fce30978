"""Hierarchical and Monarch attention: errors of constant blocks, the gap of the entropy.

Everything is float64 NumPy. Groups of consecutive tokens are given by their borders, G + 1 whole numbers from 0 to n.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import entr, logsumexp

from nla_llm.theory.bound import Matrix, Theory

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "block_constant_error",
    "block_constant_theory",
    "coarse_logit_error",
    "normalised_error",
    "variational_gap",
]


def block_constant_error(x: ArrayLike, y: ArrayLike) -> float:
    """Bound of max |exp(x_i·y_j) − exp(x̄·ȳ)| over a group of queries x (a, d) and one of keys y (b, d).

    With s_ij = x_i·y_j and s̄ = x̄·ȳ, by the mean value theorem e^max(s, s̄) |s − s̄|, and

        |s_ij − s̄| = |(x_i − x̄)·ȳ + x_i·(y_j − ȳ)| ≤ |x_i − x̄| |ȳ| + |x_i| |y_j − ȳ|,   s ≤ |x_i| |y_j|.

    The block of H-Transformer-1D (Zhu and Soricut 2021, arXiv 2107.11906) is this constant.

    Examples
    --------
    >>> block_constant_error(np.ones((3, 2)), np.ones((2, 2)))
    0.0
    """
    a, b = (np.asarray(z, dtype=np.float64) for z in (x, y))
    (_, off_a), (mean_b, off_b) = _spread(a), _spread(b)
    size_a, size_b = (np.linalg.norm(z, axis=-1).max() for z in (a, b))
    logit = off_a.max() * np.linalg.norm(mean_b) + size_a * off_b.max()
    return float(np.exp(size_a * size_b) * logit)  # |x̄| and |ȳ| are no larger than the largest norms


def coarse_logit_error(
    x: ArrayLike,
    y: ArrayLike,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    mask: NDArray[np.bool_] | None = None,
) -> Matrix:
    """δ_i >= max_j |x_i·y_j − x̄·ȳ| for the means x̄ and ȳ of the groups of x_i and y_j, (..., n_q).

    δ_i = |x_i − x̄| max |ȳ| + |x_i| max_j |y_j − ȳ| with x (..., n_q, d), y (..., n_k, d), the borders of their groups,
    and the visible keys (..., n_k).

    Examples
    --------
    >>> x = np.array([[1.0], [3.0]])
    >>> coarse_logit_error(x, [[1.0], [1.0]], np.array([0, 2]), np.array([0, 2])).tolist()
    [1.0, 1.0]
    """
    a, b = (np.asarray(z, dtype=np.float64) for z in (x, y))
    seen = np.ones(b.shape[:-1], bool)
    seen = seen if mask is None else seen & mask
    mean_a, mean_b = _group_means(a, rows, np.ones(a.shape[:-1], bool)), _group_means(b, columns, seen)
    off_a = np.linalg.norm(a - mean_a, axis=-1)
    off_b = np.where(seen, np.linalg.norm(b - mean_b, axis=-1), 0)
    size_b = np.where(seen, np.linalg.norm(mean_b, axis=-1), 0)
    largest, reach = (z.max(axis=-1, keepdims=True) for z in (size_b, off_b))
    return np.asarray(off_a * largest + np.linalg.norm(a, axis=-1) * reach)


def normalised_error(row_norms: ArrayLike, delta: ArrayLike) -> Matrix:
    """Bound of ‖P̂ − P‖_F where every logit of row i is wrong by δ_i at most, from the norms |P_i| (..., n_q).

    Numerator and denominator are then wrong by factors within e^±δ each, so |P̂_ij − P_ij| ≤ (e^(2δ_i) − 1) P_ij; and
    two rows of nonnegative numbers that sum to one differ by √2 at most.

    Examples
    --------
    >>> float(normalised_error([1.0, 1.0], [0.0, 50.0]))
    1.4142135623730951
    """
    norms, d = (np.asarray(z, dtype=np.float64) for z in (row_norms, delta))
    relative = np.expm1(2 * np.minimum(d, 50.0)) * norms
    return np.asarray(np.sqrt(np.sum(np.minimum(relative, np.sqrt(2.0)) ** 2, axis=-1)))


def block_constant_theory(row_norms: ArrayLike, delta: ArrayLike, shape: tuple[int, ...]) -> Theory:
    """The error of H-Transformer-1D as a promise, in the Frobenius norm.

    Examples
    --------
    >>> float(block_constant_theory([1.0], [0.0], (1, 1)).error("frobenius"))
    0.0
    """
    return Theory(
        name="constant blocks",
        kind="bound",
        status="VB",
        source="derived: the largest error of a logit on the blocks of Zhu and Soricut 2021, arXiv 2107.11906",
        shape=shape,
        error_norm=partial(_frobenius_only, row_norms, delta),
        assumptions=("exact arithmetic",),
    )


def variational_gap(weights: ArrayLike, logits: ArrayLike) -> Matrix:
    """log Σ_j exp(s_ij) − (Σ_j p_ij s_ij + H(p_i)) of rows p that sum to one: KL(p‖softmax(s)), never negative.

    The quantity that MonarchAttention (Yaras et al. 2025, arXiv 2505.18698) makes small over its matrices; a logit −∞
    hides an entry, where p has to be zero.

    Examples
    --------
    >>> float(variational_gap([0.5, 0.5], [1.0, 1.0])), float(variational_gap([1.0, 0.0], [1.0, 1.0]).round(6))
    (0.0, 0.693147)
    """
    p, s = (np.asarray(z, dtype=np.float64) for z in (weights, logits))
    used = np.where(p > 0, s, 0.0)
    return np.asarray(logsumexp(s, axis=-1) - np.sum(p * used + entr(p), axis=-1))


def _spread(x: Matrix) -> tuple[Matrix, Matrix]:
    """The mean of some tokens and their distances from it."""
    mean = x.mean(axis=0)
    return mean, np.linalg.norm(x - mean, axis=-1)


def _group_means(x: Matrix, bounds: NDArray[np.int64], seen: NDArray[np.bool_]) -> Matrix:
    """The mean over the visible tokens of its group, for each token."""
    weights = seen.astype(np.float64)
    kept = bounds[:-1][np.diff(bounds) > 0]
    total = np.add.reduceat(weights[..., None] * x, kept, axis=-2)
    count = np.maximum(np.add.reduceat(weights, kept, axis=-1), 1)[..., None]
    return np.asarray(np.repeat(total / count, np.diff(np.append(kept, bounds[-1])), axis=-2))


def _frobenius_only(row_norms: ArrayLike, delta: ArrayLike, norm: str) -> Matrix:
    if norm != "frobenius":
        raise ValueError(f"the error is bounded in the norm 'frobenius' only, got {norm!r}")
    return normalised_error(row_norms, delta)
