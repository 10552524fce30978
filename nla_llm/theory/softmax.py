"""Bounds for the softmax: Lipschitz constants, perturbations, rounding, and norms of row-stochastic matrices.

Everything is float64 NumPy. Condition numbers of given data are measures (:mod:`nla_llm.measures`); here are the
promises that hold for all data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from nla_llm.theory.bound import Matrix

__all__ = [
    "Interval",
    "attention_perturbation_bound",
    "jacobian_infinity_norm",
    "jacobian_spectral_bounds",
    "lipschitz_constant",
    "log_sum_exp_rounding_bound",
    "row_stochastic_frobenius_bounds",
    "row_stochastic_spectral_bounds",
    "softmax_rounding_bound",
    "total_variation_bound",
]


class Interval(NamedTuple):
    """A certain lower and upper bound, arrays of one shape."""

    lower: Matrix
    upper: Matrix


# -- the Jacobian J = diag(p) − p pᵀ -----------------------------------------------------------------------------------


def lipschitz_constant(temperature: float = 1.0) -> float:
    """Least constant of ‖softmax(x/τ) − softmax(y/τ)‖₂ ≤ L ‖x − y‖₂: 1/(2τ), not 1/τ.

    λ₁(J) ≤ max 2 p_i (1 − p_i) ≤ ½ by Gershgorin, attained at p = (½, ½, 0, …).

    Examples
    --------
    >>> lipschitz_constant()
    0.5
    """
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
    return 0.5 / temperature


def jacobian_spectral_bounds(p: ArrayLike) -> Interval:
    """Bounds of the largest eigenvalue of J at probabilities p (..., n): second largest p ≤ λ₁ ≤ largest p, and more.

    Interlacing gives p_(2) ≤ λ₁ ≤ p_(1); Gershgorin gives λ₁ ≤ max 2 p_i (1 − p_i). The smaller upper bound is taken.

    Examples
    --------
    >>> [float(b) for b in jacobian_spectral_bounds([0.5, 0.5])]
    [0.5, 0.5]
    """
    rows = _probabilities(p)
    ordered = np.sort(rows, axis=-1)
    second = ordered[..., -2] if rows.shape[-1] > 1 else np.zeros(rows.shape[:-1])
    return Interval(np.asarray(second), np.minimum(ordered[..., -1], jacobian_infinity_norm(rows)))


def jacobian_infinity_norm(p: ArrayLike) -> Matrix:
    """‖J‖_∞ = ‖J‖₁ = 2 p_max (1 − p_max) at probabilities p (..., n), exactly.

    Examples
    --------
    >>> float(jacobian_infinity_norm([0.25, 0.75]))
    0.375
    """
    top = _probabilities(p).max(axis=-1)
    return np.asarray(2 * top * (1 - top))


# -- perturbations -----------------------------------------------------------------------------------------------------


def total_variation_bound(oscillation: ArrayLike) -> Matrix:
    """Largest total variation ½‖softmax(x) − softmax(x + h)‖₁ over all x, for max h − min h = oscillation.

    tanh(oscillation/4), attained by two entries whose order h turns round: x = (0, osc/2), h = (osc, 0) (derived).

    Examples
    --------
    >>> float(total_variation_bound(0.0))
    0.0
    """
    width = np.asarray(oscillation, dtype=np.float64)
    if not bool(np.all(width >= 0)):
        raise ValueError(f"oscillation is max − min and cannot be negative or NaN, got {oscillation!r}")
    return np.asarray(np.tanh(width / 4))


def attention_perturbation_bound(logit_error: ArrayLike, value_norm: ArrayLike) -> Matrix:
    """‖(softmax(S + E) − softmax(S)) V‖_F ≤ ½ ‖E‖_F ‖V‖₂ from the two norms (derived from the Lipschitz constant).

    Examples
    --------
    >>> float(attention_perturbation_bound(0.1, 2.0))
    0.1
    """
    return np.asarray(lipschitz_constant() * _norm("logit_error", logit_error) * _norm("value_norm", value_norm))


# -- rounding ----------------------------------------------------------------------------------------------------------


def softmax_rounding_bound(n: int, unit_roundoff: float, *, spread: float | None = None) -> float:
    """Relative error of every softmax entry in floating point with recursive summation, to first order in u.

    Without a shift (n + 3) u (Blanchard, Higham and Higham 2021, IMA J. Numer. Anal. 41, eq. 3.6). After subtracting
    the maximum (n + 2 + 2·spread) u, spread = max x − min x (derived; the printed constant is of the same form). The
    exponential is taken to have a relative error of at most u.

    Parameters
    ----------
    n
        Entries of the vector.
    unit_roundoff
        u, half the machine epsilon.
    spread
        max x − min x where the maximum is subtracted; None where it is not.

    Examples
    --------
    >>> softmax_rounding_bound(5, 2.0**-53) == 8 * 2.0**-53
    True
    """
    _check_rounding(n, unit_roundoff)
    if spread is None:
        return float((n + 3) * unit_roundoff)
    if not (np.isfinite(spread) and spread >= 0):
        raise ValueError(f"spread is max x − min x and must be finite and >= 0, got {spread!r}")
    return float((n + 2 + 2 * spread) * unit_roundoff)


def log_sum_exp_rounding_bound(value: ArrayLike, n: int, unit_roundoff: float) -> Matrix:
    """Absolute error of the unshifted log-sum-exp y in floating point, u|y| + (n + 1) u, to first order in u.

    Blanchard, Higham and Higham 2021, IMA J. Numer. Anal. 41, before Theorem 3.2. Valid where nothing overflows.

    Examples
    --------
    >>> float(log_sum_exp_rounding_bound(0.0, 3, 2.0**-24)) == 4 * 2.0**-24
    True
    """
    _check_rounding(n, unit_roundoff)
    return np.asarray(unit_roundoff * (np.abs(np.asarray(value, dtype=np.float64)) + n + 1))


# -- row-stochastic matrices -------------------------------------------------------------------------------------------


def row_stochastic_spectral_bounds(column_sums: ArrayLike, n_q: int) -> Interval:
    """√(n_q/n_k) ≤ σ₁(P) ≤ √(max column sum) ≤ √n_q for a row-stochastic P, from its column sums (..., n_k).

    For square P the lower bound is 1, attained by the doubly stochastic ones alone.

    Examples
    --------
    >>> [float(b) for b in row_stochastic_spectral_bounds([1.0, 1.0], 2)]
    [1.0, 1.0]
    """
    sums = np.asarray(column_sums, dtype=np.float64)
    if sums.ndim < 1 or not np.allclose(sums.sum(axis=-1), n_q, rtol=1e-8):
        raise ValueError(f"column_sums (..., n_k) of a row-stochastic matrix must add up to n_q={n_q}")
    upper = np.sqrt(sums.max(axis=-1))
    return Interval(np.full_like(upper, np.sqrt(n_q / sums.shape[-1])), np.asarray(upper))


def row_stochastic_frobenius_bounds(n_q: int, n_k: int) -> Interval:
    """√(n_q/n_k) ≤ ‖P‖_F ≤ √n_q: uniform attention below, one key in each row above.

    Examples
    --------
    >>> [float(b) for b in row_stochastic_frobenius_bounds(4, 4)]
    [1.0, 2.0]
    """
    return Interval(np.asarray(np.sqrt(n_q / n_k)), np.asarray(np.sqrt(float(n_q))))


def _probabilities(p: ArrayLike) -> Matrix:
    rows = np.asarray(p, dtype=np.float64)
    if rows.ndim < 1 or not bool(np.all(rows >= 0)) or not np.allclose(rows.sum(axis=-1), 1, rtol=1e-8):
        raise ValueError("p must hold probabilities (..., n): entries >= 0 that sum to one along the last axis")
    return rows


def _norm(name: str, value: ArrayLike) -> Matrix:
    a = np.asarray(value, dtype=np.float64)
    if not bool(np.all(a >= 0)):
        raise ValueError(f"{name} is a norm and cannot be negative or NaN, got {value!r}")
    return a


def _check_rounding(n: int, unit_roundoff: float) -> None:
    if isinstance(n, bool) or int(n) != n or n < 1:
        raise ValueError(f"n must be a whole number >= 1, got {n!r}")
    if not 0 < unit_roundoff < 1:
        raise ValueError(
            f"unit_roundoff must lie between 0 and 1, got {unit_roundoff!r}; it is half the machine epsilon"
        )
