"""Low-rank products with a state that keys enter step by step: every row sees the keys that are far enough away."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np

from nla_llm.backend import Array, by_heads, device_of, matmul, namespace
from nla_llm.operators.base import Operator

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Step", "SteppedLowRank"]


class Step(NamedTuple):
    """The keys ``first_key:last_key`` enter the state, then the rows ``first_row:last_row`` read it."""

    first_row: int
    last_row: int
    first_key: int
    last_key: int

    @property
    def enters(self) -> bool:
        """Whether any key enters."""
        return self.last_key > self.first_key


@final
class SteppedLowRank(Operator):
    """Entry (i, j) is left_i · right_j for the keys j that enter not later than row i reads, and zero for the others.

    Steps from the first row to the last, with growing keys, give each row what lies more than some distance before it;
    steps from the last row to the first what lies behind it. Nothing is subtracted, so that entries of positive factors
    stay positive. O(n r) operations a column.

    Parameters
    ----------
    left, right
        Factors (..., n_q, r) and (..., n_k, r).
    decay
        (..., K, r): factors of the state at each of the K steps at which keys enter, before they do. Carries a running
        scale; the first is not used.
    steps
        In the order of time; each row is read once, each key enters at most once.
    nonnegative
        Whether the factors are known to be >= 0.

    Examples
    --------
    >>> steps = [Step(0, 1, 0, 0), Step(1, 2, 0, 1), Step(2, 3, 1, 2)]
    >>> ones = np.ones((3, 1))
    >>> SteppedLowRank(ones, ones, np.ones((2, 1)), steps).dense().tolist()
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    """

    def __init__(
        self, left: Array, right: Array, decay: Array, steps: Sequence[Step], *, nonnegative: bool = False
    ) -> None:
        batch = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
        super().__init__((*batch, left.shape[-2], right.shape[-2]), left)
        self.left = left
        self.right = right
        self.decay = decay
        self.steps = tuple(steps)
        self.nonnegative = nonnegative

    def apply(self, x: Array) -> Array:
        return by_heads(partial(_product, self.steps), self.left, self.right, self.decay, x)

    def apply_transpose(self, y: Array) -> Array:
        return by_heads(partial(_adjoint, self.steps), self.left, self.right, self.decay, y)


def _product(steps: Sequence[Step], left: Array, right: Array, decay: Array, x: Array) -> Array:
    xp, state, entered = namespace(left), None, 0
    parts = {}
    for step in steps:
        if step.enters:
            keys = slice(step.first_key, step.last_key)
            update = matmul(xp.matrix_transpose(right[..., keys, :]), x[..., keys, :])
            state = update if state is None else decay[..., entered, :, None] * state + update
            entered += 1
        rows = left[..., step.first_row : step.last_row, :]
        parts[step.first_row] = _zeros(rows, x) if state is None else matmul(rows, state)
    return xp.concat([parts[row] for row in sorted(parts)], axis=-2)


def _adjoint(steps: Sequence[Step], left: Array, right: Array, decay: Array, y: Array) -> Array:
    xp, state = namespace(left), None
    entered = sum(step.enters for step in steps)
    parts, n = {}, right.shape[-2]
    for step in reversed(steps):
        rows = slice(step.first_row, step.last_row)
        read = matmul(xp.matrix_transpose(left[..., rows, :]), y[..., rows, :])
        state = read if state is None else state + read
        if step.enters:
            entered -= 1
            parts[step.first_key] = matmul(right[..., step.first_key : step.last_key, :], state)
            state = decay[..., entered, :, None] * state
    # the keys that enter are consecutive; the others have no entries
    first = min(parts, default=0)
    last = max((step.last_key for step in steps if step.enters), default=0)
    around = [
        _zeros(right[..., :first, :], y),
        *(parts[key] for key in sorted(parts)),
        _zeros(right[..., last:n, :], y),
    ]
    batch = np.broadcast_shapes(*(part.shape[:-2] for part in around))
    return xp.concat([xp.broadcast_to(part, (*batch, *part.shape[-2:])) for part in around], axis=-2)


def _zeros(factor: Array, x: Array) -> Array:
    """Rows of zeros: as many as the factor has, as wide as x."""
    xp = namespace(factor)
    batch = np.broadcast_shapes(factor.shape[:-2], x.shape[:-2])
    dtype = xp.result_type(factor.dtype, x.dtype)
    return xp.zeros((*batch, factor.shape[-2], x.shape[-1]), dtype=dtype, device=device_of(factor))
