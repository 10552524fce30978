"""One pass over the rows of an operator: what every measure that needs entries is built from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm.backend import Array, eps, from_numpy, is_numpy, namespace, parallel, thread_count, to_numpy
from nla_llm.linalg import widen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from nla_llm.operators import Operator

__all__ = ["EntryNorms", "dense_blocks", "entry_norms", "frobenius_by_rows", "rounding", "row_blocks"]

_SAFE_SQUARE = 1e-250  # sums of squares above it, and below its inverse, have lost nothing to under- or overflow
_LARGEST = float(np.finfo(np.float64).max)
_BLOCK_ENTRIES = 1 << 20  # entries held at once, batch axes included: 8 MB in float64 whatever n is


def row_blocks(op: Operator) -> Iterator[tuple[int, int]]:
    """Ranges of rows that together hold about 2^20 entries."""
    n = op.shape[-2]
    step = max(1, _BLOCK_ENTRIES // max(1, math.prod(op.shape) // n))
    return ((start, min(start + step, n)) for start in range(0, n, step))


def dense_blocks(op: Operator) -> Iterator[Array]:
    """Blocks of rows from the top, float64; on NumPy as many at a time as there are threads."""
    ranges = list(row_blocks(op))
    at_once = thread_count() if is_numpy(op.rows(0, 1)) else 1
    for first in range(0, len(ranges), at_once):
        yield from parallel(lambda block: widen(op.rows(*block)), ranges[first : first + at_once])


def rounding(op: Operator) -> float:
    """Relative rounding error allowed for a norm of ``op`` as computed: 4 √n eps.

    √n rather than n: rounding errors behave as independent ones (Higham and Mary 2019, SIAM J. Sci. Comput. 41). The
    constant 4 is empirical: eight times the largest error seen in float64 sums of squares up to n = 900.

    It speaks of the operator as computed. What cancels inside it is not charged: a difference A − B carries errors of
    eps (‖A‖ + ‖B‖), which exceed the bracket where ‖A − B‖ falls below about 1e-8 of that sum.
    """
    return 4.0 * math.sqrt(max(op.shape[-2:])) * eps(op)


class EntryNorms(NamedTuple):
    """Norms that are sums over entries, float64 arrays of the batch shape of the operator."""

    frobenius: NDArray[Any]  # ‖A‖_F
    one: NDArray[Any]  # largest column sum of |a_ij|
    inf: NDArray[Any]  # largest row sum of |a_ij|
    maximum: NDArray[Any]  # largest |a_ij|


def entry_norms(op: Operator) -> EntryNorms:
    """The four norms of one pass over the rows, in memory that does not depend on n beyond one row of sums.

    Raises
    ------
    ValueError
        If the operator has an entry that is not finite.
    """
    batch, xp = op.batch_shape, op.xp
    squares, inf, maximum = _SquareSum(batch), np.zeros(batch), np.zeros(batch)
    columns = np.zeros((*batch, op.shape[-1]))
    for rows in dense_blocks(op):
        block = xp.abs(rows)
        squares.add(block)
        columns += to_numpy(xp.sum(block, axis=-2))
        inf = np.maximum(inf, to_numpy(xp.max(xp.sum(block, axis=-1), axis=-1)))
        maximum = np.maximum(maximum, to_numpy(xp.max(block, axis=(-2, -1))))
    _check_finite(op, columns)
    return EntryNorms(squares.root(), columns.max(axis=-1), inf, maximum)


def frobenius_by_rows(op: Operator) -> NDArray[Any]:
    """‖A‖_F alone by one pass over the rows, cheaper than ``entry_norms``.

    Raises
    ------
    ValueError
        If the operator has an entry that is not finite.
    """
    squares = _SquareSum(op.batch_shape)
    for rows in dense_blocks(op):
        squares.add(rows)
    _check_finite(op, squares.root())
    return squares.root()


class _SquareSum:
    """Running sum of squares held as scale² · squares, which neither over- nor underflows (as LAPACK's lassq)."""

    def __init__(self, batch: tuple[int, ...]) -> None:
        self.scale, self.squares = np.ones(batch), np.zeros(batch)

    def add(self, block: Array) -> None:
        """Add the squares of a block (..., rows, columns)."""
        xp = namespace(block)
        with np.errstate(over="ignore", under="ignore"):
            plain = to_numpy(xp.sum(block * block, axis=(-2, -1)))
        if np.all((plain > _SAFE_SQUARE) & (plain < 1.0 / _SAFE_SQUARE)):
            self._add(np.ones_like(plain), plain)
            return
        largest = to_numpy(xp.max(xp.abs(block), axis=(-2, -1)))
        scale = np.where(largest > 0, np.minimum(largest, _LARGEST), 1.0)  # an infinite entry stays one
        unit = block / from_numpy(scale[..., None, None], like=block)
        self._add(scale, to_numpy(xp.sum(unit * unit, axis=(-2, -1))))

    def root(self) -> NDArray[Any]:
        """Square root of the sum."""
        total: NDArray[Any] = self.scale * np.sqrt(self.squares)
        return total

    def _add(self, scale: NDArray[Any], squares: NDArray[Any]) -> None:
        own, other = (
            np.where(sums > 0, scales, 0.0) for sums, scales in ((self.squares, self.scale), (squares, scale))
        )
        common = np.maximum(own, other)
        common = np.where(common > 0, common, 1.0)
        with np.errstate(under="ignore"):
            self.squares = self.squares * (own / common) ** 2 + squares * (other / common) ** 2
        self.scale = common


def _check_finite(op: Operator, sums: NDArray[Any]) -> None:
    if not np.isfinite(sums).all():
        raise ValueError(f"{op!r} has entries that are not finite, so its norms are not defined")
