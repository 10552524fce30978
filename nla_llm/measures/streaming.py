"""One pass over the rows of an operator: what every measure that needs entries is built from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import eps, from_numpy, to_numpy
from nla_llm.linalg import widen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from nla_llm.operators import Operator

__all__ = ["EntryNorms", "entry_norms", "rounding", "row_blocks"]

_BLOCK_ENTRIES = 1 << 21  # entries held at once, batch axes included: 16 MB in float64 whatever n is


def row_blocks(op: Operator) -> Iterator[tuple[int, int]]:
    """Ranges of rows that together hold about 2^21 entries."""
    n = op.shape[-2]
    step = max(1, _BLOCK_ENTRIES // max(1, math.prod(op.shape) // n))
    return ((start, min(start + step, n)) for start in range(0, n, step))


def rounding(op: Operator) -> float:
    """Relative rounding error allowed for a norm of ``op`` as computed: 4 √n eps.

    √n rather than n: rounding errors behave as independent ones (Higham and Mary 2019, SIAM J. Sci. Comput. 41). The
    constant 4 is empirical: ten times the largest error seen in the tests.
    """
    return 4.0 * math.sqrt(max(op.shape[-2:])) * eps(op)


class EntryNorms:
    """Sums over the entries of an operator, float64 arrays of its batch shape.

    Attributes
    ----------
    frobenius, one, inf, maximum
        ‖A‖_F, largest column sum of |a_ij|, largest row sum of |a_ij|, largest |a_ij|.
    """

    def __init__(self, op: Operator) -> None:
        batch, n_k = op.batch_shape, op.shape[-1]
        # ‖A‖_F = scale √squares, so that squares neither overflow nor underflow (LAPACK's lassq)
        scale, squares = np.zeros(batch), np.zeros(batch)
        columns, self.inf = np.zeros((*batch, n_k)), np.zeros(batch)
        xp = op.xp
        for start, stop in row_blocks(op):
            block = xp.abs(widen(op.rows(start, stop)))
            columns += to_numpy(xp.sum(block, axis=-2))
            self.inf = np.maximum(self.inf, to_numpy(xp.max(xp.sum(block, axis=-1), axis=-1)))
            larger = np.maximum(scale, to_numpy(xp.max(block, axis=(-2, -1))))
            unit = np.where(larger > 0, larger, 1.0)
            block = block / from_numpy(unit[..., None, None], like=block)
            squares = squares * (scale / unit) ** 2 + to_numpy(xp.sum(block * block, axis=(-2, -1)))
            scale = larger
        self.maximum: NDArray[Any] = scale
        self.frobenius: NDArray[Any] = scale * np.sqrt(squares)
        self.one: NDArray[Any] = columns.max(axis=-1)


def entry_norms(op: Operator) -> EntryNorms:
    """The four norms of one pass, in memory that does not depend on n beyond one row of sums.

    Raises
    ------
    ValueError
        If the operator has an entry that is not finite.
    """
    norms = EntryNorms(op)
    if not np.isfinite(norms.one).all():
        raise ValueError(f"{op!r} has entries that are not finite, so its norms are not defined")
    return norms
