"""Tiles: the laws stand in the table of laws; here blocks, libraries, narrow formats and refusals."""

import numpy as np
import pytest

from nla_llm.operators import Panel, TiledSparse, gather_rows, sparse
from nla_llm.operators import _tiles as numpy_path


def operator(batch=(), dtype=np.float64, library=np.asarray):
    rng = np.random.default_rng(0)
    panels = [
        Panel(rng.standard_normal((*batch, 6, 4, 5)).astype(dtype), rng.integers(0, 19, (6, 5))),
        Panel(rng.standard_normal((*batch, 7, 1, 3)).astype(dtype), rng.integers(0, 19, (*batch, 7, 3))),
    ]
    order = np.argsort(rng.random((*batch, 1, 31)), axis=-1)
    panels = [Panel(*(library(a) for a in panel)) for panel in panels]
    return TiledSparse(panels, (*batch, 31, 19), order=library(order))


def written_out(op):
    """The matrix by loops over tiles, rows and keys."""
    dense = np.zeros(op.shape)
    for index in np.ndindex(op.batch_shape):
        row = 0
        for weights, keys in op.panels:
            tiles = keys if keys.ndim == 2 else keys[index]
            for t, tile in enumerate(weights[index]):
                for entries in tile:
                    query = op.order[index][0, row]
                    for entry, key in zip(entries, tiles[t], strict=True):
                        dense[index][query, key] += entry
                    row += 1
    return dense


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_it_is_the_sum_of_its_entries(batch):
    op = operator(batch)
    np.testing.assert_allclose(op.dense(), written_out(op), atol=1e-15)
    assert op.stored == 24 * 5 + 7 * 3


@pytest.mark.parametrize("entries", [1, 50, 1 << 20])
def test_blocks_do_not_matter(entries, monkeypatch):
    monkeypatch.setattr(numpy_path, "_BLOCK_ENTRIES", entries)
    monkeypatch.setattr(sparse, "_BLOCK_ENTRIES", entries)
    strict = pytest.importorskip("array_api_strict")
    x, y = np.random.default_rng(1).standard_normal((2, 31, 4))
    x = x[:19]
    for op, library in ((operator((2,)), np.asarray), (operator((2,), library=strict.asarray), strict.asarray)):
        dense = written_out(operator((2,)))
        np.testing.assert_allclose(np.asarray(op @ library(x)), dense @ x, atol=1e-14)
        np.testing.assert_allclose(np.asarray(op.T @ library(y)), np.swapaxes(dense, -1, -2) @ y, atol=1e-14)


def test_half_precision_of_rows_of_one_tile():
    """SciPy has no sparse matrices in float16: they are made in float32, the result is float16."""
    op, x = operator(dtype=np.float16), np.random.default_rng(1).standard_normal((19, 2)).astype(np.float16)
    wide = operator().dense()
    assert (op @ x).dtype == (op.T @ np.ones((31, 1), np.float16)).dtype == op.dense().dtype == np.float16
    np.testing.assert_allclose(op @ x, wide @ x, atol=0.03)
    np.testing.assert_allclose(op.dense(), wide, atol=3e-3)


def test_rows_are_gathered_for_heads_of_either_side():
    x, index = np.random.default_rng(2).standard_normal((2, 1, 9, 3)), np.arange(24).reshape(1, 3, 4, 2) % 9
    gathered = gather_rows(x, index)
    assert gathered.shape == (2, 3, 4, 2, 3)
    np.testing.assert_array_equal(gathered[1, 2, 3, 0], x[1, 0, index[0, 2, 3, 0]])


def test_panels_that_do_not_make_the_rows_are_refused():
    with pytest.raises(ValueError, match="panels of 2 rows do not make 1 x 3 rows"):
        TiledSparse([Panel(np.ones((1, 2, 2)), np.zeros((1, 2), int))], (3, 4))
