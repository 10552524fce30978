"""Updates replaced by low-rank products from few products with blocks of random vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, final

from nla_llm import costs
from nla_llm.backend import generator
from nla_llm.linalg import generalised_nystrom, krylov_svd, randomised_svd
from nla_llm.linalg.svd import BLOCK
from nla_llm.methods.registry import Properties, positive, register, settle, whole_number
from nla_llm.methods.update.result import LowRankUpdate
from nla_llm.methods.update.shared import (
    by_matrix,
    check_rank,
    equivariant,
    from_svd,
    order,
    scaled_left_cost,
    spectrum_of,
    working_operator,
)

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.backend import Array
    from nla_llm.operators import Operator
    from nla_llm.problems import UpdateProblem
    from nla_llm.theory import Theory

__all__ = ["KrylovSVD", "RandomisedSVD", "SinglePassSVD", "range_finder_cost"]

_RANDOM = Properties(
    problem="update", family="randomised svd", target="update", budget="rank", converges=True, deterministic=False,
    row_stochastic=False,
)  # fmt: skip


@register("randomised_svd")
@final
@dataclass(frozen=True)
class RandomisedSVD:
    """Range finder, then the SVD of what it has found (Halko, Martinsson and Tropp 2011, arXiv 0909.4061).

    2 power_steps + 2 passes over the update. Each product is orthonormalised, so powers lose nothing to rounding.

    Parameters
    ----------
    rank
        r, columns of the factors.
    oversampling
        Further columns of the basis, dropped at the end.
    power_steps
        Products with ΔW ΔWᵀ; the more, the slower the spectrum may decay.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> B = RandomisedSVD(1)(UpdateProblem(np.diag([3.0, 1.0])), rng=0)
    >>> round(float(B.remaining("spectral").value), 12)
    1.0
    """

    rank: int
    oversampling: int = 10
    power_steps: int = 2
    properties: ClassVar[Properties] = _RANDOM

    def __post_init__(self) -> None:
        settle(self)
        whole_number("rank", self.rank)
        whole_number("oversampling", self.oversampling, at_least=0)
        whole_number("power_steps", self.power_steps, at_least=0)

    @equivariant
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """``left`` = U Σ and ``right`` = V in the precision of the update."""
        check_rank(self.rank, problem)
        options = {"oversampling": self.oversampling, "power_steps": self.power_steps}
        return from_svd(randomised_svd(working_operator(problem), self.rank, generator(rng), **options), problem)

    def theory(self, problem: UpdateProblem) -> Theory | None:
        """Bound of the mean square Frobenius error, and of the mean spectral error; needs two columns to spare."""
        from nla_llm.theory.low_rank import randomised_svd_theory  # noqa: PLC0415 - SciPy loads there

        spare = min(self.oversampling, min(problem.d_out, problem.d_in) - self.rank)
        if spare < 2:
            return None
        return randomised_svd_theory(
            spectrum_of(problem), self.rank, spare, self.power_steps, tuple(problem.delta.shape)
        )

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """Range finder, one product more, QR and an SVD of the small factor."""
        import sympy  # noqa: PLC0415 - loaded by the first formula only

        d_out, d_in, r, f = costs.d_out, costs.d_in, costs.r, costs.formulas
        columns = sympy.Min(r + self.oversampling, order())
        small = f.matmul(d_in, d_out, columns) + f.qr(d_in, columns) + f.svd(columns, columns)
        back = f.matmul(d_out, columns, r) + f.matmul(d_in, columns, r)
        found = range_finder_cost(d_out, d_in, columns, self.power_steps)
        return costs.Cost(prepare=found + small + back) + scaled_left_cost()


@register("krylov_svd")
@final
@dataclass(frozen=True)
class KrylovSVD:
    """Leading triplets of a block Krylov space, grown until their residuals are small (Musco and Musco 2015).

    arXiv 1504.05477; the block may be smaller than the rank, since for a given number of products small blocks
    reach further (Meyer, Musco and Musco 2024, arXiv 2305.02535). The one engine that comes within rtol²/2 of the
    optimum in the spectral norm too, for slow spectra and repeated singular values as well, where ``steps`` is not
    given.

    Parameters
    ----------
    rank
        r, columns of the factors.
    block
        Columns of the random start.
    steps
        Blocks of the space, at least rank/block; by default as many as the residuals ask for.
    rtol
        Largest residual relative to the first singular value left out, where ``steps`` is not given.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> B = KrylovSVD(1)(UpdateProblem(np.diag([3.0, 1.0])), rng=0)
    >>> round(float(B.remaining("spectral").value), 12)
    1.0
    """

    rank: int
    block: int = BLOCK
    steps: int | None = None
    rtol: float = 2.5e-2
    properties: ClassVar[Properties] = replace(_RANDOM, family="krylov svd")

    def __post_init__(self) -> None:
        settle(self)
        whole_number("rank", self.rank)
        whole_number("block", self.block)
        if self.steps is not None:
            whole_number("steps", self.steps)
        positive("rtol", self.rtol, at_most=1)

    @equivariant
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """``left`` = U Σ and ``right`` = V in the precision of the update."""
        check_rank(self.rank, problem)
        size = min(self.block, problem.d_out, problem.d_in) * (self.steps or self.rank)
        if size < self.rank:
            raise ValueError(
                f"steps={self.steps} blocks of {self.block} columns span no space of dimension rank={self.rank}; "
                f"pass steps >= {-(-self.rank // self.block)}"
            )
        left, right = by_matrix(working_operator(problem), rng, self._one)
        return LowRankUpdate(left, right, of=problem.operator)

    def _one(self, op: Operator, rng: np.random.Generator) -> tuple[Array, Array]:
        u, s, v = krylov_svd(op, self.rank, rng, block=self.block, steps=self.steps, rtol=self.rtol).svd
        return u * s[..., None, :], v

    def theory(self, problem: UpdateProblem) -> Theory | None:
        """Bound of the mean square Frobenius error for a given number of steps of a block wider than the rank."""
        from nla_llm.theory.low_rank import krylov_svd_theory  # noqa: PLC0415 - SciPy loads there

        width = min(self.block, problem.d_out, problem.d_in)
        if self.steps is None or width < self.rank + 2:
            return None
        return krylov_svd_theory(
            spectrum_of(problem), self.rank, width - self.rank, self.steps, tuple(problem.delta.shape)
        )

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """Products, orthogonalisation and the SVD of the small factor, for a given number of steps.

        Raises
        ------
        ValueError
            Where the residuals decide on the number of steps.
        """
        import sympy  # noqa: PLC0415 - loaded by the first formula only

        if self.steps is None:
            raise ValueError("the residuals decide on the number of steps; pass steps=... to state a cost beforehand")
        d_out, d_in, r, f = costs.d_out, costs.d_in, costs.r, costs.formulas
        short, long = order(), sympy.Max(d_out, d_in)
        found, size = f.qr(short, _width(0, self.block)) + costs.Operations(draw=short * _width(0, self.block)), 0
        for step in range(self.steps):
            width = _width(step, self.block)
            found += f.matmul(long, short, width) + f.matmul(width, long, width) + costs.Operations(compare=width**2)
            found += f.matmul(size, long, width)
            size = size + width
            if step + 1 < self.steps:
                following = _width(step + 1, self.block)
                pull_back = f.matmul(short, long, width) * sympy.Min(1, following)
                found += pull_back + _next_block_cost(short, size, following)
        ritz = f.qr(long, size) + f.svd(size, size) + f.matmul(long, size, r) + f.matmul(short, size, r)
        return costs.Cost(prepare=found + ritz) + scaled_left_cost()


def _width(step: int, block: int) -> Any:
    """Columns of a block of the Krylov space, cut where the space becomes complete."""
    import sympy  # noqa: PLC0415 - loaded by the first formula only

    return sympy.Max(0, sympy.Min(block, order() - step * block))


def _next_block_cost(rows: Any, size: Any, width: Any) -> costs.Operations:
    """Costs of ``linalg.extend_basis``: projection twice, QR, columns that depend replaced, and the same again."""
    import sympy  # noqa: PLC0415 - loaded by the first formula only

    f = costs.formulas
    twice = 2 * (f.matmul(size, rows, width) + f.matmul(rows, size, width) + costs.Operations(add=rows * width))
    lengths = costs.Operations(madd=rows * width, sqrt=width, compare=sympy.Max(0, width - 1))
    dependent = costs.Operations(compare=width, mul=sympy.Min(1, width), draw=rows * width)
    return 2 * (twice + f.qr(rows, width)) + lengths + dependent + f.matmul(width, rows, width)


@register("single_pass_svd")
@final
@dataclass(frozen=True)
class SinglePassSVD:
    """Q (ΨQ)⁺ ΨΔW with Q = orth(ΔW Ω): both sketches come from one pass over the update.

    Tropp, Yurtsever, Udell and Cevher 2017 (arXiv 1609.00048), algorithm 4; the generalised Nyström approximation. The
    squared error is on average 1 + r/(rows − r − 1) times that of the projection on Q.

    Parameters
    ----------
    rank
        r, columns of Ω and of the factors.
    rows
        Rows of Ψ, at least r + 2 for an error that has a mean; 4 r + 1 by default, a third above that of two passes.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> B = SinglePassSVD(1)(UpdateProblem(np.ones((4, 3))), rng=0)
    >>> float(abs(B.dense() - 1).max().round(12))
    0.0
    """

    rank: int
    rows: int | None = None
    properties: ClassVar[Properties] = _RANDOM

    def __post_init__(self) -> None:
        settle(self)
        whole_number("rank", self.rank)
        if self.rows is not None:
            whole_number("rows", self.rows)
            if self.rows < self.rank + 2:
                raise ValueError(
                    f"rows={self.rows} must be at least rank + 2 = {self.rank + 2}, else the error has no mean"
                )

    def _rows(self) -> int:
        return self.rows or 4 * self.rank + 1

    @equivariant
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """``left`` = Q, orthonormal, and ``right`` the coefficients, in the precision of the update."""
        check_rank(self.rank, problem)
        left, right = generalised_nystrom(working_operator(problem), self.rank, self._rows(), generator(rng))
        return LowRankUpdate(left, right, of=problem.operator)

    def theory(self, problem: UpdateProblem) -> Theory:
        """Bound of the mean square Frobenius error."""
        from nla_llm.theory.low_rank import single_pass_theory  # noqa: PLC0415 - SciPy loads there

        return single_pass_theory(spectrum_of(problem), self.rank, self._rows(), tuple(problem.delta.shape))

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """Two sketches, the orthonormal basis, a least-squares problem with a right-hand side for each column."""
        d_out, d_in, r, f = costs.d_out, costs.d_in, costs.r, costs.formulas
        rows = 4 * r + 1 if self.rows is None else self.rows
        sketches = range_finder_cost(d_out, d_in, r, 0) + f.matmul(d_in, d_out, rows)
        fit = f.matmul(rows, d_out, r) + f.qr(rows, r) + f.matmul(r, rows, d_in) + f.solve(r, d_in)
        drawn = costs.Operations(draw=rows * d_out)
        return costs.Cost(prepare=sketches + fit + drawn, apply=f.LowRankShape(d_out, d_in, r).apply(1))


def range_finder_cost(rows: Any, columns: Any, width: Any, power_steps: int) -> costs.Operations:
    """Costs of ``linalg.range_finder`` on a rows × columns matrix: 2 power_steps + 1 products, as many QRs."""
    f = costs.formulas
    forward = f.matmul(rows, columns, width) + f.qr(rows, width)
    back = f.matmul(columns, rows, width) + f.qr(columns, width)
    powers: costs.Operations = power_steps * (forward + back)
    return costs.Operations(draw=columns * width) + forward + powers
