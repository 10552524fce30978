"""Closed forms of random features, against quadrature, mpmath, enumeration and, for small norms, Monte Carlo."""

import itertools

import mpmath
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import ortho_group

from nla_llm.theory import kernel_theory
from nla_llm.theory import random_features as rf
from nla_llm.theory._confluent import pair_covariance

KINDS = ("trigonometric", "positive", "hyperbolic")
SIGN = {"trigonometric": -1, "positive": 1, "hyperbolic": 1}


def values(kind, omega, x, y):
    """f(ω)/SM for each frequency (last axis of ω is d), written from the definitions of the features."""
    a, b = omega @ x, omega @ y
    if kind == "positive":
        f = np.exp(a - x @ x / 2) * np.exp(b - y @ y / 2)
    elif kind == "hyperbolic":
        f = np.exp(-(x @ x + y @ y) / 2) * (np.exp(a + b) + np.exp(-a - b)) / 2
    else:
        f = np.exp((x @ x + y @ y) / 2) * (np.cos(a) * np.cos(b) + np.sin(a) * np.sin(b))
    return f / np.exp(x @ y)


def argument(kind, x, y):
    return float(np.sum((x + SIGN[kind] * y) ** 2))


def exact_pair(kind, a, d):
    """Cross moment of two rows of an orthogonal block over SM², minus one, in 60 digits."""
    with mpmath.workdps(60):
        tau = mpmath.mpf(a) * SIGN[kind]
        return mpmath.exp(-tau) * mpmath.hyp1f1(d, mpmath.mpf(d) / 2, tau / 2) - 1


def exact_variance(kind, a, m, d, pairs):
    with mpmath.workdps(60):
        a = mpmath.mpf(a)
        single = mpmath.expm1(a) if kind == "positive" else mpmath.cosh(a) - 1
        return single / m + pairs * exact_pair(kind, a, d) / m**2


@pytest.mark.parametrize("kind", KINDS)
def test_independent_variance_is_that_of_gauss_hermite_quadrature(kind):
    x, y = np.array([0.7, -0.3]), np.array([0.4, 0.9])
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    omega = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1)
    w = np.multiply.outer(weights, weights)
    f = values(kind, omega, x, y)
    assert np.sum(w * f) == pytest.approx(1, rel=1e-13)
    assert rf.relative_variance(kind, argument(kind, x, y), m=1) == pytest.approx(np.sum(w * f**2) - 1, rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [2, 3, 4, 16, 33, 64, 128])
def test_orthogonal_variance_agrees_with_sixty_digits(kind, d):
    for a, m in itertools.product((1e-8, 1e-3, 0.3, 0.999, 1.001, 5, 20, 60, 300), (2, d, 2 * d, 2 * d + 3)):
        full, rest = divmod(m, d)
        want = mpmath.log(exact_variance(kind, a, m, d, full * d * (d - 1) + rest * (rest - 1)))
        got = float(rf.log_relative_variance(kind, a, m=m, d=d, directions="orthogonal"))
        assert abs(got - float(want)) < 1e-10, (a, m)


@pytest.mark.parametrize("d", [3, 4, 7])
def test_large_arguments_neither_overflow_nor_lose_the_logarithm(d):
    for kind in KINDS:
        a = np.array([800.0, 1500.0])
        got = rf.log_relative_variance(kind, a, m=3, d=d, directions="orthogonal")
        want = [float(mpmath.log(exact_variance(kind, v, 3, d, 6))) for v in a] if d >= 3 else []
        np.testing.assert_allclose(got, want, rtol=1e-12)
        assert np.all(np.isinf(rf.relative_variance(kind, a, m=3, d=d, directions="orthogonal")))


def test_zero_norm_has_no_variance_and_tiny_norms_keep_the_limit():
    for kind in KINDS:
        tiny = rf.log_relative_variance(kind, [0.0, 1e-170], m=4, d=4, directions="orthogonal")
        assert tiny[0] == -np.inf
        limit = np.log(1 / 4 if kind == "positive" else (1 / 8) * (3 / 6))  # t²/2 (1/d − (d−1)/(d(d+2)))
        assert tiny[1] - limit == pytest.approx(np.log(1e-170) * (1 if kind == "positive" else 2), rel=1e-12)


def orthogonal_rows(rng, draws, m, d):
    """Blocks of d orthogonal rows with χ_d norms, and a remainder, by SciPy's Haar sampler."""
    blocks = [ortho_group(d, seed=rng).rvs(draws).reshape(draws, d, d) for _ in range(-(-m // d))]
    rows = np.concatenate(blocks, axis=1)[:, :m]
    return rows * np.sqrt(rng.chisquare(d, size=(draws, m)))[..., None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [3, 8])  # one block, two blocks and a remainder at d = 3
def test_orthogonal_blocks_by_monte_carlo(kind, m):
    rng, d, draws = np.random.default_rng(7), 3, 100_000
    x, y = np.array([0.5, 0.1, -0.2]), np.array([0.3, 0.4, 0.5]) * (1 if kind == "positive" else -1)
    f = values(kind, orthogonal_rows(rng, draws, m, d), x, y) - 1
    estimate = f.mean(axis=1)
    assert abs(estimate.mean()) < 4 * estimate.std() / np.sqrt(draws)
    a = argument(kind, x, y)
    predicted, independent = (
        float(rf.relative_variance(kind, a, m=m, d=d, directions=directions)) for directions in ("orthogonal", "iid")
    )
    squares = estimate**2
    assert abs(squares.mean() - predicted) < 4 * squares.std() / np.sqrt(draws)
    pairs = squares - np.sum(f**2, axis=1) / m**2  # what differs from independent frequencies, alone
    deviation = pairs.std() / np.sqrt(draws)
    assert abs(pairs.mean() - (predicted - independent)) < 4 * deviation
    assert abs(pairs.mean()) > 6 * deviation  # the check can tell the two ensembles apart


def test_orthogonal_block_covariance_by_quadrature_over_the_sphere():
    """d = 2: ω₁ = r₁(cos a, sin a), ω₂ = ±r₂(−sin a, cos a), r ~ χ₂; three one-dimensional rules."""
    r, w = np.polynomial.laguerre.laggauss(60)  # r²/2 is exponential
    r = np.sqrt(2 * r)
    a = 2 * np.pi * np.arange(64) / 64
    for t in (0.5, 4.0):
        first = np.cosh(np.sqrt(t) * np.multiply.outer(r, np.cos(a))) * np.exp(-t / 2)
        second = np.cosh(np.sqrt(t) * np.multiply.outer(r, np.sin(a))) * np.exp(-t / 2)
        cross = np.mean((w @ first) * (w @ second))
        value, log_size = pair_covariance(np.asarray(t), 2)
        assert log_size == 0
        assert value == pytest.approx(cross - 1, abs=1e-9)


def test_published_ratios_of_orthogonal_to_independent():
    for (d, t), ratio in {(4, 1): 0.8866, (16, 1): 0.7818, (64, 1): 0.7311, (16, 8): 0.9967, (64, 8): 0.9931}.items():
        blocks = rf.relative_variance("positive", t, m=d, d=d, directions="orthogonal")
        got = blocks / rf.relative_variance("positive", t, m=d)
        assert got == pytest.approx(ratio, abs=5e-5)
    # trigonometric features can lose by orthogonality: the covariance at s = 10, d = 4 is positive
    assert rf.relative_variance("trigonometric", 10, m=4, d=4, directions="orthogonal") > rf.relative_variance(
        "trigonometric", 10, m=4
    )


def test_performer_theorem_2_holds_with_a_sharp_constant():
    for d, t in itertools.product((1, 2, 4, 8, 64), np.geomspace(1e-3, 60, 25)):
        for m in {1, max(1, d // 2), d}:
            independent, blocks = (
                rf.relative_variance("positive", t, m=m, d=d, directions=e) for e in ("iid", "orthogonal")
            )
            gain = (1 - 1 / m) * -pair_covariance(np.asarray(t), d)[0] if m > 1 else 0.0
            assert gain == pytest.approx(independent - blocks, abs=1e-14 * independent)
            assert gain >= rf.claimed_gain(t, m=m, d=d) * (1 - 1e-12)
    for d in (2, 8, 64):  # their ratio tends to one: no larger constant than 2/(d + 2) would do
        true = (1 - 1 / d) * -pair_covariance(np.asarray(1e-4), d)[0]
        assert true / rf.claimed_gain(1e-4, m=d, d=d) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="one block"):
        rf.claimed_gain(1.0, m=9, d=8)


def test_squared_norms_keep_relative_accuracy_and_refuse_a_negative_scale():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 1, 5, 3))
    k = -q[:, :, :4] * (1 + 1e-9)
    got = rf.squared_norms(q, np.broadcast_to(k, (2, 3, 4, 3)), scale=0.5)
    assert got.shape == (2, 3, 5, 4)
    want = 0.5 * np.sum((q[:, :, :4] + k) ** 2, axis=-1)
    np.testing.assert_allclose(np.diagonal(got, axis1=-2, axis2=-1)[:, 0, :4], want[:, 0], rtol=1e-6)
    np.testing.assert_allclose(rf.squared_norms(q, k, scale=2.0, plus=False)[1, 0], 2 * cdist(q[1, 0], k[1, 0]) ** 2)
    with pytest.raises(ValueError, match="pass −q"):
        rf.squared_norms(q, k, scale=-1.0)


def test_kernel_theory_of_a_problem_by_blocks_of_rows():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 5, 4))
    for kind in KINDS:
        promise = kernel_theory(q, k, scale=0.5, features=kind, m=9, directions="orthogonal")
        z = np.sqrt(0.5) * (q[:, :, None] + SIGN[kind] * k[:, None])
        want = rf.relative_variance(kind, np.sum(z**2, -1), m=9, d=4, directions="orthogonal")
        np.testing.assert_allclose(promise.relative_variance(), want, rtol=1e-12)
        np.testing.assert_array_equal(promise.relative_variance(2, 4), promise.relative_variance()[:, 2:4])
        assert promise.unbiased
        assert promise.shape == (2, 6, 5)


def test_trigonometric_against_positive():
    assert rf.trigonometric_to_positive(1, np.pi / 4) == pytest.approx(0.0060, abs=5e-5)
    assert rf.trigonometric_to_positive(1, 3 * np.pi / 4) == pytest.approx(17.85, abs=5e-3)
    norms = np.array([0.25, 0.5, 1, 2])
    np.testing.assert_allclose(rf.trigonometric_to_positive(norms, np.pi / 2), -np.expm1(-2 * norms**2) / 2, rtol=1e-13)
    np.testing.assert_allclose([rf.crossover_angle(v) for v in norms], [2.4970, 2.0827, 1.7426, 1.6141], atol=5e-5)


def test_growth_table_at_dimension_64():
    t = np.array([1.0, 4, 16, 64])
    ten = np.log(10)
    np.testing.assert_allclose(
        rf.log_relative_variance("positive", t, m=1) / ten, [0.235, 1.729, 6.949, 27.795], atol=5e-4
    )
    np.testing.assert_allclose(
        rf.log_relative_variance("hyperbolic", t, m=1) / ten, [-0.265, 1.420, 6.648, 27.494], atol=5e-4
    )
    np.testing.assert_allclose(rf.log_optimal_positive_variance(t, 64) / ten, [0.215, 1.549, 5.043, 13.069], atol=5e-4)
    # trigonometric: the exponents of hyperbolic features, in s = |x − y|² instead of t
    want = np.log10(np.exp(t) * np.expm1(-t) ** 2 / 2)
    np.testing.assert_allclose(rf.log_relative_variance("trigonometric", t, m=1) / ten, want, atol=1e-12)


def test_standard_normal_tokens_have_a_mean_exponent_of_twice_the_root_of_the_dimension():
    """E t = 2√d at scale 1/√d: at d = 16 a relative variance of one needs e^8 ≈ 2981 positive features."""
    q, k = np.random.default_rng(0).standard_normal((2, 600, 16))
    t = rf.squared_norms(q, k, scale=0.25)
    assert abs(t.mean() - 8) < 4 * t.std() / np.sqrt(600)
    assert rf.relative_variance("positive", 8.0, m=2980) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("rho", [0.4, 1.0, 1.7])
def test_variance_of_generalised_positive_features_by_quadrature(rho):
    """f = D exp(A|ω|² + B ω·x − |x|²/2) and the like for y, one dimension, A = (1 − 1/ρ)/8."""
    x, y, A = 0.6, 0.5, (1 - 1 / rho) / 8
    B, D = np.sqrt(1 - 4 * A), (1 - 4 * A) ** 0.25
    # The second moment has the weight exp(4Aω² − ω²/2): a Gaussian of variance 1/(1 − 8A), used as the rule's weight.
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    variance = 1 / (1 - 8 * A)
    omega = nodes * np.sqrt(variance)
    second = D**4 * np.sqrt(variance) * weights @ np.exp(2 * B * omega * (x + y) - x**2 - y**2) / np.sqrt(2 * np.pi)
    relative = second / np.exp(2 * x * y) - 1
    assert np.exp(rf.log_optimal_positive_variance((x + y) ** 2, 1, rho=rho)) == pytest.approx(relative, rel=1e-10)


def test_optimal_rho_is_the_minimiser():
    known = {(0.5, 4): 0.701562, (4, 16): 0.561553, (30, 64): 0.427640, (200, 64): 0.124557}
    for (t, d), rho in known.items():
        assert rf.optimal_rho(t, d) == pytest.approx(rho, abs=5e-7)
        grid = rho * np.linspace(0.9, 1.1, 41)
        assert np.all(
            rf.log_optimal_positive_variance(t, d) <= rf.log_optimal_positive_variance(t, d, rho=grid) + 1e-13
        )
    assert rf.optimal_rho(0.0, 8) == 1


def test_recentring_lowers_the_mean_squared_norm_by_exactly_its_claim():
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((7, 3)) + 0.8, rng.standard_normal((5, 3)) + 0.5
    c = rf.recentring_shift(q, k)
    before, after = (rf.squared_norms(q, b, scale=0.3).mean() for b in (k, k + c))
    assert before - after == pytest.approx(0.3 * np.sum((q.mean(0) + k.mean(0)) ** 2), rel=1e-12)
    for nudge in np.eye(3) * 0.1:
        assert rf.squared_norms(q, k + c + nudge, scale=0.3).mean() > after


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_theory_takes_arrays_of_any_library(library):
    xp = pytest.importorskip(library)
    q, k = np.random.default_rng(0).standard_normal((2, 4, 3))
    theirs, ours = (
        kernel_theory(a, b, scale=0.5, features="hyperbolic", m=5, directions="orthogonal").log_relative_variance(1, 3)
        for a, b in ((xp.asarray(q), xp.asarray(k)), (q, k))
    )
    np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_recentring_in_the_namespace_of_its_arguments(library):
    xp = pytest.importorskip(library)
    q, k = xp.ones((4, 2), dtype=xp.float64), xp.ones((3, 2), dtype=xp.float64)
    if library == "torch":
        q, k = q.double(), k.double()
    c = rf.recentring_shift(q, k)
    assert type(c) is type(q)
    assert np.asarray(c).tolist() == [[-2.0, -2.0]]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: rf.log_relative_variance("gaussian", 1.0, m=1), "features must be one of"),
        (lambda: rf.log_relative_variance("positive", -1.0, m=1), "squared_norm must be finite"),
        (lambda: rf.log_relative_variance("positive", 1.0, m=0), "m must be a whole number"),
        (lambda: rf.log_relative_variance("positive", 1.0, m=2, directions="orthogonal"), "needs d"),
        (lambda: rf.optimal_rho(np.nan, 3), "t must be finite"),
        (lambda: rf.log_optimal_positive_variance(1.0, 3, rho=0.0), "rho must be positive"),
        (lambda: rf.crossover_angle(0.0), "norm must be positive"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
