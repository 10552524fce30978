"""Importance sampling of columns: approximate matrix multiplication, its variance and the best probabilities."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nla_llm.theory.bound import Matrix, Theory

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "importance_error_first_order",
    "optimal_probabilities",
    "optimal_product_error",
    "product_error",
    "sampled_columns_theory",
    "sampled_columns_variance",
    "without_replacement_bound",
]

SOURCE = "Drineas, Kannan and Mahoney 2006, SIAM J. Comput. 36 (1)"


# -- the product -------------------------------------------------------------------------------------------------------


def product_error(a: ArrayLike, b: ArrayLike, p: ArrayLike, m: int) -> Matrix:
    """E ‖A B − C R‖_F² for C R = Σ_r a_r b_r/(m p_r) over m draws of columns a_r of A and rows b_r of B.

    (1/m) (Σ_j |a_j|² |b_j|²/p_j − ‖A B‖_F²), exactly (Drineas, Kannan and Mahoney 2006, Lemma 4).

    Parameters
    ----------
    a, b
        A (..., l, n) and B (..., n, c).
    p
        Probabilities (..., n) that sum to one, positive wherever a_j b_j is not zero.
    m
        Draws, with replacement.

    Examples
    --------
    >>> float(product_error(np.eye(2), np.eye(2), [0.5, 0.5], 1))
    2.0
    """
    a, b, p = (np.asarray(x, dtype=np.float64) for x in (a, b, p))
    _check(p, m)
    size = np.sum(a**2, axis=-2) * np.sum(b**2, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(size > 0, size / p, 0.0)
    return np.asarray((np.sum(terms, axis=-1) - np.sum((a @ b) ** 2, axis=(-2, -1))) / m)


def optimal_probabilities(a: ArrayLike, b: ArrayLike) -> Matrix:
    """p_j ∝ |a_j| |b_j|, for which :func:`product_error` is least.

    Examples
    --------
    >>> optimal_probabilities(np.diag([3.0, 1.0]), np.eye(2)).tolist()
    [0.75, 0.25]
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    size = np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-1)
    return np.asarray(size / np.sum(size, axis=-1, keepdims=True))


def optimal_product_error(a: ArrayLike, b: ArrayLike, m: int) -> Matrix:
    """The least :func:`product_error`: (1/m) ((Σ_j |a_j| |b_j|)² − ‖A B‖_F²).

    Examples
    --------
    >>> float(optimal_product_error(np.ones((1, 4)), np.ones((4, 1)), 1))  # equal terms: no error
    0.0
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    size = np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-1)
    return np.asarray((np.sum(size, axis=-1) ** 2 - np.sum((a @ b) ** 2, axis=(-2, -1))) / m)


# -- the kernel of attention -------------------------------------------------------------------------------------------


def sampled_columns_variance(p: ArrayLike, m: int) -> Matrix:
    """Var Â_ij/A_ij² of Â_ij = A_ij c_j/(m p_j), c_j binomial: (1/p_j − 1)/m; infinite where p_j is zero.

    Examples
    --------
    >>> sampled_columns_variance([0.5, 0.25, 0.25], 2).tolist()
    [0.5, 1.5, 1.5]
    """
    p = np.asarray(p, dtype=np.float64)
    _check(p, m)
    with np.errstate(divide="ignore"):
        return np.asarray((1 / p - 1) / m)


def sampled_columns_theory(
    p: ArrayLike, m: int, shape: tuple[int, ...], *, always: tuple[int, ...] = (), stratified: bool = False
) -> Theory:
    """Mean one and relative variance (1/p_j − 1)/m of a kernel whose columns are sampled with replacement.

    Stratified draws have the same mean and at most this variance: it loses what lies between strata.

    Parameters
    ----------
    p
        Probabilities (..., n_k), the batch axes broadcasting against those of ``shape``.
    m
        Draws.
    shape
        Shape of the kernel, (..., n_q, n_k).
    always
        Columns that are taken exactly, whatever is drawn.
    stratified
        One draw from each of m strata of equal probability.

    Examples
    --------
    >>> sampled_columns_theory([0.5, 0.5], 4, (1, 2)).relative_variance().tolist()
    [[0.25, 0.25]]
    """
    variance = sampled_columns_variance(p, m)
    mean = np.where(np.isinf(variance), 0.0, 1.0)
    variance = np.where(np.isinf(variance), 0.0, variance)
    variance[..., list(always)] = 0.0
    with np.errstate(divide="ignore"):
        log_variance = np.log(variance)
    return Theory(
        name="sampled columns", kind="bound" if stratified else "closed form", status="VB" if stratified else "VE",
        source=SOURCE + ", Lemma 3", shape=shape,
        mean_rows=partial(_same_rows, mean, shape), log_variance_rows=partial(_same_rows, log_variance, shape),
        assumptions=("strata of equal probability" if stratified else "independent draws, with replacement",),
    )  # fmt: skip


def importance_error_first_order(rows: ArrayLike, p: ArrayLike, m: int) -> Matrix:
    """Squared error of rows (..., n) of the normalised estimate, to first order in 1/m.

    Σ_j (P_ij²/p_j) (1 − 2 P_ij + |P_i|²)/m: row i of P̂ is a ratio of means of m draws, whose deviation is to first
    order the mean of (P_ij/p_j)(e_j − P_i) (derived, by the delta method). With p_j = 1/n it is
    :func:`nla_llm.theory.yardsticks.random_keys_error_first_order` with replacement.

    Examples
    --------
    >>> float(importance_error_first_order([0.5, 0.5], [0.5, 0.5], 4))
    0.125
    """
    rows, p = np.asarray(rows, dtype=np.float64), np.asarray(p, dtype=np.float64)
    _check(p, m)
    norm = np.sum(rows**2, axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(rows > 0, rows**2 / p * (1 - 2 * rows + norm), 0.0)
    return np.asarray(np.sum(terms, axis=-1) / m)


def without_replacement_bound(n: int, m: int, shape: tuple[int, ...]) -> Theory:
    """Bound n/m − 1 of the relative variance where m of n columns are drawn without replacement, some taken exactly.

    A column outside the exact part is drawn with probability m/n and weighs n/m: relative variance n/m − 1. One inside
    has none. Which is which may itself be drawn, so this bounds the mean over that.

    Examples
    --------
    >>> without_replacement_bound(8, 4, (1, 8)).relative_variance()[0, 0].round(12).item()
    1.0
    """
    with np.errstate(divide="ignore"):
        log_variance = np.full(n, np.log(n / m - 1))
    return Theory(
        name="without replacement", kind="bound", status="VB", source="derived: hypergeometric counts", shape=shape,
        mean_rows=partial(_same_rows, np.ones(n), shape), log_variance_rows=partial(_same_rows, log_variance, shape),
        assumptions=("uniform draws without replacement", "no weights between zero and one"),
    )  # fmt: skip


def _same_rows(row: NDArray[np.float64], shape: tuple[int, ...], start: int, stop: int) -> Matrix:
    """Rows ``start:stop`` of a matrix whose rows are all ``row`` (..., n_k)."""
    return np.asarray(np.broadcast_to(row[..., None, :], (*shape[:-2], stop - start, shape[-1])))


def _check(p: NDArray[np.float64], m: int) -> None:
    if not (bool(np.all(p >= 0)) and np.allclose(p.sum(axis=-1), 1, rtol=1e-8)):
        raise ValueError("p must hold probabilities that are not negative and sum to one")
    if isinstance(m, bool) or int(m) != m or m < 1:
        raise ValueError(f"m must be a whole number >= 1, got {m!r}")
