"""Baselines of low-rank updates, against published figures, exact averages and simulation."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import ortho_group

from nla_llm.theory import updates


def test_random_column_of_the_published_table():
    assert updates.random_projection_norm(61.95, 4, 12288, 12288) == pytest.approx(0.0202, abs=5e-5)
    assert updates.random_projection_norm(61.95, 64, 12288, 12288) == pytest.approx(0.3227, abs=5e-5)


def test_random_projection_and_similarity_by_haar_draws():
    d_out, d_in, r, draws = 6, 9, 3, 20_000
    w = np.random.default_rng(0).standard_normal((d_out, d_in))
    u = ortho_group(d_out, seed=1).rvs(draws)
    v = ortho_group(d_in, seed=2).rvs(draws)
    squares = np.sum((np.swapaxes(u[..., :r], 1, 2) @ w @ v[..., :r]) ** 2, axis=(1, 2))
    want = updates.random_projection_norm(np.linalg.norm(w), r, d_out, d_in) ** 2
    assert abs(squares.mean() - want) < 4 * squares.std() / np.sqrt(draws)
    overlap = np.sum(v[:, :4, :2] ** 2, axis=(1, 2)) / 2  # against the first four coordinate vectors
    assert abs(overlap.mean() - updates.random_subspace_similarity(4, 2, d_in)) < 4 * overlap.std() / np.sqrt(draws)


def test_published_thresholds():
    assert updates.hard_threshold((50, 50), noise=1.0) == pytest.approx(4 / np.sqrt(3) * np.sqrt(50), rel=1e-14)
    assert updates.hard_threshold((20, 80), noise=0.1) == updates.hard_threshold((80, 20), noise=0.1)
    for ratio, omega in {1.0: 2.858362, 0.5: 2.171185, 0.2: 1.765046, 0.05: 1.519341}.items():
        assert updates.hard_threshold((int(1000 * ratio), 1000), median=1.0) == pytest.approx(omega, abs=1e-6)
        cubic = 0.56 * ratio**3 - 0.95 * ratio**2 + 1.82 * ratio + 1.43
        assert abs(updates.hard_threshold((int(1000 * ratio), 1000), median=1.0) - cubic) < 0.02


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_threshold_is_where_keeping_a_value_starts_to_pay(ratio):
    """Error of a kept spike is y² − 2 y θ c_u c_v + θ², of a dropped one θ²; equal at the threshold."""

    def gain(theta):
        y, left, right = updates.spiked_model(theta, ratio)
        return y**2 - 2 * y * theta * np.sqrt(left * right)

    root = minimize_scalar(
        lambda t: abs(gain(t)), bounds=(ratio**0.25 + 0.01, 4), method="bounded", options={"xatol": 1e-12}
    )
    n = 1000
    threshold = updates.hard_threshold((round(ratio * n), n), noise=1 / np.sqrt(n))
    assert updates.spiked_model(root.x, ratio).singular_value == pytest.approx(threshold, rel=1e-6)


@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_median_of_the_noise_by_simulation(ratio):
    n = 400
    s = np.linalg.svd(np.random.default_rng(0).standard_normal((int(ratio * n), n)) / np.sqrt(n), compute_uv=False)
    assert np.median(s**2) == pytest.approx(updates.marchenko_pastur_median(ratio), rel=0.03)


def test_spiked_model_by_simulation():
    rng, m, n = np.random.default_rng(3), 300, 600
    u, v = np.linalg.qr(rng.standard_normal((m, 2)))[0], np.linalg.qr(rng.standard_normal((n, 2)))[0]
    theta = np.array([3.0, 1.5])
    a = (u * theta) @ v.T + rng.standard_normal((m, n)) / np.sqrt(n)
    left, s, right = np.linalg.svd(a, full_matrices=False)
    value, left_overlap, right_overlap = updates.spiked_model(theta, m / n)
    np.testing.assert_allclose(s[:2], value, rtol=0.03)
    np.testing.assert_allclose(np.sum(u * left[:, :2], axis=0) ** 2, left_overlap, atol=0.04)
    np.testing.assert_allclose(np.sum(v * right[:2].T, axis=0) ** 2, right_overlap, atol=0.04)
    lost = updates.spiked_model(0.5, m / n)
    assert lost.left_overlap == lost.right_overlap == 0
    assert lost.singular_value == pytest.approx(s[2], rel=0.03)


def test_shrinker_is_the_projection_onto_the_true_spike():
    theta = np.array([0.2, 1.2, 2.0, 5.0])
    y, left, right = updates.spiked_model(theta, 0.5)
    np.testing.assert_allclose(updates.frobenius_shrinker(y, 0.5), theta * np.sqrt(left * right), rtol=1e-10, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: updates.random_projection_norm(1.0, 5, 4, 9), "rank must lie"),
        (lambda: updates.random_subspace_similarity(0, 2, 4), "i and j must lie"),
        (lambda: updates.hard_threshold((2, 2)), "exactly one of"),
        (lambda: updates.hard_threshold((0, 2), noise=1.0), "shape must be"),
        (lambda: updates.marchenko_pastur_median(1.5), r"in \(0, 1\]"),
        (lambda: updates.spiked_model(-1.0, 0.5), "strength must be"),
        (lambda: updates.frobenius_shrinker(2.0, 2.0), "transpose the matrix"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def sines(U, V):
    """‖sin Θ‖_F of two spaces of equal dimension, from the projectors alone."""
    return np.linalg.norm(U @ U.T - V @ V.T) / np.sqrt(2)


@pytest.mark.parametrize("size", [1e-6, 1e-2, 0.3])
@pytest.mark.parametrize("k", [1, 3])
def test_subspaces_turn_no_further_than_the_bounds(k, size):
    rng = np.random.default_rng(k)
    values = np.array([4.0, 3.0, 2.5, 1.0, 0.5, 0.2])
    U, V = ortho_group.rvs(6, random_state=0), ortho_group.rvs(6, random_state=1)
    for attempt in range(30):
        E = rng.standard_normal((6, 6))
        if attempt % 3 == 0:  # adversarial: mixes the directions on both sides of the gap
            E = np.outer(U[:, k - 1], V[:, k]) + np.outer(U[:, k], V[:, k - 1])
        E *= size / np.linalg.norm(E, 2)
        norms = np.linalg.norm(E, 2), np.linalg.norm(E)
        found = np.linalg.svd(U * values @ V.T + E)
        bound = updates.wedin_bound(*norms, values, k)
        assert sines(found[0][:, :k], U[:, :k]) <= bound
        assert sines(found[2][:k].T, V[:, :k]) <= bound
        S = (E + E.T) / 2
        leading = np.linalg.eigh(U * values @ U.T + S)[1][:, ::-1][:, :k]
        gap = values[k - 1] - values[k]
        assert sines(leading, U[:, :k]) <= updates.davis_kahan_bound(np.linalg.norm(S, 2), np.linalg.norm(S), gap, k)


def test_a_two_by_two_rotation_in_closed_form():
    """diag(1, 0) plus ε off the diagonal turns by ½ arctan(2ε): the bound is 2ε, the factor 2 too large."""
    epsilon = 1e-3
    turned = np.linalg.eigh(np.array([[1.0, epsilon], [epsilon, 0.0]]))[1][:, 1:]
    bound = updates.davis_kahan_bound(epsilon, np.sqrt(2) * epsilon, 1.0, 1)
    assert sines(turned, np.eye(2)[:, :1]) == pytest.approx(np.sin(0.5 * np.arctan(2 * epsilon)), rel=1e-9)
    assert bound == pytest.approx(2 * epsilon)


@pytest.mark.parametrize(
    "call",
    [
        lambda: updates.davis_kahan_bound(2.0, 1.0, 1.0, 1),
        lambda: updates.davis_kahan_bound(1.0, 1.0, 0.0, 1),
        lambda: updates.wedin_bound(0.1, 0.1, [1.0, 1.0], 1),
        lambda: updates.wedin_bound(0.1, 0.1, [2.0, 1.0], 2),
    ],
)
def test_perturbations_that_make_no_sense(call):
    with pytest.raises(ValueError, match=r"0 <= ‖E‖₂ <= ‖E‖_F|k must be between"):
        call()
