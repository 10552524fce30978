"""Updates replaced by the product that is best for the inputs that the layer sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.backend import Array, eps, namespace, to_numpy
from nla_llm.linalg import in_range, triangular_factor, widen, working
from nla_llm.methods.registry import Properties, register, settle, whole_number
from nla_llm.methods.update.result import LowRankUpdate
from nla_llm.methods.update.shared import check_rank, equivariant, formed
from nla_llm.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from nla_llm.problems import UpdateProblem
    from nla_llm.theory import Theory

__all__ = ["DataAwareSVD", "calibration_factor"]

_BLOCK_ROWS = 4096  # calibration inputs that are factorised at a time


@register("data_aware_svd")
@final
@dataclass(frozen=True)
class DataAwareSVD:
    """B of rank r with the least ‖X (ΔW − B)ᵀ‖_F over the calibration inputs X: ΔW projected where its outputs are.

    With X = QR and ΔW Rᵀ = U Σ Vᵀ the best is B = U_r U_rᵀ ΔW: its error is that of the truncation of ΔW Rᵀ, and no
    factor is ever inverted (derived; equal to S⁻¹[S ΔWᵀ]_r with S = R where R has an inverse, as in SVD-LLM, Wang et
    al. 2024, arXiv 2403.07378). So X may be rank deficient or have fewer samples than the rank: what rank the data do
    not use goes to the rest of ΔW. R comes from QR of X, block by block, never from XᵀX, whose condition is the square.
    Everything is computed in float64.

    For calibration data that do not fit into memory pass ``inputs=nl.linalg.triangular_factor(blocks)``.

    Parameters
    ----------
    rank
        r, columns of the factors.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> inputs = np.array([[0.1, 10.0]])  # the second column of the update is what matters
    >>> B = DataAwareSVD(1)(UpdateProblem(np.diag([3.0, 1.0]), inputs=inputs))
    >>> abs((np.diag([3.0, 1.0]) - B.dense()) @ inputs[0]).round(12).tolist()
    [0.0, 0.0]
    """

    rank: int
    properties: ClassVar[Properties] = Properties(
        problem="update", family="data aware svd", target="update", budget="rank", converges=True, row_stochastic=False
    )

    def __post_init__(self) -> None:
        settle(self)
        whole_number("rank", self.rank)

    @equivariant
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """``left`` = U_r, orthonormal, and ``right`` = ΔWᵀ U_r, in the precision of the update.

        Raises
        ------
        ValueError
            If the problem has no inputs.
        """
        check_rank(self.rank, problem)
        xp, t = problem.xp, problem.xp.matrix_transpose
        delta = widen(formed("delta", problem.delta))
        factor, _ = in_range(formed("inputs", calibration_factor(problem)))  # its size does not matter
        weighted = delta @ t(factor)
        u, s, _ = xp.linalg.svd(weighted, full_matrices=False)
        u = _spend_the_rest(u, s, delta, self.rank)
        narrow = working(problem.like).dtype
        left, right = xp.astype(u, narrow, copy=False), xp.astype(t(delta) @ u, narrow, copy=False)
        return LowRankUpdate(left, right, of=problem.operator)

    def theory(self, problem: UpdateProblem) -> Theory:
        """The error of the outputs, ``error("outputs")``: a closed form."""
        from nla_llm.theory.low_rank import data_aware_theory  # noqa: PLC0415 - SciPy loads there

        weighted = widen(problem.exact().dense()) @ problem.xp.matrix_transpose(calibration_factor(problem))
        values = to_numpy(problem.xp.linalg.svdvals(weighted))
        return data_aware_theory(values, self.rank, tuple(problem.delta.shape))

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """QR of the inputs, of which there are ``samples``; the weighted update, its SVD and one product."""
        import sympy  # noqa: PLC0415 - loaded by the first formula only

        d_out, d_in, r, f = costs.d_out, costs.d_in, costs.r, costs.formulas
        count = costs.Operations
        samples = _samples(problem)
        blocks = [_BLOCK_ROWS] * (samples // _BLOCK_ROWS) + [samples % _BLOCK_ROWS] * bool(samples % _BLOCK_ROWS)
        prepare, rows = count(), 0
        for block in blocks:
            rows += block
            if rows > problem.d_in:
                prepare += f.qr(rows, d_in)
                rows = problem.d_in
        short = d_in if rows == problem.d_in else rows
        prepare += f.matmul(d_out, d_in, short) + f.svd(d_out, short) + f.matmul(d_in, d_out, r)
        prepare += count(mul=1, compare=sympy.Min(d_out, short))  # singular values that are rounding
        return costs.Cost(prepare=prepare, apply=f.LowRankShape(d_out, d_in, r).apply(1))


def calibration_factor(problem: UpdateProblem) -> Array:
    """R with RᵀR = XᵀX for the calibration inputs X of a problem, by successive QR of blocks of rows, in float64.

    Raises
    ------
    ValueError
        If the problem has no inputs.
    """
    if problem.inputs is None:
        raise ValueError(
            "data_aware_svd needs calibration inputs; pass UpdateProblem(delta, inputs=...), an array (samples, d_in), "
            "an operator, or linalg.triangular_factor of a stream of blocks"
        )
    return triangular_factor(_blocks(problem.inputs))


def _blocks(inputs: Array | Operator) -> Iterator[Array]:
    op = inputs if isinstance(inputs, Operator) else Dense(inputs)
    for start in range(0, op.shape[-2], _BLOCK_ROWS):
        yield op.rows(start, min(start + _BLOCK_ROWS, op.shape[-2]))


def _samples(problem: UpdateProblem) -> int:
    if problem.inputs is None:
        raise ValueError("the cost depends on the number of calibration inputs; pass UpdateProblem(delta, inputs=...)")
    return int(problem.inputs.shape[-2])


def _spend_the_rest(u: Array, s: Array, delta: Array, rank: int) -> Array:
    """The first ``rank`` columns of U; those to which no data belong replaced by the leading ones of the rest of ΔW."""
    xp, t = namespace(u), namespace(u).matrix_transpose
    noise = 1e1 * max(delta.shape[-2:]) * eps(s)  # the constant is empirical
    seen = s > noise * s[..., :1]
    if s.shape[-1] >= rank and bool(xp.all(seen[..., :rank])):
        return u[..., :rank]
    u = xp.where(seen[..., None, :], u, xp.zeros_like(u))
    more, left, _ = xp.linalg.svd(delta - u @ (t(u) @ delta), full_matrices=False)
    there = left > noise * xp.linalg.matrix_norm(delta)[..., None]
    more = xp.where(there[..., None, :], more, xp.zeros_like(more))
    number = xp.sum(xp.astype(seen, xp.int64), axis=-1, keepdims=True)
    place = xp.arange(rank)
    index = xp.where(place < number, place, u.shape[-1] + place - number)
    both = xp.concat([u, more], axis=-1)
    return xp.take_along_axis(both, xp.broadcast_to(index[..., None, :], (*both.shape[:-1], rank)), axis=-1)
