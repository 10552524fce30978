"""Softmax on tiles: a pattern says which keys each block of queries sees, and this makes the operator of it.

All sparse methods go this way: keys are gathered for a block of queries, logits are a small matrix product, and what a
single query of the block does not see is hidden in it. Nothing n × n is formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, constant, device_of, from_numpy, is_numpy, matmul_where, namespace, parallel
from nla_llm.operators import Panel, RowNormalised, TiledSparse, ZeroRowSumError, gather_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nla_llm.problems import AttentionProblem

    Matrix = NDArray[Any]
    Whole = NDArray[np.int64]

__all__ = [
    "TILE",
    "Support",
    "enough_keys",
    "low_tile",
    "masked_row_error",
    "merged_softmax",
    "merged_softmax_cost",
    "rescaled",
    "restricted_softmax",
    "restricted_softmax_cost",
    "row_groups",
    "tile_softmax",
    "to_tiles",
]

TILE = 64  # queries that share gathered keys; more gather less and see more keys that only some of them need

_BLOCK_ENTRIES = 1 << 18  # of the largest array of a block of tiles: a MiB in float32, a core's second-level cache


@dataclass(frozen=True, eq=False)
class Support:
    """Which keys some consecutive queries see: T tiles of b queries each.

    Attributes
    ----------
    first
        The first query.
    keys
        Keys of each tile, whole numbers (T, s), or (..., T, s) in the library of the problem.
    seen
        Which of them each query of the tile sees, (T, b, s) or (..., T, b, s).
    """

    first: int
    keys: Array
    seen: Array


def enough_keys(m: int, problem: AttentionProblem) -> None:
    """Refuse a budget beyond the number of keys."""
    if m > problem.n_k:
        raise ValueError(f"m={m} exceeds the number of keys, n_k={problem.n_k}; pass m <= n_k")


def low_tile(m: int) -> int:
    """Queries of a tile that shares one run of m keys: with more than a quarter of them few would see its middle."""
    return min(TILE, -(-m // 4))


def row_groups(first: int, stop: int, tile: int = TILE) -> list[tuple[int, int, int]]:
    """(first row, tiles, rows of a tile) of the full tiles of the rows ``first:stop``, and of the rest.

    Examples
    --------
    >>> row_groups(1, 12, tile=4)
    [(1, 2, 4), (9, 1, 3)]
    """
    full, rest = divmod(stop - first, tile)
    groups = [(first, full, tile), (stop - rest, 1, rest)]
    return [g for g in groups if g[1] and g[2]]


def restricted_softmax(problem: AttentionProblem, supports: Sequence[Support]) -> RowNormalised:
    """Softmax over the keys that the supports leave, which follow one another from the first query to the last.

    Raises
    ------
    ZeroRowSumError
        If the mask hides every key that the pattern leaves to a query.
    """
    panels, top = _panels(problem, problem.scale * problem.q, supports)
    op = TiledSparse(panels, _shape_of(problem, panels), nonnegative=True)
    return RowNormalised(op, row_scale_log=top)


def merged_softmax(problem: AttentionProblem, rounds: Sequence[tuple[Whole, Sequence[Support]]]) -> RowNormalised:
    """Softmax over the keys of several patterns, none of them twice, each in an order of its own of the queries.

    A round is an order (n_q,) of the queries, and supports that follow one another in this order. A query may see no
    key in some round, but sees one in some other.
    """
    xp, q = problem.xp, problem.scale * problem.q
    orders = [xp.asarray(order, device=device_of(q)) for order, _ in rounds]
    parts = [
        _panels(problem, xp.take(q, order, axis=-2), supports, empty_rows=True)
        for order, (_, supports) in zip(orders, rounds, strict=True)
    ]
    tops = [xp.take(top, xp.argsort(order), axis=-1) for order, (_, top) in zip(orders, parts, strict=True)]
    common = xp.max(xp.stack(tops, axis=-1), axis=-1)
    panels = [
        panel
        for order, (own, top) in zip(orders, parts, strict=True)
        for panel in rescaled(own, xp.exp(top - xp.take(common, order, axis=-1)))
    ]
    op = TiledSparse(panels, _shape_of(problem, panels), order=xp.stack(orders), nonnegative=True)
    return RowNormalised(op, row_scale_log=common)


def _panels(
    problem: AttentionProblem, q: Array, supports: Sequence[Support], *, empty_rows: bool = False
) -> tuple[list[Panel], Array]:
    """Tiles of the scaled queries, exp(logits − largest), and the largest logits (..., n_q)."""
    xp, device = problem.xp, device_of(q)
    nothing = xp.zeros((1, 1, 1), dtype=xp.bool, device=device) if empty_rows else None
    panels, tops = [], []
    for support in supports:
        tiles, tall, _ = support.seen.shape[-3:]
        keys, seen = (from_numpy(a, like=q) for a in (support.keys, support.seen))
        block = to_tiles(q[..., support.first : support.first + tiles * tall, :], tall)
        weights, top = tile_softmax(block, problem.k, keys, seen, problem.key_mask, repeated=nothing)
        panels.append(Panel(weights, keys))
        tops.append(xp.reshape(top, (*top.shape[:-2], -1)))
    return panels, xp.concat(tops, axis=-1)


def _shape_of(problem: AttentionProblem, panels: Sequence[Panel]) -> tuple[int, ...]:
    batch = np.broadcast_shapes(*(panel.weights.shape[:-3] for panel in panels))
    return (*batch, problem.n_q, problem.n_k)


def restricted_softmax_cost(problem: AttentionProblem, pairs: Any) -> costs.Cost:
    """Cost of :func:`restricted_softmax` where the pattern leaves that many pairs of a query and a key.

    Keys that a mask hides are computed and thrown away.
    """
    n_q, _, d, d_v = costs.symbols_of(problem)
    logits = costs.Operations(mul=n_q * d, madd=pairs * d)
    softmax = costs.Operations(compare=pairs - n_q, add=pairs, exp=pairs)
    sums = costs.Operations(add=pairs - n_q, compare=2 * n_q)
    return costs.Cost(prepare=logits + softmax + sums, apply=costs.Operations(madd=pairs * d_v, div=n_q * d_v))


def merged_softmax_cost(problem: AttentionProblem, pairs: Any, rows: Any) -> costs.Cost:
    """Cost of :func:`merged_softmax` where so many rows of all rounds see any key: what it takes to merge them too."""
    n_q, _, _, d_v = costs.symbols_of(problem)
    merge = costs.Operations(compare=rows, add=rows, exp=rows, mul=pairs)
    apply = costs.Operations(add=(rows - n_q) * d_v)
    return restricted_softmax_cost(problem, pairs) + costs.Cost(prepare=merge, apply=apply)


def to_tiles(x: Array, tall: int) -> Array:
    """Rows (..., T b, d) as tiles (..., T, b, d)."""
    return namespace(x).reshape(x, (*x.shape[:-2], x.shape[-2] // tall, tall, x.shape[-1]))


def tile_softmax(
    q: Array, k: Array, keys: Array, seen: Array, key_mask: Array | None, *, repeated: Array | None = None
) -> tuple[Array, Array]:
    """exp(logits − largest) on tiles, zero on what is not seen, and the largest logits of the rows.

    Parameters
    ----------
    q
        Scaled queries (..., T, b, d).
    k
        Keys (..., n_k, d).
    keys, seen
        Gathered keys (..., T, s) and which of them a query sees, (..., T, b, s).
    key_mask
        Boolean (..., n_k), or None.
    repeated
        Pairs that are counted elsewhere already, (..., T, b, s). Where these are given a row may be left with nothing;
        its largest logit is −∞.
    """
    if is_numpy(q, k, keys, seen):
        seen = seen if repeated is None else seen & ~repeated
        return _numpy_softmax(q, k, keys, seen, key_mask, empty_rows=repeated is not None)
    xp = namespace(q)
    logits = matmul_where(q, xp.matrix_transpose(gather_rows(k, keys)), seen, -xp.inf)
    kept = None if repeated is None else ~repeated
    if key_mask is not None:
        visible = xp.matrix_transpose(gather_rows(key_mask[..., None], keys))
        kept = visible if kept is None else kept & visible
        if repeated is None and not bool(xp.all(xp.any(seen & kept, axis=-1))):
            raise masked_row_error()
    if kept is not None:  # of what is not seen nothing was computed; what is seen and hidden is thrown away
        logits = xp.where(kept | ~seen, logits, constant(-xp.inf, like=logits))
    top = shift = xp.max(logits, axis=-1)
    if repeated is not None:
        shift = xp.where(top > -xp.inf, top, constant(0.0, like=top))
    return xp.exp(logits - shift[..., None]), top


def rescaled(panels: list[Panel], factor: Array) -> list[Panel]:
    """Weights of the panels times a factor for each of their rows, (..., n_q)."""
    xp, scaled, start = namespace(factor), [], 0
    for panel in panels:
        shape = (*factor.shape[:-1], *panel.weights.shape[-3:-1], 1)
        rows = xp.reshape(factor[..., start : start + panel.height], shape)
        scaled.append(Panel(panel.weights * rows, panel.keys))
        start += panel.height
    return scaled


def masked_row_error() -> ZeroRowSumError:
    """What is raised where the mask hides all keys that the pattern leaves to a query."""
    return ZeroRowSumError(
        "key_mask hides every key that the pattern leaves to some query, so this row has no softmax: a larger budget "
        "m, a global token that is visible, or leaving out the padded queries helps"
    )


def _numpy_softmax(
    q: Matrix, k: Matrix, keys: Matrix, seen: Matrix, key_mask: Matrix | None, *, empty_rows: bool
) -> tuple[Matrix, Matrix]:
    """The NumPy path of :func:`tile_softmax`: one pass over each block of tiles while it is in the cache."""
    masks = [] if key_mask is None else [key_mask.shape[:-1]]
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-2], keys.shape[:-2], seen.shape[:-3], *masks)
    (tiles, tall), s = q.shape[-3:-1], keys.shape[-1]
    weights, top = np.empty((*batch, tiles, tall, s), q.dtype), np.empty((*batch, tiles, tall), q.dtype)
    q, k, keys, seen = (
        np.broadcast_to(a, (*batch, *a.shape[a.ndim - axes :])) for a, axes in ((q, 3), (k, 2), (keys, 2), (seen, 3))
    )
    mask = None if key_mask is None else np.broadcast_to(key_mask, (*batch, key_mask.shape[-1]))
    step = max(1, _BLOCK_ENTRIES // (s * max(tall, k.shape[-1])))

    def block(task: tuple[tuple[int, ...], int]) -> None:
        index, start = task
        part = slice(start, min(start + step, tiles))
        w, columns, visible = weights[index][part], keys[index][part], seen[index][part]
        np.matmul(q[index][part], k[index][columns].swapaxes(-1, -2), out=w)
        if mask is not None:
            visible = visible & mask[index][columns][:, None, :]
            if not empty_rows and not visible.any(axis=-1).all():
                raise masked_row_error()
        if not visible.all():
            np.copyto(w, -np.inf, where=~visible)
        largest = w.max(axis=-1)
        top[index][part] = largest
        w -= np.where(largest > -np.inf, largest, 0)[..., None] if empty_rows else largest[..., None]
        np.exp(w, out=w)

    parallel(block, [(index, start) for index in np.ndindex(batch) for start in range(0, tiles, step)])
    return weights, top
