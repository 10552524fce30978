"""Low-rank approximation by engines that do not see all of a matrix: mean errors, and promises of the methods.

Singular values are arrays (..., r), all of them, in descending order; k is the rank, p the oversampling. Means are over
Gaussian test matrices. Everything is float64 NumPy.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nla_llm.theory.bound import Matrix, Theory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import ArrayLike

__all__ = [
    "data_aware_theory",
    "halko_deviation",
    "halko_frobenius",
    "halko_power",
    "halko_spectral",
    "krylov_frobenius",
    "krylov_svd_theory",
    "nystrom_spectral",
    "nystrom_trace",
    "powered_frobenius",
    "randomised_svd_theory",
    "rank_revealing_theory",
    "single_pass_bound",
    "single_pass_factor",
    "single_pass_theory",
    "tolerance_theory",
]

HALKO = "Halko, Martinsson and Tropp 2011, arXiv 0909.4061"
TROPP = "Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1609.00048"


# -- the range finder: Q = orth(A Ω) with k + p columns ----------------------------------------------------------------


def halko_frobenius(singular_values: ArrayLike, k: int, p: int) -> Matrix:
    """E ‖A − QQᵀA‖_F² ≤ (1 + k/(p − 1)) Σ_{j>k} σ_j²; its root (Halko, Martinsson and Tropp 2011, theorem 10.5).

    Examples
    --------
    >>> round(float(halko_frobenius([2.0, 1.0, 1.0], 1, 2)), 3)
    2.0
    """
    s = _checked(singular_values, k, p)
    return np.asarray(math.sqrt(1 + k / (p - 1)) * _tail(s, k))


def halko_spectral(singular_values: ArrayLike, k: int, p: int) -> Matrix:
    """E ‖A − QQᵀA‖₂ ≤ (1 + √(k/(p − 1))) σ_{k+1} + e √(k + p)/p (Σ_{j>k} σ_j²)^½ (theorem 10.6).

    Examples
    --------
    >>> float(halko_spectral([1.0, 0.0, 0.0], 1, 2))
    0.0
    """
    s = _checked(singular_values, k, p)
    return np.asarray((1 + math.sqrt(k / (p - 1))) * _value(s, k) + math.e * math.sqrt(k + p) / p * _tail(s, k))


def halko_power(singular_values: ArrayLike, k: int, p: int, q: int) -> Matrix:
    """E ‖A − QQᵀA‖₂ after q power steps: the bound of theorem 10.6 for (AAᵀ)^q A, to the power 1/(2q + 1).

    Corollary 10.10. Versions without the number of singular values that are left are in circulation, and false.

    Examples
    --------
    >>> s = [1.0, 0.5, 0.25]
    >>> bool(halko_power(s, 1, 2, 3) < halko_power(s, 1, 2, 0))
    True
    """
    s = _checked(singular_values, k, p)
    return np.asarray(halko_spectral(s ** (2 * q + 1), k, p) ** (1 / (2 * q + 1)))


def halko_deviation(
    singular_values: ArrayLike, k: int, p: int, *, t: float, u: float, norm: str = "frobenius"
) -> tuple[Matrix, float]:
    """A bound of ‖A − QQᵀA‖ and the probability with which it may fail, 2t^(−p) + e^(−u²/2) (theorems 10.7 and 10.8).

    p >= 4 and t, u >= 1. The constants are those of the journal; an early preprint has larger ones.

    Examples
    --------
    >>> bound, failure = halko_deviation([1.0, 0.1, 0.1], 1, 4, t=2.0, u=2.0)
    >>> round(failure, 3)
    0.26
    """
    s = _checked(singular_values, k, p)
    if p < 4 or min(t, u) < 1:
        raise ValueError(f"p must be at least 4 and t and u at least 1, got p={p}, t={t}, u={u}")
    head, spread = 1 + t * math.sqrt(3 * k / (p + 1)), t * math.e * math.sqrt(k + p) / (p + 1)
    failure = 2 * t**-p + math.exp(-(u**2) / 2)
    if norm == "frobenius":
        return np.asarray(head * _tail(s, k) + u * spread * _value(s, k)), failure
    if norm == "spectral":
        return np.asarray((head + u * spread) * _value(s, k) + spread * _tail(s, k)), failure
    raise ValueError(f"norm must be 'frobenius' or 'spectral', got {norm!r}")


def powered_frobenius(singular_values: ArrayLike, k: int, p: int, q: int) -> Matrix:
    """Root of a bound of E ‖A − [QQᵀA]_k‖_F² after q power steps, truncation to rank k included.

    Σ_{j>k} σ_j² + Σ_{j>k} σ_j^(4q+2) Σ_{i≤k} σ_i^(−4q) / (p − 1), theorem 10.5 for q = 0. Derived: [QQᵀA]_k is the best
    of rank k in the range of Q, no worse than QQᵀA_k, whose error is orthogonal to A − A_k; and with φ(σ) = σ^(2q+1),
    Y = (AAᵀ)^q AΩ, the matrix Y Ω₁⁺ φ(Σ₁)⁻¹ Σ₁ V₁ᵀ in that range differs from A_k by
    U₂ φ(Σ₂) Ω₂ Ω₁⁺ φ(Σ₁)⁻¹ Σ₁ V₁ᵀ, whose mean square follows from E (Ω₁Ω₁ᵀ)⁻¹ = I/(p − 1).

    Examples
    --------
    >>> s = [2.0, 1.0, 1.0]
    >>> bool(np.isclose(powered_frobenius(s, 1, 2, 0), halko_frobenius(s, 1, 2)))
    True
    """
    s = _checked(singular_values, k, p)
    return _filtered(s, k, p, lambda x: x ** (2 * q + 1))


def krylov_frobenius(singular_values: ArrayLike, k: int, p: int, steps: int) -> Matrix:
    """The same for the best of rank k with its rows in the Krylov space span{Ω, AᵀAΩ, …} of ``steps`` blocks.

    Ω has k + p columns. The space contains φ(A) Ω for every even polynomial φ of degree 2 steps − 2; the bound is the
    lesser one of those of the monomial and of the Chebyshev polynomial of (0, σ_{k+1}). Derived as
    :func:`powered_frobenius`.

    Examples
    --------
    >>> s = np.arange(1, 101) ** -0.5
    >>> bool(krylov_frobenius(s, 5, 5, 5) < powered_frobenius(s, 5, 5, 4))
    True
    """
    s = _checked(singular_values, k, p)
    degree = 2 * steps - 2
    bounds = [_filtered(s, k, p, lambda x: x ** float(degree))]
    edge = _value(s, k)[..., None]
    if np.all(edge > 0):
        bounds.append(_filtered(s, k, p, lambda x: _chebyshev(x / edge, degree)))
    return np.asarray(np.minimum.reduce(bounds))


def _filtered(s: Matrix, k: int, p: int, polynomial: Callable[[Matrix], Matrix]) -> Matrix:
    """Root of Σ_{j>k} σ_j² + Σ_{j>k} φ(σ_j)² Σ_{i≤k} (σ_i/φ(σ_i))² / (p − 1), overflow kept out of it."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scale = np.where(s[..., :1] > 0, s[..., :1], 1.0)
        filtered = polynomial(s)
        head = np.sum((s[..., :k] / filtered[..., :k] / scale) ** 2, axis=-1)
        left = np.sum(filtered[..., k:] ** 2, axis=-1)
        rest = left * np.where(np.isnan(head), np.inf, head) * scale[..., 0] ** 2
    rest = np.where(left == 0, 0.0, rest)
    return np.asarray(np.sqrt(_tail(s, k) ** 2 + rest / (p - 1)))


def _chebyshev(x: Matrix, degree: int) -> Matrix:
    """T_degree(x) for x >= 0."""
    inside = np.cos(degree * np.arccos(np.clip(x, 0.0, 1.0)))
    return np.asarray(np.where(x <= 1, inside, np.cosh(degree * np.arccosh(np.maximum(x, 1.0)))))


# -- one pass: Q (ΨQ)⁺ ΨA ----------------------------------------------------------------------------------------------


def single_pass_factor(k: int, rows: int) -> float:
    """E ‖A − Q(ΨQ)⁺ΨA‖_F² / ‖A − QQᵀA‖_F² = 1 + k/(rows − k − 1) for a fixed Q of k columns: an equality (derived).

    From Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1609.00048, section 4: ΨQ and Ψ(I − QQᵀ)A are independent.

    Examples
    --------
    >>> single_pass_factor(2, 5)
    2.0
    """
    if rows < k + 2:
        raise ValueError(f"rows must be at least k + 2 = {k + 2}, else the error has no mean; got {rows}")
    return 1 + k / (rows - k - 1)


def single_pass_bound(singular_values: ArrayLike, k: int, rows: int) -> Matrix:
    """Root of E ‖A − Q(ΨQ)⁺ΨA‖_F² ≤ (1 + f(k, rows)) min_{r<k−1} (1 + f(r, k)) Σ_{j>r} σ_j², f(a, b) = a/(b − a − 1).

    Tropp, Yurtsever, Udell and Cevher 2017, theorem 4.3, where Q = orth(AΩ) with k columns.

    Examples
    --------
    >>> float(single_pass_bound([2.0, 0.0, 0.0], 3, 7))
    0.0
    """
    s = _checked(singular_values, min(k, 1), 2)
    bounds = [(1 + r / (k - r - 1)) * _tail(s, r) ** 2 for r in range(max(k - 1, 1))] if k > 1 else [_tail(s, 0) ** 2]
    return np.asarray(np.sqrt(single_pass_factor(k, rows) * np.minimum.reduce(bounds)))


def nystrom_trace(eigenvalues: ArrayLike, columns: int) -> Matrix:
    """E tr(A − AΩ(ΩᵀAΩ)⁺ΩᵀA) ≤ min_{r<s−1} (1 + r/(s − r − 1)) Σ_{j>r} λ_j for semi-definite A and s Gaussian columns.

    Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1706.05736, theorem 4.1.

    Examples
    --------
    >>> float(nystrom_trace([4.0, 1.0, 0.0], 3))
    2.0
    """
    values = -np.sort(-np.asarray(eigenvalues, dtype=np.float64), axis=-1)
    if columns < 2:
        raise ValueError(f"columns must be at least 2, got {columns}")
    bounds = [(1 + r / (columns - r - 1)) * np.sum(values[..., r:], axis=-1) for r in range(columns - 1)]
    return np.asarray(np.minimum.reduce(bounds))


def nystrom_spectral(eigenvalues: ArrayLike, columns: int) -> Matrix:
    """E‖A − AΩ(ΩᵀAΩ)⁺ΩᵀA‖₂, the same with s columns: at most the least over 2 ≤ p ≤ s − 2 of a sum of two terms.

    (1 + 2(s − p)/(p − 1)) λ_{s−p+1} + 2e²s/(p² − 1) Σ_{j>s−p} λ_j (Frangella, Tropp and Udell 2021, arXiv 2110.02820,
    proposition 2.2, as we read it).

    Examples
    --------
    >>> float(nystrom_spectral([4.0, 1.0, 0.0, 0.0], 4))
    0.0
    """
    values, s = -np.sort(-np.asarray(eigenvalues, dtype=np.float64), axis=-1), columns
    if s < 4:
        raise ValueError(f"columns must be at least 4, got {columns}")
    bounds = [
        (1 + 2 * (s - p) / (p - 1)) * _value(values, s - p)
        + 2 * math.e**2 * s / (p**2 - 1) * np.sum(values[..., s - p :], axis=-1)
        for p in range(2, s - 1)
    ]
    return np.asarray(np.minimum.reduce(bounds))


# -- what methods promise ----------------------------------------------------------------------------------------------


def randomised_svd_theory(singular_values: ArrayLike, k: int, p: int, q: int, shape: tuple[int, ...]) -> Theory:
    """Mean square Frobenius error and mean spectral error of the truncated randomised SVD.

    The spectral bound is σ_{k+1} above that of the range finder (Halko, Martinsson and Tropp 2011, theorem 9.3).
    """
    s = _checked(singular_values, k, p)

    def spectral() -> Matrix:
        return np.asarray(_value(s, k) + halko_power(s, k, p, q))

    known: dict[str, Callable[[], Matrix]] = {"frobenius": partial(powered_frobenius, s, k, p, q), "spectral": spectral}
    return _bound(
        f"mean error with {p} columns to spare", f"{HALKO}, theorems 9.3, 10.5 and corollary 10.10", shape, known
    )


def krylov_svd_theory(singular_values: ArrayLike, k: int, p: int, steps: int, shape: tuple[int, ...]) -> Theory:
    """Mean square Frobenius error of the best of rank k in a block Krylov space."""
    s = _checked(singular_values, k, p)
    known = {"frobenius": partial(krylov_frobenius, s, k, p, steps)}
    return _bound(f"mean error of {steps} blocks", f"derived from {HALKO}, theorem 10.5", shape, known)


def single_pass_theory(singular_values: ArrayLike, k: int, rows: int, shape: tuple[int, ...]) -> Theory:
    """Mean square Frobenius error of one pass."""
    known = {"frobenius": partial(single_pass_bound, singular_values, k, rows)}
    return _bound(f"mean error of {k} columns and {rows} rows", f"{TROPP}, theorem 4.3", shape, known)


def rank_revealing_theory(singular_values: ArrayLike, k: int, factor: float, shape: tuple[int, ...]) -> Theory:
    """σ_j of the error is at most √(1 + f² k (n − k)) σ_{k+j}: in both norms by as much above the best."""
    s = np.asarray(singular_values, dtype=np.float64)
    growth = math.sqrt(1 + factor**2 * k * (shape[-1] - k))
    known: dict[str, Callable[[], Matrix]] = {
        "frobenius": lambda: np.asarray(growth * _tail(s, k)),
        "spectral": lambda: np.asarray(growth * _value(s, k)),
    }
    return _bound("strong rank-revealing QR", "Gu and Eisenstat 1996, theorem 3.2", shape, known)


def data_aware_theory(weighted_values: ArrayLike, k: int, shape: tuple[int, ...]) -> Theory:
    """‖X(ΔW − B)ᵀ‖_F = (Σ_{j>k} σ_j(XΔWᵀ)²)^½, the error of the outputs, under the name 'outputs'."""
    s = np.asarray(weighted_values, dtype=np.float64)
    known = {"outputs": lambda: np.asarray(_tail(s, k))}
    source = "Eckart and Young 1936, for XΔWᵀ (derived)"
    return _bound(f"best of rank {k} for the outputs", source, shape, known, kind="closed form")


def tolerance_theory(tolerance: ArrayLike, norm: str, failure: float, shape: tuple[int, ...]) -> Theory:
    """An error of at most ``tolerance`` in one norm, but for a probability of ``failure``."""
    known = {norm: lambda: np.asarray(tolerance, dtype=np.float64)}
    return _bound("the tolerance", "certified a posteriori", shape, known, failure=failure)


def _bound(
    name: str,
    source: str,
    shape: tuple[int, ...],
    known: Mapping[str, Callable[[], Matrix]],
    *,
    kind: str = "bound",
    failure: float = 0.0,
) -> Theory:
    def error(norm: str) -> Matrix:
        if norm not in known:
            raise ValueError(f"theory '{name}' speaks of {' and '.join(known)} only, got norm={norm!r}")
        return known[norm]()

    status = "VE" if kind == "closed form" else "VB"
    holds = f"holds but for a probability of {failure:g}" if failure else "exact arithmetic"
    return Theory(name, kind, status, source, shape, error_norm=error, assumptions=(holds,))  # type: ignore[arg-type]


# -- pieces ------------------------------------------------------------------------------------------------------------


def _checked(singular_values: ArrayLike, k: int, p: int) -> Matrix:
    s = -np.sort(-np.asarray(singular_values, dtype=np.float64), axis=-1)
    if s.ndim < 1 or not bool(np.all(np.isfinite(s) & (s >= 0))):
        raise ValueError(f"singular_values must be an array (..., r) of finite numbers >= 0, got {singular_values!r}")
    if k < 1 or p < 2:
        raise ValueError(f"k must be at least 1 and p at least 2, else the bound is infinite; got k={k}, p={p}")
    return s


def _tail(s: Matrix, k: int) -> Matrix:
    return np.asarray(np.linalg.norm(s[..., k:], axis=-1))


def _value(s: Matrix, k: int) -> Matrix:
    return np.asarray(s[..., k] if s.shape[-1] > k else np.zeros(s.shape[:-1]))
