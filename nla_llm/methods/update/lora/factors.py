"""The pair of factors B and A of an update s·B·A: its scaling, and how well conditioned it is."""

from __future__ import annotations

from math import pi, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm.backend import Array, namespace, to_numpy
from nla_llm.linalg import factored_svd
from nla_llm.operators import LowRank

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["SCALINGS", "Factors", "PairCondition", "largest_angle", "pair_condition", "product"]

SCALINGS: dict[str, Callable[[float, int], float]] = {
    # Hu et al. 2021, arXiv 2106.09685, section 4.1
    "standard": lambda alpha, rank: alpha / rank,
    # Kalajdzievski 2023, arXiv 2312.03732: the first step does not depend on the rank
    "rank_stabilised": lambda alpha, rank: alpha / sqrt(rank),
}


class Factors(NamedTuple):
    """B (..., d_out, r) and A (..., r, d_in), or anything that has one entry for each of theirs."""

    B: Array
    A: Array


class PairCondition(NamedTuple):
    """Condition numbers in the 2-norm of the two factors and of their product, arrays of the batch shape."""

    A: NDArray[np.float64]
    B: NDArray[np.float64]
    product: NDArray[np.float64]


def product(factors: Factors, scale: float) -> LowRank:
    """The operator s·B·A.

    Examples
    --------
    >>> product(Factors(np.ones((3, 1)), np.ones((1, 2))), 0.5).dense().tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    return LowRank(scale * factors.B, namespace(factors.A).matrix_transpose(factors.A))


def pair_condition(factors: Factors) -> PairCondition:
    """κ₂ of A, B and BA on their r directions, in float64; infinite where fewer than r are left.

    That of the product comes from QR factorisations of the factors and the singular values of an r × r matrix: BA is
    not formed. The largest finite value is about 1/eps, and values near it mean singular to rounding.

    Examples
    --------
    >>> pair = pair_condition(Factors(np.diag([1.0, 2.0]), np.diag([1.0, 4.0])))
    >>> float(pair.A), float(pair.B), float(pair.product)
    (4.0, 2.0, 8.0)
    """
    xp = namespace(factors.B)
    transposed = xp.matrix_transpose(factors.A)
    values = (xp.linalg.svdvals(xp.astype(f, xp.float64)) for f in (factors.A, factors.B))
    return PairCondition(*map(_ratio, (*values, factored_svd(factors.B, transposed).values)))


def largest_angle(factors: Factors, left: Array, right: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Largest principal angle between the column space of BA and that of ``left``, and between the row spaces.

    Parameters
    ----------
    factors : Factors
    left : array (..., d_out, k)
        Orthonormal columns, for instance left singular vectors of the update.
    right : array (..., d_in, k)
        Orthonormal columns.

    Returns
    -------
    two arrays of the batch shape, in radians
        A right angle where BA has fewer than min(r, k) directions: what is not there lies in no space.
    """
    from nla_llm.measures import principal_angles  # noqa: PLC0415 - measured after training, not in it

    xp = namespace(factors.B)
    svd = factored_svd(factors.B, xp.matrix_transpose(factors.A))
    values = to_numpy(svd.values)
    k = min(values.shape[-1], int(left.shape[-1]))
    short = values[..., k - 1] <= max(svd.left.shape[-2], svd.right.shape[-2]) * np.finfo(float).eps * values[..., 0]
    pairs = ((svd.left[..., :k], left), (svd.right[..., :k], right))
    angles = [np.where(short, pi / 2, principal_angles(found, wanted)[..., -1]) for found, wanted in pairs]
    return angles[0], angles[1]


def _ratio(values: Any) -> NDArray[np.float64]:
    s = np.asarray(to_numpy(values), dtype=np.float64)
    first, last = s[..., 0], s[..., -1]
    return np.asarray(np.divide(first, last, out=np.full(first.shape, np.inf), where=last > 0))
