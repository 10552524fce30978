"""Matrices of a narrow precision in float64 arithmetic, block of rows by block of rows."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, final

from nla_llm.operators.base import Dense, Operator, Product, Scaled, Sum, Transpose
from nla_llm.operators.lowrank import LowRank

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nla_llm.backend import Array

__all__ = ["Widened", "widened"]

BLOCK_ENTRIES = 1 << 20  # widened at a time: 8 MiB


@final
class Widened(Operator):
    """A narrow matrix (..., n_q, n_k) as a float64 operator that never holds all of it in float64.

    Law: products are those of the matrix converted as a whole. They read it once and convert what they read, which
    costs a few times as much as a product in float32: for references and certificates, not for speed.

    Examples
    --------
    >>> import numpy as np
    >>> op = Widened(np.ones((3, 2), dtype=np.float32))
    >>> (op @ np.array([1.0, 1e-9])).tolist()  # float32 would round to one
    [1.000000001, 1.000000001, 1.000000001]
    """

    def __init__(self, matrix: Array) -> None:
        xp = Dense(matrix).xp
        super().__init__(matrix.shape, xp.astype(matrix[..., :1, :1], xp.float64))
        self.matrix = matrix

    def apply(self, x: Array) -> Array:
        return self.xp.concat([self.rows(start, stop) @ x for start, stop in self._blocks()], axis=-2)

    def apply_transpose(self, y: Array) -> Array:
        transpose, total = self.xp.matrix_transpose, None
        for start, stop in self._blocks():
            part = transpose(self.rows(start, stop)) @ y[..., start:stop, :]
            total = part if total is None else total + part
        return total

    def rows(self, start: int, stop: int) -> Array:
        return self.xp.astype(self.matrix[..., start:stop, :], self.dtype)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        n = self.shape[-2]
        step = max(1, BLOCK_ENTRIES * n // max(prod(self.shape), 1))
        return ((start, min(start + step, n)) for start in range(0, n, step))


def widened(op: Operator) -> Operator:
    """``op`` in float64 arithmetic: matrices block by block, factors as a whole; other operators as they are.

    Examples
    --------
    >>> import numpy as np
    >>> op = Dense(np.ones((2, 2), dtype=np.float32))
    >>> (op - LowRank(op.matrix[:, :1], op.matrix[:, 1:])).dtype.name, widened(op).dtype.name
    ('float32', 'float64')
    """
    result = op
    if op.dtype != op.xp.float64:
        match op:
            case Dense():
                result = Widened(op.matrix)
            case Transpose():
                result = widened(op.op).T
            case Scaled() if isinstance(op.factor, float):
                result = Scaled(op.factor, widened(op.op))
            case Sum():
                result = Sum(*(widened(term) for term in op.terms))
            case Product():
                result = Product(*(widened(factor) for factor in op.factors))
            case LowRank():
                result = op.map(lambda a: op.xp.astype(a, op.xp.float64))
    return result
