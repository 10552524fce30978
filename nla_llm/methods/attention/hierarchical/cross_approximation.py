"""Adaptive cross approximation of blocks of the kernel exp(x·y), with a logarithmic scale for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, constant, device_of, eps, is_numpy, largest, namespace, parallel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.methods.attention.hierarchical.boxes import Level

    Matrix = NDArray[Any]

__all__ = ["Blocks", "cross_approximation", "cross_approximation_cost", "references_of", "take_blocks"]


REFERENCES = 64  # columns whose residual is known on all rows; more find better pivots and take as long as crosses
NOISE = 16.0  # units of rounding of the largest entry of a row below which its residual is taken for zero; empirical


class Blocks(NamedTuple):
    """Factors of far blocks of s tokens: block b is diag(exp(scale)) leftᵀ right.

    Attributes
    ----------
    left, right
        (..., B, m, s), zero for hidden keys and for slots beyond the last token.
    scale
        Logarithms of the scales of the rows, (..., B, s).
    pivots
        (..., B, m); zero for a step whose row had nothing left but rounding.
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


def references_of(level: Level) -> int:
    """Reference columns of a block."""
    return min(level.size, REFERENCES)


def cross_approximation(x: Array, y: Array, mask: Array | None, top: Array, *, level: Level, m: int) -> Blocks:
    """m crosses of each far block of a level, with partial pivoting and reference columns.

    Bebendorf 2000 (Numer. Math. 86); Grasedyck 2005 (Computing 74) for the references. Step t takes the row I of the
    residual and divides it by its largest entry, at J; then the column J. Hence row residuals are at most one after the
    division, and a cross removes one from the rank of the residual. The next row is where the residual of at most 64
    reference columns, evenly spaced in the box, is largest; where nothing is left of these, where the last column is.

    Scales of rows (a diagonal factor, which no cross notices) keep exp in range: they begin with what the row sums up
    to, by the largest logit of the near field and by the references, and grow with the logits of columns that are met.
    So a row whose near field is far above the block takes no part in the choice of pivots.

    Parameters
    ----------
    x, y
        Scaled queries (..., n_q, d) and keys (..., n_k, d).
    mask
        (..., n_k), True for visible keys, or None.
    top
        Largest logits in the near field, (..., n_q, 1), −∞ where there are none or where they must not be looked at.
    """
    xp = namespace(x)
    n_q, n_k = x.shape[-2], y.shape[-2]
    slot, device = np.arange(level.size), device_of(x)
    inside = level.rows[:, None] * level.size + slot < n_q
    filled = np.minimum(n_k - level.columns * level.size, level.size)[:, None]  # slots with a key in each box
    shown = xp.asarray((slot < filled)[:, None, :], device=device)
    if mask is not None:
        shown = shown & xp.matrix_transpose(take_blocks(mask[..., None], level.columns, level.size))
    parts = [take_blocks(a, boxes, level.size) for a, boxes in ((x, level.rows), (y, level.columns), (top, level.rows))]
    count = references_of(level)
    references = np.tile((2 * np.arange(count) + 1) * level.size // (2 * count), (len(level.rows), 1))
    parts += [shown, *(xp.asarray(a[:, None, :], device=device) for a in (inside, references))]
    batch = np.broadcast_shapes(*(part.shape[:-2] for part in parts))
    flat = [xp.reshape(xp.broadcast_to(a, (*batch, *a.shape[-2:])), (-1, *a.shape[-2:])) for a in parts]
    found = _crosses_on_numpy(m, *flat) if is_numpy(*flat) else _crosses(m, *flat)
    left, right, scale, pivots = (xp.reshape(a, (*batch, *a.shape[1:])) for a in found)
    return Blocks(left, right, scale[..., 0, :], pivots[..., 0])


def _crosses(m: int, *blocks: Array) -> tuple[Array, ...]:
    """Left and right factors (B, m, s), scales (B, 1, s) and pivots (B, m, 1) of blocks x, y (B, s, d)."""
    x, y, near, shown, inside, references = blocks
    xp, t = namespace(x), namespace(x).matrix_transpose
    (b, s), like = x.shape[:2], {"dtype": x.dtype, "device": device_of(x)}
    left, right = xp.zeros((b, m, s), **like), xp.zeros((b, m, s), **like)
    nothing, lowest, noise = xp.zeros((), **like), xp.asarray(-xp.inf, **like), NOISE * eps(x)
    place = xp.arange(s, device=device_of(x))[None, None, :]
    known, scale, merit = _references(x, y, near, shown, references)
    unused = inside
    row = _next_row(known, merit, merit, unused, noise)
    pivots = []
    for i in range(m):
        logits = xp.where(shown, _rows_at(x, row) @ t(y), lowest)
        own, top = xp.take_along_axis(scale, row, axis=-1), xp.max(logits, axis=-1, keepdims=True)
        shift = xp.maximum(own, top)
        residual = xp.exp(logits - shift)
        if i:
            residual -= (t(_columns_at(left[:, :i, :], row)) * xp.exp(own - shift)) @ right[:, :i, :]
        column = _argmax(xp.abs(residual))
        pivot = xp.take_along_axis(residual, column, axis=-1)
        some = xp.abs(pivot) > noise * xp.exp(top - shift)
        residual = xp.where(some, residual / xp.where(some, pivot, xp.ones_like(pivot)), nothing)
        right[:, i, :] = residual[:, 0, :]
        logits = xp.where(some, _rows_at(y, column) @ t(x), lowest)
        grown = xp.maximum(scale, logits)
        decay, scale = xp.exp(scale - grown), grown
        left[:, :i, :] = left[:, :i, :] * decay
        cross = xp.exp(logits - scale)
        if i:
            cross -= t(_columns_at(right[:, :i, :], column)) @ left[:, :i, :]
        cross = xp.where(some, cross, nothing)
        left[:, i, :] = cross[:, 0, :]
        pivots.append(xp.where(some, pivot, nothing)[:, :, 0])
        if i + 1 < m:
            known = known * decay - t(xp.take_along_axis(residual, references, axis=-1)) * cross
            unused = unused & (place != row)
            row = _next_row(known, xp.abs(cross), merit, unused, noise)
    return *_below_largest(xp.where(inside, left, nothing), right, scale), xp.stack(pivots, axis=1)


def _references(x: Array, y: Array, near: Array, shown: Array, references: Array) -> tuple[Array, Array, Array]:
    """Residuals of the reference columns (B, c, s), the first scales and the merits of rows (B, 1, s)."""
    xp, t = namespace(x), namespace(x).matrix_transpose
    index = xp.broadcast_to(t(references), (*references.shape[:-2], references.shape[-1], y.shape[-1]))
    seen = t(xp.take_along_axis(shown, references, axis=-1))
    logits = xp.take_along_axis(y, index, axis=-2) @ t(x)
    logits = xp.where(seen, logits, constant(-xp.inf, like=x))
    merit = _log_sum_exp(logits, factor=y.shape[-2] / references.shape[-1])
    scale = _log_sum_exp(xp.concat([t(near), merit], axis=-2))
    scale = xp.where(scale > -xp.inf, scale, xp.zeros_like(scale))  # a mask hides all that is known of the row
    hidden = xp.full_like(merit, -largest(merit))  # finite: of these rows too each comes but once
    merit = xp.where(merit > -xp.inf, merit - scale, hidden)
    return xp.exp(logits - scale), scale, merit


def _log_sum_exp(logits: Array, *, factor: float = 1.0) -> Array:
    """log(factor Σ exp) of columns, −∞ where all of them are."""
    xp = namespace(logits)
    top = xp.max(logits, axis=-2, keepdims=True)
    top = xp.where(top > -xp.inf, top, xp.zeros_like(top))
    total = factor * xp.sum(xp.exp(logits - top), axis=-2, keepdims=True)
    some = total > 0
    return xp.where(some, top + xp.log(xp.where(some, total, xp.ones_like(total))), xp.full_like(top, -xp.inf))


def _below_largest(left: Array, right: Array, scale: Array) -> tuple[Array, Array, Array]:
    """Scales by what the rows of the crosses hold, −∞ for nothing, instead of by the logits that were met."""
    xp = namespace(left)
    peak = xp.max(xp.abs(left), axis=-2, keepdims=True)
    some = peak > 0
    peak = xp.where(some, peak, xp.ones_like(peak))
    left /= peak
    return left, right, xp.where(some, scale + xp.log(peak), xp.full_like(peak, -xp.inf))


def _next_row(known: Array, last: Array, merit: Array, unused: Array, noise: float) -> Array:
    """Where the references have most left; else where the last column is largest; else where the logits are."""
    xp = namespace(known)
    lost = -xp.ones_like(last)
    first, second = (xp.where(unused, a, lost) for a in (xp.max(xp.abs(known), axis=-2, keepdims=True), last))
    row, next_best = _argmax(first), _argmax(second)
    found, found_next = (xp.take_along_axis(a, i, axis=-1) > noise for a, i in ((first, row), (second, next_best)))
    other = _argmax(xp.where(unused, merit, xp.full_like(merit, -xp.inf)))
    return xp.where(found, row, xp.where(found_next, next_best, other))


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


# -- the NumPy path ----------------------------------------------------------------------------------------------------

# rows of the blocks that are worked on together: fewer pay for calls, more leave the cache (measured)
_GROUP_SLOTS = 4096


def _crosses_on_numpy(m: int, *blocks: Matrix) -> tuple[Matrix, ...]:
    """As :func:`_crosses`, by threads over groups of blocks, without work on what a step leaves as it is."""
    (total, s), dtype = blocks[0].shape[:2], blocks[0].dtype
    left, right = np.zeros((total, m, s), dtype), np.zeros((total, m, s), dtype)
    scale, pivots = np.empty((total, 1, s), dtype), np.zeros((total, m, 1), dtype)
    step = max(1, _GROUP_SLOTS // s)

    def group(start: int) -> None:
        some = slice(start, min(start + step, total))
        _crosses_of_group(*(a[some] for a in (*blocks, left, right, scale, pivots)))

    parallel(group, range(0, total, step))
    return left, right, scale, pivots


def _crosses_of_group(*arrays: Matrix) -> None:
    """Fill factors that are zero, scales and pivots of some blocks."""
    x, y, near, shown, inside, references, left, right, all_scales, pivots = arrays
    m, block = left.shape[1], np.arange(len(x))
    hidden, inside, picked = ~shown[:, 0], inside[:, 0], references[:, 0]
    some_hidden, noise = bool(hidden.any()), x.dtype.type(NOISE * eps(x))
    known, scale, merit = _references(x, y, near, shown, references)
    scale, merit, used = scale[:, 0].copy(), np.where(inside, merit[:, 0], -np.inf), ~inside
    known *= inside[:, None]
    row = _next_rows(known, merit, merit, noise)
    for i in range(m):
        logits = _times(y, x[block, row])
        if some_hidden:
            logits[hidden] = -np.inf
        top, own = logits.max(axis=1), scale[block, row]
        shift = np.maximum(own, top)
        logits -= shift[:, None]
        residual = np.exp(logits, out=logits)
        if i:
            residual -= _sum_of(left[block, :i, row] * np.exp(own - shift)[:, None], right[:, :i])
        column = np.abs(residual).argmax(axis=1)
        pivot = residual[block, column]
        used[block, row], merit[block, row], known[block, :, row] = True, -np.inf, 0
        some = np.abs(pivot) > noise * np.exp(top - shift)
        pivots[:, i, 0] = np.where(some, pivot, 0)
        np.divide(residual, pivot[:, None], out=right[:, i], where=some[:, None])
        logits = _times(x, y[block, column])
        logits[~some] = -np.inf
        grown = np.nonzero(logits > scale)
        if len(grown[0]):
            decay = np.exp(scale[grown] - logits[grown])[:, None]
            left[grown[0], :i, grown[1]] *= decay
            known[grown[0], :, grown[1]] *= decay
            scale[grown] = logits[grown]
        logits -= scale
        cross = np.exp(logits, out=left[:, i])
        if i:
            cross -= _sum_of(right[block, :i, column], left[:, :i])
            cross[~some] = 0
        if i + 1 < m:
            rest = np.where(used, 0, cross)  # rows that have been taken stay zero, and are not found again
            _take_off(known, right[block[:, None], i, picked], rest)
            row = _next_rows(known, np.abs(rest, out=rest), merit, noise)
    left *= inside[:, None]
    _, _, all_scales[...] = _below_largest(left, right, scale[:, None])


def _times(x: Matrix, vector: Matrix) -> Matrix:
    """x (B, s, d) times vectors (B, d): (B, s)."""
    product: Matrix = (x @ vector[:, :, None])[..., 0]
    return product


def _sum_of(weights: Matrix, rows: Matrix) -> Matrix:
    """Rows (B, i, s) with weights (B, i): (B, s)."""
    total: Matrix = (weights[:, None] @ rows)[:, 0]
    return total


def _take_off(known: Matrix, weights: Matrix, cross: Matrix) -> None:
    """Subtract weights (B, c) times crosses (B, s) from known (B, c, s): one pass of BLAS where it has the format."""
    from scipy.linalg import blas  # noqa: PLC0415 - SciPy loads where it is used

    update = {np.dtype(np.float32): blas.sger, np.dtype(np.float64): blas.dger}.get(known.dtype)
    if update is None:
        known -= weights[:, :, None] * cross[:, None]
        return
    for a, w, x in zip(known, weights, cross, strict=True):
        update(-1.0, x, w, a=a.T, overwrite_a=True)


def _largest(known: Matrix) -> NDArray[np.int64]:
    """Place of the entry of largest size in each block."""
    from scipy.linalg import blas  # noqa: PLC0415

    place = {np.dtype(np.float32): blas.isamax, np.dtype(np.float64): blas.idamax}.get(known.dtype)
    flat = known.reshape(len(known), -1)
    return np.abs(flat).argmax(axis=1) if place is None else np.asarray([place(a) for a in flat])


def _next_rows(known: Matrix, last: Matrix, merit: Matrix, noise: Any) -> NDArray[np.int64]:
    """:func:`_next_row` of each block, where rows that have been taken are zero or at −∞."""
    block, place = np.arange(len(known)), _largest(known)
    found = np.abs(known.reshape(len(known), -1)[block, place]) > noise
    row: NDArray[np.int64] = place % known.shape[-1]
    if not found.all():
        second = last.argmax(axis=1)
        row = np.where(found, row, np.where(last[block, second] > noise, second, merit.argmax(axis=1)))
    return row


def cross_approximation_cost(slots: Any, blocks: Any, columns: Any, d: Any) -> costs.Operations:
    """Costs of m crosses of far blocks with so many slots of rows, and entries of reference columns, together."""
    m, count = costs.m, costs.Operations
    both = columns + 2 * slots  # and the near field
    start = count(madd=columns * d, add=2 * both, exp=both + 2 * slots, compare=both + 2 * slots, mul=2 * slots)
    start += count(add=columns + slots, exp=columns, compare=2 * slots)
    largest = count(compare=slots - blocks)  # a maximum of each block
    row = count(compare=columns - slots + 2 * blocks) + 3 * largest
    pairs = m * (m - 1) / 2  # of a cross and an earlier one
    cross = count(madd=2 * slots * d, add=3 * slots + blocks, exp=3 * slots + blocks, div=slots, mul=blocks)
    cross += count(compare=slots + 2 * blocks) + 2 * largest
    earlier = count(madd=2 * slots * pairs, mul=(slots + blocks) * pairs)
    later = count(add=2 * slots + blocks + columns, exp=blocks, mul=2 * columns) * (m - 1)
    start += count(compare=slots * m, add=slots, exp=slots, div=slots * m)  # scales at the end
    total: costs.Operations = start + m * (cross + row) + earlier + later
    return total
