"""What the makers of problems accept, checked at the border."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Matrix = NDArray[np.float64]

__all__ = ["at_least_zero", "floating", "spectrum", "whole"]


def whole(name: str, value: Any) -> int:
    """``value`` as an int; a ``ValueError`` if it is no whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return int(value)


def at_least_zero(name: str, value: float) -> float:
    """``value`` as a float; a ``ValueError`` if it is negative or not finite."""
    if not (np.ndim(value) == 0 and np.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be one finite number >= 0, got {value!r}")
    return float(value)


def spectrum(values: ArrayLike) -> Matrix:
    """Singular values (r,) in float64; a ``ValueError`` if there is none, or one is negative or not finite."""
    s = np.asarray(values, dtype=np.float64)
    if s.ndim != 1 or s.size == 0:
        raise ValueError(f"singular_values must be a list of at least one number, got shape {s.shape}")
    if not bool(np.all(np.isfinite(s) & (s >= 0))):
        raise ValueError(f"singular_values must be finite and >= 0, got values between {s.min()!r} and {s.max()!r}")
    return s


def floating(dtype: DTypeLike) -> np.dtype[Any]:
    """``dtype`` as NumPy's; a ``TypeError`` if it is not floating."""
    kind = np.dtype(dtype)
    if kind.kind != "f":
        raise TypeError(f"dtype must be floating, such as numpy.float32, got {kind}")
    return kind
