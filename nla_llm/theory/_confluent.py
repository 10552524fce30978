"""Confluent hypergeometric functions as means over a Poisson variable: bounded terms, no overflow.

With K ~ Poisson(λ) and b_k = Π_{i<k} (d/2 − i)/(d/2 + i), which lies in [−1, 1], Kummer's transformation gives

    e^(−t) ₁F₁(d; d/2; t/2)  = E b_K,          λ = t/2
    ₁F₁(d; d/2; −s/2)        = E (−1)^K b_K,   λ = s/2

and with g_k = (d/2)^k / (d/2)_k in (0, 1]: e^(−t/2) ₀F₁(; d/2; dt/4) = E g_K, λ = t/2. For even d the sum of b_k ends
at k = d/2.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import gammaln

if TYPE_CHECKING:
    from collections.abc import Callable

    from nla_llm.theory.bound import Matrix

__all__ = ["pair_covariance", "poisson_mean", "rising_ratio"]

_RECURRENCE = 600.0  # exp(−λ) is a normal number below it
_CHUNK = 1 << 16


def poisson_mean(coefficients: Callable[[int], Matrix], rate: Matrix) -> Matrix:
    """E c_K for K ~ Poisson(rate), elementwise; ``coefficients(count)`` gives c_0 … c_(count−1), bounded by 1.

    Examples
    --------
    >>> poisson_mean(lambda count: np.ones(count), np.asarray([0.0, 3.0, 900.0])).round(12).tolist()
    [1.0, 1.0, 1.0]
    """
    flat = np.atleast_1d(np.asarray(rate, dtype=np.float64)).ravel()
    out = np.empty_like(flat)
    order = np.argsort(flat)  # chunks of like rates: the sum of each is as long as its largest rate needs
    for start in range(0, flat.size, _CHUNK):
        index = order[start : start + _CHUNK]
        small = index[flat[index] <= _RECURRENCE]
        large = index[flat[index] > _RECURRENCE]
        out[small] = _sum_by_recurrence(coefficients, flat[small])
        out[large] = _sum_by_logarithms(coefficients, flat[large])
    return out.reshape(np.shape(rate))


def _terms(largest: float) -> int:
    """Terms after which the tail of a Poisson variable is below 1e-18; the 12 and the 40 are empirical."""
    return int(largest + 12 * np.sqrt(largest) + 40)


def _sum_by_recurrence(coefficients: Callable[[int], Matrix], rate: Matrix) -> Matrix:
    if not rate.size:
        return rate
    weight, total = np.exp(-rate), np.zeros_like(rate)
    for k, c in enumerate(coefficients(_terms(float(rate.max())))):
        total += c * weight
        weight *= rate / (k + 1)
    return total


def _sum_by_logarithms(coefficients: Callable[[int], Matrix], rate: Matrix) -> Matrix:
    total = np.zeros_like(rate)
    if not rate.size:
        return total
    c = coefficients(_terms(float(rate.max())))
    first = max(0, int(rate.min() - 12 * np.sqrt(rate.min()) - 40))
    for k in range(first, len(c)):
        total += c[k] * np.exp(k * np.log(rate) - rate - gammaln(k + 1))
    return total


def rising_ratio(d: int, count: int) -> Matrix:
    """log g_k for k < count, g_k = (d/2)^k / (d/2)_k."""
    i = np.arange(count - 1)
    return np.concatenate([[0.0], np.cumsum(-np.log1p(2 * i / d))])


def _falling_over_rising(d: int, count: int) -> Matrix:
    """b_k for k < count; for even d it vanishes from k = d/2 + 1 on and is cut there."""
    count = min(count, d // 2 + 1) if d % 2 == 0 else count
    i = np.arange(count - 1)
    return np.concatenate([[1.0], np.cumprod((d / 2 - i) / (d / 2 + i))])


def pair_covariance(tau: Matrix, d: int) -> tuple[Matrix, Matrix]:
    """C_d(τ) = e^(−τ) ₁F₁(d; d/2; τ/2) − 1 as (mantissa, log_size): the value is mantissa · e^log_size.

    It is the covariance, over the squared kernel, of two frequencies of one Haar-orthogonal block with χ_d norms; τ is
    |x + y|² for positive and hyperbolic features, −|x − y|² for trigonometric ones. Elementwise; d ≥ 2. For τ < 0 the
    size is e^|τ|, for τ ≥ 0 it is 1. Below |τ| = 1 the exact Taylor coefficients keep the relative accuracy.

    Examples
    --------
    >>> value, log_size = pair_covariance(np.asarray(10.0) * -1, 4)
    >>> round(float(value), 5), float(log_size)
    (0.00108, 10.0)
    """
    tau = np.asarray(tau, dtype=np.float64)
    small, positive = np.abs(tau) <= 1, tau > 0
    mantissa = np.empty_like(tau)
    mantissa[small] = _taylor(tau[small], d) * np.exp(np.minimum(tau[small], 0))
    up, down = ~small & positive, ~small & ~positive
    mantissa[up] = poisson_mean(lambda n: _falling_over_rising(d, n), tau[up] / 2) - 1
    s = -tau[down]
    mantissa[down] = poisson_mean(lambda n: _signed(_falling_over_rising(d, n)), s / 2) - np.exp(-s)
    return mantissa, np.maximum(-tau, 0)


def _signed(c: Matrix) -> Matrix:
    return np.asarray(c * (-1.0) ** np.arange(len(c)))


def _taylor(tau: Matrix, d: int) -> Matrix:
    total = np.zeros_like(tau)
    for a in reversed(_taylor_coefficients(d)):
        total = total * tau + a
    return np.asarray(total * tau**2)


@lru_cache(maxsize=64)
def _taylor_coefficients(d: int, count: int = 24) -> tuple[float, ...]:
    """Coefficients of τ², τ³, … in C_d(τ), from the product of two exact series; the first is −1/(2(d + 2))."""
    exponential, kummer = [Fraction(1)], [Fraction(1)]
    for j in range(count + 1):
        exponential.append(-exponential[-1] / (j + 1))
        kummer.append(kummer[-1] * Fraction(d + j, d + 2 * j) / (j + 1))
    return tuple(float(sum(kummer[j] * exponential[k - j] for j in range(k + 1))) for k in range(2, count + 2))
