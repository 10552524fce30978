"""How often bounds from random vectors fail: norms from a few images, from power iteration, from Krylov spaces; traces.

Everything is float64 NumPy.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "krylov_failure",
    "krylov_mean_error",
    "largest_image_failure",
    "musco_steps",
    "power_failure",
    "power_mean_error",
    "square_image_variance",
    "trace_variance",
]


# -- the spectral norm -------------------------------------------------------------------------------------------------


def largest_image_failure(factor: float, vectors: int, *, rank_one: bool = False) -> float:
    """Probability that ‖B‖₂ > α √(2/π) max_i ‖Bω_i‖ over r Gaussian ω_i: at most α^(−r); erf(√π/(2α))^r for rank one.

    Halko, Martinsson and Tropp 2011, arXiv 0909.4061, lemma 4.1; the equality for rank one is derived: there ‖Bω‖ is
    ‖B‖₂ times the absolute value of a normal number.

    Examples
    --------
    >>> largest_image_failure(2.0, 5), round(largest_image_failure(2.0, 5, rank_one=True), 5)
    (0.03125, 0.02272)
    """
    if not factor > 1:
        raise ValueError(f"factor must be above 1, got {factor!r}")
    return float(math.erf(math.sqrt(math.pi) / (2 * factor)) ** vectors if rank_one else factor**-vectors)


def krylov_failure(n: int, steps: int, shortfall: ArrayLike) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Probability that the largest Ritz value of a semi-definite matrix is below (1 − ε) λ₁: ≤ 1.648 √n e^(−√ε(2k−1)).

    k products with one random vector (Kuczyński and Woźniakowski 1992, theorem 4.2).

    Examples
    --------
    >>> bool(krylov_failure(100, 20, 0.1) < 1e-3)
    True
    """
    epsilon = np.asarray(shortfall, dtype=np.float64)
    return np.asarray(np.minimum(1.0, 1.648 * math.sqrt(n) * np.exp(-np.sqrt(epsilon) * (2 * steps - 1))))


def power_failure(n: int, steps: int, shortfall: ArrayLike) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The same for the power method: ≤ min(0.824, 0.354/√(ε(k − 1))) √n (1 − ε)^(k − ½) (theorem 4.1).

    Examples
    --------
    >>> bool(power_failure(100, 20, 0.1) > krylov_failure(100, 20, 0.1))
    True
    """
    epsilon = np.asarray(shortfall, dtype=np.float64)
    factor = np.minimum(0.824, 0.354 / np.sqrt(epsilon * (steps - 1)))
    return np.asarray(np.minimum(1.0, factor * math.sqrt(n) * (1 - epsilon) ** (steps - 0.5)))


def krylov_mean_error(n: int, steps: int) -> float:
    """Mean relative error of the largest Ritz value: ≤ 0.103 (log(n (k − 1)⁴)/(k − 1))² (theorem 3.2, k >= 4)."""
    return float(0.103 * (math.log(n * (steps - 1) ** 4) / (steps - 1)) ** 2)


def power_mean_error(n: int, steps: int) -> float:
    """Mean relative error of the power method: ≤ 0.871 log(n)/(k − 1) (theorem 3.1, k >= 2)."""
    return float(0.871 * math.log(n) / (steps - 1))


def musco_steps(n: int, epsilon: float, *, krylov: bool = True) -> float:
    """Order of the number of steps for (1 + ε) σ_{k+1} in the spectral norm: log n/√ε, log n/ε for subspace iteration.

    Musco and Musco 2015, arXiv 1504.05477. Without its constant, which the paper does not state: for comparison only.

    Examples
    --------
    >>> round(musco_steps(1000, 0.01, krylov=False) / musco_steps(1000, 0.01))
    10
    """
    return math.log(n) / (math.sqrt(epsilon) if krylov else epsilon)


# -- traces and squared norms ------------------------------------------------------------------------------------------


def trace_variance(symmetric: ArrayLike, kind: str) -> float:
    """Variance of ωᵀAω for symmetric A: 2(‖A‖_F² − Σa_ii²) for signs, 2‖A‖_F² for normal ω, less on the sphere.

    'rademacher', 'gaussian', or 'sphere' (uniform with |ω|² = n): 2n/(n + 2) (‖A‖_F² − tr²/n). For the mean over s
    vectors divide by s (Hutchinson 1989; Meyer, Musco, Musco and Woodruff 2021, arXiv 2010.09649, for a review).

    Examples
    --------
    >>> trace_variance(np.eye(3), "rademacher"), trace_variance(np.eye(3), "gaussian")
    (0.0, 6.0)
    """
    a = np.asarray(symmetric, dtype=np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not np.allclose(a, a.T):
        raise ValueError(f"symmetric must be a symmetric matrix, got shape {a.shape}")
    square, n = float(np.sum(a * a)), a.shape[0]
    known = {
        "rademacher": 2 * (square - float(np.sum(np.diag(a) ** 2))),
        "gaussian": 2 * square,
        "sphere": 2 * n / (n + 2) * (square - float(np.trace(a)) ** 2 / n),
    }
    if kind not in known:
        raise ValueError(f"kind must be one of {', '.join(known)}, got {kind!r}")
    return float(known[kind])


def square_image_variance(singular_values: ArrayLike) -> float:
    """Variance of ‖Bω‖² for normal ω, 2 Σ σ_i⁴; its mean is ‖B‖_F². For the mean over s vectors divide by s.

    Examples
    --------
    >>> square_image_variance([2.0, 1.0])
    34.0
    """
    return float(2 * np.sum(np.asarray(singular_values, dtype=np.float64) ** 4))
