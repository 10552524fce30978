"""Columns that stand for all: QR with column pivoting, and swaps that make it rank-revealing in the strong sense."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nla_llm.backend import Array, device_of, eps, namespace
from nla_llm.operators import Dense

if TYPE_CHECKING:
    from nla_llm.operators import Operator

__all__ = ["PivotedQR", "chosen_columns", "interpolation", "pivoted_qr", "strong_pivoted_qr"]


class PivotedQR(NamedTuple):
    """A ≈ basis @ coefficients, exact in the chosen columns.

    Attributes
    ----------
    columns : integer array (..., k)
        Places of the pivots.
    basis : array (..., m, k)
        Orthonormal; a column is zero where nothing but rounding was left to choose from.
    coefficients : array (..., k, n)
        ``basisᵀ A``; upper triangular in the chosen columns.
    remaining : array (..., n)
        Squared lengths of the columns of A − basis @ coefficients.
    """

    columns: Array
    basis: Array
    coefficients: Array
    remaining: Array


def pivoted_qr(a: Array, steps: int) -> PivotedQR:
    """QR with column pivoting: each step takes the column with the most left outside the span of those before.

    Businger and Golub 1965, by modified Gram–Schmidt on an explicit residual (a copy of ``a``): the lengths that
    pivots are chosen by are those of what is left, not differences of large numbers. Each new direction is
    orthogonalised again.

    Parameters
    ----------
    a : array (..., m, n), float32 or float64
    steps : int
        At most min(m, n).

    Examples
    --------
    >>> import numpy as np
    >>> found = pivoted_qr(np.array([[1.0, 3.0, 0.0], [0.0, 4.0, 2.0]]), 2)
    >>> found.columns.tolist(), found.remaining.round(12).tolist()
    ([1, 2], [0.0, 0.0, 0.0])
    """
    xp, t = namespace(a), namespace(a).matrix_transpose
    residual, columns, rows = a, [], []
    basis: Array = None
    left = _square_lengths(residual)
    floor = (eps(a) * steps) ** 2 * xp.max(left, axis=-1, keepdims=True)
    for _ in range(steps):
        j = xp.argmax(left, axis=-1, keepdims=True)
        q = _chosen(residual, j)
        if basis is not None:
            q = q - basis @ (t(basis) @ q)
        length = _square_lengths(q)
        empty = length <= floor
        length = xp.sqrt(xp.where(empty, xp.ones_like(length), length))
        q = xp.where(empty[..., None, :], xp.zeros_like(q), q / length[..., None, :])
        row = t(q) @ residual
        residual = residual - q @ row
        left = _square_lengths(residual)
        columns.append(j)
        rows.append(row)
        basis = q if basis is None else xp.concat([basis, q], axis=-1)
    # rows of the residual before step i lack what earlier directions took, which is orthogonal to q_i: they are q_iᵀ A
    return PivotedQR(xp.concat(columns, axis=-1), basis, xp.concat(rows, axis=-2), left)


def strong_pivoted_qr(a: Array, steps: int, *, factor: float = 2.0, max_swaps: int = 1000) -> PivotedQR:
    """Rank-revealing QR in the strong sense: pivots after which no swap raises the volume of the chosen columns by f.

    Gu and Eisenstat 1996 (SIAM J. Sci. Comput. 17, algorithm 4), from the pivots of :func:`pivoted_qr`. With
    c = √(1 + f² k (n − k)): σ_i(R₁₁) >= σ_i(A)/c and σ_j(A − QQᵀA) <= c σ_{k+j}(A), and entries of R₁₁⁻¹R₁₂ are at
    most f. A swap is followed by a new QR of the chosen columns; they are rare.

    Parameters
    ----------
    a : array (..., m, n), float32 or float64
    steps : int
        k, at most min(m, n).
    factor
        f >= 1; at 1 rounding could make swaps cycle.
    max_swaps : int
        Most swaps, beyond which the pivots are taken as they are.
    """
    xp, t = namespace(a), namespace(a).matrix_transpose
    found = pivoted_qr(a, steps)
    places = xp.arange(steps, device=device_of(a))
    for _ in range(max_swaps):
        gain, i, j = _best_swap(a, found)
        needed = gain > factor**2
        if not bool(xp.any(needed)):
            break
        columns = xp.where(needed & (places == i), j, found.columns)
        basis = xp.linalg.qr(chosen_columns(Dense(a), columns))[0]
        coefficients = t(basis) @ a
        found = PivotedQR(columns, basis, coefficients, _square_lengths(a - basis @ coefficients))
    return found


def interpolation(found: PivotedQR) -> Array:
    """T (..., k, n) with basis @ coefficients = A_J T for the chosen columns A_J, the identity in those columns."""
    xp = namespace(found.coefficients)
    triangle = _regular(_chosen(found.coefficients, found.columns))
    return xp.linalg.solve(triangle, found.coefficients)


def chosen_columns(op: Operator, columns: Array) -> Array:
    """The columns (..., n_q, k) of ``op`` at places (..., k): read from a matrix, else products with unit vectors."""
    xp = op.xp
    if isinstance(op, Dense):
        return _chosen(op.matrix, columns)
    places = xp.arange(op.shape[-1], device=device_of(op.like))
    return op @ xp.astype(places[:, None] == columns[..., None, :], op.dtype)


def _best_swap(a: Array, found: PivotedQR) -> tuple[Array, Array, Array]:
    """Largest square by which exchanging pivot i for column j multiplies the volume, (..., 1), with i and j."""
    xp, n = namespace(a), int(a.shape[-1])
    triangle = _chosen(found.coefficients, found.columns)
    k = int(triangle.shape[-1])
    eye = xp.broadcast_to(xp.eye(k, dtype=a.dtype, device=device_of(a)), triangle.shape)
    both = xp.linalg.solve(_regular(triangle), xp.concat([eye, found.coefficients], axis=-1))
    inverse, weights = both[..., :k], both[..., k:]
    lengths = xp.sum(inverse * inverse, axis=-1)
    gains = weights * weights + lengths[..., None] * found.remaining[..., None, :]
    places = xp.arange(n, device=device_of(a))
    taken = xp.any(places[:, None] == found.columns[..., None, :], axis=-1)
    empty = xp.linalg.diagonal(triangle) == 0
    gains = xp.where(taken[..., None, :] | empty[..., :, None], xp.zeros_like(gains), gains)
    flat = xp.reshape(gains, (*gains.shape[:-2], k * n))
    place = xp.argmax(flat, axis=-1, keepdims=True)
    return xp.max(flat, axis=-1, keepdims=True), place // n, place % n


def _regular(triangle: Array) -> Array:
    """The triangle with one in place of a pivot that is zero: nothing was left there."""
    xp = namespace(triangle)
    empty = xp.linalg.diagonal(triangle) == 0
    eye = xp.eye(triangle.shape[-1], dtype=triangle.dtype, device=device_of(triangle))
    return xp.where(empty[..., None, :] & (eye > 0), eye, triangle)


def _square_lengths(x: Array) -> Array:
    return namespace(x).sum(x * x, axis=-2)


def _chosen(a: Array, columns: Array) -> Array:
    xp = namespace(a)
    index = xp.broadcast_to(columns[..., None, :], (*a.shape[:-1], columns.shape[-1]))
    return xp.take_along_axis(a, index, axis=-1)
