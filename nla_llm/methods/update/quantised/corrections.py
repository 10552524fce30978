"""What the methods share: the quantised base, the best correction of it in a norm, and what both cost and weigh.

A matrix W (d_out, d_in), the ``delta`` of an update problem, is replaced by Q + L, Q quantised and L = left rightᵀ
of rank r. Given Q, the best L is known: with M any square root of the second moment of the inputs, M Mᵀ = XᵀX, the
output error ‖(W − Q − L) Xᵀ‖_F = ‖(W − Q − L) M‖_F is least for the L with L M = [(W − Q) M]_r. If U_r holds the r
leading left singular vectors of (W − Q) M, then L = U_r U_rᵀ (W − Q) is such a one: no inverse of M is needed, so
inputs without full rank do no harm.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from nla_llm import costs
from nla_llm.arithmetic.quantisers import quantiser
from nla_llm.backend import Array, namespace
from nla_llm.linalg import in_range, singular_values
from nla_llm.methods.registry import Properties, settle, whole_number
from nla_llm.methods.update.shared import check_rank, formed
from nla_llm.operators import Dense, LowRank, Operator, Sum

if TYPE_CHECKING:
    from nla_llm.problems import UpdateProblem
    from nla_llm.theory import Theory

FACTOR_BITS = 16  # of an entry of a correction that is not quantised, as it is counted

__all__ = [
    "FACTOR_BITS",
    "QuantisedBase",
    "applying_cost",
    "best_correction",
    "calibration",
    "check_format",
    "corrected",
    "correction_cost",
    "dense_matrix",
    "properties",
    "quantisation_cost",
    "remainder_cost",
    "residual_theory",
    "square_root",
    "square_root_cost",
]


def properties(**more: Any) -> Properties:
    """What all of them declare; the base is quantised, so only the correction has a small rank."""
    common = {"problem": "update", "family": "quantised", "target": "update", "row_stochastic": False}
    if "budget" in more:
        common["exceptions"] = {"rank": "the rank is that of the correction; the quantised base has full rank"}
    return Properties(**{**common, **more})


class QuantisedBase:
    """What all of them share: their options are checked when they are made, and they know what they store.

    The dataclasses derived from it have fields ``format`` and ``block``, and ``rank`` where the base is corrected.
    """

    format: str
    block: int | None

    def __post_init__(self) -> None:
        settle(self)
        check_format("format", self.format)
        quantiser(self.format, self.block)
        for name in ("rank", "iterations"):
            if hasattr(self, name):
                whole_number(name, getattr(self, name))

    def bits(self, problem: UpdateProblem) -> Fraction:
        """Bits that are stored for an entry of W: those of the base, and 16 for each entry of the factors."""
        shape = (problem.d_out, problem.d_in)
        factors = Fraction(getattr(self, "rank", 0) * FACTOR_BITS * sum(shape), shape[0] * shape[1])
        return quantiser(self.format, self.block).bits_per_entry(shape) + factors


def check_format(name: str, value: Any) -> None:
    """Refuse what is no format, in the words of the quantisers."""
    try:
        quantiser(value)
    except ValueError as error:
        raise ValueError(str(error).replace("format", name, 1)) from None


def dense_matrix(problem: UpdateProblem, rank: int = 0) -> Array:
    """The matrix, formed, in a precision that a library decomposes, once the rank is known to fit."""
    check_rank(rank, problem)
    return formed("delta", problem.delta)


def calibration(problem: UpdateProblem, dtype: Any) -> Array:
    """Calibration inputs (samples, d_in) in a precision; weights are made of them, so their size does not matter.

    Raises
    ------
    ValueError
        If the problem has none.
    """
    if problem.inputs is None:
        raise ValueError(
            "a correction weighted by inputs needs calibration inputs, and the problem has none; pass "
            "UpdateProblem(matrix, inputs=X), or choose a method without weights, such as lqer with weighting='none'"
        )
    return problem.xp.astype(in_range(formed("inputs", problem.inputs))[0], dtype, copy=False)


def square_root(problem: UpdateProblem, dtype: Any) -> Array:
    """M (d_in, k) with M Mᵀ = XᵀX: Xᵀ, or the transposed triangle of its QR factorisation, which never squares X."""
    inputs = calibration(problem, dtype)
    xp = namespace(inputs)
    if inputs.shape[-2] > inputs.shape[-1]:
        inputs = xp.linalg.qr(inputs)[1]
    return xp.matrix_transpose(inputs)


def best_correction(residual: Array, rank: int, weighted: Array | None = None) -> LowRank:
    """U_r U_rᵀ (W − Q) for the leading left singular vectors of the weighted residual (W − Q) M, of itself if None.

    Examples
    --------
    >>> import numpy as np
    >>> residual = np.diag([3.0, 2.0])
    >>> best_correction(residual, 1).dense().tolist(), best_correction(residual, 1, 1 / residual.clip(1)).rank
    ([[3.0, 0.0], [0.0, 0.0]], 1)
    """
    xp = namespace(residual)
    u = xp.linalg.svd(residual if weighted is None else weighted, full_matrices=False)[0][..., :rank]
    return LowRank(u, xp.matrix_transpose(residual) @ u)


def corrected(base: Array, correction: LowRank) -> Sum:
    """Q + L: its ``terms`` are the dequantised base, dense, and the correction with ``left`` and ``right``."""
    return Sum(Dense(base), correction)


# -- what they cost and promise ---------------------------------------------------------------------------------


def quantisation_cost(method: QuantisedBase) -> costs.Operations:
    """Quantising the whole matrix once."""
    return costs.formulas.quantisation(costs.d_out, costs.d_in, quantiser(method.format, method.block))


def correction_cost(columns: Any = None) -> costs.Operations:
    """The residual, the singular vectors of it or of the weighted one with other ``columns``, and the right factor."""
    d_out, d_in, r = costs.d_out, costs.d_in, costs.r
    columns = d_in if columns is None else columns
    subtraction = costs.Operations(add=d_out * d_in)
    return subtraction + costs.formulas.svd(d_out, columns) + costs.formulas.matmul(d_in, d_out, r)


def square_root_cost(problem: UpdateProblem) -> tuple[costs.Operations, Any]:
    """Costs of :func:`square_root`, and the columns of what it returns: n samples, or d_in where they are more."""
    if problem.inputs is None or problem.inputs.shape[-2] <= problem.d_in:
        return costs.Operations(), costs.n
    return costs.formulas.qr(costs.n, costs.d_in), costs.d_in


def remainder_cost() -> costs.Operations:
    """W − L, with L multiplied out."""
    d_out, d_in, r = costs.d_out, costs.d_in, costs.r
    return costs.formulas.matmul(d_out, r, d_in) + costs.Operations(add=d_out * d_in)


def applying_cost() -> costs.Operations:
    """Q and L applied to one input, and the sum."""
    d_out, d_in, r = costs.d_out, costs.d_in, costs.r
    factors = costs.formulas.LowRankShape(d_out, d_in, r).apply(1)
    return costs.formulas.matmul(d_out, d_in, 1) + factors + costs.Operations(add=d_out)


def residual_theory(problem: UpdateProblem, base: Operator, rank: int) -> Theory:
    """Error in every unitarily invariant norm of the best correction, from the singular values of W − Q."""
    from nla_llm.theory.yardsticks import eckart_young_theory  # noqa: PLC0415 - SciPy loads there

    return eckart_young_theory(singular_values(problem.exact() - base), rank, tuple(problem.delta.shape))
