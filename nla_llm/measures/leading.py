"""The best low-rank approximation of a large matrix, and brackets of its singular values that a part of them gives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm.backend import generator
from nla_llm.linalg import SVD, truncated_svd
from nla_llm.linalg.lanczos import leading_triplets
from nla_llm.measures.estimate import Estimate
from nla_llm.measures.ranks import Spectrum
from nla_llm.measures.spectral import spectral_norm
from nla_llm.measures.streaming import frobenius_by_rows, rounding
from nla_llm.operators import Dense, LowRank

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator

__all__ = ["DENSE_ENTRIES", "FULL_ORDER", "Approximation", "gram_spectrum", "leading_spectrum", "remainder"]

FULL_ORDER = 1024  # up to this smaller dimension all singular values are computed, in about a second
DENSE_ENTRIES = 1 << 20  # up to so many entries densely
_STEPS = 8  # most block Krylov steps; the bracket tells what they have come to
_RTOL = 0.1  # residual at which they stop: the spectral error is then within 0.5 % of the optimum
_WIDTH = 0.03  # relative, of the bracket of the spectral norm of the error


class Approximation(NamedTuple):
    """A matrix as UΣVᵀ plus a remainder whose norms are bracketed."""

    factors: SVD
    spectrum: Spectrum
    spectral: Estimate  # ‖A − UΣVᵀ‖₂
    frobenius: Estimate  # ‖A − UΣVᵀ‖_F


def remainder(op: Operator, left: NDArray[Any], right: NDArray[Any], rng: Any) -> tuple[Estimate, Estimate]:
    """``‖A − left rightᵀ‖`` in the spectral and the Frobenius norm, in the precision of A.

    Both brackets are widened by the rounding of the products that cancel, 4√n eps ‖left rightᵀ‖_F.

    Examples
    --------
    >>> a = Dense(np.diag([3.0, 2.0]))
    >>> spectral, frobenius = remainder(a, np.array([[3.0], [0.0]]), np.array([[1.0], [0.0]]), rng=0)
    >>> round(float(spectral.value), 12), round(float(frobenius.value), 12)
    (2.0, 2.0)
    """
    product = LowRank(left.astype(op.dtype, copy=False), right.astype(op.dtype, copy=False))
    error = op - product
    slack = rounding(op) * math.sqrt(float(np.sum((left.T @ left) * (right.T @ right))))
    spectral = _widened(spectral_norm(error, rtol=_WIDTH, rng=rng), slack)
    norm = float(frobenius_by_rows(error))
    return spectral, _widened(Estimate.exact(norm, "one pass over the entries", rounding=rounding(op)), slack)


def _widened(x: Estimate, slack: float) -> Estimate:
    return Estimate(x.value, np.maximum(x.lower - slack, 0.0), x.upper + slack, x.confidence, x.how)


def gram_spectrum(matrix: NDArray[Any]) -> Spectrum:
    """All singular values, from the Gram matrix of the shorter side, in float64 whatever the dtype of the matrix.

    Squares are off by at most about n eps σ₁² (the constant 4 is empirical), values well below √(n eps) σ₁ are not
    resolved: their brackets reach down to zero.

    Examples
    --------
    >>> gram_spectrum(np.diag([3.0, 2.0, 1.0])).values.round(12).tolist()
    [3.0, 2.0, 1.0]
    """
    a = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    order, step = a.shape[0], 1 + (1 << 20) // a.shape[0]
    gram = np.zeros((order, order))
    for start in range(0, a.shape[1], step):
        columns = a[:, start : start + step].astype(np.float64)
        gram += columns @ columns.T
    squares = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    slack = 4 * order * np.finfo(np.float64).eps * float(squares[0])
    total = Estimate.exact(float(np.trace(gram)), "trace of the Gram matrix", rounding=1e-13)
    lower, upper = np.sqrt(np.maximum(squares - slack, 0.0)), np.sqrt(squares + slack)
    return Spectrum(lower, upper, total, order=order, how="eigenvalues of the Gram matrix")


def leading_spectrum(
    matrix: NDArray[Any], rank: int, rng: int | np.random.Generator, *, squares: float | None = None
) -> Approximation:
    """Approximate a matrix by ``rank`` singular triplets, never decomposing a large one in full.

    With A V = U Θ exactly and R = AᵀU − V Θ (or both transposed), σ_i >= θ_i by interlacing, and by Weyl's
    inequality σ_i <= max(θ_i, ε) + ‖R‖₂ as well as σ_i² <= θ_i² + ε², where ε = ‖A − UΘVᵀ‖₂, itself bracketed. Up to
    the smaller dimension ``FULL_ORDER`` all singular values are computed and the brackets are rounding.

    Parameters
    ----------
    matrix : array (d_out, d_in), float32 or float64
    rank : int
        1 <= rank <= min(d_out, d_in).
    rng : int or numpy.random.Generator
    squares : float, optional
        ‖A‖_F², where it is known.

    Examples
    --------
    >>> found = leading_spectrum(np.diag([3.0, 2.0, 1.0]), 1, rng=0)
    >>> found.factors.values.round(12).tolist(), found.spectrum.values.round(12).tolist()
    ([3.0], [3.0, 2.0, 1.0])
    """
    op, rng = Dense(matrix), generator(rng)
    order = min(matrix.shape)
    if matrix.size <= DENSE_ENTRIES:
        factors = truncated_svd(op, rank, rng)
    else:
        factors = leading_triplets(matrix, rank, rng, rtol=_RTOL, max_steps=_STEPS)
    left = factors.left * factors.values
    spectral, frobenius = remainder(op, left, factors.right, rng)
    if order <= FULL_ORDER:
        full = Spectrum.dense(matrix) if matrix.size <= DENSE_ENTRIES else gram_spectrum(matrix)
        return Approximation(factors, full, spectral, frobenius)
    total = float(np.square(frobenius_by_rows(op))) if squares is None else squares
    link = max(
        float(np.linalg.norm(np.asarray(a @ x.astype(matrix.dtype), dtype=np.float64) - y * factors.values, 2))
        for a, x, y in ((op, factors.right, factors.left), (op.T, factors.left, factors.right))
    )
    slack = rounding(op) * float(factors.values[0])
    rest, theta = float(spectral.upper), factors.values
    upper = np.minimum(np.maximum(theta, rest) + link, np.hypot(theta, rest)) + slack
    energy = Estimate.exact(total, "one pass over the entries", rounding=1e-6 if matrix.dtype == np.float32 else 1e-13)
    lower = np.maximum(theta - slack, 0.0)
    spectrum = Spectrum(lower, upper, energy, order=order, rest=rest, how=spectral.how, confidence=spectral.confidence)
    return Approximation(factors, spectrum, spectral, frobenius)
