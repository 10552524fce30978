"""The rank that a tolerance asks for, found without knowing the spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, namespace, number, to_numpy
from nla_llm.linalg import (
    SVD,
    apply_as,
    extend_basis,
    factored_svd,
    gaussian_columns,
    low_rank_factors,
    orthonormalise,
    widen,
    working,
)
from nla_llm.measures import frobenius_norm, spectral_norm
from nla_llm.methods.registry import Properties, one_of, positive, register, settle, whole_number
from nla_llm.methods.update.result import LowRankUpdate, remaining_error
from nla_llm.methods.update.shared import by_matrix, equivariant, working_operator
from nla_llm.operators import LowRank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from nla_llm.measures import Estimate
    from nla_llm.operators import Operator
    from nla_llm.problems import UpdateProblem
    from nla_llm.theory import Theory

__all__ = ["AdaptiveRank"]

_NARROW = 0.05  # relative width of the certificate: what is spent of the tolerance on not knowing the error better
_LEAST_FAILURE = 1e-10
_POWER_STEPS = 1  # by which each block is turned towards the leading singular vectors


@register("adaptive_rank")
@final
@dataclass(frozen=True)
class AdaptiveRank:
    """Least rank found whose error is within a tolerance of the norm of the update, certified; never a full SVD.

    A basis Q grows by blocks of Gaussian columns, each after a power step, until what remains outside is certified to
    be small; then as many singular values of QᵀΔW are dropped as the tolerance allows, and the result is certified once
    more as it stands, in its own precision. Certificates are those of ``LowRankUpdate.remaining``: the upper bound
    is certain for the Frobenius norm of a matrix, and holds for the spectral norm with a probability by Kuczyński
    and Woźniakowski 1992, sharper by far than the largest of a few random images (Halko, Martinsson and Tropp 2011,
    lemma 4.1; ``theory.low_rank``). The permitted failure is shared out among all looks at a bound.

    Blocks as in the randQB of Martinsson and Voronin 2016 (arXiv 1503.07157). Their indicator ‖ΔW‖_F² − ‖QᵀΔW‖_F² only
    says when to look, and only while it is not rounding.

    Parameters
    ----------
    tolerance
        Largest error relative to the norm of the update.
    norm
        "frobenius" or "spectral".
    failure
        Probability with which the error may yet be larger.
    block
        Columns by which the basis grows.

    Raises
    ------
    FloatingPointError
        When called, if the tolerance lies below what rounding lets anybody certify.

    Examples
    --------
    >>> from nla_llm.problems import UpdateProblem
    >>> B = AdaptiveRank(0.3, norm="spectral")(UpdateProblem(np.diag([4.0, 2.0, 1.0, 0.5])), rng=0)
    >>> B.rank
    2
    """

    tolerance: float = 0.1
    norm: str = "frobenius"
    failure: float = 1e-2
    block: int = 16
    properties: ClassVar[Properties] = Properties(
        problem="update",
        family="adaptive rank",
        target="update",
        deterministic=False,
        row_stochastic=False,
        partial=True,
        exceptions={"cost": "the size of the basis and the work of certificates depend on the data"},
    )

    def __post_init__(self) -> None:
        settle(self)
        for name in ("tolerance", "failure"):
            positive(name, getattr(self, name), at_most=1)
        if self.failure < _LEAST_FAILURE:  # shared out among looks it would be lost beside one
            raise ValueError(f"failure must be at least {_LEAST_FAILURE:g}, got {self.failure!r}")
        one_of("norm", self.norm, ("frobenius", "spectral"))
        whole_number("block", self.block)

    @equivariant
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """``left`` = U Σ and ``right`` = V; in a batch every matrix finds its own rank, zeros fill up the rest."""
        left, right = by_matrix(working_operator(problem), rng, self._one)
        return LowRankUpdate(left, right, of=problem.operator)

    def theory(self, problem: UpdateProblem) -> Theory:
        """The tolerance, as a bound that holds but for the stated probability."""
        from nla_llm.theory.low_rank import tolerance_theory  # noqa: PLC0415 - SciPy loads there

        sizes = _size(problem.exact(), self.norm, 1e-3, np.random.default_rng(0), 1e-3).upper
        return tolerance_theory(self.tolerance * sizes, self.norm, self.failure, tuple(problem.delta.shape))

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """Multiply-adds of a basis of l columns in whole blocks and of one SVD in it; l is known afterwards.

        Certificates, and looks that did not suffice, come on top. The rank r of the result is at most l.
        """
        import sympy  # noqa: PLC0415 - loaded by the first formula only

        d_out, d_in, r, f, size = costs.d_out, costs.d_in, costs.r, costs.formulas, sympy.Symbol("l")
        b = sympy.Symbol("block")
        blocks = size / b
        bases = f.qr(d_out, b) * (3 * blocks - 1) + f.qr(d_in, b) * blocks
        outside = costs.Operations(madd=5 * d_out * size * (size - b) + (blocks - 1) * d_out * b * (b + 1))
        small = f.qr(d_in, size) + f.svd(size, size) + f.matmul(d_out, size, size) + f.matmul(d_in, size, size)
        prepare = (
            4 * f.matmul(d_out, d_in, size)
            + bases
            + outside
            + small
            + costs.Operations(draw=d_in * size + d_out * (size - b))
        )
        return costs.Cost(prepare=prepare, apply=f.LowRankShape(d_out, d_in, r).apply(1))

    def _one(self, op: Operator, rng: np.random.Generator) -> tuple[Array, Array]:
        looks = _Looks(self.failure)
        whole = _size(op, self.norm, _NARROW / 5, rng, looks.next())
        goal = self.tolerance * float(whole.lower)
        if goal == 0:
            return tuple(op.xp.zeros((n, 1), dtype=working(op.like).dtype) for n in op.shape)
        enough = _Enough(self.norm, float(whole.value), goal)
        for svd in _growing(op, self.block, rng, enough):
            rank, most = enough.rank(to_numpy(svd.values)), int(svd.values.shape[-1])
            while rank <= most:
                left, right = svd.left[..., :rank] * svd.values[..., None, :rank], svd.right[..., :rank]
                if float(self._certificate(op, LowRank(left, right), rng, looks.next()).upper) <= goal:
                    return left, right
                rank += max(1, (most - rank) // 4)
        raise FloatingPointError(
            f"tolerance={self.tolerance:g} in the {self.norm} norm cannot be certified for {op!r} in {op.dtype}: the "
            "remaining error is of the size of rounding; pass a larger tolerance, or the update in float64"
        )

    def _certificate(self, op: Operator, approximation: LowRank, rng: np.random.Generator, failure: float) -> Estimate:
        norm: Any = self.norm
        return remaining_error(op, approximation, norm, rng, rtol=_NARROW, confidence=1.0 - failure)


class _Looks:
    """Shares of the permitted failure, 6/(π² k²) of it for look k: in all no more than was permitted.

    Halves, quarters, … would come to nothing beside a confidence of one after some fifty looks.
    """

    def __init__(self, failure: float) -> None:
        self.failure, self.number = failure, 0

    def next(self) -> float:
        self.number += 1
        return self.failure * 6.0 / (math.pi * self.number) ** 2


def _size(op: Operator, norm: str, rtol: float, rng: np.random.Generator, failure: float) -> Estimate:
    measure = spectral_norm if norm == "spectral" else frobenius_norm
    return measure(op, rtol, rng, confidence=1.0 - failure)


class _Enough:
    """Whether a basis is worth a look, and which rank: by ‖A − [QQᵀA]_k‖_F² = ‖A‖_F² − Σ_{j≤k} θ_j², or by θ_{k+1}.

    Both only guide: what decides is a certificate. Where the difference is rounding they ask for the full rank.
    """

    def __init__(self, norm: str, size: float, goal: float) -> None:
        self.frobenius, self.size, self.goal = norm == "frobenius", size, goal

    def look(self, captured: float, smallest: float) -> bool:
        """From ‖QᵀA‖_F² and the root mean square of the singular values that the last block has found."""
        if self.frobenius:
            return self.size**2 * (1 - 4 * float(np.finfo(np.float32).eps)) - captured <= self.goal**2
        return smallest <= self.goal

    def rank(self, values: NDArray[Any]) -> int:
        """The least rank that may do, or one above all."""
        if self.frobenius:
            left = self.size**2 - np.cumsum(values.astype(np.float64) ** 2)
            return 1 + int(np.sum(left > self.goal**2))
        return max(1, int(np.sum((1 + _NARROW) * values > self.goal)))


def _growing(op: Operator, block: int, rng: np.random.Generator, enough: _Enough) -> Iterator[SVD]:
    """SVDs of Q QᵀA for a growing Q, each block found by a power step outside the ones before."""
    factors = low_rank_factors(op)
    if factors is not None:
        yield factored_svd(*factors)
        return
    xp, t, order = op.xp, op.xp.matrix_transpose, min(op.shape[-2:])
    basis: Array = None
    images: Array = None
    captured, look, size = 0.0, 0, 0
    while size < order:
        sketch = apply_as(op, gaussian_columns(op, min(block, order - size), rng))
        for _ in range(_POWER_STEPS):
            outside = orthonormalise(_outside(basis, sketch))
            sketch = apply_as(op, orthonormalise(apply_as(op.T, outside)))
        new = orthonormalise(sketch) if basis is None else extend_basis(basis, sketch, rng)[0]
        image = apply_as(op.T, new)
        basis = new if basis is None else xp.concat([basis, new], axis=-1)
        images = image if images is None else xp.concat([images, image], axis=-1)
        found = number(xp.sum(widen(image) ** 2))
        captured, size = captured + found, int(basis.shape[-1])
        if size == order or (size >= look and enough.look(captured, math.sqrt(found / int(new.shape[-1])))):
            look = size + size // 8
            outer, small = xp.linalg.qr(images)
            u, s, vt = xp.linalg.svd(small, full_matrices=False)
            yield SVD(basis @ t(vt), s, outer @ u)


def _outside(basis: Array, x: Array) -> Array:
    if basis is None:
        return x
    return x - basis @ (namespace(basis).matrix_transpose(basis) @ x)
