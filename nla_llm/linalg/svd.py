"""Singular values and truncated singular value decompositions of operators, without forming them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import Array, eps, generator, namespace, to_numpy
from nla_llm.linalg.basis import gaussian, orthonormalise, widen
from nla_llm.linalg.factors import SVD, factored_svd, low_rank_factors
from nla_llm.linalg.krylov import BlockKrylov, apply_widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator

__all__ = ["SMALL_ENTRIES", "is_small", "largest_singular_value", "range_finder", "singular_values", "truncated_svd"]

SMALL_ORDER = 512  # dense SVD up to this smaller dimension: under 0.1 s on one core
SMALL_ENTRIES = 2**24  # and up to this many entries, batch axes included: 128 MB in float64
_OVERSAMPLING = 8  # extra columns of the block (Halko, Martinsson, Tropp 2011, section 4.2: 5 or 10)


def is_small(op: Operator) -> bool:
    """Whether all singular values of ``op`` are a matter of a moment: a small matrix, or one with thin factors."""
    if low_rank_factors(op) is not None:
        return True
    return min(op.shape[-2:]) <= SMALL_ORDER and math.prod(op.shape) <= SMALL_ENTRIES


def singular_values(op: Operator) -> NDArray[Any]:
    """All singular values of an operator in float64, descending, an array (..., min(n_q, n_k)).

    From its factors where it is a low-rank product in disguise (as many values as columns then), else dense.

    Raises
    ------
    ValueError
        If an entry is not finite.

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> singular_values(Dense(np.array([[0.0, 2.0], [1.0, 0.0]]))).tolist()
    [2.0, 1.0]
    """
    factors = low_rank_factors(op)
    if factors is not None:
        return _batched(to_numpy(factored_svd(*factors).values), op)
    return to_numpy(op.xp.linalg.svdvals(_finite_dense(op)))


def largest_singular_value(op: Operator) -> NDArray[Any]:
    """The largest singular value of a small operator in float64, an array of the batch shape.

    From the Gram matrix of the shorter side, in two thirds of the time of an SVD: squaring harms the small singular
    values, not the largest. Entries are scaled by the largest one first, so that nothing over- or underflows.

    Raises
    ------
    ValueError
        If an entry is not finite.

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> float(largest_singular_value(Dense(np.array([[0.0, 2e200], [1e200, 0.0]]))))
    2e+200
    """
    factors = low_rank_factors(op)
    if factors is not None:
        return singular_values(op)[..., 0]
    xp, matrix = op.xp, _finite_dense(op)
    top = xp.max(xp.abs(matrix), axis=(-2, -1), keepdims=True)
    unit = matrix / xp.where(top > 0, top, xp.ones_like(top))
    if unit.shape[-1] > unit.shape[-2]:
        unit = xp.matrix_transpose(unit)
    squares = xp.linalg.eigvalsh(xp.matrix_transpose(unit) @ unit)[..., -1]
    return to_numpy(top[..., 0, 0] * xp.sqrt(squares))


def _finite_dense(op: Operator) -> Array:
    matrix = widen(op.dense())
    if not bool(op.xp.all(op.xp.isfinite(matrix))):
        raise ValueError(f"{op!r} has entries that are not finite, so it has no singular values")
    return matrix


def _batched(values: NDArray[Any], op: Operator) -> NDArray[Any]:
    """Values broadcast to the batch axes of ``op``, which a factor shared by several elements lacks."""
    return np.broadcast_to(values, (*op.batch_shape, values.shape[-1]))


def range_finder(op: Operator, columns: int, rng: int | np.random.Generator, *, power_steps: int = 1) -> Array:
    """Orthonormal basis of an approximate range of ``op`` by randomised subspace iteration.

    Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.4.

    Parameters
    ----------
    op : Operator (..., n_q, n_k)
    columns : int
        Size of the basis, at most min(n_q, n_k).
    rng : int or numpy.random.Generator
    power_steps : int
        Products with A Aᵀ after the first product with A.

    Returns
    -------
    array (..., n_q, columns), float64

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> u = np.ones((6, 1)) / np.sqrt(6.0)
    >>> q = range_finder(Dense(u @ u.T), 1, rng=0)
    >>> bool(np.isclose(abs((u.T @ q).item()), 1))
    True
    """
    _check_rank("columns", columns, op)
    x = gaussian((*op.batch_shape, op.shape[-1], columns), generator(rng), like=op.like)
    q = orthonormalise(apply_widened(op, x))
    for _ in range(power_steps):
        q = orthonormalise(apply_widened(op, orthonormalise(apply_widened(op.T, q))))
    return q


def truncated_svd(
    op: Operator, rank: int, rng: int | np.random.Generator, *, rtol: float = 3e-2, max_steps: int | None = None
) -> SVD:
    """The ``rank`` leading singular triplets, matrix-free: the best approximation of that rank.

    Dense SVD where the operator is small or the rank is a good part of its order, else block Krylov from ``rank + 8``
    Gaussian columns (Musco and Musco 2015, arXiv 1504.05477), stopped by its residuals. With A V = U Θ exactly and
    R = AᵀU − VΘ, the error ‖A − UΘVᵀ‖₂² is at most ‖R‖₂² above that of the part of A outside U, so the
    default ``rtol`` on ‖R‖₂/σ_{rank+1} lets the error exceed the optimum by about rtol²/2 = 4.5e-4 relative in the
    spectral norm, and by less in the Frobenius norm.

    Parameters
    ----------
    op : Operator (..., n_q, n_k)
    rank : int
        1 <= rank <= min(n_q, n_k).
    rng : int or numpy.random.Generator
    rtol : float
        Largest residual ‖R‖₂ relative to σ_{rank+1}.
    max_steps : int, optional
        Most blocks; by default as many as keep the basis under half of the smaller dimension. Where they do not
        suffice, the dense SVD takes over if the matrix fits (2^24 entries), else the best found is returned.

    Returns
    -------
    SVD
        In float64, in the array library of ``op``.

    Raises
    ------
    ValueError
        If ``rank`` is not between 1 and min(n_q, n_k).

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> truncated_svd(Dense(np.diag([1.0, 3.0, 2.0])), 2, rng=0).values.tolist()
    [3.0, 2.0]
    """
    _check_rank("rank", rank, op)
    order, block = min(op.shape[-2:]), rank + _OVERSAMPLING
    fits = math.prod(op.shape) <= SMALL_ENTRIES
    if (factors := low_rank_factors(op)) is not None and factors[0].shape[-1] >= rank:
        return _leading(factored_svd(*factors), rank)
    if fits and (order <= SMALL_ORDER or 8 * block >= order):
        return _dense_svd(op, rank)
    if op.shape[-1] > op.shape[-2]:
        u, s, v = truncated_svd(op.T, rank, rng, rtol=rtol, max_steps=max_steps)
        return SVD(v, s, u)
    limit = max_steps or max(4, order // (2 * block))
    space, converged = _krylov_until_converged(op, rank, generator(rng), rtol, limit)
    if not converged and max_steps is None and fits:
        return _dense_svd(op, rank)
    return _rayleigh_ritz(space, rank)


def _krylov_until_converged(
    op: Operator, rank: int, rng: np.random.Generator, rtol: float, limit: int
) -> tuple[BlockKrylov, bool]:
    block = min(rank + _OVERSAMPLING, op.shape[-1])
    space = BlockKrylov(op, gaussian((*op.batch_shape, op.shape[-1], block), rng, like=op.like), rng=rng)
    while space.steps < limit and not space.complete:
        space.advance()
        if space.steps > 1 and bool(np.all(_residual(space, rank) <= rtol)):
            return space, True
    return space, space.complete


def _residual(space: BlockKrylov, rank: int) -> NDArray[Any]:
    """‖AᵀU − VΘ‖₂ / θ_{rank+1} for the leading Ritz triplets; zero where both are rounding noise."""
    coupling = space.coupling()
    squares, vectors = space.ritz()
    theta = np.sqrt(squares)
    noise = math.sqrt(max(space.op.shape[-2:])) * eps(space.op) * theta[..., :1]
    last = vectors[..., -coupling.shape[-1] :, :rank]
    rows = coupling @ (last / np.maximum(theta[..., None, :rank], np.maximum(noise, np.finfo(float).tiny)[..., None]))
    norms = np.linalg.norm(rows, ord=2, axis=(-2, -1))
    scale = np.maximum(theta[..., rank], 0.0) if theta.shape[-1] > rank else np.zeros(theta.shape[:-1])
    return np.where(norms <= noise[..., 0], 0.0, norms / np.maximum(scale, np.maximum(noise[..., 0], 1e-300)))


def _rayleigh_ritz(space: BlockKrylov, rank: int) -> SVD:
    xp = namespace(space.image)
    q, r = xp.linalg.qr(space.image)
    u, s, vt = xp.linalg.svd(r, full_matrices=False)
    right = space.basis @ xp.matrix_transpose(vt)[..., :rank]
    return SVD(q @ u[..., :rank], s[..., :rank], right)


def _dense_svd(op: Operator, rank: int) -> SVD:
    xp = op.xp
    u, s, vt = xp.linalg.svd(_finite_dense(op), full_matrices=False)
    return _leading(SVD(u, s, xp.matrix_transpose(vt)), rank)


def _leading(svd: SVD, rank: int) -> SVD:
    return SVD(svd.left[..., :rank], svd.values[..., :rank], svd.right[..., :rank])


def _check_rank(name: str, rank: int, op: Operator) -> None:
    if not 1 <= rank <= min(op.shape[-2:]):
        raise ValueError(f"{name} must be between 1 and {min(op.shape[-2:])} for an operator {op.shape}, got {rank}")
