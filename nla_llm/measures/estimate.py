"""A number with its error bar: what every measure returns."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from nla_llm.backend import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["Estimate"]


@final
@dataclass(frozen=True, eq=False)
class Estimate:
    """A value between a lower and an upper bound.

    Laws: ``lower <= value <= upper``; the truth lies in [lower, upper] with probability at least ``confidence``, for
    each entry by itself; a confidence of 1 means that only rounding could make it untrue. Quotients, products, powers
    and roots keep these laws (interval arithmetic, union bound on the confidences).

    Parameters
    ----------
    value, lower, upper : array or float
        Float64 NumPy arrays of one shape: the batch axes of the operator that was measured; 0-d for a single one.
    confidence : float
        In (0, 1].
    how : str
        Where the numbers come from, for a reader.

    Raises
    ------
    ValueError
        If the bounds do not enclose the value, a number is NaN, or the confidence lies outside (0, 1].

    Examples
    --------
    >>> a = Estimate.bracket(1.0, 1.2, "by hand")
    >>> b = Estimate.exact(2.0, "by definition")
    >>> ratio = a / b
    >>> float(ratio.lower), float(ratio.upper), ratio.contains(0.55).item()
    (0.5, 0.6, True)
    """

    value: NDArray[Any]
    lower: NDArray[Any]
    upper: NDArray[Any]
    confidence: float
    how: str

    def __post_init__(self) -> None:
        numbers = (np.array(to_numpy(x), dtype=np.float64) for x in (self.value, self.lower, self.upper))
        value, lower, upper = np.broadcast_arrays(*numbers)
        if np.isnan(value).any() or np.isnan(lower).any() or np.isnan(upper).any():
            raise ValueError(f"an Estimate cannot hold NaN, got value {value}, lower {lower}, upper {upper}")
        if not ((lower <= value) & (value <= upper)).all():
            raise ValueError(f"need lower <= value <= upper, got value {value}, lower {lower}, upper {upper}")
        if not 0 < self.confidence <= 1:
            raise ValueError(f"confidence must lie in (0, 1], got {self.confidence}")
        for name, x in (("value", value), ("lower", lower), ("upper", upper)):
            own = np.array(x)
            own.flags.writeable = False
            object.__setattr__(self, name, own)

    # -- constructors ----------------------------------------------------------------------------------------------

    @classmethod
    def exact(cls, value: Any, how: str, *, rounding: float = 0.0) -> Estimate:
        """A value known up to a relative rounding error, none by default."""
        value = np.asarray(to_numpy(value), dtype=np.float64)
        slack = rounding * np.abs(np.where(np.isfinite(value), value, 0.0))
        return cls(value, value - slack, value + slack, 1.0, how)

    @classmethod
    def bracket(cls, lower: Any, upper: Any, how: str, *, confidence: float = 1.0, value: Any = None) -> Estimate:
        """A bracket; the value is the midpoint, or the lower end where the upper is infinite, unless given."""
        lower, upper = (np.asarray(to_numpy(x), dtype=np.float64) for x in (lower, upper))
        if value is None:
            finite = np.isfinite(upper)
            value = np.where(finite, lower + 0.5 * (np.where(finite, upper, lower) - lower), lower)
        return cls(value, lower, upper, confidence, how)

    @classmethod
    def from_samples(cls, values: Any, *, confidence: float = 0.95, axis: int = 0) -> Estimate:
        """Mean over independent samples (seeds) with its Student-t interval.

        The interval is exact for normal samples and asymptotic otherwise. A single sample says nothing about its
        spread: the interval is then the whole line.

        Examples
        --------
        >>> e = Estimate.from_samples([1.0, 2.0, 3.0])
        >>> float(e.value), float(e.upper.round(3))
        (2.0, 4.484)
        """
        from scipy.special import stdtrit  # noqa: PLC0415 - SciPy loads only where it is needed

        samples = np.asarray(to_numpy(values), dtype=np.float64)
        count = samples.shape[axis] if samples.ndim else 0
        if count < 1:
            raise ValueError("values must hold at least one sample along the axis")
        mean = samples.mean(axis=axis)
        how = f"mean over {count} samples"
        if count == 1:
            return cls(mean, mean - np.inf, mean + np.inf, confidence, f"{how}: no interval from a single one")
        half = stdtrit(count - 1, 0.5 + 0.5 * confidence) * samples.std(axis=axis, ddof=1) / np.sqrt(count)
        return cls(mean, mean - half, mean + half, confidence, f"{how}, Student-t interval")

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the three arrays: the batch axes."""
        return self.value.shape

    @property
    def width(self) -> NDArray[Any]:
        """``upper − lower``."""
        with np.errstate(invalid="ignore"):  # inf − inf is a point at infinity
            return np.where(self.upper == self.lower, 0.0, self.upper - self.lower)

    def contains(self, x: Any) -> NDArray[np.bool_]:
        """Whether ``x`` lies between the bounds, entry by entry."""
        x = to_numpy(x)
        return np.asarray((self.lower <= x) & (x <= self.upper))

    def __float__(self) -> float:
        if self.value.ndim:
            raise TypeError(f"an Estimate of shape {self.shape} is not one number; pick an entry, as in estimate[0]")
        return float(self.value)

    def __getitem__(self, index: Any) -> Estimate:
        return Estimate(self.value[index], self.lower[index], self.upper[index], self.confidence, self.how)

    # -- interval arithmetic ---------------------------------------------------------------------------------------

    def __mul__(self, other: Any) -> Estimate:
        other = _as_estimate(other)
        corners = _corners(np.multiply, self, other)
        how = self._joint_how(other, "×")
        return Estimate(self.value * other.value, *corners, _joint_confidence(self, other), how)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Estimate:
        other = _as_estimate(other)
        if (other.value == 0).any():
            raise ZeroDivisionError(f"the reference is zero, so a relative figure has no meaning ({other.how})")
        if ((other.lower < 0) & (other.upper > 0)).any():
            raise ZeroDivisionError(f"the denominator {other} may be zero")
        # the ends have the sign of the value or are zero: a zero end is approached from the side of the value
        low, high = np.copysign(other.lower, other.value), np.copysign(other.upper, other.value)
        other = Estimate(other.value, low, high, other.confidence, other.how)
        corners = _corners(np.divide, self, other)
        how = self._joint_how(other, "/")
        return Estimate(self.value / other.value, *corners, _joint_confidence(self, other), how)

    def __pow__(self, exponent: int) -> Estimate:
        if exponent < 1 or (self.lower < 0).any():
            raise ValueError("only positive powers of non-negative estimates are defined")
        return self._mapped(lambda x: x**exponent)

    def sqrt(self) -> Estimate:
        """Square root of a non-negative estimate."""
        if (self.lower < 0).any():
            raise ValueError(f"the square root needs a non-negative estimate, got {self}")
        return self._mapped(np.sqrt)

    def _mapped(self, function: Callable[[NDArray[Any]], NDArray[Any]]) -> Estimate:
        return Estimate(function(self.value), function(self.lower), function(self.upper), self.confidence, self.how)

    def _joint_how(self, other: Estimate, sign: str) -> str:
        return f"({self.how}) {sign} ({other.how})" if other.how != _NUMBER else self.how

    # -- showing ---------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        trust = "" if self.confidence == 1 else f" ({100 * self.confidence:.4g} %)"
        if self.value.ndim:
            low, high = (self.lower.min(), self.upper.max()) if self.value.size else (np.nan, np.nan)
            return f"{self.value.size} values of shape {self.shape} in [{low:.4g}, {high:.4g}]{trust}"
        return f"{self.value:.4g} [{self.lower:.4g}, {self.upper:.4g}]{trust}"

    def _repr_html_(self) -> str:
        title = html.escape(self.how, quote=True)
        if not self.value.ndim:
            return f'<span title="{title}">{html.escape(str(self))}</span>'
        rows = "".join(
            f"<tr><td>{html.escape(str(index))}</td><td>{self.value[index]:.4g}</td>"
            f"<td>{self.lower[index]:.4g}</td><td>{self.upper[index]:.4g}</td></tr>"
            for index in np.ndindex(self.shape)
        )
        head = "<tr><th>entry</th><th>value</th><th>lower</th><th>upper</th></tr>"
        return f"<table>{head}{rows}<caption>{title}; confidence {self.confidence:.4g}</caption></table>"


_NUMBER = "a number"


def _as_estimate(x: Any) -> Estimate:
    return x if isinstance(x, Estimate) else Estimate.exact(x, _NUMBER)


def _joint_confidence(a: Estimate, b: Estimate) -> float:
    """Union bound: both hold with at least this probability."""
    return max(1.0 - (1.0 - a.confidence) - (1.0 - b.confidence), np.finfo(float).tiny)


def _corners(operation: Callable[..., Any], a: Estimate, b: Estimate) -> tuple[NDArray[Any], NDArray[Any]]:
    """Smallest and largest result over the four corners; 0 · ∞ and 0 / 0 on a boundary add no bound of their own."""
    with np.errstate(divide="ignore", invalid="ignore"):
        corners = np.stack(
            np.broadcast_arrays(*(operation(x, y) for x in (a.lower, a.upper) for y in (b.lower, b.upper)))
        )
        centre = operation(a.value, b.value)
    undefined = np.isnan(corners)
    lower = np.where(undefined, 0.0, corners).min(axis=0)
    upper = np.where(undefined, np.inf, corners).max(axis=0)
    return np.minimum(lower, centre), np.maximum(upper, centre)
