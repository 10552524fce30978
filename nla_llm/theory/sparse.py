"""Errors of softmax that is restricted to some keys of each row: exact, from the mass that a row keeps.

A row p of P that keeps the keys S with the mass μ = Σ_S p becomes p̂ = p/μ on S and 0 elsewhere. Everything is float64
NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nla_llm.theory.bound import Matrix, Theory

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["mass_left_out", "restriction_error", "restriction_theory"]

KeptRows: TypeAlias = Callable[[int, int], tuple[Matrix, NDArray[np.bool_]]]

_ROWS = 256  # rows looked at together


def mass_left_out(p: ArrayLike, kept: ArrayLike) -> Matrix:
    """Total variation ½ Σ |p̂ − p| of rows p (..., n) restricted to ``kept`` (..., n): 1 − μ exactly (derived).

    On S every entry grows, by (1/μ − 1) p, in all by 1 − μ; elsewhere every entry is lost, in all 1 − μ. No pattern of
    m keys does better than the m largest entries.

    Examples
    --------
    >>> float(mass_left_out([0.5, 0.25, 0.25], [True, True, False]))
    0.25
    """
    rows, keep = _check(p, kept)
    return np.asarray(np.sum(np.where(keep, 0, rows), axis=-1))


def restriction_error(p: ArrayLike, kept: ArrayLike) -> Matrix:
    """Squared error Σ (p̂ − p)² of rows p (..., n) restricted to ``kept``: ((1 − μ)/μ)² Σ_S p² + Σ_rest p² (derived).

    Examples
    --------
    >>> float(restriction_error([0.5, 0.5], [True, False]))  # (1 − 0.5)² + 0.5²
    0.5
    """
    rows, keep = _check(p, kept)
    inside, outside = np.where(keep, rows, 0), np.where(keep, 0, rows)
    mass = inside.sum(axis=-1)
    if not bool(np.all(mass > 0)):
        raise ValueError("kept must leave every row some mass; a row without any has no softmax")
    growth = outside.sum(axis=-1) / mass  # 1/μ − 1 without the cancellation
    return np.asarray(growth**2 * np.sum(inside**2, axis=-1) + np.sum(outside**2, axis=-1))


def restriction_theory(rows: KeptRows, shape: tuple[int, ...]) -> Theory:
    """The Frobenius error of restricted softmax as a promise, from blocks of rows of P and of what is kept of them.

    Parameters
    ----------
    rows
        Function (start, stop) → rows of P and which entries are kept, each (..., stop − start, n_k).
    shape
        Shape of the matrix.

    Examples
    --------
    >>> def half(start, stop):
    ...     return np.full((stop - start, 2), 0.5), np.broadcast_to([True, False], (stop - start, 2))
    >>> float(restriction_theory(half, (2, 2)).error("frobenius"))
    1.0
    """

    def error(norm: str) -> Matrix:
        if norm != "frobenius":
            raise ValueError(f"the mass that rows keep gives the norm 'frobenius', got {norm!r}")
        squares = np.zeros(shape[:-2])
        for start in range(0, shape[-2], _ROWS):
            squares = squares + restriction_error(*rows(start, min(start + _ROWS, shape[-2]))).sum(axis=-1)
        return np.sqrt(squares)

    return Theory(
        name="mass left out",
        kind="closed form",
        status="VE",
        source="derived: p̂ = p/μ on the kept keys, whose mass is μ",
        shape=shape,
        error_norm=error,
        assumptions=("exact arithmetic", "softmax over the kept keys of each row"),
    )


def _check(p: ArrayLike, kept: ArrayLike) -> tuple[Matrix, NDArray[np.bool_]]:
    rows, keep = np.asarray(p, dtype=np.float64), np.asarray(kept)
    if keep.dtype != np.bool_ or keep.shape[-1:] != rows.shape[-1:]:
        raise ValueError(f"kept must be a boolean array (..., {rows.shape[-1]}), got {keep.dtype} {keep.shape}")
    return rows, keep
