"""Operators that are low-rank products in disguise: their factors, and the SVD that costs O(n r²)."""

from __future__ import annotations

from typing import NamedTuple

from nla_llm.backend import Array, namespace
from nla_llm.linalg.basis import widen
from nla_llm.operators import LowRank, Operator, RowNormalised, Scaled, Skeleton, Transpose

__all__ = ["SVD", "factored_svd", "low_rank_factors"]


class SVD(NamedTuple):
    """``left @ diag(values) @ rightᵀ``: left (..., n_q, r), values (..., r) descending, right (..., n_k, r)."""

    left: Array
    values: Array
    right: Array


def low_rank_factors(op: Operator) -> tuple[Array, Array] | None:
    """Factors (..., n_q, r) and (..., n_k, r) with ``op == left @ rightᵀ`` where the operator has them, else None.

    Looks through transposes, scalings and row normalisation; not through sums, where differences may cancel. None as
    well where r exceeds min(n_q, n_k), since the matrix itself is then the smaller object.

    Examples
    --------
    >>> import numpy as np
    >>> left, right = low_rank_factors(2.0 * LowRank(np.ones((3, 1)), np.ones((4, 1))).T)
    >>> left.shape, right.shape, left[0].tolist()
    ((4, 1), (3, 1), [2.0])
    """
    factors = _factors(op)
    return factors if factors is not None and factors[0].shape[-1] <= min(op.shape[-2:]) else None


def _factors(op: Operator) -> tuple[Array, Array] | None:
    match op:
        case LowRank():
            return op.left, op.right
        case Skeleton():
            return op.left.dense() @ op.core, op.xp.matrix_transpose(op.right.dense())
        case Transpose():
            inner = _factors(op.op)
            return None if inner is None else (inner[1], inner[0])
        case Scaled():
            inner = _factors(op.op)
            return None if inner is None else (op.factor * inner[0], inner[1])
        case RowNormalised():
            inner = _factors(op.op)
            return None if inner is None else (inner[0] / op.sums[..., None], inner[1])
    return None


def factored_svd(left: Array, right: Array) -> SVD:
    """SVD of ``left @ rightᵀ`` from QR of both factors and an r × r SVD; the product is never formed.

    Parameters
    ----------
    left, right : array (..., n_q, r), (..., n_k, r), r <= min(n_q, n_k)

    Returns
    -------
    SVD
        With r triplets, in float64.

    Examples
    --------
    >>> import numpy as np
    >>> factored_svd(np.ones((4, 1)), np.ones((9, 1))).values.round(12).tolist()
    [6.0]
    """
    xp = namespace(left, right)
    q_left, r_left = xp.linalg.qr(widen(left))
    q_right, r_right = xp.linalg.qr(widen(right))
    u, s, vt = xp.linalg.svd(r_left @ xp.matrix_transpose(r_right), full_matrices=False)
    return SVD(q_left @ u, s, q_right @ xp.matrix_transpose(vt))
