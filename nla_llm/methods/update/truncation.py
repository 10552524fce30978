"""Updates replaced by their truncated singular value decomposition, or by nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.backend import device_of
from nla_llm.linalg import SVD, factored_svd, low_rank_factors
from nla_llm.methods.registry import Properties, register, settle, whole_number
from nla_llm.methods.update.result import LowRankUpdate
from nla_llm.methods.update.shared import check_rank, checked, filled_up, formed, from_svd, spectrum_of

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.operators import Operator
    from nla_llm.problems import UpdateProblem
    from nla_llm.theory import Theory

__all__ = ["TruncatedSVD", "ZeroUpdate", "recompressed"]


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
        settle(self)
        whole_number("rank", self.rank)

    @checked
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """Factors in the precision of the update; in float32 where that is a half precision.

        An update that is a low-rank product already, such as an adapter, is recompressed by QR of both factors; its
        product is never formed. Any other operator is.
        """
        check_rank(self.rank, problem)
        xp, r, op = problem.xp, self.rank, problem.operator
        if low_rank_factors(op) is not None:
            return recompressed(op, r)
        u, s, vt = xp.linalg.svd(formed("delta", op), full_matrices=False)
        return from_svd(SVD(u[..., :, :r], s[..., :r], xp.matrix_transpose(vt[..., :r, :])), problem)

    def theory(self, problem: UpdateProblem) -> Theory:
        """Error in every unitarily invariant norm, from the singular values of the update."""
        from nla_llm.theory.yardsticks import eckart_young_theory  # noqa: PLC0415 - SciPy loads there

        return eckart_young_theory(spectrum_of(problem), self.rank, tuple(problem.delta.shape))

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """A dense singular value decomposition, that of an update that is held as an array; two factors to apply."""
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

    @checked
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """The zero operator as a product of rank at most one."""
        xp, batch = problem.xp, problem.batch_shape
        kind = {"dtype": problem.delta.dtype, "device": device_of(problem.like)}
        left, right = xp.zeros((*batch, problem.d_out, 1), **kind), xp.zeros((*batch, problem.d_in, 1), **kind)
        return LowRankUpdate(left, right, of=problem.operator, nonnegative=True)

    def theory(self, problem: UpdateProblem) -> Theory:
        """The norms of the update: nothing of rank zero is nearer than zero."""
        from nla_llm.theory.yardsticks import eckart_young_theory  # noqa: PLC0415 - SciPy loads there

        return eckart_young_theory(spectrum_of(problem), 0, tuple(problem.delta.shape))

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """Nothing to prepare; applying it multiplies by a rank of one, though by zeros."""
        return costs.Cost(apply=costs.formulas.LowRankShape(costs.d_out, costs.d_in, 1).apply(1))


def recompressed(adapter: Operator, rank: int) -> LowRankUpdate:
    """The best approximation of a low-rank product by one of smaller rank: QR of both factors and a small SVD.

    Costs O((d_out + d_in) R²) for factors of R columns; the product is never formed. The factors are
    ``left`` = U Σ, ``right`` = V, in the precision of the adapter; columns beyond those of the adapter are zero.

    Raises
    ------
    ValueError
        If the operator is no low-rank product, or its factors have more columns than the matrix has rows or columns.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.operators import LowRank
    >>> B = recompressed(LowRank(np.eye(5, 3), np.eye(4, 3)), 2)
    >>> B.rank, float(B.remaining("spectral").value)
    (2, 1.0)
    """
    factors = low_rank_factors(adapter)
    if factors is None:
        raise ValueError(f"{adapter!r} is no low-rank product of fewer columns than the matrix has; pass an adapter")
    xp, (u, s, v) = adapter.xp, factored_svd(*factors)
    left, right = (filled_up(a, rank) for a in (u * s[..., None, :], v))
    narrow = left.dtype if adapter.dtype not in (xp.float32, xp.float64) else adapter.dtype
    return LowRankUpdate(xp.astype(left, narrow), xp.astype(right, narrow), of=adapter)
