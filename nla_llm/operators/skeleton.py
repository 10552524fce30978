"""Products with a small core between two factors, and diagonal matrices: the pieces of Nyström and CUR methods."""

from __future__ import annotations

from typing import final

import numpy as np

from nla_llm.backend import Array, matmul
from nla_llm.operators.base import Operator

__all__ = ["Diagonal", "Skeleton"]


@final
class Skeleton(Operator):
    """L C R, applied from the right: two operators with a small core between them, which is the inverse of something.

    Parameters
    ----------
    left, right
        Operators (..., n_q, r) and (..., s, n_k).
    core
        C, an array (..., r, s).
    intersection
        The matrix W (..., s, r) of which C is an inverse, a pseudo-inverse or an approximation to one; its condition
        says what errors of the factors are multiplied by.

    Examples
    --------
    >>> from nla_llm.operators.base import Dense
    >>> w = np.diag([4.0, 1.0])
    >>> op = Skeleton(Dense(np.ones((3, 2))), np.linalg.inv(w), Dense(np.ones((2, 5))), intersection=w)
    >>> op.dense()[0].tolist(), float(op.core_condition)
    ([1.25, 1.25, 1.25, 1.25, 1.25], 4.0)
    """

    def __init__(self, left: Operator, core: Array, right: Operator, *, intersection: Array) -> None:
        if (left.shape[-1], right.shape[-2]) != tuple(core.shape[-2:]):
            raise ValueError(f"factors {left.shape} and {right.shape} do not fit a core of shape {tuple(core.shape)}")
        batch = np.broadcast_shapes(left.batch_shape, core.shape[:-2], right.batch_shape)
        super().__init__((*batch, left.shape[-2], right.shape[-1]), left.like)
        self.left = left
        self.core = core
        self.right = right
        self.intersection = intersection

    @property
    def core_condition(self) -> Array:
        """κ₂ of the intersection, one number for each batch entry, in float64; infinite where it is singular."""
        xp = self.xp
        s = xp.linalg.svdvals(xp.astype(self.intersection, xp.float64, copy=False))
        largest, smallest = s[..., 0], s[..., -1]
        regular = smallest > 0
        ratio = largest / xp.where(regular, smallest, xp.ones_like(smallest))
        return xp.where(regular, ratio, xp.full_like(ratio, xp.inf))

    def apply(self, x: Array) -> Array:
        return self.left.apply(matmul(self.core, self.right.apply(x)))

    def apply_transpose(self, y: Array) -> Array:
        return self.right.apply_transpose(matmul(self.xp.matrix_transpose(self.core), self.left.apply_transpose(y)))

    def rows(self, start: int, stop: int) -> Array:
        block = self.xp.matrix_transpose(matmul(self.left.rows(start, stop), self.core))
        return self.xp.matrix_transpose(self.right.apply_transpose(block))


@final
class Diagonal(Operator):
    """diag(d) for d (..., n).

    Examples
    --------
    >>> (Diagonal(np.array([2.0, 3.0])) @ np.ones(2)).tolist()
    [2.0, 3.0]
    """

    def __init__(self, diagonal: Array) -> None:
        super().__init__((*diagonal.shape, diagonal.shape[-1]), diagonal)
        self.diagonal = diagonal
        self.nonnegative = bool(self.xp.all(diagonal >= 0))

    def apply(self, x: Array) -> Array:
        return self.diagonal[..., None] * x

    def apply_transpose(self, y: Array) -> Array:
        return self.diagonal[..., None] * y
