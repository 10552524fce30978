"""Quantised base and correction are chosen in turns: LoftQ, QPiSSA, CALDERA."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.arithmetic.quantisers import quantiser
from nla_llm.backend import namespace
from nla_llm.methods.registry import Properties, register
from nla_llm.methods.update.quantised import corrections
from nla_llm.methods.update.shared import checked
from nla_llm.operators import LowRank, Sum

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from nla_llm.arithmetic.quantisers import Quantiser
    from nla_llm.backend import Array
    from nla_llm.problems import UpdateProblem
    from nla_llm.theory import Theory

__all__ = ["CALDERA", "LoftQ", "QPiSSA", "alternation"]


def alternation(matrix: Array, quantise: Quantiser, rank: int) -> Iterator[Sum]:
    """Q₁ + L₁, Q₂ + L₂, … without end: L_t is the best correction of Q_t = Q(W − L_{t−1}), from L₀ = 0.

    The correction lowers the error that its base left, or keeps it. The next base need not: a scale is the largest
    modulus of its block, whatever the error, so the sequence of errors may rise.

    Examples
    --------
    >>> import numpy as np
    >>> steps = alternation(np.array([[8.0, 0.0], [0.0, 2.0]]), quantiser("int2"), 1)
    >>> [next(steps).dense().tolist() for _ in range(2)]  # quantised to 8, corrected by 2; then without end
    [[[8.0, 0.0], [0.0, 2.0]], [[8.0, 0.0], [0.0, 2.0]]]
    """
    residual = matrix
    while True:
        base = quantise(residual).matrix
        correction = corrections.best_correction(matrix - base, rank)
        yield corrections.corrected(base, correction)
        residual = matrix - correction.dense()


@register("loftq")
@final
@dataclass(frozen=True)
class LoftQ(corrections.QuantisedBase):
    """Quantisation and truncated singular value decomposition in turns, from no correction (LoftQ).

    Q_t = Q(W − L_{t−1}), L_t = [W − Q_t]_r, algorithm 1 of Li et al. 2023 (arXiv 2310.08659); one iteration is LQER.
    Given its last base the error is the least in every unitarily invariant norm; that more iterations lower it is not
    promised.

    Parameters
    ----------
    rank
        Of the correction.
    iterations
        T ≥ 1; the paper takes 5.
    format, block
        As for :class:`~nla_llm.methods.update.quantised.single.QuantisedMatrix`.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> problem = UpdateProblem(np.random.default_rng(0).standard_normal((64, 64)))
    >>> error = [np.linalg.norm(problem.delta - LoftQ(8, iterations=t)(problem).dense()) for t in (1, 5)]
    >>> bool(error[1] < error[0])
    True
    """

    rank: int
    iterations: int = 5
    format: str = "nf4"
    block: int | None = 64
    properties: ClassVar[Properties] = corrections.properties(budget="rank", converges=True)

    @checked
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> Sum:
        """The sum of the dequantised matrix and the correction."""
        matrix = corrections.dense_matrix(problem, self.rank)
        steps = alternation(matrix, quantiser(self.format, self.block), self.rank)
        return next(islice(steps, self.iterations - 1, None))

    def theory(self, problem: UpdateProblem) -> Theory:
        """Error in every unitarily invariant norm, from the singular values of what the last base leaves."""
        return corrections.residual_theory(problem, self(problem).terms[0], self.rank)

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """T quantisations and singular value decompositions; between them the correction is multiplied out."""
        turn = corrections.quantisation_cost(self) + corrections.correction_cost()
        prepare = self.iterations * turn + (self.iterations - 1) * corrections.remainder_cost()
        return costs.Cost(prepare=prepare, apply=corrections.applying_cost())


@register("qpissa")
@final
@dataclass(frozen=True)
class QPiSSA(corrections.QuantisedBase):
    """Q(W − L) + L with the leading part of W itself kept out of the quantisation (QPiSSA).

    L = [W]_r, and in further iterations L = [W − Q]_r for the last base Q, each followed by quantising W − L (Meng et
    al. 2024, arXiv 2404.02948, section 4). The same turns as LoftQ's from the other end, and it ends with the base.

    Parameters
    ----------
    rank
        Of the correction.
    iterations
        T ≥ 1.
    format, block
        As for :class:`~nla_llm.methods.update.quantised.single.QuantisedMatrix`.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> W = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 4.0))
    >>> bool(abs(QPiSSA(1)(UpdateProblem(W)).dense() - W).max() < 1e-14)  # rank one: nothing is left to quantise
    True
    """

    rank: int
    iterations: int = 1
    format: str = "nf4"
    block: int | None = 64
    properties: ClassVar[Properties] = corrections.properties(budget="rank", converges=True)

    @checked
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> Sum:
        """The sum of the dequantised matrix and the correction."""
        matrix, quantise = corrections.dense_matrix(problem, self.rank), quantiser(self.format, self.block)
        correction = corrections.best_correction(matrix, self.rank)
        base = quantise(matrix - correction.dense()).matrix
        for _ in range(self.iterations - 1):
            correction = corrections.best_correction(matrix - base, self.rank)
            base = quantise(matrix - correction.dense()).matrix
        return corrections.corrected(base, correction)

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """T singular value decompositions, products of the factors and quantisations."""
        turn = corrections.correction_cost() + corrections.remainder_cost() + corrections.quantisation_cost(self)
        first = costs.Operations(add=-costs.d_out * costs.d_in)  # there is no base yet to be taken off
        return costs.Cost(prepare=self.iterations * turn + first, apply=corrections.applying_cost())


@register("caldera")
@final
@dataclass(frozen=True)
class CALDERA(corrections.QuantisedBase):
    """Q + L with factors that are quantised as well, Q and L in turns, weighted by the inputs (CALDERA).

    In each turn Q = Q(W − L); the left factor is the quantised U_r of (W − Q) M, M Mᵀ = XᵀX; the right one solves the
    least-squares problem for that left factor and is quantised. After Saha et al. 2024 (arXiv 2405.18886, algorithms 1
    and 2), simplified: entries are rounded to the nearest level, where the paper rounds with feedback on lattices
    (LDLQ); the factors are refitted once; the last iterate is returned, where the paper keeps the best.

    Parameters
    ----------
    rank
        Of the correction.
    iterations
        Turns, ≥ 1.
    format, block
        As for :class:`~nla_llm.methods.update.quantised.single.QuantisedMatrix`.
    factor_format
        Format of both factors, their columns one after the other in blocks of ``block``; one straddles two columns
        where ``block`` does not divide d_out or d_in.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> rng = np.random.default_rng(0)
    >>> problem = UpdateProblem(rng.standard_normal((64, 64)), inputs=rng.standard_normal((99, 64)))
    >>> float(CALDERA(8).bits(problem)), float(LoftQ(8).bits(problem))
    (5.625, 8.5)
    """

    rank: int
    iterations: int = 5
    format: str = "nf4"
    block: int | None = 64
    factor_format: str = "int4"
    properties: ClassVar[Properties] = corrections.properties(budget="rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        corrections.check_format("factor_format", self.factor_format)

    @checked
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> Sum:
        """The sum of the dequantised matrix and the correction, of dequantised factors."""
        matrix, quantise = corrections.dense_matrix(problem, self.rank), quantiser(self.format, self.block)
        root = corrections.square_root(problem, matrix.dtype)
        base = quantise(matrix).matrix
        correction = self._correction(matrix - base, root)
        for _ in range(self.iterations - 1):
            base = quantise(matrix - correction.dense()).matrix
            correction = self._correction(matrix - base, root)
        return corrections.corrected(base, correction)

    def _correction(self, residual: Array, root: Array) -> LowRank:
        """Quantised factors; they are quantised transposed, so that blocks run along columns."""
        xp, quantise = namespace(residual), quantiser(self.factor_format, self.block)
        free = corrections.best_correction(residual, self.rank, residual @ root)
        left = quantise(xp.matrix_transpose(free.left)).matrix
        right = quantise(xp.linalg.solve(left @ xp.matrix_transpose(left), left @ residual)).matrix
        return LowRank(xp.matrix_transpose(left), xp.matrix_transpose(right))

    def bits(self, problem: UpdateProblem) -> Fraction:
        """Bits that are stored for an entry of W."""
        quantise, entries = quantiser(self.factor_format, self.block), problem.d_out * problem.d_in
        factors = sum(quantise.bits_per_entry((self.rank, d)) * self.rank * d for d in (problem.d_out, problem.d_in))
        base = quantiser(self.format, self.block).bits_per_entry((problem.d_out, problem.d_in))
        return base + Fraction(factors, entries)

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """In each turn a quantisation, a decomposition of the weighted residual, r × r equations, two small ones."""
        d_out, d_in, r, formulas = costs.d_out, costs.d_in, costs.r, costs.formulas
        root, columns = corrections.square_root_cost(problem)
        quantise = quantiser(self.factor_format, self.block)
        factors = formulas.quantisation(r, d_out, quantise) + formulas.quantisation(r, d_in, quantise)
        factors += formulas.matmul(r, d_out, r + d_in) + formulas.solve(r, d_in)
        turn = corrections.quantisation_cost(self) + corrections.correction_cost(columns) + factors
        turn += formulas.matmul(d_out, d_in, columns)
        prepare = root + self.iterations * turn + (self.iterations - 1) * corrections.remainder_cost()
        return costs.Cost(prepare=prepare, apply=corrections.applying_cost())
