"""The NumPy path of tiled sparse operators: threads over blocks of tiles, compressed rows where a tile has one row.

Gathered right-hand sides are held for one block of tiles only. Scattered additions are products with a sparse matrix of
ones: ``np.add.at`` takes an order of magnitude longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import parallel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nla_llm.operators.sparse import Panel

    Matrix = NDArray[Any]

__all__ = ["tiled_gather", "tiled_product", "tiled_rows", "tiled_transpose"]

_BLOCK_ENTRIES = 1 << 18  # gathered entries of a block of tiles: a MiB in float32, a core's second-level cache


def tiled_gather(x: Matrix, index: Matrix) -> Matrix:
    """Rows of x (..., n, c) at index (..., T, s), head by head: ``take_along_axis`` makes an index for every entry."""
    batch = np.broadcast_shapes(x.shape[:-2], index.shape[:-2])
    x, index = np.broadcast_to(x, (*batch, *x.shape[-2:])), np.broadcast_to(index, (*batch, *index.shape[-2:]))
    out = np.empty((*batch, *index.shape[-2:], x.shape[-1]), x.dtype)

    def head(place: tuple[int, ...]) -> None:
        out[place] = x[place][index[place]]

    parallel(head, np.ndindex(batch))
    return out


def tiled_product(panels: Sequence[Panel], batch_shape: tuple[int, ...], x: Matrix) -> Matrix:
    """Rows of all panels times x."""
    batch = np.broadcast_shapes(batch_shape, x.shape[:-2])
    height = sum(panel.height for panel in panels)
    out = np.empty((*batch, height, x.shape[-1]), np.result_type(panels[0].weights.dtype, x.dtype))
    x = np.broadcast_to(x, (*batch, *x.shape[-2:]))

    def block(task: tuple[tuple[int, ...], Panel, int, int, int]) -> None:
        index, panel, first, start, stop = task
        weights, keys = _view(panel, batch, index)
        weights, keys = weights[start:stop], keys[start:stop]
        tall = weights.shape[1]
        rows = out[index][first + start * tall : first + stop * tall]
        if tall == 1:
            rows[...] = _compressed(weights, keys, x.shape[-2]) @ _wide(x[index])
        else:
            gathered = x[index][keys].astype(out.dtype, copy=False)
            np.matmul(weights, gathered, out=rows.reshape(stop - start, tall, -1))

    parallel(block, _blocks(panels, batch, x.shape[-1]))
    return out


def tiled_transpose(panels: Sequence[Panel], batch_shape: tuple[int, ...], n: int, y: Matrix) -> Matrix:
    """The transposed panels times the rows y that belong to them: an array (..., n, c)."""
    batch = np.broadcast_shapes(batch_shape, y.shape[:-2])
    dtype = np.result_type(panels[0].weights.dtype, y.dtype)
    out = np.empty((*batch, n, y.shape[-1]), dtype)
    y = np.broadcast_to(y, (*batch, *y.shape[-2:]))

    def head(index: tuple[int, ...]) -> None:
        total = np.zeros((n, y.shape[-1]), _wide(out[index]).dtype)
        for _, panel, first, start, stop in _blocks(panels, (), y.shape[-1]):
            weights, keys = _view(panel, batch, index)
            weights, keys = weights[start:stop], keys[start:stop]
            tall = weights.shape[1]
            rows = y[index][first + start * tall : first + stop * tall]
            if tall == 1:
                total += _compressed(weights, keys, n).T @ _wide(rows)
            else:
                part = weights.transpose(0, 2, 1) @ rows.reshape(stop - start, tall, -1)
                total += _sum_of_places(keys, n, total.dtype) @ _wide(part.reshape(-1, part.shape[-1]))
        out[index] = total

    parallel(head, np.ndindex(batch))
    return out


def tiled_rows(panels: Sequence[Panel], batch_shape: tuple[int, ...], n: int, rows: Matrix) -> Matrix:
    """Dense rows of the panels, picked by rows (count,) or, to be added over R, (..., R, count)."""
    if rows.ndim == 1:
        rows = rows[None]
    rows = np.broadcast_to(rows, (*batch_shape, *rows.shape[-2:]))
    out = np.zeros((*batch_shape, rows.shape[-1], n), panels[0].weights.dtype)
    for index in np.ndindex(batch_shape):
        for wanted in rows[index]:
            first = 0
            for panel in panels:
                here = np.flatnonzero((wanted >= first) & (wanted < first + panel.height))
                weights, keys = _view(panel, batch_shape, index)
                tile, row = np.divmod(wanted[here] - first, weights.shape[1])
                flat = weights[tile, row][:, None, :]
                out[index][here] += _compressed(flat, keys[tile], n).toarray().astype(out.dtype, copy=False)
                first += panel.height
    return out


def _view(panel: Panel, batch: tuple[int, ...], index: tuple[int, ...]) -> tuple[Matrix, Matrix]:
    """Weights (T, b, s) and keys (T, s) of one batch entry."""
    weights: Matrix = np.broadcast_to(panel.weights, (*batch, *panel.weights.shape[-3:]))[index]
    keys: Matrix = np.broadcast_to(panel.keys, (*batch, *panel.keys.shape[-2:]))[index]
    return weights, keys


def _blocks(
    panels: Sequence[Panel], batch: tuple[int, ...], columns: int
) -> list[tuple[tuple[int, ...], Panel, int, int, int]]:
    """Batch entry, panel, first row of the panel, and a range of its tiles."""
    tasks, first = [], 0
    for panel in panels:
        tiles, tall, s = panel.weights.shape[-3:]
        # a product of compressed rows gathers nothing: its blocks are only there for the threads
        step = max(1, _BLOCK_ENTRIES // s) if tall == 1 else max(1, _BLOCK_ENTRIES // (s * max(columns, tall)))
        spans = [(start, min(start + step, tiles)) for start in range(0, tiles, step)]
        tasks += [(index, panel, first, *span) for index in np.ndindex(batch) for span in spans]
        first += panel.height
    return tasks


def _compressed(weights: Matrix, keys: Matrix, n: int) -> Any:
    """Tiles of one row, (T, 1, s), as a sparse matrix (T, n) of SciPy."""
    from scipy.sparse import csr_matrix  # noqa: PLC0415 - SciPy loads with the first product

    tiles, s = keys.shape
    starts = np.arange(0, tiles * s + 1, s)
    return csr_matrix((_wide(weights).reshape(-1), keys.reshape(-1), starts), shape=(tiles, n))


def _sum_of_places(keys: Matrix, n: int, dtype: Any) -> Any:
    """The sparse matrix (n, T s) of ones that adds up the rows that belong to the same key."""
    from scipy.sparse import csc_matrix  # noqa: PLC0415 - SciPy loads with the first product

    flat = keys.reshape(-1)
    return csc_matrix((np.ones(flat.size, dtype), flat, np.arange(flat.size + 1)), shape=(n, flat.size))


def _wide(a: Matrix) -> Matrix:
    """In float32 where the format is narrower: SciPy has no sparse matrices of those."""
    return a if a.dtype.kind == "f" and a.dtype.itemsize >= 4 else a.astype(np.float32)
