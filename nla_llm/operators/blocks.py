"""Operators of what consecutive tokens share: means over copies, and products that stay inside segments."""

from __future__ import annotations

from copy import copy
from functools import reduce
from math import ceil
from typing import TYPE_CHECKING, final

import numpy as np

from nla_llm.backend import Array, device_of, matmul, namespace
from nla_llm.operators.base import Operator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Averaged", "SegmentDiagonal", "Segments"]


@final
class Averaged(Operator):
    """Mean over copies of an operator: each of ``parts`` is (..., g, n_q, n_k), the mean runs over all g of all parts.

    The copies come in parts so that only one part is worked on at a time.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.operators import Dense
    >>> Averaged([Dense(np.array([[[1.0]], [[2.0]]])), Dense(np.array([[[6.0]]]))]).dense().tolist()
    [[3.0]]
    """

    def __init__(self, parts: Sequence[Operator]) -> None:
        first = parts[0]
        super().__init__((*first.shape[:-3], *first.shape[-2:]), first.like)
        self.parts = tuple(parts)
        self.copies = sum(part.shape[-3] for part in parts)
        self.nonnegative = all(part.nonnegative for part in parts)

    def apply(self, x: Array) -> Array:
        return self._mean([part.apply(x[..., None, :, :]) for part in self.parts], axis=-3)

    def apply_transpose(self, y: Array) -> Array:
        return self._mean([part.apply_transpose(y[..., None, :, :]) for part in self.parts], axis=-3)

    def rows(self, start: int, stop: int) -> Array:
        return self._mean([part.rows(start, stop) for part in self.parts], axis=-3)

    def row_sums(self) -> Array:
        return self._mean([part.row_sums() for part in self.parts], axis=-2)

    def _mean(self, values: list[Array], *, axis: int) -> Array:
        sums = [self.xp.sum(value, axis=axis) for value in values]
        return reduce(lambda a, b: a + b, sums) * (1 / self.copies)


@final
class Segments:
    """``m`` consecutive segments of n >= m tokens, of ⌊n/m⌋ tokens at first and one more from some segment on.

    With ``windows`` B <= m the tokens are parted so into B windows, the segments among the windows, and each window
    into its segments: no segment crosses the border of a window.

    Attributes
    ----------
    size
        Slots of each segment, ⌈⌈n/B⌉/⌊m/B⌋⌉, that is ⌈n/m⌉ without windows; what is shorter is filled up in
        :meth:`split`.
    window
        The window of each segment, (m,).
    slots
        Token in each slot, an array of NumPy (m, size); a slot that is filled up repeats the last token of its segment.
    filled
        Which slots hold a token of their own, (m, size).
    number
        The segment of each token, (n,).

    Examples
    --------
    >>> import numpy as np
    >>> Segments(5, 2).split(np.arange(5.0)[:, None])[..., 0].tolist()
    [[0.0, 1.0, 1.0], [2.0, 3.0, 4.0]]
    """

    def __init__(self, n: int, m: int, *, windows: int | None = None) -> None:
        windows = m if windows is None else windows
        if not 1 <= windows <= m <= n:
            raise ValueError(
                f"m={m} segments in {windows} windows cannot be made of {n} tokens; pass 1 <= windows <= m <= {n}"
            )
        self.n, self.m, self.size = n, m, ceil(ceil(n / windows) / (m // windows))
        tokens, parts = _parted(n, windows), _parted(m, windows)
        self.window: NDArray[np.int64] = np.repeat(np.arange(windows), parts)
        lengths = np.concatenate([_parted(t, p) for t, p in zip(tokens, parts, strict=True)])
        firsts = np.cumsum(lengths) - lengths
        slot = np.arange(self.size)
        self.filled: NDArray[np.bool_] = slot < lengths[:, None]
        self.slots: NDArray[np.int64] = firsts[:, None] + np.minimum(slot, lengths[:, None] - 1)
        self.number: NDArray[np.int64] = np.repeat(np.arange(m), lengths)

    def merged(self, count: int) -> Segments:
        """Every ``count`` neighbouring segments as one; slots that are filled up stay where they were.

        Examples
        --------
        >>> Segments(5, 4).merged(2).filled.tolist()
        [[True, False, True, False], [True, False, True, True]]
        """
        if self.m % count:
            raise ValueError(f"{self.m} segments cannot be merged by {count}; pass a divisor of {self.m}")
        whole = copy(self)
        whole.m, whole.size = self.m // count, self.size * count
        whole.slots = self.slots.reshape(whole.m, whole.size)
        whole.filled = self.filled.reshape(whole.m, whole.size)
        whole.window, whole.number = self.window[::count], self.number // count
        return whole

    def split(self, x: Array) -> Array:
        """Tokens x (..., n, c) in slots, (..., m, size, c)."""
        xp = namespace(x)
        if not self.filled.all():
            x = xp.take(x, xp.asarray(self.slots.reshape(-1), device=device_of(x)), axis=-2)
        return xp.reshape(x, (*x.shape[:-2], self.m, self.size, x.shape[-1]))

    def join(self, x: Array) -> Array:
        """What stands in the slots x (..., m, size, c), token by token (..., n, c)."""
        xp = namespace(x)
        x = xp.reshape(x, (*x.shape[:-3], self.m * self.size, x.shape[-1]))
        if self.filled.all():
            return x
        place = np.flatnonzero(self.filled.reshape(-1))
        return xp.take(x, xp.asarray(place, device=device_of(x)), axis=-2)


def _parted(n: int, m: int) -> NDArray[np.int64]:
    """m whole numbers that sum up to n and differ by one at most, the larger ones last."""
    return n // m + (np.arange(m) >= m - n % m)


@final
class SegmentDiagonal(Operator):
    """Block-diagonal operator: the queries of a segment see the keys of the segment of the same number.

    Parameters
    ----------
    blocks
        (..., m, rows.size, columns.size), zero where a slot is filled up.
    rows, columns
        The segments of queries and of keys, m each.

    Examples
    --------
    >>> import numpy as np
    >>> op = SegmentDiagonal(np.ones((2, 1, 2)), Segments(2, 2), Segments(4, 2))
    >>> op.dense().tolist()
    [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """

    def __init__(self, blocks: Array, rows: Segments, columns: Segments, *, nonnegative: bool = False) -> None:
        if blocks.shape[-3:] != (rows.m, rows.size, columns.size) or rows.m != columns.m:
            expected = (rows.m, rows.size, columns.size)
            raise ValueError(f"blocks must be (..., m, rows, columns) = (..., {expected}), got {blocks.shape}")
        super().__init__((*blocks.shape[:-3], rows.n, columns.n), blocks)
        self.blocks = blocks
        self.segments = (rows, columns)
        self.nonnegative = nonnegative

    def apply(self, x: Array) -> Array:
        rows, columns = self.segments
        return rows.join(matmul(self.blocks, columns.split(x)))

    def apply_transpose(self, y: Array) -> Array:
        rows, columns = self.segments
        return columns.join(matmul(self.xp.matrix_transpose(self.blocks), rows.split(y)))
