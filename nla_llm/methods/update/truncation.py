"""Updates replaced by their truncated singular value decomposition, or by nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.backend import device_of, to_numpy
from nla_llm.methods.registry import Properties, register, require, whole_number
from nla_llm.operators import LowRank

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.problems import UpdateProblem
    from nla_llm.theory import Theory

__all__ = ["TruncatedSVD", "ZeroUpdate"]


@register("truncated_svd")
@final
@dataclass(frozen=True)
class TruncatedSVD:
    """The best update of rank r in every unitarily invariant norm (Eckart and Young 1936, Mirsky 1960).

    The factors are ``left`` = U Σ (d_out, r) and ``right`` = V (d_in, r).

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> B = TruncatedSVD(1)(UpdateProblem(np.diag([3.0, 1.0])))
    >>> float(abs(B.dense()).max())
    3.0
    """

    rank: int
    properties: ClassVar[Properties] = Properties(
        problem="update", family="truncated svd", target="update", budget="rank", converges=True, row_stochastic=False
    )

    def __post_init__(self) -> None:
        whole_number("rank", self.rank)

    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRank:
        """Operator of class LowRank, in the precision of the update; in float32 where that is a half precision."""
        require(self, problem)
        if self.rank > min(problem.d_out, problem.d_in):
            raise ValueError(f"rank={self.rank} exceeds the dimensions of the update, {problem.d_out} x {problem.d_in}")
        xp, r = problem.xp, self.rank
        delta = problem.delta
        if delta.dtype not in (xp.float32, xp.float64):  # in no other does a library decompose
            delta = xp.astype(delta, xp.float32 if delta.dtype.itemsize <= 4 else xp.float64)
        u, s, vt = xp.linalg.svd(delta, full_matrices=False)
        return LowRank(u[..., :, :r] * s[..., None, :r], xp.matrix_transpose(vt[..., :r, :]))

    def theory(self, problem: UpdateProblem) -> Theory:
        """Error in every unitarily invariant norm, from the singular values of the update."""
        from nla_llm.theory.yardsticks import eckart_young_theory  # noqa: PLC0415 - SciPy loads there

        spectrum = to_numpy(problem.xp.linalg.svdvals(problem.exact().dense()))
        return eckart_young_theory(spectrum, self.rank, tuple(problem.delta.shape))

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """A dense singular value decomposition; applying it to one input takes the two factors."""
        d_out, d_in, r = costs.d_out, costs.d_in, costs.r
        factors = costs.formulas.svd(d_out, d_in) + costs.Operations(mul=d_out * r)
        return costs.Cost(prepare=factors, apply=costs.formulas.LowRankShape(d_out, d_in, r).apply(1))


@register("zero_update")
@final
@dataclass(frozen=True)
class ZeroUpdate:
    """No update at all: the yardstick of doing nothing, with relative error one.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> ZeroUpdate()(UpdateProblem(np.eye(2))).dense().tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """

    properties: ClassVar[Properties] = Properties(
        problem="update", family="zero update", target="zero", row_stochastic=False, nonnegative=True, yardstick=True
    )

    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRank:
        """The zero operator as a product of rank at most one."""
        require(self, problem)
        xp, batch = problem.xp, problem.batch_shape
        kind = {"dtype": problem.delta.dtype, "device": device_of(problem.delta)}
        left, right = xp.zeros((*batch, problem.d_out, 1), **kind), xp.zeros((*batch, problem.d_in, 1), **kind)
        return LowRank(left, right, nonnegative=True)

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """Nothing to prepare; applying it multiplies by a rank of one, though by zeros."""
        return costs.Cost(apply=costs.formulas.LowRankShape(costs.d_out, costs.d_in, 1).apply(1))
