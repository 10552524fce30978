"""Sparse operators as tiles: a block of queries, the keys that are gathered for it, and a small dense matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np

from nla_llm.backend import Array, device_of, is_numpy, matmul, namespace
from nla_llm.operators._tiles import tiled_gather, tiled_product, tiled_rows, tiled_transpose
from nla_llm.operators.base import Operator

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Panel", "TiledSparse", "gather_rows"]

_BLOCK_ENTRIES = 1 << 22  # gathered entries held at once by the generic path


class Panel(NamedTuple):
    """T tiles of the same size: b consecutive rows each, which share s keys.

    Attributes
    ----------
    weights
        Entries (..., T, b, s), zero where a row does not see a key.
    keys
        Columns (T, s), or (..., T, s) where they differ between the batch entries; a column may come twice in a tile,
        its entries add up.
    """

    weights: Array
    keys: Array

    @property
    def height(self) -> int:
        """Number of rows, T b."""
        return int(self.weights.shape[-3] * self.weights.shape[-2])


@final
class TiledSparse(Operator):
    """A sparse matrix of dense tiles: row i of tile t is Σ_j weights[t, i, j] x[keys[t, j]].

    Block patterns run at the speed of small matrix products, and a tile of one row is a row of any sparse matrix. The
    rows of the panels, one below the other, are the rows of the matrix; where ``order`` is given they are the rows of
    several matrices that are added up, each in an order of its own.

    Parameters
    ----------
    panels
        Tiles in the order of their rows.
    shape
        (..., n_q, n_k).
    order
        Optional (..., R, n_q): for each of the R matrices that are added, which query a row belongs to.
    nonnegative
        Whether all weights are known to be >= 0.

    Examples
    --------
    >>> op = TiledSparse([Panel(np.ones((1, 2, 2)), np.array([[0, 3]]))], (2, 4))
    >>> op.dense().tolist()
    [[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]]
    """

    def __init__(
        self, panels: Sequence[Panel], shape: tuple[int, ...], *, order: Array | None = None, nonnegative: bool = False
    ) -> None:
        super().__init__(shape, panels[0].weights)
        self.panels = tuple(panels)
        self.order = order
        self.nonnegative = nonnegative
        rounds = 1 if order is None else order.shape[-2]
        height = sum(panel.height for panel in self.panels)
        if height != rounds * self.shape[-2]:
            raise ValueError(f"panels of {height} rows do not make {rounds} x {self.shape[-2]} rows")
        self.places = None if order is None else _places(order)

    @property
    def stored(self) -> int:
        """Entries held for each batch entry, the zeros in the tiles included."""
        return sum(panel.height * int(panel.keys.shape[-1]) for panel in self.panels)

    def apply(self, x: Array) -> Array:
        if is_numpy(self.like, x):
            return self._add_up(tiled_product(self.panels, self.batch_shape, x))
        parts = [
            _flat(matmul(panel.weights[..., a:b, :, :], gather_rows(x, panel.keys[..., a:b, :])))
            for panel in self.panels
            for a, b in _spans(panel, x, x.shape[-1])
        ]
        return self._add_up(self.xp.concat(parts, axis=-2))

    def apply_transpose(self, y: Array) -> Array:
        y = self._to_rows(y)
        if is_numpy(self.like, y):
            return tiled_transpose(self.panels, self.batch_shape, self.shape[-1], y)
        xp, first, total = self.xp, 0, None
        for panel in self.panels:
            height = panel.weights.shape[-2]
            for a, b in _spans(panel, y, max(y.shape[-1], self.shape[-1])):
                block = y[..., first + a * height : first + b * height, :]
                block = xp.reshape(block, (*y.shape[:-2], b - a, height, y.shape[-1]))
                part = matmul(xp.matrix_transpose(panel.weights[..., a:b, :, :]), block)
                part = _scatter_rows(part, panel.keys[..., a:b, :], self.shape[-1])
                total = part if total is None else total + part
            first += panel.height
        return total

    def row_sums(self) -> Array:
        """Sums of the weights of each row."""
        xp = self.xp
        parts = [xp.sum(panel.weights, axis=-1) for panel in self.panels]
        sums = xp.concat([xp.reshape(p, (*p.shape[:-2], -1, 1)) for p in parts], axis=-2)
        return self._add_up(sums)[..., 0]

    def rows(self, start: int, stop: int) -> Array:
        stop = min(stop, self.shape[-2])
        if not is_numpy(self.like):
            return super().rows(start, stop)
        rows = np.arange(start, stop) if self.places is None else self.places[..., start:stop]
        return tiled_rows(self.panels, self.batch_shape, self.shape[-1], rows)

    # -- rows of the panels, and rows of the matrix ----------------------------------------------------------------

    def _add_up(self, y: Array) -> Array:
        """Rows of the matrix from those of the panels."""
        if self.places is None:
            return y
        picked = gather_rows(y, self.places)
        return self.xp.sum(picked, axis=-3) if picked.shape[-3] > 1 else picked[..., 0, :, :]

    def _to_rows(self, y: Array) -> Array:
        """Rows for the panels from those for the matrix."""
        if self.order is None:
            return y
        picked = gather_rows(y, self.order)
        return self.xp.reshape(picked, (*picked.shape[:-3], -1, picked.shape[-1]))


def gather_rows(x: Array, index: Array) -> Array:
    """Rows of x (..., n, c) at index (..., T, s): an array (..., T, s, c).

    Examples
    --------
    >>> gather_rows(np.array([[1.0], [2.0]]), np.array([[0, 1], [1, 1]]))[..., 0].tolist()
    [[1.0, 2.0], [2.0, 2.0]]
    """
    xp = namespace(x)
    (tiles, s), (n, c) = index.shape[-2:], x.shape[-2:]
    if index.ndim == 2:
        picked = xp.take(x, xp.reshape(index, (-1,)), axis=-2)
    elif is_numpy(x, index):
        return tiled_gather(x, index)
    else:
        batch = np.broadcast_shapes(x.shape[:-2], index.shape[:-2])
        flat = xp.reshape(index, (*index.shape[:-2], tiles * s, 1))
        wanted = xp.broadcast_to(flat, (*batch, tiles * s, c))
        picked = xp.take_along_axis(xp.broadcast_to(x, (*batch, n, c)), wanted, axis=-2)
    return xp.reshape(picked, (*picked.shape[:-2], tiles, s, c))


def _places(order: Array) -> Array:
    """Where the panels hold each query, (..., R, n_q): the inverse of ``order``, counted through all R."""
    xp = namespace(order)
    rounds, n = order.shape[-2:]
    return xp.argsort(order, axis=-1) + n * xp.arange(rounds, device=device_of(order))[:, None]


def _scatter_rows(part: Array, keys: Array, n: int) -> Array:
    """Rows of part (..., T, s, c) added up at keys (..., T, s): an array (..., n, c)."""
    xp = namespace(part)
    part = xp.reshape(part, (*part.shape[:-3], -1, part.shape[-1]))
    keys = xp.reshape(keys, (*keys.shape[:-2], 1, -1))
    place = xp.arange(n, device=device_of(keys))[:, None]
    return xp.astype(keys == place, part.dtype) @ part  # the standard has no scattered addition


def _flat(y: Array) -> Array:
    """Rows of tiles (..., T, b, c), one below the other."""
    return namespace(y).reshape(y, (*y.shape[:-3], -1, y.shape[-1]))


def _spans(panel: Panel, x: Array, columns: int) -> Iterator[tuple[int, int]]:
    """Blocks of tiles so small that as many columns for each of their keys can be held."""
    tiles, s = panel.keys.shape[-2:]
    heads = int(np.prod(np.broadcast_shapes(panel.weights.shape[:-3], x.shape[:-2]), dtype=int))
    step = max(1, _BLOCK_ENTRIES // max(1, heads * s * columns))
    return ((a, min(a + step, tiles)) for a in range(0, tiles, step))
