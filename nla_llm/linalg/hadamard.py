"""Walsh–Hadamard transforms, and orthogonal matrices that are products of them with random signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nla_llm.backend import Array, is_numpy, namespace

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["next_power_of_two", "walsh_hadamard"]

_CHUNK_ENTRIES = 1 << 14  # of the NumPy path: two buffers of it stay in a second-level cache (measured)


def next_power_of_two(n: int) -> int:
    """Least power of two that is at least ``n``.

    Examples
    --------
    >>> [next_power_of_two(n) for n in (1, 2, 3, 64, 65)]
    [1, 2, 4, 64, 128]
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return 1 << (n - 1).bit_length()


def walsh_hadamard(x: Array) -> Array:
    """H x along the last axis, H_ij = (−1)^(number of ones that i and j share in binary), in D lg D additions.

    Not normalised: H Hᵀ = D I. The order of rows is Sylvester's, H_2D = [[H, H], [H, −H]].

    Parameters
    ----------
    x
        (..., D) with D a power of two; it is not changed.

    Raises
    ------
    ValueError
        If the length of the last axis is not a power of two.

    Examples
    --------
    >>> walsh_hadamard(np.array([1.0, 2.0, 3.0, 4.0])).tolist()
    [10.0, -2.0, -4.0, 0.0]
    """
    size = x.shape[-1]
    if size != next_power_of_two(max(size, 1)):
        raise ValueError(f"the last axis must have a power of two as its length, got {size}; pad it with zeros")
    if is_numpy(x):
        return _in_chunks(x)
    xp, half = namespace(x), 1
    while half < size:
        pairs = xp.reshape(x, (*x.shape[:-1], size // (2 * half), 2, half))
        first, second = pairs[..., :1, :], pairs[..., 1:, :]
        x = xp.reshape(xp.concat([first + second, first - second], axis=-2), x.shape)
        half *= 2
    return x


def _in_chunks(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """The same additions in the same order, a few rows at a time and with rows as the fastest axis."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out = np.empty_like(rows)
    step = max(1, _CHUNK_ENTRIES // size)
    for start in range(0, len(rows), step):
        current = np.array(rows[start : start + step].T, order="C")
        other = np.empty_like(current)
        half = 1
        while half < size:
            a, b = (z.reshape(size // (2 * half), 2, half, -1) for z in (current, other))
            np.add(a[:, 0], a[:, 1], out=b[:, 0])
            np.subtract(a[:, 0], a[:, 1], out=b[:, 1])
            current, other = other, current
            half *= 2
        out[start : start + step] = current.T
    return out.reshape(x.shape)
