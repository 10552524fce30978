"""Projections onto m random directions along the keys: P RᵀR in place of P, its exact error, and what was published.

R is m × n with independent entries N(0, 1/m), so that E RᵀR = I. Everything is float64 NumPy.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nla_llm.theory.bound import Matrix, Theory

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "gaussian_projection_entry_variance",
    "gaussian_projection_error",
    "gaussian_projection_theory",
    "gaussian_projection_vector_error",
    "linformer_published_rank",
]


def gaussian_projection_vector_error(P: ArrayLike, w: ArrayLike, m: int) -> Matrix:
    """E |P RᵀR w − P w|² = (‖P‖_F² |w|² + |P w|²)/m, exactly, for P (..., n_q, n) and w (n,).

    Isserlis: E (p·r)²(r·w)² = |p|²|w|² + 2 (p·w)² for r ~ N(0, I), row by row and draw by draw. Wang et al. 2020
    (arXiv 2006.04768, Theorem 1) state ‖P RᵀR w − P w‖ ≤ ε ‖P w‖ instead, which fails where P w = 0 and P is not.

    Examples
    --------
    >>> float(gaussian_projection_vector_error(np.full((4, 4), 0.25), [1.0, -1.0, 0.0, 0.0], m=2))
    1.0
    """
    p, vector = np.asarray(P, dtype=np.float64), np.asarray(w, dtype=np.float64)
    image = p @ vector
    squared = np.sum(p**2, axis=(-2, -1)) * np.sum(vector**2) + np.sum(image**2, axis=-1)
    return np.asarray(squared / _draws(m))


def gaussian_projection_error(squared_norm: ArrayLike, keys: ArrayLike, m: int) -> Matrix:
    """√E ‖P RᵀR − P‖_F² = ‖P‖_F √((n + 1)/m), exactly, from ‖P‖_F² and the number n of visible keys.

    The sum of :func:`gaussian_projection_vector_error` over the unit vectors; the columns of hidden keys are zero and
    have no error.

    Examples
    --------
    >>> float(gaussian_projection_error(1.0, 15, 4))
    2.0
    """
    squared, n = np.asarray(squared_norm, dtype=np.float64), np.asarray(keys, dtype=np.float64)
    return np.asarray(np.sqrt(squared * (n + 1) / _draws(m)))


def gaussian_projection_entry_variance(P: ArrayLike, m: int) -> Matrix:
    """Var (P RᵀR)_ij = (|p_i|² + P_ij²)/m with p_i the rows of P (..., n_q, n); the mean is P_ij.

    Examples
    --------
    >>> gaussian_projection_entry_variance(np.eye(2), 1).tolist()
    [[2.0, 1.0], [1.0, 2.0]]
    """
    p = np.asarray(P, dtype=np.float64)
    return np.asarray((np.sum(p**2, axis=-1, keepdims=True) + p**2) / _draws(m))


def gaussian_projection_theory(squared_norm: ArrayLike, keys: ArrayLike, m: int, shape: tuple[int, ...]) -> Theory:
    """The root mean square error of P RᵀR as a promise, in the Frobenius norm.

    Examples
    --------
    >>> float(gaussian_projection_theory(1.0, 15, 4, (15, 15)).error("frobenius"))
    2.0
    """
    gaussian_projection_error(squared_norm, keys, m)  # bad arguments show here, not when a figure is drawn
    return Theory(
        name=f"Gaussian projection onto {m} directions",
        kind="closed form",
        status="VE",
        source="derived from the fourth moments of a Gaussian vector (Isserlis); construction of Theorem 1 of Wang et "
        "al. 2020, arXiv 2006.04768",
        shape=shape,
        error_norm=partial(_frobenius_only, squared_norm, keys, m),
        assumptions=("independent Gaussian entries of variance 1/m", "exact arithmetic"),
    )


def linformer_published_rank(n: int, epsilon: float) -> int:
    """⌈5 log n/(ε² − ε³)⌉, the number of directions that Theorem 1 of Wang et al. 2020 (arXiv 2006.04768) asks for.

    With it |P RᵀR w − P w| ≤ ε |P w| is claimed with high probability. The argument (Johnson and Lindenstrauss) gives
    |p_i·RᵀR w − p_i·w| ≤ ε |p_i| |w| for the rows p_i of P, which is weaker: see
    :func:`gaussian_projection_vector_error`.

    Examples
    --------
    >>> linformer_published_rank(512, 0.5)
    250
    """
    if not (n >= 2 and 0 < epsilon < 1):
        raise ValueError(f"n must be at least 2 and epsilon between 0 and 1, got n={n} and epsilon={epsilon}")
    return int(np.ceil(5 * np.log(n) / (epsilon**2 - epsilon**3)))


def _frobenius_only(squared_norm: ArrayLike, keys: ArrayLike, m: int, norm: str) -> Matrix:
    if norm != "frobenius":
        raise ValueError(f"the mean square error is known in the norm 'frobenius' only, got {norm!r}")
    return gaussian_projection_error(squared_norm, keys, m)


def _draws(m: int) -> int:
    if isinstance(m, bool) or int(m) != m or m < 1:
        raise ValueError(f"m must be a whole number >= 1, got {m!r}")
    return int(m)
