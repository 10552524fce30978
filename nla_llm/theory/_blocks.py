"""Blocks of directions whose law is the same in every rotated frame: moments of their features, and of pairs.

Everything is relative to the squared kernel. τ is |x + y|² for positive and hyperbolic, −|x − y|² for trigonometric
features, as in :mod:`nla_llm.theory.random_features`, and a = |τ|.

Equal angles, u_i·u_j = γ, and independent χ_d norms: |ω₁ ± ω₂|² = R² (1 ± γσ) in a uniform direction, where R² is
χ²_{2d} and σ = 2 r₁r₂/R² independent of R, σ² ~ Beta(d/2, 1/2). With C_d of an orthogonal pair, which is γ = 0,

    covariance, positive features               g(γ) = E_σ e^(γστ) (1 + C_d((1 + γσ)τ)) − 1
    covariance, hyperbolic and trigonometric    (g(γ) + g(−γ))/2

Orthogonal, all norms √d: 2ω₁, ω₁ ± ω₂ and ω₁ have fixed norms, so that with F(z) = ₀F₁(; d/2; z)

    mean μ = e^(−τ/2) F(dτ/4),    E f(ω₁)f(ω₂) = e^(−τ) F(dτ/2),
    E f² = e^(−τ) F(dτ) for positive, half of e^(−τ) (F(dτ) + 1) for hyperbolic and trigonometric features.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import eigh_tridiagonal
from scipy.special import gammaln, ive

from nla_llm.theory._confluent import pair_covariance

if TYPE_CHECKING:
    from nla_llm.theory.bound import Matrix

__all__ = ["equiangular_covariance", "fixed_norm_log_variance", "log_hyp0f1", "oscillating_hyp0f1"]

_BY_SUM = 1e5  # argument up to which the terms of ₀F₁ stay below e^633
_BY_TAYLOR = 2.0
_TERMS = 48  # 6^48/48! < 1e-23


# -- equal angles, χ norms ---------------------------------------------------------------------------------------------


def equiangular_covariance(features: str, a: Matrix, d: int, cosine: float) -> tuple[Matrix, Matrix]:
    """Covariance of a pair with γ = ``cosine`` as (mantissa, log_size), elementwise; d ≥ 2.

    Examples
    --------
    >>> value, log_size = equiangular_covariance("positive", np.asarray(1.0), 4, -1 / 3)
    >>> round(float(value), 4)
    -0.2805
    """
    a = np.asarray(a, dtype=np.float64)
    oscillating, one_sided = features == "trigonometric", features == "positive"
    if not cosine:
        return pair_covariance(-a if oscillating else a, d)
    reach = abs(cosine)
    total: Matrix = np.zeros(a.shape)
    grows = reach * float(np.max(a, initial=0.0))
    # The law of σ narrows as 1/√d; the numbers are empirical, tested against the series and against adaptive rules.
    for sigma, weight in _half_angles(d, 8 + 32 // d + int(min(200.0, 1.5 * grows))):
        b = reach * sigma * a
        near, far = (
            pair_covariance(-c if oscillating else c, d)[0] if wanted else a
            for c, wanted in ((a - b, not one_sided or cosine < 0), (a + b, not one_sided or cosine > 0))
        )
        if one_sided and cosine < 0:
            total += weight * (np.expm1(-b) + np.exp(-b) * near)
        elif one_sided:
            total += weight * np.exp(b - reach * a) * (far - np.expm1(-b))
        elif oscillating:
            total += weight * (near + far + np.exp(b - a) * np.expm1(-b) ** 2) / 2
        else:
            outer = np.exp(b - reach * a) * (far + np.expm1(-b) ** 2)
            total += weight * (np.exp(-b - reach * a) * near + outer) / 2
    if one_sided and cosine < 0:
        return total, np.zeros_like(a)
    return total, np.asarray(a if oscillating else reach * a)


def _half_angles(d: int, count: int) -> list[tuple[float, float]]:
    """Nodes and weights of the mean over σ: Gauss–Jacobi for σ^(d−1) (1 − σ)^(−1/2), times (1 + σ)^(−1/2)."""
    x, w = _gauss_jacobi(count, -0.5, d - 1.0)
    w = w / np.sqrt(3 + x)
    return [(float(s), float(v)) for s, v in zip((1 + x) / 2, w / w.sum(), strict=True)]


@lru_cache(maxsize=64)
def _gauss_jacobi(count: int, alpha: float, beta: float) -> tuple[Matrix, Matrix]:
    """Rule for the weight (1 − x)^α (1 + x)^β on [−1, 1] with weights of sum one, by Golub and Welsch (1969)."""
    n = np.arange(1, count, dtype=np.float64)
    total = alpha + beta
    centre = (beta**2 - alpha**2) / ((2 * n + total) * (2 * n + total + 2))
    first = (beta - alpha) / (total + 2)
    squares = 4 * n * (n + alpha) * (n + beta) / ((2 * n + total) ** 2 * (2 * n + total + 1))
    squares[1:] *= (n[1:] + total) / (2 * n[1:] + total - 1)  # one where n = 1, also where it reads 0/0
    x, vectors = eigh_tridiagonal(np.concatenate([[first], centre]), np.sqrt(squares))
    return np.asarray(x, dtype=np.float64), np.asarray(vectors[0] ** 2, dtype=np.float64)


# -- fixed norms -------------------------------------------------------------------------------------------------------


def fixed_norm_log_variance(features: str, a: Matrix, d: int, *, m: int, pairs: int) -> Matrix:
    """Logarithm of the variance of the mean of m features, of which ``pairs`` ordered pairs share a block.

    Examples
    --------
    >>> [round(float(np.exp(fixed_norm_log_variance("hyperbolic", 1.0, 8, m=8, pairs=p))), 5) for p in (0, 56)]
    [0.03138, 0.00067]
    """
    a = np.asarray(a, dtype=np.float64)
    sign = -1 if features == "trigonometric" else 1
    small = a <= _BY_TAYLOR
    out = np.empty_like(a)
    out[small] = _log_series(_fixed_norm_series(features == "positive", d, m, pairs), sign, a[small])
    b = a[~small]
    if features == "trigonometric":
        second, pair, mean = (oscillating_hyp0f1(d, d * b * c) for c in (1.0, 0.5, 0.25))
        scaled = ((second + 1) / 2 - mean**2) / m + pairs / m**2 * (pair - mean**2)
        size = b
    else:
        second, pair, mean = (log_hyp0f1(d / 2, d * b * c) for c in (1.0, 0.5, 0.25))
        size = second if features == "positive" else np.logaddexp(second, 0) - np.log(2)
        square = np.exp(2 * mean - size)
        scaled = (1 - square) / m + pairs / m**2 * (np.exp(pair - size) - square)
        size = size - b
    with np.errstate(divide="ignore"):
        out[~small] = np.log(np.maximum(scaled, 0)) + size
    return out


def log_hyp0f1(b: float, z: Matrix) -> Matrix:
    """log ₀F₁(; b; z) for z ≥ 0, by its series or, beyond e^633, by Bessel's function.

    Examples
    --------
    >>> float(log_hyp0f1(0.5, np.asarray([4.0]))[0] - np.log(np.cosh(4.0))).__abs__() < 1e-15
    True
    """
    z = np.asarray(z, dtype=np.float64)
    out = np.empty_like(z)
    small = z <= _BY_SUM
    x = z[small]
    term, total, k = np.ones_like(x), np.ones_like(x), 0
    while np.any(term > 1e-17 * total):
        term = term * (x / ((k + 1) * (b + k)))
        total += term
        k += 1
    out[small] = np.log(total)
    root = np.sqrt(z[~small])
    out[~small] = gammaln(b) + (1 - b) * np.log(root) + np.log(ive(b - 1, 2 * root)) + 2 * root
    return out


def oscillating_hyp0f1(d: int, z: Matrix) -> Matrix:
    """₀F₁(; d/2; −z) for z ≥ 0: the mean of cos(2√z u₁) over directions u in R^d, by Gauss–Jacobi in u₁.

    Examples
    --------
    >>> bool(np.isclose(oscillating_hyp0f1(3, np.asarray([4.0]))[0], np.sin(4.0) / 4, rtol=1e-14))
    True
    """
    root = np.sqrt(np.asarray(z, dtype=np.float64))
    if d == 1:
        return np.asarray(np.cos(2 * root))
    count = 40 + int(1.1 * float(np.max(root, initial=0.0)))  # more than half the phase; the 40 is empirical
    total = np.zeros_like(root)
    for u, w in zip(*_gauss_jacobi(count + count % 2, (d - 3) / 2, (d - 3) / 2), strict=True):
        if u > 0:
            total += 2 * w * np.cos(2 * root * u)
    return total


@lru_cache(maxsize=64)
def _fixed_norm_series(positive: bool, d: int, m: int, pairs: int) -> tuple[Fraction, ...]:
    """Exact coefficients in τ of the variance: in a full block those of low order cancel."""

    def rotation(c: Fraction) -> list[Fraction]:  # ₀F₁(; d/2; c d τ)
        out = [Fraction(1)]
        for k in range(_TERMS):
            out.append(out[-1] * c * d / ((k + 1) * (Fraction(d, 2) + k)))
        return out

    def exponential(c: int) -> list[Fraction]:  # e^(−cτ/2)
        out = [Fraction(1)]
        for k in range(_TERMS):
            out.append(-out[-1] * Fraction(c, 2) / (k + 1))
        return out

    def product(p: list[Fraction], q: list[Fraction]) -> list[Fraction]:
        return [sum((p[j] * q[k - j] for j in range(k + 1)), Fraction(0)) for k in range(_TERMS + 1)]

    whole = exponential(2)
    second, pair = product(rotation(Fraction(1)), whole), product(rotation(Fraction(1, 2)), whole)
    if not positive:
        second = [(s + e) / 2 for s, e in zip(second, whole, strict=True)]
    mean = product(rotation(Fraction(1, 4)), exponential(1))
    square = product(mean, mean)
    return tuple(
        (s - q) / m + Fraction(pairs, m**2) * (p - q) for s, p, q in zip(second, pair, square, strict=True)
    )  # fmt: skip


def _log_series(coefficients: tuple[Fraction, ...], sign: int, a: Matrix) -> Matrix:
    """log Σ c_k (± a)^k: the lowest power stands apart, so that it does not underflow."""
    lowest = next((k for k, c in enumerate(coefficients) if c), None)
    if lowest is None:
        return np.full_like(a, -np.inf)
    total = np.zeros_like(a)
    for k in range(len(coefficients) - 1, lowest - 1, -1):
        total = total * a + float(coefficients[k] * sign**k)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.maximum(total, 0)) + lowest * np.log(a))
