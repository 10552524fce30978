"""Spacings of stored numbers: how fine the grid is on which a matrix lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FORMATS", "count_binades", "spacings"]

# stored dtype -> bits of the fraction, exponent of the smallest spacing
FORMATS = {"float64": (52, -1074), "float32": (23, -149), "float16": (10, -24), "bfloat16": (7, -133)}
_LAYOUT = {np.dtype(np.float32): (np.int32, 23, 0xFF, 127), np.dtype(np.float64): (np.int64, 52, 0x7FF, 1023)}


def count_binades(values: NDArray[Any]) -> NDArray[np.int64]:
    """How many entries of a float32 or float64 array lie in each binade, by its biased exponent.

    Examples
    --------
    >>> counts = count_binades(np.array([1.0, 1.5, 2.0, 0.0], np.float32))
    >>> counts[127].item(), counts[128].item(), counts[0].item()
    (2, 1, 1)
    """
    return np.bincount(binades(values).ravel(), minlength=_LAYOUT[values.dtype][2] + 1)


def binades(values: NDArray[Any]) -> NDArray[Any]:
    """Biased exponent of every entry."""
    whole, bits, mask, _ = _LAYOUT[values.dtype]
    return (np.ascontiguousarray(values).view(whole) >> bits) & mask


def spacings(stored: str, computed: np.dtype[Any]) -> NDArray[np.float64]:
    """Spacing of the numbers of a stored dtype in each binade of ``computed``; zero in that of zero.

    In the binade of zero there are subnormal numbers of ``computed`` too; those of half precision lie in binades of
    float32 proper, where the spacing has reached its floor.

    Examples
    --------
    >>> spacings("bfloat16", np.dtype(np.float32))[127].item() == 2.0**-7
    True
    """
    bits, smallest = FORMATS[stored]
    _, _, mask, bias = _LAYOUT[computed]
    exponent = np.arange(mask + 1) - bias
    with np.errstate(under="ignore", over="ignore"):
        found = np.ldexp(1.0, np.maximum(exponent - bits, smallest))
    found[0] = 0.0
    return found
