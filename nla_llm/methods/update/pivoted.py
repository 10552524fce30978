"""Updates replaced by some of their own columns and rows, chosen by QR with column pivoting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.backend import generator
from nla_llm.linalg import (
    PivotedQR,
    apply_as,
    chosen_columns,
    in_range,
    interpolation,
    orthonormalise,
    pivoted_qr,
    range_finder,
    strong_pivoted_qr,
)
from nla_llm.methods.registry import Properties, register, settle, whole_number
from nla_llm.methods.update.randomised import range_finder_cost
from nla_llm.methods.update.result import LowRankUpdate
from nla_llm.methods.update.shared import check_rank, equivariant, formed, order, spectrum_of, working_operator

if TYPE_CHECKING:
    from typing import Any

    import numpy as np

    from nla_llm.operators import Operator
    from nla_llm.problems import UpdateProblem
    from nla_llm.theory import Theory

__all__ = ["CURUpdate", "Interpolative", "RankRevealingQR"]

_PIVOTED = Properties(
    problem="update", family="pivoted qr", target="update", budget="rank", converges=True, row_stochastic=False
)


@register("rank_revealing_qr")
@final
@dataclass(frozen=True)
class RankRevealingQR:
    """Projection on r columns of the update, chosen by strong rank-revealing QR (Gu and Eisenstat 1996).

    Every singular value of the error is within √(1 + f² r (d_in − r)) of the best possible one. Deterministic; works on
    a copy of the update, which an operator is formed for.

    Parameters
    ----------
    rank
        r, columns of the factors.
    factor
        f > 1: exchanges of two columns go on as long as one multiplies the volume of the chosen ones by more.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> B = RankRevealingQR(1)(UpdateProblem(np.diag([1.0, 3.0])))
    >>> abs(B.dense()).round(12).tolist()
    [[0.0, 0.0], [0.0, 3.0]]
    """

    rank: int
    factor: float = 2.0
    properties: ClassVar[Properties] = _PIVOTED

    def __post_init__(self) -> None:
        settle(self)
        whole_number("rank", self.rank)
        if isinstance(self.factor, bool) or not isinstance(self.factor, int | float) or not self.factor > 1:
            raise ValueError(f"factor must be a number above 1, got {self.factor!r}; pass for example 2.0")

    @equivariant
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """``left`` = Q of the chosen columns, orthonormal, and ``right`` = ΔWᵀQ."""
        check_rank(self.rank, problem)
        found = strong_pivoted_qr(formed("delta", problem.delta), self.rank, factor=float(self.factor))
        xp = problem.xp
        return LowRankUpdate(found.basis, xp.matrix_transpose(found.coefficients), of=problem.operator)

    def theory(self, problem: UpdateProblem) -> Theory:
        """Gu and Eisenstat's bound in the spectral and the Frobenius norm."""
        from nla_llm.theory.low_rank import rank_revealing_theory  # noqa: PLC0415 - SciPy loads there

        return rank_revealing_theory(spectrum_of(problem), self.rank, float(self.factor), tuple(problem.delta.shape))

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """Pivots and one look for an exchange; each exchange that is made costs a QR, a product and a look more."""
        d_out, d_in, r = costs.d_out, costs.d_in, costs.r
        prepare = _pivoting_cost(d_out, d_in, r) + _look_cost(d_in, r)
        return costs.Cost(prepare=prepare, apply=costs.formulas.LowRankShape(d_out, d_in, r).apply(1))


@dataclass(frozen=True)
class _Sketched:
    """Fields of the two methods that choose by pivots of a sketch QᵀΔW."""

    rank: int
    oversampling: int = 10
    power_steps: int = 1

    def __post_init__(self) -> None:
        settle(self)
        whole_number("rank", self.rank)
        whole_number("oversampling", self.oversampling, at_least=0)
        whole_number("power_steps", self.power_steps, at_least=0)

    def _pivots(self, problem: UpdateProblem, op: Operator, rng: int | np.random.Generator | None) -> PivotedQR:
        check_rank(self.rank, problem)
        columns = min(self.rank + self.oversampling, problem.d_out, problem.d_in)
        q = range_finder(op, columns, generator(rng), power_steps=self.power_steps)
        sketch, _ = in_range(apply_as(op.T, q))  # pivots are the same
        return pivoted_qr(op.xp.matrix_transpose(sketch), self.rank)

    def _pivots_cost(self) -> costs.Operations:
        import sympy  # noqa: PLC0415 - loaded by the first formula only

        d_out, d_in, r = costs.d_out, costs.d_in, costs.r
        columns = sympy.Min(r + self.oversampling, order())
        sketch = costs.formulas.matmul(d_in, d_out, columns)
        return range_finder_cost(d_out, d_in, columns, self.power_steps) + sketch + _pivoting_cost(columns, d_in, r)


@register("interpolative")
@final
@dataclass(frozen=True)
class Interpolative(_Sketched):
    """r columns of the update itself, and what they have to be combined by to give the others: C T.

    Columns by pivots of QᵀΔW for a random basis Q of its range, T from the same QR (Halko, Martinsson and Tropp 2011,
    arXiv 0909.4061, section 5.2). T is the identity in the chosen columns, which are reproduced exactly.

    Parameters
    ----------
    rank
        r, columns chosen.
    oversampling, power_steps
        Of the range finder.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> B = Interpolative(1)(UpdateProblem(np.outer([1.0, 2.0], [3.0, 4.0, 1.0])), rng=0)
    >>> B.left[:, 0].tolist()
    [4.0, 8.0]
    """

    properties: ClassVar[Properties] = replace(_PIVOTED, deterministic=False)

    @equivariant
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """``left`` = C, the chosen columns, and ``right`` = Tᵀ."""
        op = working_operator(problem)
        found = self._pivots(problem, op, rng)
        right = op.xp.matrix_transpose(interpolation(found))
        return LowRankUpdate(chosen_columns(op, found.columns), right, of=problem.operator)

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """Basis, sketch, its pivots, a triangular system with a right-hand side for each column."""
        d_out, d_in, r, f = costs.d_out, costs.d_in, costs.r, costs.formulas
        prepare = self._pivots_cost() + f.solve(r, d_in) + _empty_cost(r)
        return costs.Cost(prepare=prepare, apply=f.LowRankShape(d_out, d_in, r).apply(1))


@register("cur_update")
@final
@dataclass(frozen=True)
class CURUpdate(_Sketched):
    """C U R: r columns and r rows of the update, and the best matrix between them, U = C⁺ ΔW R⁺.

    Columns by pivots of QᵀΔW for a random basis Q of its range, rows by pivots of Cᵀ (Voronin and Martinsson 2017,
    arXiv 1412.8447); U by projection on orthonormal bases of both, never by inverting C or R (Stewart 1999).

    Parameters
    ----------
    rank
        r, columns and rows chosen.
    oversampling, power_steps
        Of the range finder.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> B = CURUpdate(1)(UpdateProblem(np.outer([1.0, 2.0], [3.0, 4.0, 1.0])), rng=0)
    >>> float(abs(B.dense()[1, 1]).round(12))
    8.0
    """

    properties: ClassVar[Properties] = replace(
        _PIVOTED,
        deterministic=False,
        exceptions={"different_seeds": "seeds change the sketch, seldom the pivots that it shows"},
    )

    @equivariant
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """``left`` = Q_C (Q_Cᵀ ΔW Q_R), ``right`` = Q_R for orthonormal bases of the columns and of the rows."""
        op = working_operator(problem)
        t = op.xp.matrix_transpose
        columns = chosen_columns(op, self._pivots(problem, op, rng).columns)
        rows = pivoted_qr(t(columns), self.rank).columns
        left, right = orthonormalise(columns), orthonormalise(chosen_columns(_transposed(op), rows))
        return LowRankUpdate(left @ (t(left) @ apply_as(op, right)), right, of=problem.operator)

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """Pivots of the sketch and of the columns, two orthonormal bases, one product with the update."""
        d_out, d_in, r, f = costs.d_out, costs.d_in, costs.r, costs.formulas
        bases = f.qr(d_out, r) + f.qr(d_in, r)
        core = f.matmul(d_out, d_in, r) + 2 * f.matmul(r, d_out, r)
        prepare = self._pivots_cost() + _pivoting_cost(r, d_out, r) + bases + core
        return costs.Cost(prepare=prepare, apply=f.LowRankShape(d_out, d_in, r).apply(1))


def _transposed(op: Operator) -> Operator:
    """The transpose; of a matrix as a matrix, whose columns can be read."""
    from nla_llm.operators import Dense  # noqa: PLC0415

    return Dense(op.xp.matrix_transpose(op.matrix)) if isinstance(op, Dense) else op.T


# -- costs -------------------------------------------------------------------------------------------------------------


def _pivoting_cost(rows: Any, columns: Any, steps: Any) -> costs.Operations:
    """Costs of ``linalg.pivoted_qr``: lengths before and after each step, the pivot, its direction, the update."""
    f, count, entries = costs.formulas, costs.Operations, rows * columns
    lengths = count(mul=entries) + f.sum_of(rows, times=columns)
    floor = count(compare=columns - 1, mul=1)
    step = count(compare=columns) + count(mul=rows, add=rows - 1) + count(sqrt=1, div=rows)  # pivot; its length
    step += f.matmul(1, rows, columns) + count(madd=entries, add=entries)
    again = count(madd=rows * steps * (steps - 1), add=rows * (steps - 1))  # 2 rows · i multiply-adds in step i
    steps_cost: costs.Operations = steps * (step + lengths)
    return lengths + floor + steps_cost + again


def _look_cost(columns: Any, steps: Any) -> costs.Operations:
    """Costs of one search for an exchange: a triangular system, all gains, the largest."""
    f, count, pairs = costs.formulas, costs.Operations, steps * columns
    inverse = f.solve(steps, steps + columns) + count(mul=steps**2) + f.sum_of(steps, times=steps)
    gains = count(mul=2 * pairs, add=pairs)
    return inverse + _empty_cost(steps) + gains + count(compare=steps + 2 * (pairs - 1) + 1)


def _empty_cost(steps: Any) -> costs.Operations:
    """Looking for pivots that are zero, and for the diagonal."""
    return costs.Operations(compare=steps + steps**2)
