"""Remainders, roots and the normalisation against extended precision, dense grids and worst cases that attain them."""

import mpmath
import numpy as np
import pytest

import nla_llm as nl
from nla_llm.theory import polynomials as poly

EPS = np.finfo(np.float64).eps


def taylor(u, p):
    """Σ_{k≤p} u^k/k! in the working precision of mpmath."""
    return mpmath.fsum(mpmath.mpf(u) ** k / mpmath.factorial(k) for k in range(p + 1))


# -- errors on an interval ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [0.0, 1e-3, 0.5, 4.0, 30.0])
@pytest.mark.parametrize("p", [0, 1, 2, 5, 8, 40])
def test_taylor_remainder_is_attained_at_the_right_end(p, b):
    with mpmath.workdps(250):
        ends = [abs(mpmath.exp(mpmath.mpf(u)) - taylor(u, p)) for u in np.linspace(-b, b, 21)]
        assert max(ends) == ends[-1]
        assert float(poly.taylor_remainder(b, p)) == pytest.approx(float(ends[-1]), rel=1e-12, abs=0)


@pytest.mark.parametrize("b", [0.3, 4.0, 20.0])
@pytest.mark.parametrize("p", [0, 1, 3, 8, 30])
def test_chebyshev_remainder_is_the_largest_error_of_the_cut_series(p, b):
    """The series by interpolation at so many nodes that nothing is left, cut, on a grid with both ends."""
    with mpmath.workdps(40):
        count = p + 80
        nodes = [mpmath.cos(mpmath.pi * (2 * i + 1) / (2 * count)) for i in range(count)]
        values = [mpmath.exp(b * x) for x in nodes]
        coefficients = [
            2 * mpmath.fsum(v * mpmath.chebyt(k, x) for v, x in zip(values, nodes, strict=True)) / count
            for k in range(p + 1)
        ]
        coefficients[0] /= 2
        errors = [
            abs(mpmath.exp(b * x) - mpmath.fsum(c * mpmath.chebyt(k, x) for k, c in enumerate(coefficients)))
            for x in map(mpmath.mpf, np.linspace(-1, 1, 41))
        ]
        assert max(errors) == errors[-1]
        assert float(poly.chebyshev_remainder(b, p)) == pytest.approx(float(errors[-1]), rel=1e-11)


def test_chebyshev_against_taylor():
    """At the same degree the cut Chebyshev series is better by about 2^p; both fall to nothing."""
    assert poly.taylor_remainder(4.0, 8) / poly.chebyshev_remainder(4.0, 8) > 200
    p = np.arange(0, 60, 4)
    for remainder in (poly.taylor_remainder, poly.chebyshev_remainder):
        errors = np.array([float(remainder(4.0, int(i))) for i in p])
        assert np.all(np.diff(errors) < 0)
        assert errors[-1] < 1e-30
    np.testing.assert_allclose(
        poly.chebyshev_remainder([1.0, 4.0], 3), [poly.chebyshev_remainder(b, 3) for b in (1, 4)]
    )


@pytest.mark.parametrize("tolerance", [10.0, 1e-3, 1e-12])
@pytest.mark.parametrize("b", [0.0, 0.5, 4.0, 30.0])
def test_least_degree_by_the_errors_themselves(b, tolerance):
    """Taylor at u = B in 100 digits; the interpolant in Chebyshev nodes is at most twice as far as the cut series."""
    with mpmath.workdps(100):
        p = next(p for p in range(500) if abs(mpmath.exp(b) - taylor(b, p)) <= tolerance)
    assert poly.least_degree(b, tolerance) == p
    better = poly.least_degree(b, tolerance, basis="chebyshev")
    assert better <= p
    if b and tolerance > 1e-10:
        nodes = np.polynomial.chebyshev.chebinterpolate(lambda x: np.exp(b * x), better)
        x = np.linspace(-1, 1, 2001)
        error = np.abs(np.polynomial.chebyshev.chebval(x, nodes) - np.exp(b * x)).max()
        assert error <= 2 * tolerance + 1e3 * EPS * np.exp(b)


# -- the ratio and the roots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0, 1, 2, 3, 8, 21])
def test_ratio_of_the_taylor_polynomial(p):
    u = np.array([-60.0, -7.3, -1.0, -1e-3, 0.0, 1e-3, 1.0, 7.3, 60.0])
    with mpmath.workdps(60):
        want = [float(taylor(x, p) * mpmath.exp(-mpmath.mpf(x))) for x in u]
    np.testing.assert_allclose(poly.taylor_ratio(u, p), want, rtol=1e-12, atol=4 * EPS)


@pytest.mark.parametrize(("p", "root"), [(1, -1.0), (3, -1.5961), (5, -2.1806), (7, -2.7590)])
def test_odd_degrees_have_one_real_root(p, root):
    found = poly.taylor_root(p)
    assert found == pytest.approx(root, abs=5e-5)
    assert abs(taylor(found, p)) < 1e-13
    assert real_roots(p) == 1


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_even_degrees_have_none(p):
    assert poly.taylor_root(p) is None
    assert real_roots(p) == 0
    assert np.all(poly.taylor_ratio(np.linspace(-50, 50, 1001), p) > 0)


def real_roots(p):
    """Number of real roots by a Sturm chain, in exact arithmetic."""
    import sympy

    u = sympy.symbols("u")
    return sympy.Poly(sum(u**k / sympy.factorial(k) for k in range(p + 1)), u).count_roots()


# -- normalisation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 0.9])
def test_normalised_entries_stay_within_the_bound_and_approach_it(epsilon):
    rng = np.random.default_rng(0)
    bound = float(poly.normalised_entry_bound(epsilon))
    for _ in range(200):
        p = rng.dirichlet(np.full(6, 0.3)) + 1e-12
        w = p * (1 + epsilon * rng.choice([-1.0, 1.0], 6))
        assert np.max(np.abs(w / w.sum() / (p / p.sum()) - 1)) <= bound * (1 + 1e-12)
    p = np.array([1e-9, 1 - 1e-9])
    w = p * (1 + epsilon * np.array([1.0, -1.0]))
    assert w[0] / w.sum() / p[0] - 1 == pytest.approx(bound, rel=1e-6)


def test_reweighting_bounds_hold_and_are_attained():
    rng = np.random.default_rng(1)
    for spread in (0.01, 0.5, 3.0):
        for _ in range(300):
            p = rng.dirichlet(np.full(rng.integers(2, 9), 10.0 ** rng.uniform(-1, 1)))
            g = np.exp(spread * rng.standard_normal(p.size))
            error = g * p / (g @ p) - p
            bounds = poly.reweighting_bounds(g.min(), g.max(), largest=p.max(), norm=np.linalg.norm(p))
            assert np.abs(error).max() <= bounds.entry * (1 + 1e-12)
            assert np.linalg.norm(error) <= bounds.two_norm * (1 + 1e-12)
    kappa = 5.0  # two entries whose ratio turns round attain the total variation
    p = np.array([1.0, kappa**0.5]) / (1 + kappa**0.5)
    error = p * [kappa, 1] / (p @ [kappa, 1]) - p
    bounds = poly.reweighting_bounds(1.0, kappa, largest=p.max(), norm=np.linalg.norm(p))
    assert np.abs(error).max() == pytest.approx(float(bounds.entry), rel=1e-12)
    assert np.linalg.norm(error) == pytest.approx(float(bounds.two_norm), rel=1e-12)


# -- the promise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["plain", "causal", "masked"])
@pytest.mark.parametrize("scale", [0.05, 0.5, -0.3])
@pytest.mark.parametrize("p", [1, 2, 4, 7])
def test_the_error_of_taylor_attention_is_within_the_promise(p, scale, structure, monkeypatch):
    """The polynomial written out; a bound that is more than 100 times too large at small logits would say nothing."""
    monkeypatch.setattr(poly, "_ROWS", 32)
    rng, n = np.random.default_rng(p), 70
    q, k = rng.standard_normal((2, 2, n, 3))
    options = {"causal": {"causal": True}, "masked": {"key_mask": np.arange(n) % 3 > 0}}.get(structure, {})
    problem = nl.AttentionProblem(q, k, scale=scale, **options)
    u = scale * q @ np.swapaxes(k, -1, -2)
    visible = np.tri(n) if structure == "causal" else 1.0 * options.get("key_mask", np.ones(n))
    kernel = visible * np.polynomial.polynomial.polyval(u, 1 / np.cumprod([1.0, *range(1, p + 1)]))
    error = kernel / kernel.sum(axis=-1, keepdims=True) - problem.exact().dense()
    promise = poly.taylor_theory(q, k, scale=scale, degree=p, **options)
    measured = {
        "max": np.abs(error).max(axis=(-1, -2)),
        "frobenius": np.linalg.norm(error, axis=(-2, -1)),
        "spectral": np.linalg.norm(error, 2, axis=(-2, -1)),
        "nuclear": np.linalg.norm(error, "nuc", axis=(-2, -1)),
    }
    for norm, size in measured.items():
        assert promise.error(norm).shape == (2,)
        assert np.all(size <= promise.error(norm) + 1e3 * EPS)
    if scale == 0.05:
        assert np.all(promise.error("frobenius") <= 100 * measured["frobenius"] + 1e3 * EPS)


def test_beyond_the_root_of_an_odd_degree_nothing_is_promised():
    q = np.array([[2.0], [1.0]])
    k = np.array([[-1.0], [1.0]])
    assert poly.taylor_theory(q, k, scale=1.0, degree=1).error("max") == np.inf
    assert poly.taylor_theory(0.4 * q, k, scale=1.0, degree=1).error("max") < 1
    assert poly.taylor_theory(q, k, scale=1.0, degree=2).error("max") < 1


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: poly.taylor_remainder(-1.0, 2), "bound must be"),
        (lambda: poly.chebyshev_remainder(np.nan, 2), "bound must be"),
        (lambda: poly.taylor_root(1.5), "degree must be"),
        (lambda: poly.least_degree(1.0, 0.0), "tolerance must be"),
        (lambda: poly.least_degree(800.0, 1e-3), "bound must be at most 600"),
        (lambda: poly.least_degree(1.0, 0.1, basis="legendre"), "basis must be"),
        (lambda: poly.normalised_entry_bound(1.0), "epsilon must be in"),
        (
            lambda: poly.taylor_theory(np.ones((2, 1)), np.ones((2, 1)), scale=1.0, degree=2).error("two"),
            "norm must be",
        ),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_remainders_of_wide_intervals_are_numbers():
    assert poly.taylor_remainder(750.0, 3000) == 0  # 1e-506, not infinity times zero
    assert poly.chebyshev_remainder(750.0, 3000) == 0
    assert poly.taylor_remainder(800.0, 10) == np.inf
