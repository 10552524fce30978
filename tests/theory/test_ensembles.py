"""Ensembles of directions: covariances against series, quadrature, enumeration of all signs, and Monte Carlo."""

import itertools
import math
from functools import cache

import mpmath
import numpy as np
import pytest
from scipy.linalg import hadamard
from scipy.special import hyp1f1
from scipy.stats import ortho_group

from nla_llm.theory import ensembles, kernel_theory
from nla_llm.theory._blocks import fixed_norm_log_variance, log_hyp0f1, oscillating_hyp0f1
from nla_llm.theory.random_features import ISOTROPIC, pair_count, relative_variance

KINDS = ("trigonometric", "positive", "hyperbolic")
SIGN = {"trigonometric": -1, "positive": 1, "hyperbolic": 1}


def ratios(kind, phase, norm):
    """f/SM of a frequency as a function of ω·z and |z|², z = x + y, for cosines x − y."""
    if kind == "positive":
        return np.exp(phase - norm / 2)
    return np.cosh(phase) * np.exp(-norm / 2) if kind == "hyperbolic" else np.cos(phase) * np.exp(norm / 2)


# -- simplex blocks ----------------------------------------------------------------------------------------------------


@cache
def pair_moments(d, cosine, count):
    """E (r₁² + r₂² + 2γ r₁r₂)^k for independent χ_d numbers, multiplied out into moments of χ_d."""
    half = mpmath.mpf(d) / 2
    moment = [2 ** (mpmath.mpf(p) / 2) * mpmath.gamma(half + mpmath.mpf(p) / 2) / mpmath.gamma(half)
              for p in range(2 * count + 1)]  # fmt: skip
    power, out = [(2 * cosine) ** n for n in range(count)], []
    for k in range(count):
        terms = (
            math.comb(k, n) * math.comb(k - n, i) * power[n]
            * moment[2 * i + n] * moment[2 * (k - n - i) + n]
            for n in range(k + 1) for i in range(k - n + 1)
        )  # fmt: skip
        out.append(mpmath.fsum(terms))
    return out


def series_covariance(kind, a, d, cosine, count=36):
    """The series of Reid et al. in 40 digits: Σ (τ/4)^k E|ω₁ + ω₂|^(2k)/(k! (d/2)_k), over SM², minus one."""
    tau = mpmath.mpf(a) * SIGN[kind]
    signs = (1,) if kind == "positive" else (1, -1)
    total = [mpmath.fsum((tau / 4) ** k * moment / (mpmath.factorial(k) * mpmath.rf(mpmath.mpf(d) / 2, k))
                         for k, moment in enumerate(pair_moments(d, s * cosine, count))) for s in signs]  # fmt: skip
    return mpmath.exp(-tau) * mpmath.fsum(total) / len(signs) - 1


@pytest.mark.parametrize("d", [2, 3, 4, 16])
def test_simplex_variance_is_the_published_series(d):
    with mpmath.workdps(40):
        cosine = -1 / mpmath.mpf(d - 1)
        for kind, a, m in itertools.product(KINDS, (1e-7, 0.01, 0.9, 2.5), (2, d, 2 * d + 1)):
            single = mpmath.expm1(a) if kind == "positive" else mpmath.cosh(a) - 1
            want = single / m + pair_count(m, d) * series_covariance(kind, a, d, cosine) / m**2
            got = relative_variance(kind, a, m=m, d=d, directions="simplex")
            assert got == pytest.approx(float(want), rel=1e-9), (kind, a, m)


@pytest.mark.parametrize(("d", "a"), [(2, 40), (2, 250), (5, 40)])
def test_simplex_variance_for_large_norms_by_adaptive_quadrature(d, a):
    """Over σ = sin φ in 22 digits, φ of density ∝ sin^(d−1): another rule than the Gaussian one of the code."""
    with mpmath.workdps(22):
        scale = mpmath.quad(lambda p: mpmath.sin(p) ** (d - 1), [0, mpmath.pi / 2])
        for kind in KINDS:
            tau, covariance = mpmath.mpf(a) * SIGN[kind], mpmath.mpf(0)
            signs = (-1,) if kind == "positive" else (-1, 1)
            for s in signs:
                c = mpmath.mpf(s) / (d - 1)

                def integrand(p, c=c, tau=tau):
                    reach = (1 + c * mpmath.sin(p)) * tau / 2
                    return mpmath.sin(p) ** (d - 1) * mpmath.hyp1f1(d, mpmath.mpf(d) / 2, reach) * mpmath.exp(-tau)

                covariance += mpmath.quad(integrand, mpmath.linspace(0, mpmath.pi / 2, 5)) / scale / len(signs)
            single = mpmath.expm1(a) if kind == "positive" else mpmath.cosh(a) - 1
            want = mpmath.log(single / d + (1 - mpmath.mpf(1) / d) * (covariance - 1))
            got = np.log(relative_variance(kind, a, m=d, d=d, directions="simplex"))
            assert got == pytest.approx(float(want), rel=1e-11), kind


def test_published_ratios_of_simplex_to_independent():
    published = {(4, 1): 0.5103, (16, 1): 0.2736, (64, 1): 0.1705, (16, 8): 0.9961, (64, 8): 0.9915}
    for (d, t), ratio in published.items():
        got = relative_variance("positive", t, m=d, d=d, directions="simplex") / relative_variance("positive", t, m=d)
        assert got == pytest.approx(ratio, abs=5e-5)


@pytest.mark.parametrize("d", [2, 3, 8, 64])
def test_simplex_then_orthogonal_then_independent(d):
    t = np.geomspace(1e-3, 60, 30)
    simplex, orthogonal, iid = (
        relative_variance("positive", t, m=d, d=d, directions=e) for e in ("simplex", "orthogonal", "iid")
    )
    assert np.all(simplex <= orthogonal)
    assert np.all(orthogonal <= iid)
    assert np.all(simplex[t < 5] < 0.999 * orthogonal[t < 5])


def rotated_blocks(rng, draws, m, d, directions):
    """Rows from SciPy's Haar sampler, (draws, m, d)."""
    u = np.concatenate([ortho_group(d, seed=rng).rvs(draws) for _ in range(-(-m // d))], axis=1)
    if directions == "simplex":
        blocks = u.reshape(draws, -1, d, d)
        u = (np.sqrt(d / (d - 1)) * (blocks - blocks.mean(axis=2, keepdims=True))).reshape(draws, -1, d)
    lengths = np.sqrt(d) if directions == "regularised" else np.sqrt(rng.chisquare(d, size=(draws, m, 1)))
    return u[:, :m] * lengths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", ["simplex", "regularised"])
@pytest.mark.parametrize("m", [3, 8])  # one block, two blocks and a remainder at d = 3
def test_blocks_by_monte_carlo(kind, directions, m):
    rng, d, draws = np.random.default_rng(11), 3, 60_000
    z = np.array([0.8, 0.5, -0.3])
    f = ratios(kind, rotated_blocks(rng, draws, m, d, directions) @ z, z @ z)
    mean = float(ensembles.fixed_norm_mean(z @ z, d, features=kind)) if directions == "regularised" else 1.0
    estimate = f.mean(axis=1)
    assert abs(estimate.mean() - mean) < 4 * estimate.std() / np.sqrt(draws)
    squares = (estimate - mean) ** 2
    predicted = float(relative_variance(kind, z @ z, m=m, d=d, directions=directions))
    assert abs(squares.mean() - predicted) < 4 * squares.std() / np.sqrt(draws)
    pairs = squares - np.sum((f - mean) ** 2, axis=1) / m**2  # what differs from independent directions, alone
    assert abs(pairs.mean()) > 6 * pairs.std() / np.sqrt(draws)  # the check sees the blocks


# -- fixed norms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 3, 16, 64, 301])
def test_variance_of_fixed_norms_in_sixty_digits(kind, d):
    for a, m in itertools.product((1e-9, 1e-3, 1.9, 2.1, 20, 400), (1, d, 2 * d, 2 * d + 3)):
        pairs = pair_count(m, d)
        with mpmath.workdps(60):
            tau, size = mpmath.mpf(a) * SIGN[kind], mpmath.mpf(d)
            second, pair, mean = (
                mpmath.exp(-c * tau) * mpmath.hyp0f1(size / 2, size * tau * b)
                for b, c in ((1, 1), (0.5, 1), (0.25, mpmath.mpf(1) / 2))
            )
            second = second if kind == "positive" else (second + mpmath.exp(-tau)) / 2
            want = (second - mean**2) / m + mpmath.mpf(pairs) / m**2 * (pair - mean**2)
            if abs(want) < mpmath.mpf(10) ** -50 * second:
                want = mpmath.mpf(0)  # exactly: in one dimension a direction of fixed norm is a sign
            want = float(mpmath.log(want)) if want else -np.inf
        got = float(fixed_norm_log_variance(kind, np.asarray(a, dtype=float), d, m=m, pairs=pairs))
        assert got == want if np.isinf(want) else abs(got - want) < 1e-8, (a, m)


def test_full_blocks_of_fixed_norms_have_no_variance_of_second_order():
    """Σ (ω_i·z)² = d |z|² in a full block: hyperbolic features keep terms of fourth order in t alone."""
    t = np.array([1e-3, 1e-2])
    full, cut = (relative_variance("hyperbolic", t, m=m, d=8, directions="regularised") for m in (8, 7))
    assert np.log10(full[1] / full[0]) == pytest.approx(4, abs=0.05)
    assert np.log10(cut[1] / cut[0]) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("d", [1, 2, 16, 64, 65])
def test_bias_of_fixed_norms(d):
    t = np.array([0.0, 1e-4, 1.0, 8.0, 50.0, 1300.0])
    with mpmath.workdps(40):
        want, waves = (
            [float(mpmath.exp(-s * mpmath.mpf(v) / 2) * mpmath.hyp0f1(mpmath.mpf(d) / 2, s * mpmath.mpf(v) * d / 4))
             for v in t] for s in (1, -1)
        )  # fmt: skip
    np.testing.assert_allclose(ensembles.fixed_norm_mean(t, d), want, rtol=1e-10, atol=1e-18)
    got = ensembles.fixed_norm_mean(t, d, features="trigonometric")
    np.testing.assert_allclose(got * np.exp(-t / 2), np.array(waves) * np.exp(-t / 2), rtol=0, atol=1e-13)
    assert 1 - ensembles.fixed_norm_mean(1e-3, d) == pytest.approx(1e-6 / (4 * (d + 2)), rel=1e-2)


def test_bessel_functions_of_large_arguments():
    z = np.array([0.0, 1e-6, 50.0, 9.9e4, 1.1e5, 4e6])
    with mpmath.workdps(40):
        for d in (1, 6, 64):
            want = [float(mpmath.log(mpmath.hyp0f1(mpmath.mpf(d) / 2, v))) for v in z]
            np.testing.assert_allclose(log_hyp0f1(d / 2, z), want, rtol=1e-12, atol=1e-15)
            waves = [float(mpmath.hyp0f1(mpmath.mpf(d) / 2, -v)) for v in z[:4]]
            np.testing.assert_allclose(oscillating_hyp0f1(d, z[:4]), waves, rtol=0, atol=1e-12)


# -- signs -------------------------------------------------------------------------------------------------------------


def all_signs(count):
    return np.array(list(itertools.product((-1, 1), repeat=count)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("d", "m"), [(1, 2), (2, 3), (3, 4), (3, 6), (4, 1), (4, 3), (4, 4), (4, 7)])
def test_mean_and_variance_of_signs_by_enumeration_of_all_of_them(kind, d, m):
    size = 1 << (d - 1).bit_length()
    blocks = -(-m // size)
    signs = all_signs(blocks * size).reshape(-1, blocks, 1, size)
    omega = (hadamard(size) * signs).reshape(len(signs), -1, size)[:, :m, :d]
    for z in (np.linspace(-1.1, 0.7, d), np.linspace(2.0, 1.0, d), 0.01 * np.linspace(1, 2, d)):
        estimates = ratios(kind, omega @ z, z @ z).mean(axis=1)
        assert ensembles.sign_mean(kind, z) == pytest.approx(estimates.mean(), rel=1e-12)
        got = np.exp(ensembles.sign_log_variance(kind, z, m=m))
        rounding = 1e-14 * np.mean(estimates**2) + (1e-15 * np.exp(z @ z) if kind == "trigonometric" else 0.0)
        assert got == pytest.approx(np.mean((estimates - estimates.mean()) ** 2), rel=1e-9, abs=rounding)


def test_signs_are_biased_downwards_and_by_the_fourth_powers():
    z = np.random.default_rng(0).standard_normal((50, 7))
    assert np.all(ensembles.sign_mean("positive", z) < 1)
    small = 0.05 * z
    np.testing.assert_allclose(
        1 - ensembles.sign_mean("positive", small), np.sum(small**4, axis=-1) / 12, rtol=0.05
    )  # log cosh z − z²/2 = −z⁴/12 + …


def test_all_rows_of_a_block_of_signs_agree_in_the_first_coordinate():
    first, second = np.eye(8)[:2]
    alone, block, two = (np.exp(ensembles.sign_log_variance("positive", 0.5 * first, m=m)) for m in (1, 8, 16))
    assert block == pytest.approx(alone, rel=1e-12)
    assert two == pytest.approx(alone / 2, rel=1e-12)
    # along another axis half of the rows are +z, half −z, whatever the sign: the mean over a block is cosh z exactly
    assert np.exp(ensembles.sign_log_variance("positive", 0.5 * second, m=8)) < 1e-15


def test_fixed_norms_pay_for_their_bias_where_exponents_are_large():
    """Mean square error over A² at d = m = 64: bias included, it is below that of every unbiased ensemble."""
    for t, (fixed, unbiased) in {4.0: (0.308, 0.685), 8.0: (3.60, 46.2), 16.0: (59.0, 1.388e5)}.items():
        bias = ensembles.fixed_norm_mean(t, 64) - 1
        error = relative_variance("positive", t, m=64, d=64, directions="regularised") + bias**2
        best = min(relative_variance("positive", t, m=64, d=64, directions=e) for e in ("orthogonal", "simplex"))
        assert error == pytest.approx(fixed, rel=5e-3)
        assert best == pytest.approx(unbiased, rel=5e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_variance_of_signs_at_large_norms_does_not_overflow(kind):
    z = np.full((2, 64), 4.0)
    z[1] *= 3
    got = ensembles.sign_log_variance(kind, z, m=64)
    assert np.all(np.isfinite(got))
    if kind == "positive":  # one row dominates: Π cosh 2z / m
        np.testing.assert_allclose(got, 64 * np.log(np.cosh(2 * z[:, 0])) - 64 * z[:, 0] ** 2 - np.log(64), rtol=1e-3)


# -- products of three Hadamard matrices -------------------------------------------------------------------------------


@cache
def rows_of_products(size):
    """All rows H D₃ H D₂ H can have, up to signs of columns, with their multiplicities; D₁ gives these signs."""
    h = hadamard(size) / np.sqrt(size)
    signs = all_signs(size)
    rows = ((h[0] * signs) @ h)[:, None, :] * signs @ h
    return np.unique(np.abs(rows.reshape(-1, size)).round(12), axis=0, return_counts=True)


def enumerated_mean(z, size):
    """E Â/A over all signs and χ norms: E e^(rp) = ₁F₁(D/2; ½; p²/2) for the projection p of z on a row."""
    rows, counts = rows_of_products(size)
    padded = np.zeros(size)
    padded[: len(z)] = z
    projections = rows @ (all_signs(size) * padded).T
    return float(counts @ hyp1f1(size / 2, 0.5, projections**2 / 2).mean(axis=1) / counts.sum() * np.exp(-z @ z / 2))


@pytest.mark.parametrize("size", [4, 8])
def test_fourth_moments_of_products_by_enumeration(size):
    rows, counts = rows_of_products(size)
    weights = counts / counts.sum()
    moments = (rows**2).T @ (weights[:, None] * rows**2) * size**2
    want = np.full((size, size), 1 - 2 / size + 4 / size**2)
    np.fill_diagonal(want, 3 - 6 / size + 4 / size**2)
    np.testing.assert_allclose(moments, want, rtol=1e-10)


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("cut", [0, 1])
def test_bias_of_products_by_enumeration(size, cut):
    rng = np.random.default_rng(size)
    for direction in (rng.standard_normal(size - cut), np.eye(size - cut)[0], np.ones(size - cut)):
        u = direction / np.linalg.norm(direction)
        coarse, fine = (enumerated_mean(h * u, size) - ensembles.hadamard_mean(h * u) for h in (0.6, 0.3))
        assert abs(fine) < abs(coarse) / 2**5.5 + 1e-14  # sixth order
        bias = enumerated_mean(0.3 * u, size) - 1
        assert abs(fine) < 0.1 * abs(bias)


def test_figures_of_the_bias_of_products():
    """At |z| = 1, along an axis and along the diagonal: the extremes of Σ z_l⁴."""
    figures = {4: (-0.00970, 0.01028), 8: (-0.00360, 0.00127)}  # they stand in the docstring of hadamard_mean
    for size, (axis, diagonal) in figures.items():
        assert enumerated_mean(np.eye(size)[0], size) - 1 == pytest.approx(axis, abs=5e-6)
        assert enumerated_mean(np.full(size, size**-0.5), size) - 1 == pytest.approx(diagonal, abs=5e-6)


# -- theory of a problem -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [*ISOTROPIC, "hadamard", "hadamard1", "sobol"])
def test_theory_of_a_problem_by_blocks_of_rows(kind, directions):
    rng = np.random.default_rng(1)
    q, k = 0.5 * rng.standard_normal((2, 6, 3)), 0.5 * rng.standard_normal((1, 5, 3))
    promise = kernel_theory(q, k, scale=0.5, features=kind, m=9, directions=directions)
    assert promise.shape == promise.mean().shape == (2, 6, 5)
    z = np.sqrt(0.5) * (q[:, :, None] + SIGN[kind] * k[:, None])
    squares = np.sum(z**2, axis=-1)
    mean = {
        "regularised": lambda: ensembles.fixed_norm_mean(squares, 3, features=kind),
        "hadamard1": lambda: ensembles.sign_mean(kind, z),
        "hadamard": lambda: ensembles.hadamard_mean(z),
    }.get(directions, lambda: np.ones(squares.shape))()
    np.testing.assert_allclose(promise.mean(), mean, rtol=1e-12)
    np.testing.assert_array_equal(promise.mean(2, 4), promise.mean()[:, 2:4])
    assert promise.unbiased is (directions in {"iid", "orthogonal", "simplex", "sobol"})
    if directions in {"hadamard", "sobol"}:
        assert promise.covers == {"mean"}
        return
    log_variance = (
        ensembles.sign_log_variance(kind, z, m=9)
        if directions == "hadamard1"
        else np.log(relative_variance(kind, squares, m=9, d=3, directions=directions))
    )
    np.testing.assert_allclose(promise.log_relative_variance(), log_variance, rtol=1e-10)
    np.testing.assert_array_equal(promise.log_relative_variance(2, 4), promise.log_relative_variance()[:, 2:4])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: kernel_theory(np.eye(2), np.eye(2), scale=1.0, features="positive", m=2, directions="halton"),
         "directions must be one of iid"),
        (lambda: relative_variance("positive", 1.0, m=2, d=2, directions="sobol"), "one of iid, orthogonal"),
        (lambda: ensembles.fixed_norm_mean(-1.0, 3), "squared_norm must be finite"),
        (lambda: ensembles.sign_mean("gaussian", [1.0]), "features must be one of"),
        (lambda: ensembles.sign_log_variance("positive", [1.0], m=0), "m must be a whole number"),
    ],
)  # fmt: skip
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
