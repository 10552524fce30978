"""Errors of the yardsticks: doing nothing (uniform attention, random keys) and the best possible of a given rank.

Everything is float64 NumPy.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit, gammaln

from nla_llm.theory.bound import Matrix, Theory

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

__all__ = [
    "eckart_young",
    "eckart_young_theory",
    "random_keys_error",
    "random_keys_error_first_order",
    "random_keys_relative_error",
    "random_keys_theory",
    "uniform_error",
    "uniform_theory",
]

_LEAST = 1e-140  # of the entries of a row: u² at u = 50/p has to be a number
_STEP = 0.25  # of the trapezoidal rule in log u: its error is of the order of exp(−π²/step), below 1e-16


# -- the best possible -------------------------------------------------------------------------------------------------


def eckart_young(singular_values: ArrayLike, rank: int, norm: str = "frobenius") -> Matrix:
    """Least error that any matrix of rank at most ``rank`` can have, from all singular values (..., r) of the matrix.

    Eckart and Young 1936, Mirsky 1960: in every unitarily invariant norm it is the norm of the singular values that are
    left, and the truncated singular value decomposition attains it.

    Parameters
    ----------
    singular_values
        In any order, >= 0.
    rank
        At least 0; from r on the error is zero.
    norm
        'spectral', 'frobenius' or 'nuclear'.

    Returns
    -------
    Absolute error, an array of the batch shape.

    Examples
    --------
    >>> [float(eckart_young([3.0, 2.0, 1.0], 1, norm)) for norm in ("spectral", "nuclear")]
    [2.0, 3.0]
    """
    s = -np.sort(-np.asarray(singular_values, dtype=np.float64), axis=-1)
    if s.ndim < 1 or not bool(np.all(np.isfinite(s) & (s >= 0))):
        raise ValueError(f"singular_values must be an array (..., r) of finite numbers >= 0, got {singular_values!r}")
    if isinstance(rank, bool) or int(rank) != rank or rank < 0:
        raise ValueError(f"rank must be a whole number >= 0, got {rank!r}")
    tail = s[..., rank:]
    if norm == "spectral":
        return np.asarray(tail[..., 0] if tail.shape[-1] else np.zeros(s.shape[:-1]))
    if norm == "frobenius":
        top = s[..., :1]  # taken out, so that no square over- or underflows
        return np.asarray(top[..., 0] * np.linalg.norm(tail / np.where(top > 0, top, 1.0), axis=-1))
    if norm == "nuclear":
        return np.asarray(tail.sum(axis=-1))
    raise ValueError(f"norm must be 'spectral', 'frobenius' or 'nuclear', got {norm!r}")


def eckart_young_theory(singular_values: ArrayLike, rank: int, shape: tuple[int, ...]) -> Theory:
    """The error of the truncated singular value decomposition as a promise, in three norms.

    Examples
    --------
    >>> float(eckart_young_theory([3.0, 2.0, 1.0], 1, (3, 3)).error("spectral"))
    2.0
    """
    s = np.asarray(singular_values, dtype=np.float64)
    eckart_young(s, rank)  # bad arguments show here, not when a figure is drawn
    return Theory(
        name=f"best of rank {rank}",
        kind="closed form",
        status="VE",
        source="Eckart and Young 1936; Mirsky 1960",
        shape=shape,
        error_norm=partial(eckart_young, s, rank),
        assumptions=("exact arithmetic", "all singular values of the matrix are given"),
    )


# -- doing nothing -----------------------------------------------------------------------------------------------------


def uniform_error(squared_norm: ArrayLike, keys_seen: ArrayLike) -> Matrix:
    """‖P − U‖_F of uniform attention U from ‖P‖_F² and the number of keys that each query sees, exactly.

    √(‖P‖_F² − Σ_i 1/n_i), as the rows of P and U sum to one over the n_i keys that query i sees.

    Parameters
    ----------
    squared_norm
        ‖P‖_F², of any batch shape.
    keys_seen
        n_i (..., n_q), n_k in every row without a mask and i + 1 for causal attention.

    Examples
    --------
    >>> float(uniform_error(2.0, [2, 2]))  # the identity of order two
    1.0
    """
    seen = np.asarray(keys_seen, dtype=np.float64)
    if not bool(np.all(seen >= 1)):
        raise ValueError(f"keys_seen must be at least 1 in every row, got {seen.min()!r}")
    difference = np.asarray(squared_norm, dtype=np.float64) - np.sum(1 / seen, axis=-1)
    return np.asarray(np.sqrt(np.maximum(difference, 0)))  # rounding alone can make it negative


def uniform_theory(squared_norm: Callable[[], ArrayLike], keys_seen: ArrayLike, shape: tuple[int, ...]) -> Theory:
    """The error of uniform attention as a promise, from ‖P‖_F², which is asked for when the error is.

    Examples
    --------
    >>> float(uniform_theory(lambda: 2.0, [2, 2], (2, 2)).error("frobenius"))
    1.0
    """
    return _frobenius_theory(
        "uniform attention",
        "derived: rows of both matrices sum to one over the keys that a query sees",
        shape,
        lambda: uniform_error(squared_norm(), keys_seen),
    )


def random_keys_theory(entries: Callable[[], Matrix], m: int, shape: tuple[int, ...]) -> Theory:
    """The root mean square error of softmax over m random keys as a promise, from P, asked for when the error is.

    Examples
    --------
    >>> promise = random_keys_theory(lambda: np.ones((2, 8)) / 8, 2, (2, 8))
    >>> bool(np.isclose(promise.error("frobenius") ** 2, 2 * (1 / 2 - 1 / 8)))
    True
    """
    return _frobenius_theory(
        f"{m} random keys",
        "derived: the ratio's mean as an integral over the generating function of the draws",
        shape,
        lambda: np.sqrt(np.sum(random_keys_error(entries(), m), axis=-1)),
    )


def _frobenius_theory(name: str, source: str, shape: tuple[int, ...], error: Callable[[], Matrix]) -> Theory:
    def in_norm(norm: str) -> Matrix:
        if norm != "frobenius":
            raise ValueError(f"the error is known in the norm 'frobenius' only, got {norm!r}")
        return error()

    return Theory(
        name=name, kind="closed form", status="VE", source=source, shape=shape, error_norm=in_norm,
        assumptions=("exact arithmetic",),
    )  # fmt: skip


def random_keys_relative_error(n: int, m: int) -> float:
    """Relative error of softmax over m keys drawn from n without replacement, √(n/m − 1): a rule of thumb.

    First order, for rows so flat that ‖p‖₃³ ≪ ‖p‖₂² ≪ 1; for the output it also needs centred values.

    Examples
    --------
    >>> round(random_keys_relative_error(1024, 256), 3)
    1.732
    """
    _check_draws(m, n, replacement=False)
    return float(np.sqrt(n / m - 1))


def random_keys_error_first_order(p: ArrayLike, m: int, *, replacement: bool = False) -> Matrix:
    """Squared error of rows p (..., n) when softmax runs over m uniformly drawn keys, where that is small: c(…).

    c (‖p‖₂² − 2‖p‖₃³ + ‖p‖₂⁴) with c = n/m with and (n/m − 1) n/(n − 1) without replacement: the delta method on
    multinomial and hypergeometric counts (derived). Good where c (‖p‖₂² − 1/n), the relative variance of the
    denominator, is far below 1; exact for uniform rows without replacement.

    Examples
    --------
    >>> bool(np.isclose(random_keys_error_first_order(np.ones(8) / 8, 2), 1 / 2 - 1 / 8))
    True
    """
    rows = _check_rows(p)
    n = rows.shape[-1]
    _check_draws(m, n, replacement=replacement)
    factor = n / m if replacement else (n / m - 1) * n / max(n - 1, 1)
    second = np.sum(rows**2, axis=-1)
    return np.asarray(factor * (second - 2 * np.sum(rows**3, axis=-1) + second**2))


def random_keys_error(p: ArrayLike, m: int, *, replacement: bool = False) -> Matrix:
    """Squared error of rows p (..., n), averaged over all draws of m keys: E Σ_j (p̂_j − p_j)², p̂ softmax on the draw.

    Derived: 1/D = ∫ e^(−uD) du and 1/D² = ∫ u e^(−uD) du for the denominator D turn the mean of the ratio into the mean
    of e^(−uD), which is a power for independent draws and, for draws without replacement, the coefficient of x^m in
    Π(1 + x e^(−u p_l)), taken by the trapezoidal rule on a circle through the saddle point. Costs O(n) respectively
    O(n^1.5) per node and row with a few hundred nodes: for samples of rows.

    Parameters
    ----------
    p
        Rows of a row-stochastic matrix, all entries positive: a draw of keys that a query does not see has no softmax.
    m
        Keys drawn; at most n without replacement.

    Examples
    --------
    >>> bool(np.isclose(random_keys_error(np.ones(8) / 8, 2), 1 / 2 - 1 / 8))
    True
    """
    rows = _check_rows(p)
    n = rows.shape[-1]
    _check_draws(m, n, replacement=replacement)
    if not bool(np.all(rows > _LEAST)):
        raise ValueError(f"entries of p must be above {_LEAST:g}, the squares of their reciprocals are needed")
    flat = rows.reshape(-1, n)
    one = _error_with_replacement if replacement else _error_without_replacement
    return np.asarray([one(row, m) for row in flat]).reshape(rows.shape[:-1])


def _error_with_replacement(p: Matrix, m: int) -> float:
    u = _nodes(n=len(p), m=m, smallest=m * float(p.min()))
    e = np.exp(-np.multiply.outer(u, p))
    log_mean = np.log(np.maximum(e.mean(axis=1), np.finfo(np.float64).tiny))
    single = m * (e @ p**2) / len(p) * np.exp((m - 1) * log_mean)
    double = m * (m - 1) * (e**2 @ p**2) / len(p) ** 2 * np.exp((m - 2) * log_mean)
    return float(_STEP * np.sum(u * (u * (single + double) - 2 * single)) + p @ p)


def _error_without_replacement(p: Matrix, m: int) -> float:
    n = len(p)
    if m == n:
        return 0.0
    u = _nodes(n=n, m=m, smallest=float(np.sort(p)[:m].sum()))
    transform = np.asarray([_subset_transform(p, m, float(v)) for v in u])
    return float(_STEP * np.sum(u * (u - 2) * transform) + p @ p)


def _nodes(*, n: int, m: int, smallest: float) -> Matrix:
    """Nodes u, equidistant in log u, from where the integrand is still constant to where it has vanished."""
    return np.asarray(np.exp(np.arange(np.log(1e-17 * n / m), np.log(50 / smallest), _STEP)))


def _subset_transform(p: Matrix, m: int, u: float) -> float:
    """E Σ_{j ∈ S} p_j² e^(−u D_S) over the subsets S of m keys."""
    n = len(p)
    log_radius = _saddle_point(u * p, m)
    b = expit(log_radius - u * p)  # inclusion probabilities of independent keys, whose mean number is m
    log_size = np.sum(np.logaddexp(0, log_radius - u * p)) - m * log_radius
    log_subsets = gammaln(n + 1) - gammaln(m + 1) - gammaln(n - m + 1)
    # No factor vanishes: the point nearest to −1 is exp(iπ) as rounded, whose imaginary part is not zero.
    points = min(n + 1, int(4.5 * np.sqrt(n)) + 8)  # the number of keys stays within nine deviations of m
    turn = np.exp(2j * np.pi * np.arange(points) / points)[:, None]
    factors = 1 - b + b * turn
    coefficient = np.prod(factors, axis=1) * ((turn * b / factors) @ p**2) * turn[:, 0] ** -m
    return float(np.exp(log_size - log_subsets) * np.mean(coefficient.real))


def _saddle_point(shift: Matrix, m: int) -> float:
    """log ρ with Σ_l expit(log ρ − shift_l) = m, by bisection; the least one that rounding allows.

    It lies within log n of the m-th and the next of the ascending shifts. That matters where shifts differ by many
    orders of magnitude, as they do in a sharp row: between all of them a bisection has no digits left.
    """
    n, ordered = len(shift), np.sort(shift)
    low, high = float(ordered[m - 1] - np.log(n)), float(ordered[m] + np.log(n))
    for _ in range(1100):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if float(np.sum(expit(middle - shift))) < m:
            low = middle
        else:
            high = middle
    return high


def _check_rows(p: ArrayLike) -> Matrix:
    rows = np.asarray(p, dtype=np.float64)
    if rows.ndim < 1 or not bool(np.all(rows > 0)) or not np.allclose(rows.sum(axis=-1), 1, rtol=1e-8):
        raise ValueError(
            "p must hold rows of positive entries that sum to one; leave out keys that a query does not see"
        )
    return rows


def _check_draws(m: int, n: int, *, replacement: bool) -> None:
    if isinstance(m, bool) or int(m) != m or m < 1:
        raise ValueError(f"m must be a whole number >= 1, got {m!r}")
    if not replacement and m > n:
        raise ValueError(f"m={m} keys cannot be drawn without replacement from {n}; pass m <= {n} or replacement=True")
