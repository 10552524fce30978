"""What every engine returns: a low-rank operator that remembers what it stands for, and can tell how far off it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

from nla_llm.backend import eps, generator, to_numpy
from nla_llm.linalg import in_range, widen
from nla_llm.measures import Estimate, frobenius_norm, spectral_norm
from nla_llm.measures.spectral import check_tolerance
from nla_llm.operators import Dense, LowRank, Operator, Scaled, Sum, Transpose, Widened, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.backend import Array

__all__ = ["LowRankUpdate", "remaining_error"]

Norm = Literal["frobenius", "spectral"]


@final
class LowRankUpdate(LowRank):
    """left rightᵀ for left (..., d_out, r) and right (..., d_in, r), in place of the update ``of``.

    Laws: an operator of class ``LowRank``; ``remaining(norm)`` brackets the norm of ``of − self`` whatever the engine,
    its luck and its arithmetic.

    Examples
    --------
    >>> B = LowRankUpdate(np.ones((3, 1)), np.ones((2, 1)), of=Dense(np.ones((3, 2)) + np.eye(3, 2)))
    >>> B.rank, float(B.remaining("spectral").value)
    (1, 1.0)
    """

    def __init__(self, left: Array, right: Array, *, of: Operator, nonnegative: bool = False) -> None:
        super().__init__(left, right, nonnegative=nonnegative)
        self.of = of

    def remaining(
        self,
        norm: Norm = "frobenius",
        rng: int | np.random.Generator = 0,
        *,
        rtol: float = 0.05,
        confidence: float = 0.99,
    ) -> Estimate:
        """‖ΔW − B‖ a posteriori, from products with both; see :func:`remaining_error`."""
        return remaining_error(self.of, self, norm, rng, rtol=rtol, confidence=confidence)


def remaining_error(
    delta: Operator,
    approximation: LowRank,
    norm: Norm = "frobenius",
    rng: int | np.random.Generator = 0,
    *,
    rtol: float = 0.05,
    confidence: float = 0.99,
) -> Estimate:
    """‖ΔW − B‖ of any low-rank product B, without forming the difference.

    The lower bound is certain; so is the upper one where the result has the confidence 1, else it holds with the stated
    probability. Both allow for rounding, what cancels in the difference or within B = L Rᵀ included:
    4 √n eps (‖ΔW‖_F + ‖|L||R|ᵀ‖_F), with eps that of float64, in which matrices and factors are multiplied here
    whatever they are held in, or that of an operator that cannot be widened. The constant is empirical, as in the
    measures.

    * ``frobenius``: one pass over the rows where ΔW gives rows cheaply (certain), else Gaussian probes with Chernoff's
      interval, the lower end from 32 directions that are computed.
    * ``spectral``: :func:`nla_llm.measures.spectral_norm` of the difference: dense where small, else block Krylov,
      below by a Rayleigh quotient, above by a certain bound or by that of Kuczyński and Woźniakowski 1992.

    Parameters
    ----------
    delta : Operator (..., d_out, d_in)
    approximation : LowRank (..., d_out, d_in)
    norm : {"frobenius", "spectral"}
    rng : int or numpy.random.Generator
        For the probes. They have to be independent of B, so a number names a stream of its own: an engine that was
        started from the same number has not seen it. A generator must not be a copy of the one that the engine used.
    rtol : float
        Relative width aimed at.
    confidence : float
        Of an upper bound that is not certain.

    Examples
    --------
    >>> B = LowRank(np.array([[2.0], [0.0]]), np.array([[1.0], [0.0]]))
    >>> error = remaining_error(Dense(np.diag([2.0, 0.5])), B)
    >>> float(error.value), error.confidence
    (0.5, 1.0)
    """
    if norm not in ("frobenius", "spectral"):
        raise ValueError(f"norm must be 'frobenius' or 'spectral', got {norm!r}")
    check_tolerance(rtol, confidence)
    rng = _own_stream(rng)
    with np.errstate(over="ignore", invalid="ignore"):  # the measures refuse what is not finite
        difference, rows = _difference(delta, approximation)
        if norm == "spectral":
            size = _size_out_of_range(delta)
            measured = spectral_norm(Scaled(1.0 / size, difference), rtol, rng, confidence=confidence) * size
        elif rows:
            measured = frobenius_norm(difference, rtol, rng, method="exact")
        else:
            options: Any = {"method": "stochastic", "confidence": confidence, "certain_lower": True}
            measured = frobenius_norm(difference, rtol, rng, **options)
        return _allow_for_cancellation(measured, difference, approximation)


def _size_out_of_range(delta: Operator) -> Any:
    """Powers of two of the size of matrices whose squares over- or underflow in a Krylov space; else one."""
    back = in_range(delta.matrix)[1] if isinstance(delta, Dense) else None
    return 1.0 if back is None else to_numpy(widen(back))[..., 0, 0]


def _difference(delta: Operator, approximation: LowRank) -> tuple[Operator, bool]:
    """ΔW − B in the widest arithmetic, perhaps transposed, and whether its rows are at hand."""
    exact, replaced = widened(delta), widened(approximation)
    if isinstance(exact, Transpose):  # the norms are the same, and the rows of the matrix itself are at hand
        exact, replaced = exact.op, replaced.T
    return exact - replaced, _has_rows(exact)


def _own_stream(rng: int | np.random.Generator) -> np.random.Generator:
    """A generator for probes: of the seed (rng, 1) where it is a number."""
    valid = generator(rng)
    return valid if valid is rng else np.random.default_rng((int(rng), 1))  # type: ignore[arg-type]


def _has_rows(op: Operator) -> bool:
    """Whether rows are read or multiplied out of thin factors, rather than had by products with unit vectors."""
    match op:
        case Dense() | Widened() | LowRank():
            return True
        case Scaled():
            return _has_rows(op.op)
        case Sum():
            return all(_has_rows(term) for term in op.terms)
    return False


def _allow_for_cancellation(measured: Estimate, difference: Operator, approximation: LowRank) -> Estimate:
    """The estimate widened by the rounding of both terms, the size of ΔW being at most that of B plus ‖ΔW − B‖_F."""
    unit = 4.0 * math.sqrt(max(difference.shape[-2:])) * eps(difference)
    least = approximation.rank * math.sqrt(math.prod(difference.shape[-2:])) * float(np.finfo(float).smallest_subnormal)
    with np.errstate(over="ignore"):  # an upper bound of infinity is true
        slack = unit * (2.0 * _sizes_that_meet(approximation) + measured.upper) + least
    lower = np.maximum(measured.lower - slack, 0.0)
    return Estimate(measured.value, lower, measured.upper + slack, measured.confidence, measured.how)


def _sizes_that_meet(op: LowRank) -> NDArray[Any]:
    """‖ |L| |R|ᵀ ‖_F, by which the sums of L Rᵀ are rounded: above ‖L Rᵀ‖_F where columns cancel one another.

    Its square is Σ_ij (|L|ᵀ|L|)_ij (|R|ᵀ|R|)_ij; columns are divided by their largest entry, so that no square over- or
    underflows.
    """
    grams, sizes = 1.0, 1.0
    for factor in (op.left, op.right):
        entries = np.abs(to_numpy(widen(factor)))
        top = entries.max(axis=-2, keepdims=True)
        unit = entries / np.where(top > 0, top, 1.0)
        grams, sizes = grams * (np.swapaxes(unit, -1, -2) @ unit), sizes * top
    largest = np.asarray(sizes).max(axis=-1, keepdims=True)
    weights = sizes / np.where(largest > 0, largest, 1.0)
    total = (weights @ grams @ np.swapaxes(weights, -1, -2))[..., 0, 0]
    return np.asarray(largest[..., 0, 0] * np.sqrt(total))
