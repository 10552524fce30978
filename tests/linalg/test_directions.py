import numpy as np
import pytest
from scipy import stats

from nla_llm.linalg import haar_orthogonal, orthogonal_directions


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
