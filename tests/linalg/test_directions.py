import numpy as np
import pytest
from scipy import stats

from nla_llm.linalg import haar_orthogonal, orthogonal_directions, simplex_directions, sobol_directions


def positive_estimates(directions, x):
    """Estimates of exp(|x|²) = E exp(ω·2x − |x|²) by each set of directions."""
    return np.exp(directions @ (2 * x) - x @ x).mean(axis=-1)


def test_haar_matrices_are_orthogonal():
    q = haar_orthogonal(7, rng=0, batch=(3,))
    assert q.shape == (3, 7, 7)
    assert np.abs(q @ np.swapaxes(q, -1, -2) - np.eye(7)).max() < 1e-14


def test_first_entry_of_a_haar_matrix_has_the_law_of_a_uniform_direction():
    n = 3
    entries = haar_orthogonal(n, rng=1, batch=(4000,))[:, 0, 0]
    # the square of a coordinate of a uniform direction is Beta(1/2, (n − 1)/2), and its sign is fair
    assert stats.kstest(entries**2, stats.beta(0.5, (n - 1) / 2).cdf).pvalue > 0.01
    assert abs((entries > 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_qr_without_the_sign_fix_would_be_caught():
    z = np.random.default_rng(1).standard_normal((4000, 3, 3))
    biased = np.linalg.qr(z)[0][:, 0, 0]
    assert abs((biased > 0).mean() - 0.5) > 0.2


def test_directions_within_a_block_are_orthogonal_and_lengths_vary():
    w = orthogonal_directions(10, 4, rng=0)
    gram = w @ w.T
    for start in (0, 4, 8):
        block = gram[start : start + 4, start : start + 4]
        assert np.abs(block - np.diag(np.diagonal(block))).max() < 1e-13 * gram.max()
    assert np.abs(gram[0, 4:8]).min() > 1e-6
    assert np.std(np.diagonal(gram)) > 0.5


def test_second_moment_is_the_identity():
    w = orthogonal_directions(6, 3, rng=2, batch=(5000,)).reshape(-1, 3)
    moment = w.T @ w / len(w)
    assert np.abs(moment - np.eye(3)).max() < 5 * np.sqrt(2 / len(w))


def test_lengths_are_chi_distributed_and_independent_of_the_directions():
    w = orthogonal_directions(5, 5, rng=3, batch=(1500,))
    lengths = np.linalg.norm(w, axis=-1)
    assert stats.kstest(lengths.ravel() ** 2, stats.chi2(5).cdf).pvalue > 0.01
    assert abs(np.corrcoef(lengths[:, 0], lengths[:, 1])[0, 1]) < 4 / np.sqrt(1500)
    assert abs(np.corrcoef(lengths[:, 0], w[:, 0, 0] / lengths[:, 0])[0, 1]) < 4 / np.sqrt(1500)


def test_positive_features_on_these_directions_are_unbiased():
    x = np.full(4, 0.25)  # |2x|² = 1: moderate variance, so the mean is a sharp test
    estimates = positive_estimates(orthogonal_directions(4, 4, rng=4, batch=(40_000,)), x)
    error = estimates.std() / np.sqrt(len(estimates))
    assert abs(estimates.mean() - np.exp(x @ x)) < 4 * error


@pytest.mark.parametrize(("m", "d"), [(0, 3), (3, 0)])
def test_empty_shapes_are_refused(m, d):
    with pytest.raises(ValueError, match="at least 1"):
        orthogonal_directions(m, d, rng=0)


def test_randomness_must_be_given():
    with pytest.raises(TypeError, match="rng"):
        haar_orthogonal(3, None)


def test_some_columns_have_no_preferred_sign_either():
    """LAPACK's own signs would make the mean of the first entry of the first column differ from zero."""
    draws = np.array([haar_orthogonal(3, np.random.default_rng(i), columns=2) for i in range(2000)])
    assert np.all(np.abs(draws.mean(axis=0)) < 4 * np.sqrt(1 / 3 / 2000))
    np.testing.assert_allclose((draws**2).mean(axis=0), 1 / 3, atol=4 * 0.3 / np.sqrt(2000))


@pytest.mark.parametrize("columns", [0, 4])
def test_as_many_columns_as_there_are(columns):
    with pytest.raises(ValueError, match="columns must be between 1 and n=3"):
        haar_orthogonal(3, 0, columns=columns)


# -- fixed norms and simplices -----------------------------------------------------------------------------------------


def test_fixed_norms_are_the_root_of_the_dimension():
    w = orthogonal_directions(7, 4, rng=0, fixed_norms=True)
    gram = w @ w.T
    np.testing.assert_allclose(np.diagonal(gram), 4, rtol=1e-14)
    assert np.abs(gram[:4, :4] - 4 * np.eye(4)).max() < 1e-13


@pytest.mark.parametrize("d", [2, 3, 8, 64])
def test_simplex_blocks_have_equal_obtuse_angles(d):
    w = simplex_directions(2 * d + 1, d, rng=0)
    u = w / np.linalg.norm(w, axis=-1, keepdims=True)
    for block in (u[:d], u[d : 2 * d]):
        want = np.full((d, d), -1 / (d - 1))
        np.fill_diagonal(want, 1.0)
        np.testing.assert_allclose(block @ block.T, want, rtol=0, atol=1e-13)
        np.testing.assert_allclose(block.sum(axis=0), 0, atol=1e-13 * d)
    assert np.std(np.linalg.norm(w, axis=-1)) > 0.1


def test_simplex_directions_have_the_law_of_gaussian_rows():
    """Each row: χ² length, direction uniform, length independent of it; second moment the identity."""
    d, draws = 3, 6000
    w = simplex_directions(4, d, rng=5, batch=(draws,))
    for row in np.moveaxis(w, 1, 0):
        assert stats.kstest(np.sum(row**2, axis=-1), stats.chi2(d).cdf).pvalue > 0.005
        for axis in range(d):
            assert stats.kstest(row[:, axis], stats.norm.cdf).pvalue > 0.002
        np.testing.assert_allclose(row.T @ row / draws, np.eye(d), atol=4 * np.sqrt(2 / draws))
    inner = np.sum(w[:, 0] * w[:, 1], axis=-1)
    kappa = stats.chi(d).mean()
    assert abs(inner.mean() + kappa**2 / (d - 1)) < 4 * inner.std() / np.sqrt(draws)
    other = np.sum(w[:, 0] * w[:, 3], axis=-1)  # of another block
    assert abs(other.mean()) < 4 * other.std() / np.sqrt(draws)


def test_a_simplex_in_one_dimension_is_a_gaussian_number():
    w = simplex_directions(5000, 1, rng=0)[:, 0]
    assert stats.kstest(w, stats.norm.cdf).pvalue > 0.01


# -- Sobol -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "d"), [(1, 1), (5, 3), (64, 64), (100, 129)])
def test_sobol_directions_are_points_in_rows(m, d):
    w = sobol_directions(m, d, rng=0)
    assert w.shape == (m, d)
    assert np.all(np.isfinite(w))
    np.testing.assert_array_equal(w, sobol_directions(m, d, rng=0))
    assert np.any(w != sobol_directions(m, d, rng=1))


def test_each_sobol_point_is_gaussian_by_itself():
    w = np.stack([sobol_directions(6, 3, rng=np.random.default_rng([3, i])) for i in range(1500)])
    for row in np.moveaxis(w, 1, 0):
        for axis in range(3):
            assert stats.kstest(row[:, axis], stats.norm.cdf).pvalue > 0.002
        np.testing.assert_allclose(row.T @ row / len(w), np.eye(3), atol=4 * np.sqrt(2 / len(w)))


def test_sobol_points_are_spread_evenly():
    """Of 64 points each of 64 slices of each coordinate holds one; independent ones would leave a third empty."""
    u = stats.norm.cdf(sobol_directions(64, 5, rng=2))
    for column in u.T:
        assert sorted(np.floor(64 * column).astype(int)) == list(range(64))


def test_extreme_points_stay_finite(monkeypatch):
    from scipy.stats import qmc

    extremes = np.array([[0.0, 1 - 2.0**-32], [0.5, 0.5 - 2.0**-32]])
    monkeypatch.setattr(qmc.Sobol, "random_base2", lambda self, m: extremes)
    rng = type("Rng", (np.random.Generator,), {"random": lambda self, size: np.full(size, 1 - 2.0**-53)})
    w = sobol_directions(2, 2, rng=rng(np.random.PCG64(0)))
    assert np.all(np.isfinite(w))
    assert w[0, 0] == -w[0, 1] < -10  # 2^(−85) from either end
    assert abs(w[1, 0]) < 1e-9
    assert abs(w[1, 1]) < 1e-9


@pytest.mark.parametrize("function", [simplex_directions, sobol_directions])
def test_sizes_below_one_are_refused(function):
    with pytest.raises(ValueError, match="at least 1"):
        function(0, 3, rng=0)
