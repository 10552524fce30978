"""Low-rank operators: the causal form in its three shapes, normalisation, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

from nla_llm.operators import CausalLowRank, LowRank, RowNormalised, Selection, ZeroRowSumError

EPS = np.finfo(np.float64).eps


def factors(n=200, m=6, batch=(), seed=0):
    return np.random.default_rng(seed).standard_normal((2, *batch, n, m))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_parallel_chunked_and_recurrent_forms_agree(n, chunk):
    left, right = factors(n)
    x = np.random.default_rng(1).standard_normal((n, 3))
    parallel = np.tril(left @ right.T) @ x
    chunked = CausalLowRank(left, right, chunk=chunk) @ x
    state, rows = np.zeros((6, 3)), []
    for i in range(n):
        state, y = CausalLowRank.step(state, left[i : i + 1], right[i : i + 1], x[i : i + 1])
        rows.append(y)
    tolerance = 8 * EPS * (np.abs(left) @ np.abs(right).T @ np.abs(x)).max()
    np.testing.assert_allclose(chunked, parallel, rtol=0, atol=tolerance)
    np.testing.assert_allclose(np.concatenate(rows), parallel, rtol=0, atol=tolerance)


def test_decay_multiplies_the_state_on_entering_a_chunk():
    left, right = factors(10)
    decay = np.random.default_rng(2).uniform(0.1, 1, (4, 6))
    expected = np.zeros((10, 10))
    for i in range(10):
        for j in range(i + 1):
            factor = np.prod(decay[j // 3 + 1 : i // 3 + 1], axis=0)
            expected[i, j] = np.sum(left[i] * factor * right[j])
    op = CausalLowRank(left, right, decay=decay, chunk=3)
    np.testing.assert_allclose(op.dense(), expected, rtol=0, atol=16 * EPS * np.abs(expected).max())
    np.testing.assert_allclose(op.row_sums(), expected.sum(1), rtol=0, atol=64 * EPS * np.abs(expected).sum(1).max())


def test_threads_do_not_change_the_result():
    """Large enough for the threaded path, which must equal the heads one by one."""
    left, right = factors(n=4096, m=8, batch=(5,))
    x = np.random.default_rng(1).standard_normal((5, 4096, 2))
    together = CausalLowRank(left, right) @ x
    shared = CausalLowRank(left, right[:1]) @ x[0]
    for h in range(5):
        np.testing.assert_array_equal(together[h], CausalLowRank(left[h], right[h]) @ x[h])
        np.testing.assert_array_equal(shared[h], CausalLowRank(left[h], right[0]) @ x[0])


def test_causal_needs_a_square():
    with pytest.raises(ValueError, match="square"):
        CausalLowRank(np.ones((3, 2)), np.ones((4, 2)))


def test_factors_must_fit():
    with pytest.raises(ValueError, match="same r"):
        LowRank(np.ones((3, 2)), np.ones((4, 3)))


def test_rows_that_sum_to_zero_are_refused_not_patched():
    with pytest.raises(ZeroRowSumError, match=r"33.33% of the rows"):
        RowNormalised(LowRank(np.array([[1.0], [0.0], [1.0]]), np.ones((2, 1))))


def test_negative_row_sums_are_counted():
    op = RowNormalised(LowRank(np.array([[1.0], [-1.0], [-2.0], [1.0]]), np.ones((2, 1))))
    assert float(op.negative_share) == 0.5
    np.testing.assert_allclose(op.dense().sum(-1), 1.0, rtol=4 * EPS)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_causal_row_sums_of_narrow_formats(dtype):
    left, right = np.abs(factors(70, 3)).astype(dtype)
    found = RowNormalised(CausalLowRank(left, right)).dense().astype(np.float64)
    wide = RowNormalised(CausalLowRank(left.astype(np.float64), right.astype(np.float64))).dense()
    assert np.abs(found - wide).max() <= 8 * float(ml_dtypes.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("index", "rows"), [((2, 3), (2, 3)), ((2, 1), (2, 3)), ((2, 3), (2, 1)), ((3,), (2, 3)), ((3,), ())]
)
def test_a_selection_of_its_own_for_each_matrix_of_a_batch(index, rows, xp):
    rng = np.random.default_rng(0)
    pick, x = rng.integers(7, size=(*index, 4)), rng.standard_normal((*rows, 7, 2))
    got = np.asarray(Selection(xp.asarray(pick), 7, like=xp.asarray(x)) @ xp.asarray(x))
    batch = np.broadcast_shapes(index, rows)
    wide_pick, wide = np.broadcast_to(pick, (*batch, 4)), np.broadcast_to(x, (*batch, 7, 2))
    assert got.shape == (*batch, 4, 2)
    for b in np.ndindex(batch):
        np.testing.assert_array_equal(got[b], wide[b][wide_pick[b]])


@pytest.mark.parametrize("kind", [LowRank, CausalLowRank])
def test_rounding_takes_no_entry_below_zero_but_a_negative_one_shows(kind):
    """Squares of inner products, by features of both signs."""
    angle = np.random.default_rng(0).uniform(0, np.pi, 200)
    x, y = np.stack([np.cos(angle), np.sin(angle)], -1), np.stack([-np.sin(angle), np.cos(angle)], -1)  # x_i ⊥ y_i
    left, right = (np.einsum("ni,nj->nij", a, a).reshape(200, 4).astype(np.float32) for a in (x, y))
    signed, squares = kind(left, right).dense(), kind(left, right, nonnegative=True).dense()
    assert signed.min() < 0
    assert squares.min() == 0
    np.testing.assert_array_equal(squares, np.maximum(signed, 0))
    wrong = kind(left, -right, nonnegative=True).dense()
    np.testing.assert_allclose(wrong, -squares, rtol=0, atol=4 * np.finfo(np.float32).eps)


def test_sums_that_overflow_are_refused_without_a_warning():
    with pytest.raises(
        ZeroRowSumError, match="the features overflowed; pass another rng, a larger m, or a wider dtype"
    ):
        RowNormalised(LowRank(np.full((2, 1), 1e30, np.float32), np.full((3, 1), 1e30, np.float32)))
