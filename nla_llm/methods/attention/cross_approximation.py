"""Adaptive cross approximation of blocks of the kernel exp(x·y), with a logarithmic scale for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, device_of, is_numpy, namespace

if TYPE_CHECKING:
    from nla_llm.methods.attention.boxes import Level

__all__ = ["Blocks", "cross_approximation", "cross_approximation_cost", "take_blocks"]


class Blocks(NamedTuple):
    """Factors of far blocks of s tokens: block b is diag(exp(scale)) leftᵀ right.

    Attributes
    ----------
    left, right
        (..., B, m, s), zero for hidden keys and for slots beyond the last token.
    scale
        Logarithms of the scales of the rows, (..., B, s).
    pivots
        (..., B, m); zero for a step that found nothing left.
    """

    left: Array
    right: Array
    scale: Array
    pivots: Array


def take_blocks(x: Array, boxes: Any, size: int) -> Array:
    """Tokens of boxes, (..., B, s, c) of x (..., n, c); slots beyond the last token repeat it."""
    xp = namespace(x)
    slots = np.minimum(boxes[:, None] * size + np.arange(size), x.shape[-2] - 1)
    picked = xp.take(x, xp.asarray(slots.reshape(-1), device=device_of(x)), axis=-2)
    return xp.reshape(picked, (*x.shape[:-2], len(boxes), size, x.shape[-1]))


def cross_approximation(x: Array, y: Array, mask: Array | None, top: Array, *, level: Level, m: int) -> Blocks:
    """m crosses of each far block of a level, with partial pivoting (Bebendorf 2000, Numer. Math. 86).

    Step t takes the row I of the residual and divides it by its largest entry, at J; then the column J. The next row is
    where that column is largest. Hence row residuals are at most one after the division, and a block of rank r <= m is
    found exactly. Scales of rows (a diagonal factor, which no cross notices) keep exp in range: they begin with ``top``
    or the mean logit of the block, whichever is larger, and grow with the logits of the columns that are met. So a row
    whose near field is far above the block takes no part in the choice of pivots. The first row is that of the largest
    mean logit against ``top``.

    Parameters
    ----------
    x, y
        Scaled queries (..., n_q, d) and keys (..., n_k, d).
    mask
        (..., n_k), True for visible keys, or None.
    top
        Largest logits in the near field, (..., n_q, 1), −∞ where there are none.
    """
    xp = namespace(x)
    n_q, n_k = x.shape[-2], y.shape[-2]
    slot = np.arange(level.size)
    inside_q = level.rows[:, None] * level.size + slot < n_q
    inside_k = level.columns[:, None] * level.size + slot < n_k
    device = device_of(x)
    shown = xp.asarray(inside_k[:, None, :], device=device)
    if mask is not None:
        shown = shown & xp.matrix_transpose(take_blocks(mask[..., None], level.columns, level.size))
    parts = [take_blocks(a, boxes, level.size) for a, boxes in ((x, level.rows), (y, level.columns), (top, level.rows))]
    parts += [shown, xp.asarray(inside_q[:, None, :], device=device)]
    batch = np.broadcast_shapes(*(part.shape[:-2] for part in parts))
    flat = [xp.reshape(xp.broadcast_to(a, (*batch, *a.shape[-2:])), (-1, *a.shape[-2:])) for a in parts]
    found = by_heads(lambda *blocks: _crosses(m, *blocks), *flat)
    left, right, scale, pivots = (xp.reshape(a, (*batch, *a.shape[1:])) for a in found)
    return Blocks(left, right, scale[..., 0, :], pivots[..., 0])


def _crosses(m: int, *blocks: Array) -> tuple[Array, ...]:
    """Left and right factors (B, m, s), scales (B, 1, s) and pivots (B, m, 1) of blocks x, y (B, s, d)."""
    x, y, top, shown, inside = blocks
    xp, t = namespace(x), namespace(x).matrix_transpose
    (b, s), like = x.shape[:2], {"dtype": x.dtype, "device": device_of(x)}
    left, right = xp.zeros((b, m, s), **like), xp.zeros((b, m, s), **like)
    nothing, lowest = xp.zeros((), **like), xp.asarray(-xp.inf, **like)
    place = xp.arange(s, device=device_of(x))[None, None, :]
    weights = xp.astype(shown, x.dtype)
    count = xp.sum(xp.astype(shown, xp.int64), axis=-1, keepdims=True)
    mean = (weights @ y) / xp.astype(xp.where(count > 0, count, xp.ones_like(count)), x.dtype)
    means = mean @ t(x)  # (B, 1, s)
    scale = xp.maximum(t(top), means)
    merit = means - scale  # at most zero: how far a row's mean lies below the largest of its near field
    unused = inside
    row = _argmax(xp.where(unused, merit, lowest))
    pivots = []
    for i in range(m):
        logits = xp.where(shown, _rows_at(x, row) @ t(y), lowest)
        own = xp.take_along_axis(scale, row, axis=-1)
        shift = xp.maximum(own, xp.max(logits, axis=-1, keepdims=True))
        residual = xp.exp(logits - shift)
        if i:
            residual -= (t(_columns_at(left[:, :i, :], row)) * xp.exp(own - shift)) @ right[:, :i, :]
        column = _argmax(xp.abs(residual))
        pivot = xp.take_along_axis(residual, column, axis=-1)
        some = pivot != 0
        right[:, i, :] = (residual / xp.where(some, pivot, xp.ones_like(pivot)))[:, 0, :]
        logits = xp.where(some, _rows_at(y, column) @ t(x), lowest)
        grown = xp.maximum(scale, logits)
        _rescale(left[:, :i, :], scale, grown)
        scale = grown
        cross = xp.exp(logits - scale)
        if i:
            cross -= t(_columns_at(right[:, :i, :], column)) @ left[:, :i, :]
        cross = xp.where(some, cross, nothing)
        left[:, i, :] = cross[:, 0, :]
        pivots.append(pivot[:, :, 0])
        if i + 1 < m:
            unused = unused & (place != row)
            size = xp.where(unused, xp.abs(cross), -xp.ones_like(cross))
            best, other = _argmax(size), _argmax(xp.where(unused, merit, lowest))
            row = xp.where(xp.take_along_axis(size, best, axis=-1) > 0, best, other)
    return xp.where(inside, left, nothing), right, scale, xp.stack(pivots, axis=1)


def _rescale(left: Array, before: Array, after: Array) -> None:
    """Rows of the block at their new scale, in the buffer; where a scale has not changed the factor is one."""
    xp = namespace(left)
    if is_numpy(left) and left.shape[0] == 1:
        changed = np.flatnonzero(after[0, 0] > before[0, 0])
        left[:, :, changed] *= np.exp(before[:, :, changed] - after[:, :, changed])
        return
    left[...] = left * xp.exp(before - after)


def _argmax(a: Array) -> Array:
    return namespace(a).argmax(a, axis=-1, keepdims=True)


def _rows_at(x: Array, index: Array) -> Array:
    """Row index (B, 1, 1) of x (B, s, d): (B, 1, d)."""
    xp = namespace(x)
    return xp.take_along_axis(x, xp.broadcast_to(index, (*index.shape[:-1], x.shape[-1])), axis=-2)


def _columns_at(a: Array, index: Array) -> Array:
    """Column index (B, 1, 1) of a (B, t, s): (B, t, 1)."""
    xp = namespace(a)
    return xp.take_along_axis(a, xp.broadcast_to(index, (*a.shape[:-1], 1)), axis=-1)


def cross_approximation_cost(slots: Any, blocks: Any, d: Any) -> costs.Operations:
    """Costs of m crosses of ``blocks`` far blocks that have as many slots of rows together."""
    m, count = costs.m, costs.Operations
    means = count(madd=2 * slots * d, div=blocks * d, compare=slots, add=slots)
    choice = count(compare=slots - blocks)  # a maximum of each block
    pairs = m * (m - 1) / 2  # of a cross and an earlier one
    cross = count(madd=2 * slots * d, add=3 * slots, exp=3 * slots, div=slots, compare=slots + 2 * blocks)
    earlier = count(madd=2 * slots * pairs, mul=(slots + blocks) * pairs)
    later = count(add=2 * slots + blocks, exp=blocks) * (m - 1)
    total: costs.Operations = means + m * cross + earlier + later
    total += choice * (1 + 2 * m) + (2 * choice + count(compare=blocks)) * (m - 1)
    return total
