"""The matrix is quantised once, and the error corrected or not: QLoRA's start, LQER, QERA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.arithmetic.quantisers import quantiser
from nla_llm.methods.registry import Properties, one_of, register
from nla_llm.methods.update.quantised import corrections
from nla_llm.methods.update.shared import checked
from nla_llm.operators import Dense, Sum

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.backend import Array
    from nla_llm.problems import UpdateProblem
    from nla_llm.theory import Theory

__all__ = ["LQER", "QERA", "QuantisedMatrix"]


@register("quantised")
@final
@dataclass(frozen=True)
class QuantisedMatrix(corrections.QuantisedBase):
    """Q(W) alone: where QLoRA starts, its correction being zero (Dettmers et al. 2023, arXiv 2305.14314).

    Parameters
    ----------
    format
        "nf4", "int8", …: see :func:`nla_llm.arithmetic.quantisers.quantiser`.
    block
        Entries that share a scale, or None for a scale to each row.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> QuantisedMatrix("int2")(UpdateProblem(np.array([[4.0, 1.0, -3.0]]))).dense().tolist()
    [[4.0, 0.0, -4.0]]
    """

    format: str = "nf4"
    block: int | None = 64
    properties: ClassVar[Properties] = corrections.properties()

    @checked
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> Dense:
        """The dequantised matrix."""
        return Dense(quantiser(self.format, self.block)(corrections.dense_matrix(problem)).matrix)

    def theory(self, problem: UpdateProblem) -> Theory:
        """Error in every unitarily invariant norm, from the singular values of W − Q(W)."""
        return corrections.residual_theory(problem, self(problem), 0)

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """Scales, and a bisection for each entry; applied dequantised."""
        apply = costs.formulas.matmul(costs.d_out, costs.d_in, 1)
        return costs.Cost(prepare=corrections.quantisation_cost(self), apply=apply)


class _CorrectedOnce(corrections.QuantisedBase, ABC):
    """Q(W) plus the best correction of what it leaves, in a norm that ``_weighted`` says."""

    rank: int

    @checked
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> Sum:
        """The sum of the dequantised matrix and the correction."""
        matrix = corrections.dense_matrix(problem, self.rank)
        base = quantiser(self.format, self.block)(matrix).matrix
        residual = matrix - base
        correction = corrections.best_correction(residual, self.rank, self._weighted(problem, residual))
        return corrections.corrected(base, correction)

    @abstractmethod
    def _weighted(self, problem: UpdateProblem, residual: Array) -> Array | None:
        """The residual (W − Q) M, for M Mᵀ what the columns of the error weigh; None where all weigh the same."""


@register("lqer")
@final
@dataclass(frozen=True)
class LQER(_CorrectedOnce):
    """Q(W) plus the truncated singular value decomposition of W − Q(W), whose columns may carry weights.

    With ``weighting="none"`` the error is the least for this Q(W) and rank in every unitarily invariant norm (Eckart,
    Young, Mirsky). With "activations" column j of the error counts with the mean modulus of the j-th coordinate of
    the inputs: L²QER (Zhang et al. 2024, arXiv 2402.02446, section 3).

    Parameters
    ----------
    rank
        Of the correction.
    weighting
        "none" or "activations".
    format, block
        As for :class:`QuantisedMatrix`.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> op = LQER(1, format="int2")(UpdateProblem(np.array([[4.0, 1.0, -3.0]])))
    >>> op.dense().tolist(), op.terms[1].rank
    ([[4.0, 1.0, -3.0]], 1)
    """

    rank: int
    weighting: str = "none"
    format: str = "nf4"
    block: int | None = 64
    properties: ClassVar[Properties] = corrections.properties(budget="rank", converges=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("weighting", self.weighting, ("none", "activations"))

    def _weighted(self, problem: UpdateProblem, residual: Array) -> Array | None:
        if self.weighting == "none":
            return None
        inputs, xp = corrections.calibration(problem, residual.dtype), problem.xp
        return residual * xp.mean(xp.abs(inputs), axis=-2, keepdims=True)

    def theory(self, problem: UpdateProblem) -> Theory | None:
        """Error in every unitarily invariant norm, from the singular values of W − Q(W); nothing with weights."""
        if self.weighting != "none":
            return None
        base = QuantisedMatrix(self.format, self.block)(problem)
        return corrections.residual_theory(problem, base, self.rank)

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """One quantisation and one singular value decomposition."""
        d_out, d_in, n = costs.d_out, costs.d_in, costs.n
        prepare = corrections.quantisation_cost(self) + corrections.correction_cost()
        if self.weighting != "none":
            prepare += costs.formulas.sum_of(n, times=d_in) + costs.Operations(div=d_in, mul=d_out * d_in)
        return costs.Cost(prepare=prepare, apply=corrections.applying_cost())


@register("qera")
@final
@dataclass(frozen=True)
class QERA(_CorrectedOnce):
    """Q(W) plus the correction of rank r with the least output error on the calibration inputs.

    With ``weighting="exact"`` the error ‖(E − L) Xᵀ‖_F, E = W − Q(W), is the least for this Q(W) and rank,
    (Σ_{j>r} σ_j²(E Xᵀ))^½; with "diagonal" it would be for uncorrelated inputs, column j of E weighted by the root mean
    square of the j-th coordinate (Zhang et al. 2024, arXiv 2410.06040, theorems 1 and 2). The rank is at most the
    number of samples.

    Parameters
    ----------
    rank
        Of the correction.
    weighting
        "exact" or "diagonal".
    format, block
        As for :class:`QuantisedMatrix`.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> problem = UpdateProblem(np.array([[4.0, 1.0], [0.5, 2.0]]), inputs=np.array([[1.0, 1.0], [2.0, 2.0]]))
    >>> error = problem.delta - QERA(1, format="int2")(problem).dense()
    >>> float(abs(error @ problem.inputs.T).max()) < 1e-14  # inputs of rank one need a correction of rank one
    True
    """

    rank: int
    weighting: str = "exact"
    format: str = "nf4"
    block: int | None = 64
    properties: ClassVar[Properties] = corrections.properties(budget="rank", converges=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("weighting", self.weighting, ("exact", "diagonal"))

    def _weighted(self, problem: UpdateProblem, residual: Array) -> Array:
        if self.weighting == "exact":
            return residual @ corrections.square_root(problem, residual.dtype)
        inputs, xp = corrections.calibration(problem, residual.dtype), problem.xp
        return residual * xp.sqrt(xp.mean(inputs**2, axis=-2, keepdims=True))

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """One quantisation, the weights, one singular value decomposition."""
        d_out, d_in, n = costs.d_out, costs.d_in, costs.n
        prepare = corrections.quantisation_cost(self)
        if self.weighting == "diagonal":
            prepare += costs.formulas.sum_of(n, times=d_in) + costs.Operations(div=d_in, sqrt=d_in)
            prepare += costs.Operations(mul=n * d_in + d_out * d_in) + corrections.correction_cost()
        else:
            root, columns = corrections.square_root_cost(problem)
            prepare += root + costs.formulas.matmul(d_out, d_in, columns) + corrections.correction_cost(columns)
        return costs.Cost(prepare=prepare, apply=corrections.applying_cost())
