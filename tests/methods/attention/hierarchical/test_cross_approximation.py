"""Adaptive cross approximation: interpolation, scales, and its two paths."""

import numpy as np
import pytest

from nla_llm.methods.attention.hierarchical import cross_approximation as module
from nla_llm.methods.attention.hierarchical.boxes import boxes_of
from nla_llm.methods.attention.hierarchical.cross_approximation import (
    _crosses,
    _crosses_on_numpy,
    cross_approximation,
)

(LEVEL,) = boxes_of(64, 64, 32, 0, True).levels  # the rows 32 to 63 against the keys 0 to 31
NOWHERE = np.full((64, 1), -np.inf)


def found(blocks):
    return np.exp(blocks.scale[0])[:, None] * (blocks.left[0].T @ blocks.right[0])


def test_crosses_interpolate_m_rows_and_columns():
    x, y = np.random.default_rng(0).standard_normal((2, 64, 5))
    blocks = cross_approximation(x, y, None, NOWHERE, level=LEVEL, m=7)
    right = abs(found(blocks) / np.exp(x @ y.T)[32:, :32] - 1) < 1e-10
    assert np.sum(right.all(axis=0)) == np.sum(right.all(axis=1)) == 7
    assert abs(blocks.right).max() == 1.0  # rows of the residual, divided by their largest entries
    assert abs(blocks.left).max() == 1.0  # scales are those of what the rows hold


def test_an_exhausted_block_has_zero_pivots():
    x, y = np.random.default_rng(0).standard_normal((2, 64, 5))
    y[:32] = y[np.arange(32) % 3]
    blocks = cross_approximation(x, y, None, NOWHERE, level=LEVEL, m=7)
    assert np.count_nonzero(blocks.pivots) == 3
    np.testing.assert_allclose(found(blocks), np.exp(x @ y.T)[32:, :32], rtol=1e-10)


def test_rows_that_look_elsewhere_have_no_say():
    """The near field of all rows but two is far above the block: their two crosses are chosen first."""
    x, y = np.random.default_rng(0).standard_normal((2, 64, 8))
    top = np.full((64, 1), 200.0)
    top[[40, 55]] = -200.0
    blocks = cross_approximation(x, y, None, top, level=LEVEL, m=2)
    wrong = abs(found(blocks) / np.exp(x @ y.T)[32:, :32] - 1).max(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(wrong < 1e-10), [8, 23])


def test_common_factors_of_rows_are_carried_apart():
    x, y = np.random.default_rng(0).standard_normal((2, 64, 5))
    far = np.concatenate([y, np.ones((64, 1))], axis=-1)
    lifted = np.concatenate([x, 1000 * np.random.default_rng(1).standard_normal((64, 1))], axis=-1)
    plain, shifted = (cross_approximation(*z, None, NOWHERE, level=LEVEL, m=7) for z in ((x, y), (lifted, far)))
    np.testing.assert_allclose(shifted.left, plain.left, atol=1e-9)
    np.testing.assert_allclose(shifted.scale, plain.scale + lifted[32:, -1], rtol=1e-12)


@pytest.mark.parametrize("rank", [4, 1])
@pytest.mark.parametrize("slots", [40, 80, 200])
def test_groups_of_blocks_go_the_same_way(monkeypatch, slots, rank):
    """As all blocks at once in the generic path: groups of one, two and five blocks, also where nothing is left."""
    monkeypatch.setattr(module, "_GROUP_SLOTS", slots)
    rng = np.random.default_rng(0)
    x, y = 1.5 * rng.standard_normal((2, 3, 40, 4))
    y[2] = y[2, np.arange(40) % rank]
    near = rng.standard_normal((3, 40, 1))
    near[0] = -np.inf
    shown, inside = rng.random((3, 1, 40)) < 0.8, np.broadcast_to(np.arange(40) < 35, (3, 1, 40))
    shown[1] = False  # a block of hidden keys
    references = np.broadcast_to(np.arange(0, 40, 4), (3, 1, 10))
    blocks = x, y, near, shown, inside, references
    want = _crosses(9, *blocks)
    for got, wanted in zip(_crosses_on_numpy(9, *blocks), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-9)
    assert not want[0][1].any()
    assert want[0][0].any()
    assert not want[1][..., ~shown[0, 0]][0].any()
    assert np.sum(abs(want[3][2]) > 1e-10) == rank


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.longdouble, 1e-10)])
def test_other_formats(dtype, tolerance):
    """BLAS has float32 and float64; others are updated without it."""
    x, y = (0.5 * np.random.default_rng(0).standard_normal((2, 64, 2))).astype(dtype)
    y[:32] = y[np.arange(32) % 3]
    blocks = cross_approximation(x, y, None, NOWHERE.astype(dtype), level=LEVEL, m=7)
    assert {part.dtype for part in blocks} == {np.dtype(dtype)}
    want = np.exp(x.astype(np.float64) @ y.astype(np.float64).T)[32:, :32]
    np.testing.assert_allclose(found(blocks), want, rtol=tolerance)
