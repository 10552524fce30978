"""Pieces of hierarchical matrices: sums over groups of tokens, low-rank blocks, permutations, Monarch matrices."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, final

import numpy as np

from nla_llm.backend import Array, by_heads, constant, device_of, matmul, namespace
from nla_llm.operators.base import Operator
from nla_llm.operators.lowrank import Selection

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["BlockLowRank", "Grouped", "MonarchMatrix", "Permutation"]


@final
class Grouped(Operator):
    """Sums over groups of consecutive tokens, (..., G, n): entry (g, j) is 1 where token j is in group g and visible.

    Parameters
    ----------
    bounds
        G + 1 whole numbers from 0 to n that do not fall: group g holds the tokens bounds[g] to bounds[g + 1]; it may
        be empty.
    like
        An array of the library, device and dtype of the operator.
    mask
        (..., n), True for visible tokens; None where all are.

    Examples
    --------
    >>> op = Grouped(np.array([0, 2, 3]), like=np.zeros(1))
    >>> (op @ np.array([1.0, 2.0, 3.0])).tolist(), (op.T @ np.array([5.0, 6.0])).tolist()
    ([3.0, 3.0], [5.0, 5.0, 6.0])
    """

    nonnegative = True

    def __init__(self, bounds: NDArray[np.int64], *, like: Array, mask: Array | None = None) -> None:
        n, groups = int(bounds[-1]), len(bounds) - 1
        super().__init__((*(() if mask is None else mask.shape[:-1]), groups, n), like)
        lengths = np.diff(bounds)
        slots = bounds[:-1, None] + np.arange(max(1, int(lengths.max())))
        self.mask = mask
        self.filled: NDArray[np.bool_] = slots < bounds[1:, None]
        self.slots: NDArray[np.int64] = np.minimum(slots, n - 1)
        self.number: NDArray[np.int64] = np.repeat(np.arange(groups), lengths)

    @property
    def sizes(self) -> Array:
        """Visible tokens of each group, (..., G), as whole numbers."""
        xp, device = self.xp, device_of(self.like)
        if self.mask is None:
            return xp.asarray(self.filled.sum(axis=-1), device=device)
        seen = xp.take(self.mask, xp.asarray(self.slots.reshape(-1), device=device), axis=-1)
        seen = xp.reshape(seen, (*seen.shape[:-1], *self.slots.shape)) & xp.asarray(self.filled, device=device)
        return xp.sum(xp.astype(seen, xp.int64), axis=-1)

    def apply(self, x: Array) -> Array:
        xp = namespace(x)
        x = self._hide(x)
        if not self.filled.all():
            x = xp.take(x, xp.asarray(self.slots.reshape(-1), device=device_of(x)), axis=-2)
        x = xp.reshape(x, (*x.shape[:-2], *self.slots.shape, x.shape[-1]))
        if not self.filled.all():
            x = _keep(xp.asarray(self.filled, device=device_of(x))[..., None], x)
        return xp.sum(x, axis=-2)

    def apply_transpose(self, y: Array) -> Array:
        number = self.xp.asarray(self.number, device=device_of(y))
        return self._hide(self.xp.take(y, number, axis=-2))

    def _hide(self, x: Array) -> Array:
        return x if self.mask is None else _keep(self.mask[..., None], x)


@final
class BlockLowRank(Operator):
    """Blocks of equal size and low rank in the boxes of a matrix: block b is leftᵀ_b right_b, zero outside.

    Parameters
    ----------
    left, right
        Factors (..., B, r, s): B blocks of rank r and size s, zero in columns that lie beyond the matrix.
    rows, columns
        Boxes of s rows, or columns, in which the blocks stand: (B,).
    shape
        (..., n_q, n_k).
    pivots
        (..., B, r), what the columns of the factors were divided by where they come from a cross approximation.

    Examples
    --------
    >>> left, right = np.array([[[1.0, 2.0]]]), np.array([[[3.0, 0.0]]])
    >>> BlockLowRank(left, right, np.array([1]), np.array([0]), (4, 2)).dense().tolist()
    [[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [6.0, 0.0]]
    """

    def __init__(
        self,
        left: Array,
        right: Array,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        shape: tuple[int, ...],
        *,
        pivots: Array | None = None,
    ) -> None:
        super().__init__(shape, left)
        self.left, self.right, self.pivots = left, right, pivots
        self.boxes = (rows, columns)

    @property
    def ranks(self) -> Array:
        """Rank found in each block, (..., B): the steps whose pivot is above rounding of the largest."""
        if self.pivots is None:
            raise ValueError("these blocks do not come from a cross approximation, so there are no pivots to count")
        xp, size = self.xp, self.xp.abs(self.pivots)
        noise = float(xp.finfo(self.dtype).eps) * xp.max(size, axis=-1, keepdims=True)
        return xp.sum(xp.astype(size > noise, xp.int64), axis=-1)

    def apply(self, x: Array) -> Array:
        return self._product(self.left, self.right, x, self.boxes, self.shape[-2])

    def apply_transpose(self, y: Array) -> Array:
        return self._product(self.right, self.left, y, self.boxes[::-1], self.shape[-1])

    @staticmethod
    def _product(near: Array, far: Array, x: Array, boxes: tuple[NDArray[np.int64], ...], n: int) -> Array:
        rows, columns = boxes
        size, total = near.shape[-1], x.shape[-2]
        slots = np.minimum(columns[:, None] * size + np.arange(size), total - 1).reshape(-1)
        places = box_places(rows, -(-n // size))
        return by_heads_of_blocks(partial(_block_product, slots, places, n), near, far, x[..., None, :, :])


def by_heads_of_blocks(function: Callable[..., Any], *arrays: Array) -> Any:
    """:func:`~nla_llm.backend.by_heads` where the first of the last three axes counts blocks, which are no heads."""
    return by_heads(function, *arrays) if max(a.ndim for a in arrays) > 3 else function(*arrays)


def box_places(rows: NDArray[np.int64], boxes: int) -> NDArray[np.int64]:
    """Which blocks stand in each box, (most in a box, boxes); the number of blocks where there are fewer.

    Examples
    --------
    >>> box_places(np.array([0, 2, 2]), 3).tolist()
    [[0, 3, 1], [3, 3, 2]]
    """
    count = np.bincount(rows, minlength=boxes)
    order = np.argsort(rows, kind="stable")
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((int(count.max()), boxes), len(rows))
    table[rank, rows[order]] = order
    return table


def from_blocks(z: Array, places: NDArray[np.int64], n: int, fill: float) -> list[Array]:
    """Rows of blocks z (..., B, s, c) token by token, one array (..., n, c) for each block that a box may have."""
    xp = namespace(z)
    z = xp.concat([z, xp.full_like(z[..., :1, :, :], fill)], axis=-3)
    parts = []
    for row in places:
        part = xp.take(z, xp.asarray(row, device=device_of(z)), axis=-3)
        parts.append(xp.reshape(part, (*part.shape[:-3], -1, part.shape[-1]))[..., :n, :])
    return parts


def _block_product(slots: NDArray[np.int64], places: NDArray[np.int64], n: int, *arrays: Array) -> Array:
    near, far, x = arrays
    xp = namespace(near)
    x = xp.take(x, xp.asarray(slots, device=device_of(x)), axis=-2)
    x = xp.reshape(x, (*x.shape[:-3], *far.shape[-3:-2], far.shape[-1], x.shape[-1]))
    first, *others = from_blocks(matmul(xp.matrix_transpose(near), matmul(far, x)), places, n, 0.0)
    for other in others:
        first = first + other
    return first


@final
class Permutation(Operator):
    """Rows in another order: (op @ x)_i = x_order(i), for ``order`` (..., n) a permutation of each batch entry.

    Examples
    --------
    >>> op = Permutation(np.array([2, 0, 1]), like=np.zeros(1))
    >>> (op @ np.array([10.0, 11.0, 12.0])).tolist(), (op.T @ np.array([12.0, 10.0, 11.0])).tolist()
    ([12.0, 10.0, 11.0], [10.0, 11.0, 12.0])
    """

    nonnegative = True

    def __init__(self, order: Array, *, like: Array) -> None:
        n = order.shape[-1]
        super().__init__((*order.shape, n), like)
        self.there = Selection(order, n, like=like)
        self.back = Selection(self.xp.argsort(order, axis=-1), n, like=like)

    def apply(self, x: Array) -> Array:
        return self.there.gather(x)

    def apply_transpose(self, y: Array) -> Array:
        return self.back.gather(y)


@final
class MonarchMatrix(Operator):
    """Entry (l J + j, k I + i) is left[j, k, l] · right[k, j, i]: block-diagonal matrices about two transpositions.

    Dao et al. 2022 (arXiv 2204.00595): two products of O(n √n) entries each where the blocks have √n rows.

    Parameters
    ----------
    left
        (..., J, C, A): for row j of each of the A blocks of J queries, a number for each of C blocks of keys.
    right
        (..., C, J, I): for each block of I keys and each j, the entries within the block.
    shape
        (..., n_q, n_k) with n_q <= A J and n_k <= C I: what lies beyond is left away; ``right`` has to be zero there.

    Examples
    --------
    >>> left, right = np.array([[[1.0, 10.0]]]), np.array([[[2.0, 3.0]]])
    >>> MonarchMatrix(left, right, (2, 2)).dense().tolist()
    [[2.0, 3.0], [20.0, 30.0]]
    """

    def __init__(self, left: Array, right: Array, shape: tuple[int, ...], *, nonnegative: bool = False) -> None:
        super().__init__(shape, left)
        self.left, self.right, self.nonnegative = left, right, nonnegative

    def apply(self, x: Array) -> Array:
        return by_heads_of_blocks(partial(_monarch, self.shape[-2]), self.left, self.right, x[..., None, :, :])

    def apply_transpose(self, y: Array) -> Array:
        return by_heads_of_blocks(
            partial(_monarch_transposed, self.shape[-1]), self.left, self.right, y[..., None, :, :]
        )


def in_rows(x: Array, blocks: int, size: int) -> Array:
    """Rows of x (..., n, c), zeros below them, as blocks (..., blocks, size, c)."""
    xp = namespace(x)
    missing = blocks * size - x.shape[-2]
    if missing:
        below = xp.zeros((*x.shape[:-2], missing, x.shape[-1]), dtype=x.dtype, device=device_of(x))
        x = xp.concat([x, below], axis=-2)
    return xp.reshape(x, (*x.shape[:-2], blocks, size, x.shape[-1]))


def _monarch(n_q: int, left: Array, right: Array, x: Array) -> Array:
    xp, (c, _, i) = namespace(left), right.shape[-3:]
    inner = matmul(right, in_rows(x[..., 0, :, :], c, i))  # (..., C, J, columns)
    y = matmul(xp.matrix_transpose(left), swap_blocks(inner))  # (..., J, A, columns)
    return _rows(swap_blocks(y), n_q)


def _monarch_transposed(n_k: int, left: Array, right: Array, y: Array) -> Array:
    xp, (j, _, a) = namespace(left), left.shape[-3:]
    inner = matmul(left, swap_blocks(in_rows(y[..., 0, :, :], a, j)))  # (..., J, C, columns)
    x = matmul(xp.matrix_transpose(right), swap_blocks(inner))  # (..., C, I, columns)
    return _rows(x, n_k)


def _rows(y: Array, n: int) -> Array:
    return namespace(y).reshape(y, (*y.shape[:-3], -1, y.shape[-1]))[..., :n, :]


def swap_blocks(x: Array) -> Array:
    """The two axes before the last exchanged."""
    return namespace(x).moveaxis(x, -3, -2)


def _keep(mask: Array, x: Array) -> Array:
    xp = namespace(x)
    return xp.where(mask, x, constant(0.0, like=x))
