"""Randomised low-rank approximations of operators from few products with blocks of vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nla_llm.backend import Array, device_of, generator, namespace, on_one_thread
from nla_llm.linalg.basis import gaussian, orthonormalise, working
from nla_llm.linalg.factors import SVD
from nla_llm.linalg.krylov import apply_as

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.operators import Operator

__all__ = [
    "gaussian_columns",
    "generalised_nystrom",
    "least_squares",
    "leave_one_out",
    "projected_svd",
    "randomised_svd",
    "range_finder",
]


def range_finder(op: Operator, columns: int, rng: int | np.random.Generator, *, power_steps: int = 1) -> Array:
    """Orthonormal basis of an approximate range of ``op`` by randomised subspace iteration.

    Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithm 4.4: every product is orthonormalised, so that powers
    lose no small singular values to rounding. In the precision of the operator (float32 where that is narrower).

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
    array (..., n_q, columns)

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.operators import Dense
    >>> u = np.ones((6, 1)) / np.sqrt(6.0)
    >>> q = range_finder(Dense(u @ u.T), 1, rng=0)
    >>> bool(np.isclose(abs((u.T @ q).item()), 1))
    True
    """
    if not 1 <= columns <= min(op.shape[-2:]):
        raise ValueError(
            f"columns must be between 1 and {min(op.shape[-2:])} for an operator {op.shape}, got {columns}"
        )
    q = orthonormalise(apply_as(op, gaussian_columns(op, columns, generator(rng))))
    for _ in range(power_steps):
        q = orthonormalise(apply_as(op, orthonormalise(apply_as(op.T, q))))
    return q


def gaussian_columns(op: Operator, columns: int, rng: np.random.Generator) -> Array:
    """Gaussian columns (..., n_k, columns) for ``op``, in the precision in which it is to be multiplied."""
    dtype = working(op.like).dtype
    return gaussian((*op.batch_shape, op.shape[-1], columns), rng, like=op.like, dtype=dtype)


def projected_svd(op: Operator, basis: Array, rank: int) -> SVD:
    """The leading triplets of Q QᵀA for orthonormal Q, the best approximation of that rank with its range in that of Q.

    Halko, Martinsson, Tropp 2011, algorithm 5.1, by QR of AᵀQ and an SVD of the small factor.

    Parameters
    ----------
    op : Operator (..., n_q, n_k)
    basis : array (..., n_q, l), l <= n_k
    rank : int
        At most l.
    """
    return _svd_of_projection(basis, apply_as(op.T, basis), rank)


@on_one_thread
def _svd_of_projection(basis: Array, image: Array, rank: int) -> SVD:
    xp = namespace(basis)
    outer, small = xp.linalg.qr(image)  # QᵀA = smallᵀ outerᵀ
    u, s, vt = xp.linalg.svd(small, full_matrices=False)
    return SVD(basis @ xp.matrix_transpose(vt[..., :rank, :]), s[..., :rank], outer @ u[..., :, :rank])


def randomised_svd(
    op: Operator, rank: int, rng: int | np.random.Generator, *, oversampling: int = 10, power_steps: int = 2
) -> SVD:
    """The ``rank`` leading triplets of Q QᵀA for a basis Q of rank + oversampling columns from the range finder.

    2 power_steps + 2 products with A or Aᵀ.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.operators import Dense
    >>> randomised_svd(Dense(np.diag([4.0, 2.0, 0.0])), 2, rng=0).values.round(12).tolist()
    [4.0, 2.0]
    """
    columns = min(rank + oversampling, *op.shape[-2:])
    return projected_svd(op, range_finder(op, columns, rng, power_steps=power_steps), rank)


def generalised_nystrom(op: Operator, columns: int, rows: int, rng: int | np.random.Generator) -> tuple[Array, Array]:
    """Factors of Q (ΨQ)⁺ ΨA for Q = orth(AΩ), from sketches AΩ and ΨA that one pass over A gives together.

    Tropp, Yurtsever, Udell and Cevher 2017 (arXiv 1609.00048), algorithm 4; the same as AΩ (ΨAΩ)⁺ ΨA, the generalised
    Nyström approximation (Nakatsukasa 2020, arXiv 2009.11392). The least-squares problem is solved by QR.

    Parameters
    ----------
    op : Operator (..., n_q, n_k)
    columns, rows : int
        Columns of Ω and rows of Ψ, columns <= rows.

    Returns
    -------
    left : array (..., n_q, columns)
        Orthonormal.
    right : array (..., n_k, columns)

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.operators import Dense
    >>> matrix = np.outer([1.0, 2.0, 3.0], [1.0, 1.0])
    >>> left, right = generalised_nystrom(Dense(matrix), 1, 2, rng=0)
    >>> bool(np.allclose(left @ right.T, matrix))
    True
    """
    rng = generator(rng)
    sketched = apply_as(op, gaussian_columns(op, columns, rng))
    psi = gaussian_columns(op.T, rows, rng)
    corange = apply_as(op.T, psi)  # (ΨA)ᵀ
    xp = namespace(sketched)
    q = orthonormalise(sketched)
    weights = least_squares(xp.matrix_transpose(psi) @ q, xp.matrix_transpose(corange))
    return q, xp.matrix_transpose(weights)


def least_squares(a: Array, b: Array) -> Array:
    """The x that minimises ‖a x − b‖_F for a (..., m, k) of full column rank and b (..., m, c), by QR."""
    xp = namespace(a)
    q, r = xp.linalg.qr(a)
    return xp.linalg.solve(r, xp.matrix_transpose(q) @ b)


def leave_one_out(r: Array) -> Array:
    """Mean over the columns i of ‖(I − Q₋ᵢQ₋ᵢᵀ) A ω_i‖², from the factor R of A Ω = Q R alone: no product is needed.

    Q₋ᵢ spans the other columns, so the distance of column i from it is one over the length of row i of R⁻¹. As ω_i is
    independent of Q₋ᵢ, the mean is an unbiased estimate of E ‖A − Q₋ᵢQ₋ᵢᵀA‖_F², the error with one column less (Epperly
    and Tropp 2024, arXiv 2207.06342).

    Parameters
    ----------
    r : array (..., l, l)
        Invertible.

    Examples
    --------
    >>> import numpy as np
    >>> float(leave_one_out(np.diag([3.0, 1.0])))
    5.0
    """
    xp = namespace(r)
    eye = xp.broadcast_to(xp.eye(r.shape[-1], dtype=r.dtype, device=device_of(r)), r.shape)
    inverse = xp.linalg.solve(r, eye)
    return xp.mean(1.0 / xp.sum(inverse * inverse, axis=-1), axis=-1)
