"""Variances of kernels from Gaussian proposals by adaptive quadrature; randomised attention on a line."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit, softmax
from scipy.stats import norm

from nla_llm.theory import randomised
from nla_llm.theory.random_features import relative_variance


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


# -- proposals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("mu", [0.0, 0.4, -1.1])
def test_variance_of_one_proposal_by_quadrature(mu, variance):
    x, y = 0.7, -0.3

    def squared(w):
        kernel = np.exp(w * x - x**2 / 2 + w * y - y**2 / 2) * norm.pdf(w)
        return kernel**2 / norm.pdf(w, mu, variance**0.5) / np.exp(2 * x * y)

    want = quad(squared, -25, 25, epsabs=0, epsrel=1e-11, limit=200)[0] - 1
    got = np.exp(randomised.log_proposal_variance([[x]], [[y]], [mu], variance=variance, m=3))
    np.testing.assert_allclose(3 * got, want, rtol=1e-8, atol=1e-12)


def test_directions_multiply():
    """The second moment in three dimensions is the product of those of the coordinates."""
    x, y, mu = draw(0, 2, 3), draw(1, 4, 3), draw(2, 3)
    moments = [
        np.exp(randomised.log_proposal_variance(x[:, [i]], y[:, [i]], mu[[i]], variance=1.7)) + 1 for i in range(3)
    ]
    whole = np.exp(randomised.log_proposal_variance(x, y, mu, variance=1.7)) + 1
    np.testing.assert_allclose(whole, np.prod(moments, axis=0), rtol=1e-12)


def test_without_a_shift_it_is_the_variance_of_positive_features():
    x, y = 0.5 * draw(0, 3, 4), 0.5 * draw(1, 5, 4)
    got = np.exp(randomised.log_proposal_variance(x, y, np.zeros(4), m=7))
    t = np.sum((x[:, None] + y[None]) ** 2, axis=-1)
    np.testing.assert_allclose(got, relative_variance("positive", t, m=7), rtol=1e-10)


def test_narrow_proposals_have_infinite_variance():
    """The authors' programs draw with variance 1/√d in these units: weighed rightly, too narrow from d = 4 on."""
    x, y = 0.1 * draw(0, 2, 4), 0.1 * draw(1, 2, 4)
    assert np.all(np.isinf(randomised.log_proposal_variance(x, y, np.zeros(4), variance=4**-0.5)))
    assert np.all(np.isfinite(randomised.log_proposal_variance(x, y, np.zeros(4), variance=3**-0.5)))


def exact_mixture_variance(z, mu):
    """Relative variance of one draw near each mean with the balance heuristic, in one dimension."""

    def total(w):
        return np.sum(norm.pdf(w, mu))

    low, high = min(z, *mu) - 12, max(z, *mu) + 12
    options = {"epsabs": 1e-13, "epsrel": 1e-10, "limit": 500}
    second = quad(lambda w: norm.pdf(w, z) ** 2 / total(w), low, high, **options)[0]
    means = [quad(lambda w, a=a: norm.pdf(w, a) * norm.pdf(w, z) / total(w), low, high, **options)[0] for a in mu]
    np.testing.assert_allclose(np.sum(means), 1, rtol=1e-8)  # unbiased
    return second - np.sum(np.square(means))


@pytest.mark.parametrize("seed", range(8))
def test_bound_of_mixtures_by_quadrature(seed):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 6))
    x, y, mu = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(-2, 2, m)
    exact = exact_mixture_variance(x + y, mu)
    bound = float(np.exp(randomised.log_proposals_variance_bound([[x]], [[y]], mu[:, None]))[0, 0])
    assert 0 < exact <= bound
    single = min(np.exp((x + y - a) ** 2) for a in mu)
    assert bound <= single - 1 / m + 1e-12  # never above what the nearest proposal alone would give


def test_bound_is_attained_by_equal_proposals():
    exact = exact_mixture_variance(0.8, np.full(3, 0.1))
    bound = np.exp(randomised.log_proposals_variance_bound([[0.5]], [[0.3]], np.full((3, 1), 0.1)))
    np.testing.assert_allclose(bound[0, 0], exact, rtol=1e-8)
    np.testing.assert_allclose(exact, np.expm1(0.49) / 3, rtol=1e-8)


def test_a_defensive_mixture_is_never_much_worse_than_positive_features():
    """Two of five at the origin, the others anywhere."""
    x, y = draw(0, 4, 2), draw(1, 6, 2)
    mu = np.concatenate([np.zeros((2, 2)), 50 * draw(2, 3, 2)])
    t = np.sum((x[:, None] + y[None]) ** 2, axis=-1)
    bound = np.exp(randomised.log_proposals_variance_bound(x, y, mu))
    np.testing.assert_allclose(bound, (5 / 2 * np.exp(t) - 1) / 5, rtol=1e-9)


def test_proposal_theory_has_batch_axes():
    x, y, mu = draw(0, 2, 3, 4, 2), draw(1, 2, 1, 5, 2), draw(2, 2, 3, 6, 2)
    promise = randomised.proposal_theory(x, y, mu)
    assert promise.shape == (2, 3, 4, 5)
    want = randomised.log_proposals_variance_bound(x[1, 2], y[1, 0], mu[1, 2])
    np.testing.assert_array_equal(promise.log_relative_variance(1, 3)[1, 2], want[1:3])
    assert promise.unbiased


# -- randomised attention ----------------------------------------------------------------------------------------------


def test_randomised_attention_is_unbiased_by_quadrature():
    x, y = draw(0, 3), draw(1, 5)
    mean, variance = randomised.randomised_attention_moments(x, y)
    P = softmax(np.outer(x, y), axis=1)
    np.testing.assert_allclose(mean, P, rtol=0, atol=1e-10)
    assert np.all(variance < P * (1 - P))
    assert np.all(variance > 1e-4 * P * (1 - P))


def test_two_keys_by_another_quadrature():
    """With two keys f is a logistic function of ω: its moments by adaptive integration."""
    x, y = np.array([0.4]), np.array([-1.0, 0.7])
    P = softmax(np.outer(x, y), axis=1)[0]

    def density(w):
        return sum(p * norm.pdf(w, x[0] + a) for p, a in zip(P, y, strict=True))

    def first(w):
        return expit(w * (y[0] - y[1]) - (y[0] ** 2 - y[1] ** 2) / 2)

    want = [quad(lambda w, k=k: density(w) * first(w) ** k, -12, 12, epsabs=1e-13)[0] for k in (1, 2)]
    mean, variance = randomised.randomised_attention_moments(x, y)
    np.testing.assert_allclose(mean[0, 0], want[0], atol=1e-10)
    np.testing.assert_allclose(variance[0], want[1] - want[0] ** 2, atol=1e-10)


@pytest.mark.parametrize("d", [16, 64])
def test_noise_of_variance_one_in_units_of_q_and_k_is_biased(d):
    """As published: ω = q + k_l + N(0, I) before the scale, so in our units the noise has the deviation d^(-1/4)."""
    x, y = 1.0, np.array([-1.0, 1.0])
    P = softmax(x * y)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)

    def mean(deviation):
        omega = x + y[:, None] + deviation * nodes
        f = softmax(omega[..., None] * y - y**2 / 2, axis=-1)
        return np.einsum("l,t,ltj->j", P, weights / weights.sum(), f)

    np.testing.assert_allclose(mean(1.0), P, atol=1e-10)
    assert abs(mean(d**-0.25) - P).max() > 0.01


def test_error_bound_and_theory():
    x, y = draw(0, 6), draw(1, 5)
    P = softmax(np.outer(x, y), axis=1)
    _, variance = randomised.randomised_attention_moments(x, y)
    bound = randomised.randomised_attention_error_bound(np.sum(P**2), 6, 2)
    assert np.sqrt(variance.sum() / 2) < bound
    np.testing.assert_allclose(bound**2, np.sum(P * (1 - P)) / 2, rtol=1e-12)  # m keys drawn from P
    promise = randomised.randomised_attention_theory(np.sum(P**2), 2, (6, 5))
    assert float(promise.error("frobenius")) == float(bound)
    with pytest.raises(ValueError, match="'frobenius' only"):
        promise.error("nuclear")
    with pytest.raises(ValueError, match="m must be"):
        randomised.randomised_attention_theory(1.0, 0, (6, 5))
