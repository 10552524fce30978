"""Block-diagonal operators in an order of their own: tokens are sorted, and the sorted sequence is cut into blocks."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np

from nla_llm.backend import Array, constant, device_of, matmul, namespace
from nla_llm.operators.base import Operator
from nla_llm.operators.lowrank import Selection

__all__ = ["SortedBlocks", "Sorting", "cut_into_blocks", "in_blocks"]


class Sorting(NamedTuple):
    """Tokens in the order of their hashes, cut into B blocks of nearly equal size: no token is left out.

    Attributes
    ----------
    token
        Token at each slot, (..., B · w): some token where the slot is empty.
    filled
        Whether a slot holds a token, (..., B, w).
    slot
        Slot of each token, (..., n).
    block
        Block of each token, (..., n); −1 for a hidden one.
    """

    token: Selection
    filled: Array
    slot: Selection
    block: Array


@final
class SortedBlocks(Operator):
    """Block-diagonal in the order of two sortings: entry (i, j) is zero unless query i and key j share a block.

    Parameters
    ----------
    blocks
        (..., B, w_q, w_k), zero in the rows and columns of empty slots.
    queries, keys
        The sortings.
    nonnegative
        Whether no entry of the blocks is negative.
    """

    def __init__(self, blocks: Array, queries: Sorting, keys: Sorting, *, nonnegative: bool = False) -> None:
        batch = np.broadcast_shapes(blocks.shape[:-3], queries.block.shape[:-1], keys.block.shape[:-1])
        super().__init__((*batch, queries.block.shape[-1], keys.block.shape[-1]), blocks)
        self.blocks, self.queries, self.keys = blocks, queries, keys
        self.nonnegative = nonnegative

    def apply(self, x: Array) -> Array:
        """``A x`` for x (..., n_k, c)."""
        return _through(self.blocks, x, self.keys.token, self.queries.slot)

    def apply_transpose(self, y: Array) -> Array:
        """``Aᵀ y`` for y (..., n_q, c)."""
        blocks = self.xp.matrix_transpose(self.blocks)
        x = _through(blocks, y, self.queries.token, self.keys.slot)
        hidden = self.keys.block[..., None] < 0
        return self.xp.where(hidden, constant(0.0, like=x), x)


def cut_into_blocks(order: Array, count: int, mask: Array | None, *, like: Array) -> Sorting:
    """Tokens sorted by ``order`` (..., n), hidden ones last, and cut into ``count`` blocks of the n' that remain.

    Block β has the sorted places ⌊β n'/B⌋ up to ⌊(β + 1) n'/B⌋; some are empty where there are more blocks than tokens.
    """
    xp, device, n = namespace(order), device_of(order), int(order.shape[-1])
    if mask is not None:
        order = xp.where(mask, order, xp.iinfo(order.dtype).max)
        left = xp.sum(xp.astype(mask, xp.int64), axis=-1, keepdims=True)
    else:
        left = xp.full((1,), n, dtype=xp.int64, device=device)
    sorted_tokens = xp.argsort(order, axis=-1, stable=True)
    place = xp.argsort(sorted_tokens, axis=-1)

    width = -(-n // count)
    first = xp.arange(count + 1, dtype=xp.int64, device=device) * left // count
    at = first[..., :-1, None] + xp.arange(width, dtype=xp.int64, device=device)  # (..., B, w)
    filled = at < first[..., 1:, None]
    at = xp.reshape(xp.where(filled, at, xp.zeros_like(at)), (*at.shape[:-2], count * width))
    token = _take_last(sorted_tokens, at)

    block = ((place + 1) * count - 1) // left
    hidden = place >= left
    block = xp.where(hidden, xp.zeros_like(block), block)
    slot = block * width + place - _take_last(first, block)
    slot = xp.where(hidden, xp.zeros_like(slot), slot)
    block = xp.where(hidden, -xp.ones_like(block), block)
    return Sorting(Selection(token, n, like=like), filled, Selection(slot, count * width, like=like), block)


def _take_last(x: Array, index: Array) -> Array:
    """Entries of the last axis, the batch axes broadcasting."""
    xp = namespace(x)
    axes = max(x.ndim, index.ndim) - 1
    x, index = (xp.reshape(a, ((1,) * (axes + 1 - a.ndim) + tuple(a.shape))) for a in (x, index))
    batch = tuple(max(s, t) for s, t in zip(x.shape[:-1], index.shape[:-1], strict=True))
    x, index = (xp.broadcast_to(a, (*batch, a.shape[-1])) for a in (x, index))
    return xp.take_along_axis(x, index, axis=-1)


def in_blocks(x: Array, count: int) -> Array:
    """(..., B · w, c) as (..., B, w, c)."""
    return namespace(x).reshape(x, (*x.shape[:-2], count, -1, x.shape[-1]))


def _through(blocks: Array, x: Array, into: Selection, out: Selection) -> Array:
    """Rows of x gathered into slots, multiplied by the blocks, and the wanted rows gathered out of the slots."""
    y = matmul(blocks, in_blocks(into.gather(x), blocks.shape[-3]))
    return out.gather(namespace(y).reshape(y, (*y.shape[:-3], -1, y.shape[-1])))
