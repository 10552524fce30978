import numpy as np
import pytest

from nla_llm.linalg import (
    BlockKrylov,
    haar_orthogonal,
    is_small,
    krylov_svd,
    largest_singular_value,
    singular_values,
    truncated_svd,
)
from nla_llm.linalg.svd import _missed
from nla_llm.operators import Dense, LowRank, Transpose

SPECTRA = {
    "power law": lambda n: np.arange(1, n + 1.0) ** -0.5,
    "exponential": lambda n: 0.9 ** np.arange(n),
    "clustered head": lambda n: np.r_[np.full(20, 5.0), np.linspace(1, 0.1, n - 20)],
    "rank 12 and noise": lambda n: np.r_[np.full(12, 5.0), np.linspace(1, 0, n - 12) ** 0.7],
}


def with_spectrum(values, rows, seed=0):
    n = len(values)
    u, v = haar_orthogonal(rows, seed)[:, :n], haar_orthogonal(n, seed + 1)
    return (u * values) @ v.T


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("wide", [False, True])
def test_truncated_svd_reaches_the_optimum_in_both_norms(name, wide):
    n, rank = 560, 10
    values = SPECTRA[name](n)
    matrix = with_spectrum(values, 600)
    op = Dense(matrix).T if wide else Dense(matrix)
    assert not is_small(op)
    u, s, v = truncated_svd(op, rank, rng=5)
    error = (matrix.T if wide else matrix) - (u * s) @ v.T
    assert 1 - 1e-12 <= np.linalg.norm(error) / np.linalg.norm(values[rank:]) <= 1.0005
    assert 1 - 1e-12 <= np.linalg.norm(error, 2) / values[rank] <= 1.0005
    assert np.abs(u.T @ u - np.eye(rank)).max() < 1e-12
    assert np.abs(v.T @ v - np.eye(rank)).max() < 1e-12


def test_small_and_batched_operators_agree_with_the_dense_svd(xp):
    matrix = np.random.default_rng(0).standard_normal((2, 3, 14, 9))
    u, s, v = (np.asarray(a) for a in truncated_svd(Dense(xp.asarray(matrix)), 4, rng=0))
    full = np.linalg.svd(matrix, full_matrices=False)
    best = (full.U[..., :4] * full.S[..., None, :4]) @ full.Vh[..., :4, :]
    assert np.abs((u * s[..., None, :]) @ np.swapaxes(v, -1, -2) - best).max() < 1e-12
    assert np.allclose(singular_values(Dense(xp.asarray(matrix))), full.S, rtol=1e-12)


def test_batched_krylov_agrees_with_one_at_a_time():
    matrices = np.stack([with_spectrum(SPECTRA["exponential"](540), 540, seed) for seed in (0, 7)])
    both = truncated_svd(Dense(matrices), 3, rng=0)
    for i in range(2):
        one = truncated_svd(Dense(matrices[i]), 3, rng=0)
        assert np.allclose(both.values[i], one.values, rtol=1e-5)
    assert np.allclose(both.values[1], 0.9 ** np.arange(3), rtol=1e-5)


def test_a_matrix_of_lower_rank_than_asked_is_reproduced():
    matrix = with_spectrum(np.r_[np.full(6, 2.0), np.zeros(534)], 540)
    u, s, v = truncated_svd(Dense(matrix), 9, rng=0)
    assert np.abs((u * s) @ v.T - matrix).max() < 1e-12
    assert np.abs(s[6:]).max() < 1e-12


@pytest.mark.parametrize("wrap", [lambda op: op, lambda op: -2.0 * op, Transpose])
def test_factors_are_used_and_never_multiplied_out(xp, wrap):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((30, 4)), rng.standard_normal((20, 4))
    op = wrap(LowRank(xp.asarray(left), xp.asarray(right)))
    truth = np.linalg.svd(np.asarray(op.dense()), compute_uv=False)[:4]
    values = singular_values(op)
    assert values.shape == (4,)
    assert np.allclose(values, truth, rtol=1e-12)
    u, s, v = (np.asarray(a) for a in truncated_svd(op, 4, rng=0))
    assert np.abs((u * s) @ v.T - np.asarray(op.dense())).max() < 1e-12


def test_factors_shared_by_a_batch_give_values_for_each_element():
    left, right = np.random.default_rng(0).standard_normal((2, 5, 3)), np.eye(6, 3)
    assert singular_values(LowRank(left, right)).shape == (2, 3)


@pytest.mark.parametrize("name", ["power law", "rank 12 and noise"])
@pytest.mark.parametrize("block", [4, 16])
def test_krylov_svd_reaches_the_optimum_in_float32(name, block):
    """Both norms within 1.001 of the best, where the products and the basis are in float32."""
    n, rank = 560, 10
    values = SPECTRA[name](n)
    matrix = with_spectrum(values, 600).astype(np.float32)
    (u, s, v), converged = krylov_svd(Dense(matrix), rank, rng=5, block=block)
    assert converged
    assert u.dtype == s.dtype == v.dtype == np.float32
    error = matrix.astype(np.float64) - (u.astype(np.float64) * s) @ v.T.astype(np.float64)
    assert np.linalg.norm(error) <= 1.001 * np.linalg.norm(values[rank:])
    assert np.linalg.norm(error, 2) <= 1.001 * values[rank]
    assert np.abs(u.T @ u - np.eye(rank)).max() < 50 * np.finfo(np.float32).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rest", [0.5 * np.arange(1, 521) ** -0.5, 0.1 * 0.9 ** np.arange(520.0)])
def test_singular_values_repeated_more_often_than_the_block_has_columns_are_found(rest, dtype):
    values, rank = np.r_[np.ones(40), rest], 50
    matrix = with_spectrum(values, 560)
    (u, s, v), converged = krylov_svd(Dense(matrix.astype(dtype)), rank, rng=0)
    assert converged
    assert np.linalg.norm(matrix - (u.astype(float) * s) @ v.T, 2) <= 1.0005 * values[rank]


@pytest.mark.parametrize("scale", [1e-30, 1e10, 1e18])
def test_scale_does_not_matter_where_squares_leave_the_numbers_of_float32(scale):
    matrix = (scale * with_spectrum(SPECTRA["power law"](560), 560)).astype(np.float32)
    (u, s, v), converged = krylov_svd(Dense(matrix), 10, rng=0)
    assert converged
    assert np.linalg.norm(matrix / scale - (u.astype(float) * (s / scale)) @ v.T, 2) <= 1.001 * 11**-0.5


def test_where_nothing_is_left_outside_no_direction_joins():
    for values in (np.r_[np.geomspace(1, 1e-3, 25), np.zeros(535)], np.ones(560), np.arange(1, 561) ** -0.5):
        for dtype in (np.float32, np.float64):
            op = Dense(with_spectrum(values, 560).astype(dtype))
            space = BlockKrylov(op, np.random.default_rng(0).standard_normal((560, 16)), rng=np.random.default_rng(1))
            while space.size < 112:
                space.advance()
            assert not _missed(space, 30, 2.5e-2)


def test_krylov_svd_goes_on_until_it_has_converged():
    """A flat spectrum and a rank of a quarter of the order: most of the space is needed, and taken."""
    matrix = with_spectrum(np.linspace(1.0, 0.9, 120), 130)
    (u, s, v), converged = krylov_svd(Dense(matrix), 30, rng=0, block=8, rtol=1e-2)
    assert converged
    assert np.linalg.norm(matrix - (u * s) @ v.T, 2) <= 1.001 * np.linspace(1.0, 0.9, 120)[30]


def test_a_given_number_of_steps_is_taken():
    matrix = with_spectrum(SPECTRA["exponential"](60), 70)
    few = krylov_svd(Dense(matrix), 3, rng=0, block=4, steps=1)
    more = krylov_svd(Dense(matrix), 3, rng=0, block=4, steps=4)
    errors = [np.linalg.norm(matrix - (f.svd.left * f.svd.values) @ f.svd.right.T) for f in (few, more)]
    assert errors[0] > 1.01 * errors[1]
    assert not more.converged
    assert krylov_svd(Dense(matrix), 3, rng=0, block=30, steps=9).converged  # the space was complete


@pytest.mark.parametrize("rank", [0, 10])
def test_impossible_ranks_are_refused(rank):
    op = Dense(np.eye(9))
    with pytest.raises(ValueError, match="rank must be between 1 and 9"):
        truncated_svd(op, rank, rng=0)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 200), (150, 150), (2, 40, 60)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 6.0])
def test_largest_singular_value(shape, decay):
    """Against the SVD, for flat and for steep spectra, within the rounding that measures allow for a norm."""
    drawn = np.random.default_rng(0).standard_normal(shape)
    u, s, vt = np.linalg.svd(drawn, full_matrices=False)
    matrix = (u * (s * np.arange(1, s.shape[-1] + 1.0) ** -decay)[..., None, :]) @ vt
    want = np.linalg.svd(matrix, compute_uv=False)[..., 0]
    for factor in (1.0, 1e-200, 1e200):
        got = largest_singular_value(Dense(factor * matrix))
        np.testing.assert_allclose(got, factor * want, rtol=4 * max(shape) ** 0.5 * np.finfo(float).eps)


def test_the_largest_singular_value_of_zero_is_zero():
    assert float(largest_singular_value(Dense(np.zeros((3, 4))))) == 0
