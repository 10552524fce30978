"""Which keys queries see by their places: windows, beside global keys and random ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nla_llm.backend import Array, device_of, namespace
from nla_llm.methods.attention.sparse.tiles import TILE, Support, row_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.problems import AttentionProblem

    Whole = NDArray[np.int64]

__all__ = ["global_queries", "places", "range_support", "row_tile", "window_supports"]

_LOW_TILE = 16  # queries of a tile beside narrow windows, where more would mostly see keys of each other (measured)


class _Rows(NamedTuple):
    """T tiles of b queries: where they start, the first and one past the last key of each window, (T, b)."""

    start: int
    first: Whole
    last: Whole

    def reach(self) -> tuple[Whole, Whole]:
        """First key of the windows of each tile, and the number of keys over which they reach, each (T,)."""
        low = self.first.min(axis=1)
        return low, np.maximum(self.last.max(axis=1) - low, 0)

    @property
    def width(self) -> int:
        """Keys over which the windows of a tile reach, at most."""
        return int(self.reach()[1].max())


class _Beside(NamedTuple):
    """What is seen beside windows, (T, b, g + r) says by whom: the first g keys, and r drawn ones for each tile.

    A drawn key is given by its place among the keys that are neither global nor in a window of its tile.
    """

    g: int
    drawn: Whole
    seen: NDArray[np.bool_]

    def keys(self, low: Array, width: Array, final: Array) -> Array:
        """The keys (..., T, g + r) beside windows that begin at ``low`` (..., T) and reach over ``width`` keys."""
        xp = namespace(low)
        drawn = self.g + xp.asarray(self.drawn, device=device_of(low))
        drawn = xp.where(drawn < low[..., None], drawn, drawn + width[..., None])
        everywhere = xp.arange(self.g, device=device_of(low))
        everywhere = xp.broadcast_to(everywhere, (*drawn.shape[:-1], self.g))
        return xp.concat([everywhere, xp.minimum(drawn, final)], axis=-1)


def places(problem: AttentionProblem) -> Whole:
    """The key at which each query stands: its own, or the last one where there are fewer keys."""
    return np.minimum(np.arange(problem.n_q), problem.n_k - 1)


def global_queries(problem: AttentionProblem, g: int) -> int:
    """Number of queries that see all keys: in the causal form there are none that see more than a window does."""
    return 0 if problem.causal else min(g, problem.n_q)


def row_tile(width: int) -> int:
    """Queries of a tile beside windows of ``width`` keys."""
    return min(TILE, max(_LOW_TILE, width // 2))


def range_support(problem: AttentionProblem, start: int, first: Whole, last: Whole) -> Support:
    """Tiles whose queries see the keys ``first:last``, each (T, b)."""
    rows = _Rows(start, first, last)
    keys, seen = _ranges(first, last, rows.width)
    return Support(start, np.minimum(keys, problem.n_k - 1), seen)


def window_supports(
    problem: AttentionProblem, *, width: int, g: int = 0, random: int = 0, rng: np.random.Generator | None = None
) -> list[Support]:
    """Windows of ``width`` keys beside the first g keys and random ones, for all queries.

    Parameters
    ----------
    width
        Keys in the window of a query, none of them among the first g.
    g
        Global tokens: all queries see their keys, and their queries see all keys.
    random
        Keys that are drawn for each block of queries; where there are not as many beside the windows of the block,
        these are wider by as many instead.
    rng
        From where they are drawn.
    """
    supports, first_row = [], global_queries(problem, g)
    if first_row:
        everything = np.ones((1, first_row, problem.n_k), bool)
        supports.append(Support(0, np.arange(problem.n_k)[None], everything))
    narrow, wide = (_windows(problem, w, g) for w in (width, width + random))
    tile = TILE if random else row_tile(width)
    for start, tiles, tall in row_groups(first_row, problem.n_q, tile=tile):
        part = slice(start, start + tiles * tall)
        rows, wider = (_Rows(start, *(a[part].reshape(tiles, tall) for a in window)) for window in (narrow, wide))
        drawn, enough = _random_keys(problem, rows, g, random, rng)
        first, last = (np.where(enough[:, None], a, b) for a, b in zip(rows[1:], wider[1:], strict=True))
        supports.append(_beside_windows(problem, _Rows(start, first, last), g, drawn, enough))
    return supports


def _windows(problem: AttentionProblem, width: int, g: int) -> tuple[Whole, Whole]:
    """First and one past the last key of each query's window among the keys that are not global."""
    place = places(problem)
    if problem.causal:
        return np.maximum(place - width + 1, g), place + 1
    first = np.clip(place - width // 2, g, problem.n_k - width)
    return first, first + width


def _random_keys(
    problem: AttentionProblem, rows: _Rows, g: int, count: int, rng: np.random.Generator | None
) -> tuple[Whole, NDArray[np.bool_]]:
    """For each tile places of ``count`` keys among those beside windows, and whether there are so many."""
    tiles = len(rows.first)
    if rng is None or not count:
        return np.empty((tiles, 0), np.int64), np.ones(tiles, bool)
    low, width = rows.reach()
    others = low - g + (0 if problem.causal else problem.n_k - low - width)
    return _subsets(np.maximum(others, count), count, rng), others >= count


def _subsets(sizes: Whole, count: int, rng: np.random.Generator) -> Whole:
    """For each size N a uniform subset of ``count`` of the numbers below N (Floyd's algorithm, Bentley 1987)."""
    u = rng.random((len(sizes), count))
    chosen = np.full((len(sizes), count), -1, np.int64)
    for i in range(count):
        top = sizes - count + i
        pick = np.minimum((u[:, i] * (top + 1)).astype(np.int64), top)
        taken = (chosen[:, :i] == pick[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, top, pick)
    return chosen


def _beside_windows(problem: AttentionProblem, rows: _Rows, g: int, drawn: Whole, enough: NDArray[np.bool_]) -> Support:
    """Windows beside g global keys and the drawn ones of each tile."""
    tiles, tall = rows.first.shape
    row = rows.start + np.arange(tiles * tall).reshape(tiles, tall, 1)
    seen = np.ones((tiles, tall, g + drawn.shape[1]), bool)
    seen[..., :g] &= (np.arange(g) <= row) | (not problem.causal)
    seen[..., g:] &= enough[:, None, None]
    beside = _Beside(g, drawn, seen)
    if problem.key_mask is not None and not problem.causal:
        return _before_padding(problem, rows, beside)
    near = range_support(problem, *rows)
    keys = beside.keys(*rows.reach(), np.asarray(problem.n_k - 1))
    return Support(rows.start, np.concatenate([keys, near.keys], axis=1), np.concatenate([seen, near.seen], axis=2))


def _before_padding(problem: AttentionProblem, rows: _Rows, beside: _Beside) -> Support:
    """The same with windows moved before the hidden keys at the end, which may be others in each batch entry."""
    xp, mask = problem.xp, problem.key_mask
    arrays = (rows.first, rows.last, rows.reach()[1], beside.seen, np.asarray(problem.n_k - 1))
    first, last, width, seen, final = (xp.asarray(a, device=device_of(mask)) for a in arrays)
    place = xp.arange(problem.n_k, device=device_of(mask))
    end = 1 + xp.max(xp.where(mask, place, xp.zeros_like(place)), axis=-1)[..., None, None]
    nought = xp.zeros_like(end)
    back = xp.minimum(xp.maximum(last - end, nought), xp.maximum(first - beside.g, nought))
    keys, near = _ranges(first - back, last - back, rows.width)
    other = beside.keys(xp.min(first - back, axis=-1), width, final)
    seen = xp.broadcast_to(seen, (*near.shape[:-1], seen.shape[-1]))
    return Support(rows.start, xp.concat([other, xp.minimum(keys, final)], axis=-1), xp.concat([seen, near], axis=-1))


def _ranges(first: Array, last: Array, width: int) -> tuple[Array, Array]:
    """Keys (..., T, width) from the first that any query of a tile sees, and which each of them sees."""
    xp = namespace(first)
    place = xp.min(first, axis=-1)[..., None] + xp.arange(width, device=device_of(first))
    candidate = place[..., None, :]
    return place, (candidate >= first[..., None]) & (candidate < last[..., None])
