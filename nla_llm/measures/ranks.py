"""What rank a matrix has, by every rule in use: from all of its singular values, or from the largest ones alone.

Where only the largest are known, a rule gives a range that is certain: what is left of the Frobenius norm says how many
more values there can be.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nla_llm.linalg import singular_values
from nla_llm.measures.estimate import Estimate
from nla_llm.operators import Dense

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["RankRange", "Spectrum", "rank_above", "rank_of_energy", "rank_of_tolerance"]

_MET = 1e-12  # relative; a share of the energy that is met to rounding is met


class RankRange(NamedTuple):
    """The rank that a rule gives lies between the two, ends included; they are equal where it is known.

    Examples
    --------
    >>> str(RankRange(3, 3)), str(RankRange(17, 90))
    ('3', '17–90')
    """

    low: int
    high: int

    @property
    def known(self) -> bool:
        """Whether the rank is a single number."""
        return self.low == self.high

    def __str__(self) -> str:
        return str(self.low) if self.known else f"{self.low}–{self.high}"


class Spectrum:
    """Singular values of a matrix, each with its bracket: all of them, or the k largest and a bound on the others.

    Laws: ``lower[i] <= σ_{i+1} <= upper[i]``; σ_{k+1} <= ``rest``; ``squares`` brackets ‖A‖_F².

    Parameters
    ----------
    lower, upper : array (k,)
        Brackets of the largest values, descending.
    squares : Estimate
        ‖A‖_F².
    order : int
        The smaller dimension: how many singular values there are.
    rest : float
        Upper bound of those that are not given.
    how : str
        Where they come from.
    confidence : float
        With which all brackets hold.

    Examples
    --------
    >>> s = Spectrum.dense(np.diag([4.0, 2.0, 0.0]))
    >>> float(s.truncation(1, "spectral").value), str(rank_of_energy(s, 0.9))
    (0.5, '2')
    """

    def __init__(
        self,
        lower: ArrayLike,
        upper: ArrayLike,
        squares: Estimate,
        *,
        order: int,
        rest: float = 0.0,
        how: str = "",
        confidence: float = 1.0,
    ) -> None:
        self.lower, self.upper = (np.asarray(x, dtype=np.float64) for x in (lower, upper))
        self.squares, self.order, self.rest = squares, order, rest
        self.how, self.confidence = how, confidence
        if not (self.lower.shape == self.upper.shape and 1 <= self.lower.size <= order):
            raise ValueError(f"lower and upper must hold 1 to order={order} values each, got {self.lower.shape}")

    @classmethod
    def dense(cls, matrix: ArrayLike) -> Spectrum:
        """All singular values, in float64: off by at most a small multiple of eps σ₁ (the constant 8 is empirical)."""
        values = singular_values(Dense(np.asarray(matrix, dtype=np.float64)))
        slack = 8 * np.finfo(np.float64).eps * float(values[0])
        squares = float(np.sum(values**2))
        energy = Estimate.exact(squares, "dense singular value decomposition", rounding=1e-14)
        lower, upper = np.maximum(values - slack, 0.0), values + slack
        return cls(lower, upper, energy, order=values.size, how="dense singular value decomposition")

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """How many values are known."""
        return self.lower.size

    @property
    def complete(self) -> bool:
        """Whether all are."""
        return self.size == self.order

    @property
    def values(self) -> NDArray[np.float64]:
        """The known values, each in the middle of its bracket where all are known, else the lower ends."""
        return 0.5 * (self.lower + self.upper) if self.complete else self.lower

    def value(self, index: int) -> Estimate:
        """σ_index, counted from one; 0 to ``rest`` where it is not known."""
        if index > self.size:
            return self._estimate(0.0, 0.0, min(self.rest, float(self.upper[-1])))
        i = index - 1
        return self._estimate(float(self.values[i]), float(self.lower[i]), float(self.upper[i]))

    def frobenius(self, beyond: int = 0) -> Estimate:
        """√(Σ σ_i²) over i > ``beyond``: the norm, or the error of the best approximation of that rank."""
        if self.complete and beyond:
            ends = [math.sqrt(float(np.sum(x[beyond:] ** 2))) for x in (self.values, self.lower, self.upper)]
            return self._estimate(*ends)
        seen = min(beyond, self.size)
        taken = [float(np.sum(x[:seen] ** 2)) for x in (self.values, self.upper, self.lower)]
        left = [
            math.sqrt(max(float(total) - part, 0.0))
            for total, part in zip((self.squares.value, self.squares.lower, self.squares.upper), taken, strict=True)
        ]
        if beyond > seen:
            left[0] = left[1] = 0.0
        return self._estimate(left[0], min(left[1], left[0]), max(left[2], left[0]))

    def truncation(self, rank: int, norm: str) -> Estimate:
        """Relative error of the best approximation of a rank, in the Frobenius or the spectral norm; 0 at full rank.

        Raises
        ------
        ZeroDivisionError
            If the matrix is zero.
        """
        if rank >= self.order:
            return Estimate.exact(0.0, "the rank reaches the smaller dimension")
        if norm == "spectral":
            return self.value(rank + 1) / self.value(1)
        return self.frobenius(rank) / self.frobenius()

    def stable_rank(self) -> Estimate:
        """‖A‖_F² / ‖A‖₂²."""
        return self.squares / self.value(1) ** 2

    def _estimate(self, value: float, lower: float, upper: float) -> Estimate:
        ends = np.array([value, lower, upper])
        return Estimate(ends[0], ends[1], ends[2], self.confidence, self.how)


# -- rules -------------------------------------------------------------------------------------------------------------


def rank_of_energy(spectrum: Spectrum, share: float) -> RankRange:
    """Smallest rank whose best approximation keeps at least this share of ‖A‖_F².

    Where the known values do not reach it: each further one adds at most ``rest``², and as they descend, a fraction of
    them holds at least that fraction of what is left.

    Examples
    --------
    >>> half = Estimate.exact(100.0, "known")
    >>> known = Spectrum([5.0, 5.0], [5.0, 5.0], half, order=202, rest=1.0)
    >>> str(rank_of_energy(known, 0.5)), str(rank_of_energy(known, 0.9))
    ('2', '42–162')
    """
    if not 0 < share <= 1:
        raise ValueError(f"share of the energy must lie in (0, 1], got {share}")
    total = spectrum.squares
    if float(total.upper) == 0:
        return RankRange(0, 0)
    met = 1 - _MET
    ends = (spectrum.upper, float(total.lower)), (spectrum.lower, float(total.upper))
    if spectrum.complete:
        ends = (spectrum.values, float(np.sum(spectrum.values**2))), ends[1]
        low = _first_at_least(np.cumsum(spectrum.values**2), share * ends[0][1] * met)
        return RankRange(low, low)
    low, high = (_first_at_least(np.cumsum(values**2), share * norm * met) for values, norm in ends)
    k, rest = spectrum.size, min(spectrum.rest, float(spectrum.upper[-1]))
    if low > k:
        missing = share * float(total.lower) * met - float(np.sum(spectrum.upper**2))
        low = min(k + max(math.ceil(missing / rest**2), 1) if rest > 0 else spectrum.order, spectrum.order)
    if high > k:
        seen, norm = float(np.sum(spectrum.lower**2)), float(total.upper)
        fraction = min(max((share * norm * met - seen) / (norm - seen), 0.0), 1.0)
        high = max(min(k + math.ceil(fraction * (spectrum.order - k)), spectrum.order), low)
    return RankRange(low, high)


def _first_at_least(sums: NDArray[np.float64], wanted: float) -> int:
    return int(np.searchsorted(sums, wanted) + 1)


def rank_above(spectrum: Spectrum, threshold: float) -> RankRange:
    """How many singular values exceed a threshold.

    Examples
    --------
    >>> str(rank_above(Spectrum.dense(np.diag([3.0, 2.0, 1.0])), 1.5))
    '2'
    """
    if spectrum.complete:
        count = int(np.sum(spectrum.values > threshold))
        return RankRange(count, count)
    low, high = (int(np.sum(values > threshold)) for values in (spectrum.lower, spectrum.upper))
    if high == spectrum.size and spectrum.rest > threshold:
        left = float(spectrum.squares.upper) - float(np.sum(spectrum.lower**2))
        more = left / threshold**2 if threshold > 0 else math.inf
        high = int(min(spectrum.order, spectrum.size + more))
    return RankRange(low, max(low, high))


def rank_of_tolerance(spectrum: Spectrum, tolerance: float, norm: str) -> RankRange:
    """Smallest rank whose best approximation has a relative error of at most ``tolerance`` in a norm.

    Examples
    --------
    >>> s = Spectrum.dense(np.diag([3.0, 2.0, 1.0]))
    >>> [str(rank_of_tolerance(s, 0.4, norm)) for norm in ("spectral", "frobenius")]
    ['2', '2']
    """
    if not 0 < tolerance <= 1:
        raise ValueError(f"tolerance is a relative error and must lie in (0, 1], got {tolerance}")
    if norm == "frobenius":
        return rank_of_energy(spectrum, 1 - tolerance**2) if tolerance < 1 else RankRange(0, 0)
    low, high = (rank_above(spectrum, tolerance * float(end)) for end in (spectrum.upper[0], spectrum.lower[0]))
    return RankRange(low.low, high.high)
