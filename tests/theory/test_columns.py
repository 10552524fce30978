"""Columns: volume sampling by enumeration, structural bounds, leverage, the iterated inverse against matrices."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.linalg.inverses import iterated_inverse, norm_product
from nla_llm.theory import columns

EPS = np.finfo(np.float64).eps


def psd(spectrum, seed=0):
    """Positive semi-definite with a given spectrum."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(spectrum),) * 2))
    return (q * np.asarray(spectrum)) @ q.T


def nystrom(a, s):
    return a[:, s] @ np.linalg.pinv(a[np.ix_(s, s)], hermitian=True) @ a[s]


SPECTRA = [np.array([5.0, 2.0, 1.0, 0.5, 0.1, 0.02, 1e-3]), np.ones(6), 0.3 ** np.arange(8)]

# -- volume sampling (C2) ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(30, 7), (600, 300), (1500, 700)])
def test_volume_sampling_of_a_flat_spectrum(n, k):
    """All subsets are alike and leave n − k; the binomial coefficients on the way leave the range of float64."""
    assert columns.volume_sampling_error(np.full(n, 2.0), k) == pytest.approx(2.0 * (n - k), rel=1e-9)


def test_volume_sampling_of_a_decaying_spectrum_of_many_values():
    """Ratios e_{k+1}/e_k of 1/i, i = 1 … n: the coefficients of Π (1 + t/i) = C(n + t, n), in whole numbers."""
    n, k = 600, 300
    stirling = [1]
    for i in range(1, n + 1):  # Π (i + t), lowest power first
        stirling = [i * a + b for a, b in zip([*stirling, 0], [0, *stirling], strict=True)]
    expected = (k + 1) * float(Fraction(stirling[k + 1], stirling[k]))
    assert columns.volume_sampling_error(1 / np.arange(1.0, n + 1), k) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_volume_sampling_by_enumeration_of_all_subsets(spectrum, k):
    a = psd(spectrum)
    subsets = [list(s) for s in combinations(range(len(a)), k)]
    volumes = np.array([np.linalg.det(a[np.ix_(s, s)]) for s in subsets])
    errors = np.array([np.trace(a - nystrom(a, s)) for s in subsets])
    mean = np.sum(volumes * errors) / np.sum(volumes)
    assert np.isclose(columns.volume_sampling_error(spectrum, k), mean, rtol=1e-8)
    assert mean <= columns.volume_sampling_bound(spectrum, k)
    assert errors.min() <= mean <= errors.max()


@pytest.mark.parametrize("k", [1, 3])
def test_volume_sampling_of_columns_by_enumeration(k):
    b = np.random.default_rng(1).standard_normal((5, 7)) * 0.6 ** np.arange(7)
    volumes, errors = [], []
    for s in combinations(range(7), k):
        c = b[:, s]
        volumes.append(np.linalg.det(c.T @ c))
        errors.append(np.linalg.norm(b - c @ np.linalg.lstsq(c, b)[0]) ** 2)
    mean = np.average(errors, weights=volumes)
    assert np.isclose(columns.volume_sampling_error(np.linalg.svd(b, compute_uv=False) ** 2, k), mean, rtol=1e-9)


def test_elementary_symmetric_polynomials_are_the_coefficients():
    x = np.random.default_rng(0).standard_normal(6)
    np.testing.assert_allclose(columns.elementary_symmetric(x), np.poly(-x), rtol=0, atol=100 * EPS)


def test_as_many_columns_as_the_rank_leave_nothing():
    assert columns.volume_sampling_error([2.0, 1.0], 2) == 0.0
    with pytest.raises(ValueError, match="k=3"):
        columns.volume_sampling_error([2.0, 1.0, 0.0], 3)


# -- Nyström: structural bound (C3), leverage (C4), randomly pivoted Cholesky (C9), Skyformer (C5) ---------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("gaussian", [False, True])
def test_structural_bound_is_never_violated(seed, gaussian):
    rng = np.random.default_rng(seed)
    a = psd(SPECTRA[seed % 2 * 2], seed)
    sketch = rng.standard_normal((len(a), 3)) if gaussian else np.eye(len(a))[:, rng.permutation(len(a))[:3]]
    error = a - a @ sketch @ np.linalg.pinv(sketch.T @ a @ sketch, hermitian=True) @ sketch.T @ a
    for k in (0, 1, 2, 3):
        bounds = [columns.nystrom_structural_bound(a, sketch, k, norm=norm) for norm in ("spectral", "trace")]
        assert np.linalg.norm(error, 2) <= bounds[0] * (1 + 1e-10)
        assert np.trace(error) <= bounds[1] * (1 + 1e-10)


def test_structural_bound_is_attained_by_eigenvectors():
    a = psd(SPECTRA[0])
    vectors = np.linalg.eigh(a)[1][:, ::-1]
    assert np.isclose(columns.nystrom_structural_bound(a, vectors[:, :2], 2), SPECTRA[0][2])
    with pytest.raises(ValueError, match="misses"):
        columns.nystrom_structural_bound(np.diag([2.0, 1.0]), np.eye(2)[:, 1:], 1)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_ridge_leverage_scores_sum_to_the_effective_dimension(ridge):
    a = psd(SPECTRA[0])
    scores = columns.ridge_leverage_scores(a, ridge)
    assert np.isclose(scores.sum(), columns.effective_dimension(SPECTRA[0], ridge), rtol=1e-12)
    w, v = np.linalg.eigh(a)
    np.testing.assert_allclose(scores, (v**2) @ (w / (w + ridge)), rtol=1e-10)


def test_randomly_pivoted_cholesky_keeps_its_promise():
    """The mean over all sequences of pivots, by recursion, no draw at all; five steps where more are asked for."""
    a = psd(0.5 ** np.arange(7), 3)

    def mean_error(residual, steps):
        d = np.maximum(np.diag(residual), 0)
        if steps == 0 or d.sum() < 1e-13:
            return d.sum()
        total = 0.0
        for s in np.flatnonzero(d > 1e-13):
            column = residual[:, s] / np.sqrt(d[s])
            total += d[s] / d.sum() * mean_error(residual - np.outer(column, column), steps - 1)
        return total

    w = np.sort(np.linalg.eigvalsh(a))[::-1]
    for r, epsilon in ((1, 1.0), (1, 0.5), (2, 1.0)):
        best = w[r:].sum()
        k = columns.rpcholesky_pivots(r, epsilon=epsilon, eta=best / w.sum())
        assert mean_error(a, min(k, 5)) <= (1 + epsilon) * best
    assert mean_error(a, 1) > 1.2 * w[1:].sum()  # one step alone is no singular value decomposition


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_a_cross_block_is_below_that_of_the_completion(seed):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((30, 3))
    full = np.exp(-((z[:, None] - z[None]) ** 2).sum(-1) / 2)
    s = rng.permutation(30)[:8]
    error = full - full[:, s] @ np.linalg.solve(full[np.ix_(s, s)] + 0.01 * np.eye(8), full[s])
    assert np.linalg.norm(error[:18, 18:], 2) <= np.linalg.norm(error, 2)
    assert np.linalg.eigvalsh(error).min() > -1e-12  # Â ⪯ A


def test_the_largest_eigenvalue_of_the_matrix_that_skyformer_inverts_is_exactly_one():
    """Chen et al. 2021, lemma 3, puts all of them inside (0, 1): D^(1/2) 1 is an eigenvector of the eigenvalue 1."""
    z = np.random.default_rng(0).standard_normal((20, 3))
    shifted = np.exp(-((z[:, None] - z[None]) ** 2).sum(-1) / 2) + 1e-3 * np.eye(20)
    root = np.sqrt(shifted.sum(1))
    normalised = shifted / np.outer(root, root)
    np.testing.assert_allclose(normalised @ root, root, rtol=100 * EPS)
    w = np.linalg.eigvalsh(normalised)
    assert abs(w[-1] - 1) < 100 * EPS
    assert w[0] > 0
    assert np.linalg.norm(np.eye(20) - normalised, 2) < 1


# -- the iterated inverse (C11) ----------------------------------------------------------------------------------------


def softmax_core(seed=0, m=9):
    x = np.random.default_rng(seed).standard_normal((m, m))
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


def test_the_residual_of_matrices_obeys_the_recursion():
    """Not normal, not symmetric: only I − AZ and the identity appear."""
    a = softmax_core()
    z = a.T / norm_product(a)
    for _ in range(4):
        r = np.eye(len(a)) - a @ z
        z = iterated_inverse(a, 1, start=z)
        want = 0.25 * np.linalg.matrix_power(r, 3) @ (3 * np.eye(len(a)) + r)
        np.testing.assert_allclose(np.eye(len(a)) - a @ z, want, rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_the_iteration_is_a_filter_of_singular_values(iterations):
    a = softmax_core(1)
    u, s, vt = np.linalg.svd(a)
    share = columns.inverted_share(s, float(norm_product(a)[0, 0]), iterations)
    np.testing.assert_allclose(
        iterated_inverse(a, iterations), (vt.T * (share / s)) @ u.T, rtol=0, atol=1e4 * EPS * (share / s).max()
    )
    residual = columns.iteration_residual(1 - s**2 / norm_product(a)[0, 0], iterations)
    growth = 3.25**iterations  # of the rounding of 1 − a² that the residuals start from
    np.testing.assert_allclose(1 - share, residual, rtol=0, atol=10 * EPS * growth)


def test_six_steps_act_as_a_ridge():
    """At small singular values the share is that of λ = (4/13)⁶ ‖A‖₁ ‖A‖_∞; large ones are inverted."""
    small = np.array([1e-5, 1e-4])
    share, ridge = columns.inverted_share(small, 2.0, 6), 2.0 * columns.iteration_ridge(6)
    np.testing.assert_allclose(share, small**2 / (small**2 + ridge), rtol=1e-3)
    assert columns.inverted_share([0.5], 2.0, 6)[0] > 1 - 1e-12
    assert columns.inverted_share([0.03], 2.0, 6)[0] < 0.5


def test_the_iteration_converges_with_order_three():
    r = columns.iteration_residual([1e-3], 1)[0]
    assert np.isclose(r, 0.75e-9, rtol=1e-3)


# -- clusters ----------------------------------------------------------------------------------------------------------


def test_clustering_bound_is_never_violated_and_tight_within_two():
    rng = np.random.default_rng(0)
    largest = 0.0
    for seed in range(30):
        q, k = rng.standard_normal((12, 3)), 0.8 * rng.standard_normal((2 + seed % 5, 3))
        shift = 10.0 ** rng.uniform(-3, 1) * rng.standard_normal((12, 3))
        exact = nl.AttentionProblem(q, k, scale=0.6).exact().dense()
        moved = nl.AttentionProblem(q + shift, k, scale=0.6).exact().dense()
        bound = columns.clustering_bound(np.linalg.norm(shift, axis=1), np.linalg.norm(k, 2), 0.6)
        ratio = np.linalg.norm(exact - moved, axis=1) / bound
        assert ratio.max() <= 1
        largest = max(largest, ratio.max())
    assert largest > 0.5
