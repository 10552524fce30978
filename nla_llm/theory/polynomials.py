"""Polynomials in place of exp: their errors as equalities, their real roots, and what they do to softmax attention.

Everything is float64 NumPy.
"""

from __future__ import annotations

from math import lgamma
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from scipy.special import gammainc, gammaincc, hyp1f1, ive

from nla_llm.theory.bound import Matrix, Theory

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "chebyshev_remainder",
    "least_degree",
    "normalised_entry_bound",
    "reweighting_bounds",
    "taylor_ratio",
    "taylor_remainder",
    "taylor_root",
    "taylor_theory",
]

_ROWS = 256  # of the logits at a time
_LARGEST = 600.0  # e^−B is what a tail has to be divided by: a number with room for tolerances below one


# -- approximation of exp on an interval -------------------------------------------------------------------------------


def taylor_remainder(bound: ArrayLike, degree: int) -> Matrix:
    """sup over |u| ≤ B of |e^u − Σ_{k≤p} u^k/k!|, which is Σ_{k>p} B^k/k! exactly, attained at u = B.

    As e^B P(p + 1, B) with the regularised incomplete gamma function P (Abramowitz and Stegun 6.5.13).

    Examples
    --------
    >>> round(float(taylor_remainder(4.0, 8)), 5)
    1.1664
    """
    b = _bound(bound)
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(np.exp(b + np.log(gammainc(_degree(degree) + 1, b))))


def chebyshev_remainder(bound: ArrayLike, degree: int) -> Matrix:
    """sup over |u| ≤ B of |e^u − its Chebyshev series cut after degree p|: 2 Σ_{k>p} I_k(B) exactly, attained at u = B.

    The series is I₀(B) + 2 Σ I_k(B) T_k(u/B) (Abramowitz and Stegun 9.6.34); all coefficients are positive.

    Examples
    --------
    >>> round(float(chebyshev_remainder(4.0, 8)), 8)
    0.00515794
    """
    b, p = _bound(bound), _degree(degree)
    # I_k(B) e^(−B) falls as exp(−k²/2B), and faster beyond k = B
    terms = 60 + int(10 * np.sqrt(np.max(b, initial=0.0)))
    k = np.arange(p + terms, p, -1.0)  # the small ones are added first
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(2 * np.exp(b + np.log(np.sum(ive(k, b[..., None]), axis=-1))))


def least_degree(bound: float, tolerance: float, *, basis: Literal["taylor", "chebyshev"] = "taylor") -> int:
    """Least degree with which the polynomial is within ``tolerance`` of e^u, absolutely, for all |u| ≤ B.

    What a polynomial method must afford: C(d + p, p) features. Alman and Song 2023, arXiv 2302.13214, get attention in
    nearly linear time where the entries of q and k are o(√log n), so that their logits are o(log n) and this is small.

    Examples
    --------
    >>> least_degree(4.0, 1e-3), least_degree(4.0, 1e-3, basis="chebyshev")
    (15, 9)
    """
    if basis not in {"taylor", "chebyshev"}:
        raise ValueError(f"basis must be 'taylor' or 'chebyshev', got {basis!r}")
    if not (np.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be positive and finite, got {tolerance!r}")
    if not bound <= _LARGEST:
        raise ValueError(
            f"bound must be at most {_LARGEST:g}: beyond it e^bound times the tail leaves float64, got {bound!r}"
        )
    remainder = taylor_remainder if basis == "taylor" else chebyshev_remainder
    degree = 0
    while float(remainder(bound, degree)) > tolerance:
        degree += 1
    return degree


def taylor_ratio(u: ArrayLike, degree: int) -> Matrix:
    """T_p(u)/e^u for the Taylor polynomial T_p of degree p: 1 − u^(p+1)/(p+1)! · ₁F₁(p + 1; p + 2; −u).

    1 at u = 0, decreasing for u > 0. For u < 0 it increases without bound where p is even and decreases, through the
    only root, where p is odd: its derivative is −e^(−u) u^p/p! (derived).

    Examples
    --------
    >>> [round(float(x), 6) for x in taylor_ratio([-2.0, 0.0, 1.0], 1)]  # (1 + u)/e^u
    [-7.389056, 1.0, 0.735759]
    """
    a, p = np.asarray(u, dtype=np.float64), _degree(degree)
    below = np.maximum(-a, 0.0)
    with np.errstate(divide="ignore", over="ignore"):
        power = np.exp((p + 1) * np.log(below) - lgamma(p + 2)) * hyp1f1(p + 1, p + 2, below)
    return np.asarray(np.where(a >= 0, gammaincc(p + 1, np.maximum(a, 0.0)), 1 + (-1) ** p * power))


def taylor_root(degree: int) -> float | None:
    """The only real root of the Taylor polynomial of an odd degree; None for an even one, which is positive everywhere.

    Examples
    --------
    >>> [taylor_root(p) and round(taylor_root(p), 4) for p in (1, 2, 3, 4, 5)]
    [-1.0, None, -1.5961, None, -2.1806]
    """
    p = _degree(degree)
    if p % 2 == 0:
        return None
    from scipy.optimize import brentq  # noqa: PLC0415 - scipy.optimize is slow to load and only needed here

    return float(brentq(lambda u: float(taylor_ratio(u, p)), -float(p), 0.0, xtol=1e-14))


# -- what relative errors of the kernel do to its rows -----------------------------------------------------------------


def normalised_entry_bound(epsilon: ArrayLike) -> Matrix:
    """Largest |P̂_ij/P_ij − 1| where all entries of the kernel have relative errors ≤ ε < 1: 2ε/(1 − ε).

    It cannot be improved: (1 + ε)/(1 − ε) − 1 is the same number, and is approached by a row whose one entry is 1 + ε
    times too large and has hardly any weight, while all others are 1 − ε times too small (derived).

    Examples
    --------
    >>> float(normalised_entry_bound(0.5))
    2.0
    """
    e = np.asarray(epsilon, dtype=np.float64)
    if not bool(np.all((e >= 0) & (e < 1))):
        raise ValueError(
            f"epsilon must be in [0, 1): a kernel that is off by all of itself promises nothing, got {e!r}"
        )
    return np.asarray(2 * e / (1 - e))


class RowBounds(NamedTuple):
    """Bounds of p̂ − p for two rows of probabilities, arrays of one shape."""

    entry: Matrix
    two_norm: Matrix


def reweighting_bounds(lowest: ArrayLike, highest: ArrayLike, *, largest: ArrayLike, norm: ArrayLike) -> RowBounds:
    """Bounds of max |p̂ − p| and ‖p̂ − p‖₂ for p̂_j ∝ g_j p_j with weights 0 < lowest ≤ g_j ≤ highest.

    With κ = highest/lowest: no entry grows by more than κ, so that max |p̂ − p| ≤ (κ − 1) max p and ‖p̂ − p‖₂ ≤
    (κ − 1)‖p‖₂; and the total variation is at most tanh(log(κ)/4), which bounds the entries, and by √2 the norm, as
    positive and negative parts have the same sum. The smaller is taken; infinite where ``lowest`` is not positive.

    Parameters
    ----------
    lowest, highest
        Extremes of the weights of a row.
    largest, norm
        max p and ‖p‖₂ of the row.

    Examples
    --------
    >>> float(reweighting_bounds(1.0, 1.0, largest=0.5, norm=0.7).two_norm)
    0.0
    """
    low, high = np.asarray(lowest, dtype=np.float64), np.asarray(highest, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        kappa = np.where(low > 0, high / low, np.inf)
        variation = np.where(low > 0, np.tanh(np.log(kappa) / 4), np.inf)
        entry = np.minimum(variation, (kappa - 1) * np.asarray(largest))
        two_norm = np.minimum(np.sqrt(2) * variation, (kappa - 1) * np.asarray(norm))
    return RowBounds(entry, two_norm)


def taylor_theory(
    q: Matrix, k: Matrix, *, scale: float, degree: int, causal: bool = False, key_mask: ArrayLike | None = None
) -> Theory:
    """Bound of the error of attention whose exp is the Taylor polynomial of degree p, from the logits of every row.

    The ratio of the kernels is monotone in the logit on either side of 0, so the extremes of the visible logits of a
    row give its extremes, and :func:`reweighting_bounds` the rest. Norms 'max', 'frobenius', 'spectral' (as Frobenius)
    and 'nuclear' (√n times that); infinite where an odd degree meets a logit below its root.

    Parameters
    ----------
    q, k
        Queries (..., n_q, d) and keys (..., n_k, d), NumPy.
    scale, causal, key_mask
        As in :class:`~nla_llm.problems.AttentionProblem`.

    Examples
    --------
    >>> x = np.array([[0.1], [-0.1]])
    >>> float(taylor_theory(x, x, scale=1.0, degree=4).error("max")) < 1e-10
    True
    """
    p = _degree(degree)
    x, y = scale * np.asarray(q, dtype=np.float64), np.asarray(k, dtype=np.float64)
    mask = None if key_mask is None else np.asarray(key_mask, dtype=bool)
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2], () if mask is None else mask.shape[:-1])
    n_q, n_k = x.shape[-2], y.shape[-2]

    def error(norm: str) -> Matrix:
        if norm not in {"max", "frobenius", "spectral", "nuclear"}:
            raise ValueError(f"norm must be 'max', 'frobenius', 'spectral' or 'nuclear', got {norm!r}")
        rows = [_row_bounds(x, y, mask, p, causal=causal, start=i) for i in range(0, n_q, _ROWS)]
        if norm == "max":
            return np.asarray(np.max(np.concatenate([r.entry for r in rows], axis=-1), axis=-1))
        frobenius = np.linalg.norm(np.concatenate([r.two_norm for r in rows], axis=-1), axis=-1)
        return np.asarray(frobenius * (min(n_q, n_k) ** 0.5 if norm == "nuclear" else 1.0))

    return Theory(
        name=f"Taylor polynomial of degree {p}",
        kind="bound",
        status="VB",
        source="derived: remainder of the Taylor polynomial, and total variation of reweighted probabilities",
        shape=(*batch, n_q, n_k),
        error_norm=error,
        assumptions=("exact arithmetic",),
    )


def _row_bounds(
    x: Matrix, y: Matrix, mask: NDArray[np.bool_] | None, degree: int, *, causal: bool, start: int
) -> RowBounds:
    """Bounds of the rows from ``start`` on."""
    block = x[..., start : start + _ROWS, :]
    logits = block @ np.swapaxes(y, -1, -2)
    last_key = start if causal else y.shape[-2]  # of the first row
    visible = np.asarray(np.tri(block.shape[-2], y.shape[-2], k=last_key, dtype=np.bool_))
    if mask is not None:
        visible = visible & mask[..., None, :]
    high = np.max(np.where(visible, logits, -np.inf), axis=-1)
    low = np.min(np.where(visible, logits, np.inf), axis=-1)
    weights = np.exp(np.where(visible, logits, -np.inf) - high[..., None])
    total = np.sum(weights, axis=-1)
    nearest_to_zero = np.clip(0.0, low, high)  # where the ratio of an odd degree is largest
    ratios = np.stack([taylor_ratio(u, degree) for u in (low, nearest_to_zero, high)])
    return reweighting_bounds(
        ratios.min(axis=0), ratios.max(axis=0), largest=1 / total, norm=np.linalg.norm(weights, axis=-1) / total
    )


def _degree(degree: int) -> int:
    if isinstance(degree, bool) or int(degree) != degree or degree < 0:
        raise ValueError(f"degree must be a whole number >= 0, got {degree!r}")
    return int(degree)


def _bound(bound: ArrayLike) -> Matrix:
    b = np.asarray(bound, dtype=np.float64)
    if not bool(np.all(np.isfinite(b) & (b >= 0))):
        raise ValueError(f"bound must be finite and >= 0, half the length of the interval, got {bound!r}")
    return b
