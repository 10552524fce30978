"""Pivots against SciPy's; interpolation; the bounds of Gu and Eisenstat where plain pivoting breaks them."""

import numpy as np
import pytest
from scipy.linalg import qr

from nla_llm.backend import to_numpy
from nla_llm.linalg import chosen_columns, interpolation, pivoted_qr, strong_pivoted_qr
from nla_llm.operators import Dense, LowRank


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def kahan(n, angle):
    """Kahan's matrix, on which pivoting takes the columns as they stand and misses how small the last one is."""
    s, c = np.sin(angle), np.cos(angle)
    return np.diag(s ** np.arange(n)) @ (np.eye(n) - c * np.triu(np.ones((n, n)), 1)) * (1 - 1e-10 * np.arange(n))


def test_pivots_are_those_of_lapack(xp):
    matrix = draw(0, 15, 11)
    found = pivoted_qr(xp.asarray(matrix), 6)
    q, r, pivots = qr(matrix, pivoting=True, mode="economic")
    np.testing.assert_array_equal(to_numpy(found.columns), pivots[:6])
    np.testing.assert_allclose(np.abs(to_numpy(found.basis)), np.abs(q[:, :6]), rtol=0, atol=1e-13)
    left = matrix - to_numpy(found.basis) @ to_numpy(found.coefficients)
    np.testing.assert_allclose(to_numpy(found.remaining), np.sum(left**2, axis=0), rtol=0, atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(left), np.linalg.norm(r[6:, 6:]), rtol=1e-12)


def test_a_batch_is_done_one_by_one():
    matrices = np.stack([draw(0, 9, 8), draw(1, 9, 8) * np.arange(1, 9)])
    both = strong_pivoted_qr(matrices, 4)
    for i in range(2):
        alone = strong_pivoted_qr(matrices[i], 4)
        np.testing.assert_array_equal(both.columns[i], alone.columns)
        np.testing.assert_allclose(both.basis[i], alone.basis, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pivoting", [pivoted_qr, strong_pivoted_qr])
def test_exact_rank_deficiency_leaves_zero_columns(pivoting):
    matrix = draw(0, 12, 3) @ draw(1, 3, 10)
    found = pivoting(matrix, 6)
    np.testing.assert_allclose(found.basis @ found.coefficients, matrix, rtol=0, atol=1e-13)
    assert np.linalg.matrix_rank(found.basis[:, :3]) == 3
    assert np.isfinite(interpolation(found)).all()


def test_interpolation_is_the_identity_in_the_chosen_columns(xp):
    matrix = draw(2, 9, 7)
    found = pivoted_qr(xp.asarray(matrix), 4)
    t, columns = to_numpy(interpolation(found)), to_numpy(found.columns)
    np.testing.assert_allclose(t[:, columns], np.eye(4), rtol=0, atol=1e-13)
    approximation = matrix[:, columns] @ t
    np.testing.assert_allclose(approximation, to_numpy(found.basis) @ to_numpy(found.coefficients), rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [1.5, 2.0, 5.0])
def test_strong_pivots_keep_the_bounds_on_adversarial_matrices(factor):
    rng = np.random.default_rng(0)
    graded = rng.standard_normal((20, 16)) * 0.5 ** np.arange(16)
    for matrix in (kahan(20, 1.2), kahan(25, 0.9), draw(0, 18, 18), graded, np.tril(np.ones((14, 14)))):
        n = matrix.shape[1]
        sigma = np.linalg.svd(matrix, compute_uv=False)
        for k in (1, 4, n - 1):
            found = strong_pivoted_qr(matrix, k, factor=factor)
            growth = np.sqrt(1 + factor**2 * k * (n - k))
            inner = np.linalg.svd(np.take(found.coefficients, found.columns, axis=1), compute_uv=False)
            assert (inner >= sigma[:k] / growth * (1 - 1e-10)).all()
            outer = np.linalg.svd(matrix - found.basis @ found.coefficients, compute_uv=False)[: len(sigma) - k]
            assert (outer <= growth * sigma[k:] + 1e-13 * sigma[0]).all()
            assert np.abs(interpolation(found)).max() <= factor * (1 + 1e-10)


def test_plain_pivots_break_them():
    """The matrix of Kahan: swaps are needed, and raise the volume of the chosen columns."""
    matrix, k = kahan(25, 0.9), 24
    plain, strong = pivoted_qr(matrix, k), strong_pivoted_qr(matrix, k)
    np.testing.assert_array_equal(plain.columns, np.arange(24))
    assert np.abs(interpolation(plain)).max() > 100
    volumes = [np.linalg.slogdet(np.take(f.coefficients, f.columns, axis=1))[1] for f in (plain, strong)]
    assert volumes[1] > volumes[0] + np.log(2)


def test_columns_are_read_or_multiplied_out(xp):
    matrix, places = draw(0, 6, 5), np.array([4, 0, 3])
    left, right = draw(1, 6, 2), draw(2, 5, 2)
    low = LowRank(xp.asarray(left), xp.asarray(right))
    got = chosen_columns(Dense(xp.asarray(matrix)), xp.asarray(places))
    np.testing.assert_array_equal(to_numpy(got), matrix[:, places])
    np.testing.assert_allclose(
        to_numpy(chosen_columns(low, xp.asarray(places))), (left @ right.T)[:, places], rtol=0, atol=1e-14
    )
