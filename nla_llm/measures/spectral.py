"""The spectral norm of an operator that is only known by its products, with an upper bound that can be trusted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import device_of, from_numpy, generator, to_numpy
from nla_llm.linalg import BlockKrylov, gaussian, is_small, largest_singular_value
from nla_llm.measures.estimate import Estimate
from nla_llm.measures.streaming import entry_norms, frobenius_by_rows, rounding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator

__all__ = ["check_tolerance", "krylov_steps", "spectral_norm"]

_CHEAP_ENTRIES = 1 << 22  # up to here the pass over all entries costs less than the products it may save
_TINY = np.finfo(float).tiny
_FINEST = np.finfo(float).eps  # relative; a bracket that is narrower cannot be asked for


def spectral_norm(
    op: Operator,
    rtol: float = 1e-2,
    rng: int | np.random.Generator = 0,
    *,
    confidence: float = 0.99,
    block: int = 8,
    max_steps: int | None = None,
) -> Estimate:
    """Largest singular value, bracketed to ``upper <= (1 + rtol) lower``.

    Small operators and low-rank products: densely. Others: block Krylov on AᵀA from ``block`` Gaussian
    columns, until one of three upper bounds is close enough to the lower one.

    * ``lower`` is ‖Ax‖/‖x‖ for an explicit x: certain.
    * Certain, for non-negative A: λ_max(AᵀA) <= max_i (AᵀAx)_i/x_i for every x > 0 (Collatz 1942, Wielandt 1950),
      x from power iteration on the vector of ones.
    * Certain: with V the Krylov basis, λ_max(AᵀA) <= λ_max of [[θ², c], [c, h]], where θ is the largest Ritz value,
      c = ‖(I − VVᵀ)AᵀAV‖₂ and h = ‖A‖_F² − ‖AV‖_F² is what V has not yet seen. Needs ‖A‖_F, one pass over the entries,
      made only where the operator is small or the bound is about to succeed.
    * With the stated confidence: Kuczyński and Woźniakowski 1992 (SIAM J. Matrix Anal. Appl. 13, theorem 4.2): from one
      random vector, k products, the largest Ritz value of AᵀA falls below (1 − ε) λ_max with probability at most
      1.648 √n exp(−√ε (2k − 1)). All columns of the block would have to fail at once, which takes that to the power
      ``block``. The number of steps follows from ``rtol`` and ``confidence`` beforehand (``krylov_steps``).

    Parameters
    ----------
    op : Operator (..., n_q, n_k)
        All batch elements are treated in lockstep until the last has converged.
    rtol : float
        Relative width of the bracket.
    rng : int or numpy.random.Generator
    confidence : float
        Of the probabilistic bound, for each batch element by itself; the result says 1 where it was not needed.
    block : int
        Columns of the random start.
    max_steps : int, optional
        Stop after so many steps with whatever bracket is there.

    Returns
    -------
    Estimate
        Of the batch shape. ``value`` is the lower bound, from which the truth rarely differs by more than rounding.

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> estimate = spectral_norm(Dense(np.diag([2.0, 1.0])))
    >>> float(estimate.value), estimate.confidence
    (2.0, 1.0)
    """
    check_tolerance(rtol, confidence)
    if is_small(op):
        return Estimate.exact(largest_singular_value(op), "dense eigenvalues of the Gram matrix", rounding=rounding(op))
    if op.shape[-1] > op.shape[-2]:
        op = op.T  # the Krylov basis lives on the shorter side
    rng = generator(rng)
    search = _Search(op, rng, min(block, op.shape[-1]))
    planned = krylov_steps(op.shape[-1], rtol, confidence=confidence, block=search.block)
    steps = planned if max_steps is None else min(planned, max_steps)
    for step in range(1, steps + 1):
        search.advance()
        if step == 1 and (exponent := search.space.exponent()):
            scaled = 2.0**-exponent * op
            found = spectral_norm(scaled, rtol, rng, confidence=confidence, block=block, max_steps=max_steps)
            return found * 2.0**exponent
        if search.space.complete:
            return search.complete()
        if search.certified(rtol, last=step == steps):
            return search.certain()
    return search.with_confidence(confidence)


def krylov_steps(n: int, rtol: float, *, confidence: float = 0.99, block: int = 8) -> int:
    """Steps after which the Kuczyński–Woźniakowski bound brackets the norm to ``rtol``.

    Examples
    --------
    >>> krylov_steps(16384, 0.02)
    16
    """
    check_tolerance(rtol, confidence)
    root = math.sqrt(1.0 - (1.0 + rtol) ** -2)  # λ/(1 − ε) = ((1 + rtol) σ)²
    return max(2, math.ceil((_log_odds(n, confidence, block) / root + 1.0) / 2.0))


def check_tolerance(rtol: float, confidence: float) -> None:
    """Refuse tolerances and confidences that mean nothing."""
    for name, number in (("rtol", rtol), ("confidence", confidence)):
        if isinstance(number, bool) or not isinstance(number, int | float | np.number):
            raise TypeError(f"{name} must be a number, got {number!r}")
    if not rtol >= _FINEST:
        raise ValueError(
            f"rtol must be at least {_FINEST:.1g}, which is rounding, got {rtol}; pass for example rtol=1e-2"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}; pass for example 0.99")


def _log_odds(n: int, confidence: float, block: int) -> float:
    """``log(1.648 √n / δ)`` with δ the failure probability of one column."""
    return math.log(1.648 * math.sqrt(n)) - math.log1p(-confidence) / block


class _Search:
    """The state of one spectral norm: the Krylov space and the bounds so far, arrays of the batch shape."""

    def __init__(self, op: Operator, rng: np.random.Generator, block: int) -> None:
        self.op, self.block = op, block
        start = gaussian((*op.batch_shape, op.shape[-1], block), rng, like=op.like)
        ones = op.xp.ones((*op.batch_shape, op.shape[-1], 1), dtype=start.dtype, device=device_of(start))
        self.space = BlockKrylov(op, start, rng=rng, rider=ones if op.nonnegative else None)
        self.slack = rounding(op)
        self.lower: NDArray[Any] = np.zeros(op.batch_shape)
        self.bounds: dict[str, NDArray[Any]] = {}  # certain upper bounds by name
        self._next_look = 2
        self.frobenius: Any = None  # ‖A‖_F once a pass has been made
        if math.prod(op.shape) <= _CHEAP_ENTRIES:
            self._pass_over_entries()

    @property
    def upper(self) -> NDArray[Any]:
        """The least of the certain upper bounds."""
        least: NDArray[Any] = np.minimum.reduce([np.full(self.op.batch_shape, np.inf), *self.bounds.values()])
        return least

    def advance(self) -> None:
        """One more step of the Krylov space and of the power iteration that rides along."""
        if self.space.rider_pulled is not None:
            pulled = self.space.rider_pulled
            scale = self.op.xp.max(pulled, axis=-2, keepdims=True)
            # a zero operator keeps its zero rider; a positive one is scaled to a largest entry of one
            self.space.next_rider(pulled / self.op.xp.where(scale > 0, scale, self.op.xp.ones_like(scale)))
        self.space.advance()

    def certified(self, rtol: float, *, last: bool) -> bool:
        """Tighten the certain bounds; whether they are close enough everywhere."""
        if self.space.rider is not None:
            self._collatz_wielandt()
        if last or self.space.steps >= self._next_look:
            self._next_look = self.space.steps + max(1, self.space.steps // 3)  # the eigenvalues are not for nothing
            self._ritz_bounds(rtol, last=last)
        return bool(np.all(self.upper <= (1.0 + rtol) * self.lower))

    def certain(self) -> Estimate:
        """The bracket of the certain bounds alone."""
        names = [name for name, bound in self.bounds.items() if np.any(bound == self.upper)]
        how = f"block Krylov, {self.space.steps} steps; certain upper bound ({', '.join(names)})"
        return self._estimate(self.upper, how, 1.0)

    def complete(self) -> Estimate:
        """The bracket once the Krylov space is the whole space: rounding alone is left."""
        self._raise_lower()
        return self._estimate(self.lower * (1.0 + 2.0 * self.slack), "block Krylov on the whole space", 1.0)

    def with_confidence(self, confidence: float) -> Estimate:
        """The bracket with the probabilistic bound."""
        self._raise_lower()
        k = self.space.steps
        root = _log_odds(self.op.shape[-1], confidence, self.block) / (2.0 * k - 1.0)
        bound = self.lower / math.sqrt(1.0 - root**2) * (1.0 + 2.0 * self.slack) if root < 1 else np.inf
        if np.all(self.upper <= bound):
            return self.certain()
        how = f"block Krylov, {k} steps of {self.block} columns; upper bound of Kuczyński and Woźniakowski"
        return self._estimate(np.minimum(self.upper, bound), how, confidence)

    def _estimate(self, upper: Any, how: str, confidence: float) -> Estimate:
        lower = self.lower * (1.0 - self.slack)
        return Estimate.bracket(lower, np.maximum(upper, self.lower), how, confidence=confidence, value=self.lower)

    # -- the bounds ------------------------------------------------------------------------------------------------

    def _collatz_wielandt(self) -> None:
        self.space.pull_back()
        x, image, pulled = (
            to_numpy(a)[..., 0] for a in (self.space.rider, self.space.rider_image, self.space.rider_pulled)
        )
        length = np.linalg.norm(x, axis=-1)
        self.lower = np.maximum(self.lower, np.linalg.norm(image, axis=-1) / np.where(length > 0, length, 1.0))
        # x_i = 0 only where column i of A is zero (up to underflow): it takes no part in the norm
        ratios = np.divide(pulled, x, out=np.zeros_like(x), where=x > 0)
        self._lower_upper(np.sqrt(ratios.max(axis=-1)), "Collatz–Wielandt")

    def _ritz_bounds(self, rtol: float, *, last: bool) -> None:
        if last and self.frobenius is None:
            return  # the coupling would cost a product and the pass another, for a bound that has failed so far
        gram = to_numpy(self.space.gram)
        top, seen = np.linalg.eigvalsh(gram)[..., -1], np.trace(gram, axis1=-2, axis2=-1)
        link = np.linalg.norm(self.space.coupling(), ord=2, axis=(-2, -1))
        if self.frobenius is None:
            hoped = _two_by_two(top, link, np.maximum(self._guessed_square() - seen, 0.0))
            if not np.all(np.minimum(np.sqrt(hoped), self.upper) <= (1.0 + rtol) * np.sqrt(np.maximum(top, 0.0))):
                return
            self._know_frobenius(frobenius_by_rows(self.op))
        self._raise_lower()
        unseen = np.maximum(np.square(self.frobenius) * (1.0 + 2.0 * self.slack) - seen, 0.0)
        self._lower_upper(np.sqrt(_two_by_two(top, link, unseen)), "what the Krylov space leaves of the Frobenius norm")

    def _guessed_square(self) -> NDArray[Any]:
        """``‖A‖_F²`` guessed from the first block, a uniformly random subspace of dimension b: (n/b) ‖AV₁‖_F²."""
        first = to_numpy(self.space.gram)[..., : self.block, : self.block]
        guess: NDArray[Any] = np.trace(first, axis1=-2, axis2=-1) * (self.op.shape[-1] / self.block)
        return guess

    def _raise_lower(self) -> None:
        """``‖A x‖ / ‖x‖`` for the leading Ritz vector x, formed explicitly."""
        _, vectors = self.space.ritz()
        leading = from_numpy(np.ascontiguousarray(vectors[..., :1]), like=self.space.basis)
        image, x = (
            np.linalg.norm(to_numpy(v @ leading)[..., 0], axis=-1) for v in (self.space.image, self.space.basis)
        )
        self.lower = np.maximum(self.lower, image / np.maximum(x, _TINY))

    def _pass_over_entries(self) -> None:
        norms = entry_norms(self.op)
        self._know_frobenius(norms.frobenius)
        self._lower_upper(np.sqrt(norms.one * norms.inf), "√(‖A‖₁‖A‖_∞)")

    def _know_frobenius(self, frobenius: NDArray[Any]) -> None:
        self.frobenius = frobenius
        self._lower_upper(frobenius, "Frobenius")

    def _lower_upper(self, bound: NDArray[Any], name: str) -> None:
        raised = bound * (1.0 + 2.0 * self.slack)
        self.bounds[name] = np.minimum(self.bounds.get(name, np.inf), raised)


def _two_by_two(top: NDArray[Any], link: NDArray[Any], rest: NDArray[Any]) -> NDArray[Any]:
    """Larger eigenvalue of [[top, link], [link, rest]]."""
    larger: NDArray[Any] = 0.5 * (top + rest + np.hypot(top - rest, 2.0 * link))
    return larger
