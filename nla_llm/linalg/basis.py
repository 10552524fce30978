"""Orthonormal bases, robust to dependent columns; the same lines on every array library."""

from __future__ import annotations

from typing import Any

import numpy as np

from nla_llm.arithmetic import untallied
from nla_llm.backend import Array, eps, from_numpy, largest, namespace, on_one_thread, to_numpy

__all__ = ["extend_basis", "gaussian", "in_range", "orthonormalise", "widen", "working"]

# A column whose projection keeps less than this many eps of its length is rounding noise. Empirical.
_DEPENDENT = 1e3


def widen(x: Array) -> Array:
    """``x`` in float64, the arithmetic in which bases are built and norms are summed."""
    xp = namespace(x)
    return x if x.dtype == xp.float64 else xp.astype(x, xp.float64)


def working(x: Array) -> Array:
    """``x`` in a precision that libraries decompose in: its own, float32 where it is narrower, float64 where wider."""
    xp = namespace(x)
    if x.dtype in (xp.float32, xp.float64):
        return x
    return xp.astype(x, xp.float32 if x.dtype.itemsize <= 4 else xp.float64)


def gaussian(shape: tuple[int, ...], rng: np.random.Generator, *, like: Array, dtype: Any = None) -> Array:
    """Independent N(0, 1) entries drawn by NumPy in float64, so the same on every library and device, then rounded."""
    drawn = from_numpy(rng.standard_normal(shape), like=like)
    return drawn if dtype is None else namespace(drawn).astype(drawn, dtype, copy=False)


def in_range(x: Array) -> tuple[Array, Array | None]:
    """``x`` with matrices whose squares over- or underflow times powers of two, and what undoes that, or None.

    Matrices (..., m, n) with a largest entry between the fourth root of the largest number and its inverse stay as they
    are: their squares are in range, and so is eps times their squares. No count sees it.

    Examples
    --------
    >>> import numpy as np
    >>> unit, back = in_range(np.array([[[1e-200]], [[2.0]]]))
    >>> bool(0.5 <= unit[0, 0, 0] < 1), float(unit[1, 0, 0]), float((unit * back)[0, 0, 0])
    (True, 2.0, 1e-200)
    """
    xp, end = namespace(x), max(largest(x), float(np.finfo(np.float32).max))  # squares are taken in float32 at least
    with untallied(), np.errstate(over="ignore"):
        ends = xp.max(x, axis=(-2, -1), keepdims=True), -xp.min(x, axis=(-2, -1), keepdims=True)  # |x| would be a copy
        size = np.maximum(*(to_numpy(xp.astype(one, xp.float64)) for one in ends))
        out = np.isfinite(size) & (size > 0) & ((size > end**0.25) | (size < end**-0.25))
        if not out.any():
            return x, None
        most = int(np.log2(end)) - 1  # further up than to here a power of two has no inverse
        exponent = np.where(out, np.clip(np.frexp(size)[1], -most, most), 0)
        down, up = (from_numpy(np.ldexp(1.0, sign * exponent), like=x, dtype=x.dtype) for sign in (-1, 1))
        return x * down, up


@on_one_thread
def orthonormalise(x: Array) -> Array:
    """Orthonormal columns whose span contains that of ``x``.

    Householder QR: the columns are orthonormal to rounding even where those of ``x`` are dependent. In the precision of
    ``x``; float32 where that is narrower.

    Parameters
    ----------
    x : array (..., n, c), c <= n

    Returns
    -------
    array (..., n, c)

    Examples
    --------
    >>> import numpy as np
    >>> q = orthonormalise(np.ones((5, 2)))
    >>> bool(np.allclose(q.T @ q, np.eye(2)))
    True
    """
    _check_tall(x)
    return namespace(x).linalg.qr(working(x))[0]


@on_one_thread
def extend_basis(basis: Array, block: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Orthonormal columns that continue ``basis`` so that the span contains ``block``, and their coefficients.

    Columns of ``block`` that depend on the rest are replaced by random ones: the span only grows, and what a Krylov
    space cannot reach (singular values of high multiplicity, exact breakdown) is still searched.

    Parameters
    ----------
    basis : array (..., n, k)
        Orthonormal columns, float32 or float64.
    block : array (..., n, c), k + c <= n
        Of the same dtype.
    rng : numpy.random.Generator

    Returns
    -------
    new : array (..., n, c)
        Orthonormal, orthogonal to ``basis``.
    residual : array (..., c, c)
        ``newᵀ block``: what of ``block`` lies outside ``basis``.
    """
    xp = namespace(basis)
    outside = _project_out(basis, block)
    q, r = xp.linalg.qr(outside)
    pivots = xp.abs(xp.linalg.diagonal(r))
    lengths = xp.linalg.vector_norm(block, axis=-2)
    dependent = pivots <= _DEPENDENT * eps(block) * xp.max(lengths, axis=-1, keepdims=True)
    fresh = gaussian(tuple(q.shape), rng, like=basis, dtype=basis.dtype)
    q = xp.where(dependent[..., None, :], fresh, q)
    new = xp.linalg.qr(_project_out(basis, q))[0]
    return new, xp.matrix_transpose(new) @ outside


def _project_out(basis: Array, x: Array) -> Array:
    """``(I − VVᵀ) x``, twice, because once leaves rounding of the size of what was removed."""
    adjoint = namespace(basis).matrix_transpose(basis)
    x = x - basis @ (adjoint @ x)
    return x - basis @ (adjoint @ x)


def _check_tall(x: Any) -> None:
    if x.ndim < 2 or x.shape[-2] < x.shape[-1]:
        raise ValueError(
            f"x must have at least as many rows as columns, got shape {tuple(x.shape)}; pass fewer columns"
        )
