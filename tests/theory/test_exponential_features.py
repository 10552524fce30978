"""Closed forms of phase, exponential and hybrid features, against quadrature over the directions."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from nla_llm.theory import exponential_features as ef
from nla_llm.theory import random_features as rf

POINTS = {
    1: (np.array([0.7]), np.array([0.4])),
    2: (np.array([0.7, -0.3]), np.array([0.4, 0.9])),
    3: (np.array([0.3, -0.5, 0.2]), np.array([0.6, 0.1, -0.4])),
}


def gaussian_grid(d, reach=13.0, step=0.25):
    """Trapezoidal rule for N(0, I) in d dimensions, which converges like exp(−c/step²): nodes (k, d) and weights."""
    nodes = np.arange(-reach, reach + step / 2, step)
    weights = np.exp(-(nodes**2) / 2) * step / np.sqrt(2 * np.pi)
    grid = np.stack(np.meshgrid(*[nodes] * d, indexing="ij"), axis=-1).reshape(-1, d)
    return grid, np.prod(np.stack(np.meshgrid(*[weights] * d, indexing="ij"), axis=-1), axis=-1).ravel()


def exponential(omega, x, y, a, c=-0.5):
    """f/SM = D² exp(2ωᵀAω + ω·B(x + y) + c(|x|² + |y|²) − x·y) with a diagonal A, as the paper has it."""
    a = np.broadcast_to(a, x.shape)
    scale = np.prod(1 - 4 * a) ** 0.5
    exponent = 2 * omega**2 @ a + omega @ (np.sqrt(1 - 4 * a) * (x + y)) + c * (x @ x + y @ y) - x @ y
    return scale * np.exp(exponent)


def phase(omega, b, x, y):
    """f/SM of one random-phase feature, an array (directions, phases)."""
    a = [2**0.5 * np.cos((omega @ v)[:, None] + b) for v in (x, y)]
    return np.exp((x @ x + y @ y) / 2 - x @ y) * a[0] * a[1]


def a_of(rho):
    return (1 - 1 / np.asarray(rho)) / 8


def variance(x, y, **options):
    return float(ef.exponential_theory(x[None], y[None], **options).relative_variance()[0, 0])


# -- one direction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.12, 0.43, 1.0, 1.6])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_exponential_features_by_quadrature(d, rho):
    x, y = POINTS[d]
    omega, w = gaussian_grid(d)
    f = exponential(omega, x, y, a_of(rho))
    assert w @ f == pytest.approx(1, rel=1e-12)
    assert variance(x, y, rho=rho, m=3, directions="iid") == pytest.approx((w @ f**2 - 1) / 3, rel=1e-10)


@pytest.mark.parametrize("d", [2, 3])
def test_one_rho_a_coordinate_by_quadrature(d):
    x, y = POINTS[d]
    rho = np.array([0.2, 0.9, 1.4])[:d]
    omega, w = gaussian_grid(d)
    f = exponential(omega, x, y, a_of(rho))
    assert w @ f == pytest.approx(1, rel=1e-12)
    assert variance(x, y, rho=rho[None], m=2, directions="iid") == pytest.approx((w @ f**2 - 1) / 2, rel=1e-10)


@pytest.mark.parametrize("d", [1, 2])
def test_phase_features_by_quadrature(d):
    x, y = POINTS[d]
    omega, w = gaussian_grid(d)
    f = phase(omega, 2 * np.pi * np.arange(8) / 8, x, y)  # exact for trigonometric polynomials below degree 8
    assert w @ f.mean(1) == pytest.approx(1, rel=1e-12)
    s = np.sum((x - y) ** 2)
    assert np.exp(ef.log_phase_variance(s, m=5, d=d)) == pytest.approx((w @ (f**2).mean(1) - 1) / 5, rel=1e-10)


def test_phase_features_are_not_exact_at_equal_points_and_never_better_than_waves():
    s = np.linspace(0, 30, 61)
    waves = rf.log_relative_variance("trigonometric", s, m=7)
    assert np.all(ef.log_phase_variance(s, m=7, d=3) > waves)
    assert np.exp(ef.log_phase_variance(0.0, m=7, d=3)) == pytest.approx(1 / 14, rel=1e-14)


def test_the_constant_of_the_gaussian_kernel_is_rejected():
    """C = −1, as in circulating code: not the softmax kernel, for any A."""
    x, y = POINTS[2]
    omega, w = gaussian_grid(2)
    for rho in (0.4, 1.0):
        assert abs(w @ exponential(omega, x, y, a_of(rho), c=-1.0) - 1) > 0.5


def test_full_matrices_of_the_dense_features():
    """The second moment as FAVOR# writes it, with matrices A, B, C, against the sum over eigenvectors."""
    rng = np.random.default_rng(0)
    d = 5
    x, y = 0.4 * rng.standard_normal((2, d))
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    rho = rng.uniform(0.1, 1.2, d)
    a, eye = np.diag(a_of(rho)), np.eye(d)
    b = np.sqrt(eye - 4 * a) @ q.T
    c = -b.T @ np.linalg.inv(eye - 4 * a) @ b / 2
    middle = b.T @ np.linalg.inv(eye - 8 * a) @ b
    log_moment = np.linalg.slogdet(eye - 4 * a)[1] - np.linalg.slogdet(eye - 8 * a)[1] / 2
    log_moment += 2 * x @ (c + middle) @ x + 2 * y @ (c + middle) @ y + 4 * x @ middle @ y
    got = variance(x @ q, y @ q, rho=rho[None], m=1, directions="iid")
    assert got == pytest.approx(np.exp(log_moment - 2 * x @ y) - 1, rel=1e-12)


# -- the optimum -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "d", "rho", "a"),
    [
        (0.5, 4, 0.701562, -0.05317382),
        (4.0, 16, 0.561553, -0.09759705),
        (30.0, 64, 0.427640, -0.16730162),
        (200.0, 64, 0.124557, -0.87855984),
    ],
)
def test_known_optima(t, d, rho, a):
    best = float(rf.optimal_rho(t, d))
    assert best == pytest.approx(rho, abs=6e-7)
    assert a_of(best) == pytest.approx(a, abs=6e-9)
    phi = t / d
    assert a_of(best) == pytest.approx((1 - 2 * phi - np.sqrt((2 * phi + 1) ** 2 + 8 * phi)) / 16, rel=1e-12)
    found = minimize_scalar(lambda r: ef.log_exponential_moment(r, t, d), bounds=(1e-3, 1), method="bounded")
    assert best == pytest.approx(found.x, abs=1e-4)
    near = ef.log_exponential_moment(best * np.array([0.99, 1, 1.01]), t, d)
    assert near[1] < min(near[0], near[2])


def test_the_misquoted_optimum_is_rejected():
    """A = (1 − 2φ − √…)/8 with φ = t, as in circulating notes: −2.204 instead of −0.0976, and a larger variance."""
    t, d = 4.0, 16
    misquoted = (1 - 2 * t - np.sqrt((2 * t + 1) ** 2 + 8 * t)) / 8
    assert misquoted == pytest.approx(-2.204, abs=1e-3)
    worse = ef.log_exponential_moment(1 / (1 - 8 * misquoted), t, d)
    assert worse > ef.log_exponential_moment(1.0, t, d) > ef.log_exponential_moment(rf.optimal_rho(t, d), t, d)


def test_the_optimum_grows_like_a_power_and_positive_features_like_an_exponential():
    d, t = 8, np.array([1e4, 1e5, 1e6])
    best = ef.log_exponential_moment(rf.optimal_rho(t, d), t, d)
    assert np.all(np.abs(best - d / 2 * np.log(np.e * t / (2 * d))) < 10 * d**2 / t)
    np.testing.assert_allclose(np.diff(best), d / 2 * np.log(10), rtol=1e-3)
    np.testing.assert_allclose(ef.log_exponential_moment(1.0, t, d), t)


# -- orthogonal blocks -------------------------------------------------------------------------------------------------


def orthogonal_pairs():
    """Quadrature for two rows of a Haar-orthogonal block in the plane, χ₂ norms: (ω₁, ω₂, weights)."""
    nodes, weights = np.polynomial.legendre.leggauss(70)
    r = 7 * (nodes + 1)
    w = 7 * weights * r * np.exp(-(r**2) / 2)
    angle = 2 * np.pi * np.arange(48) / 48
    r1, r2, a = np.meshgrid(r, r, angle, indexing="ij")
    first = np.stack([r1 * np.cos(a), r1 * np.sin(a)], axis=-1).reshape(-1, 2)
    second = np.stack([-r2 * np.sin(a), r2 * np.cos(a)], axis=-1).reshape(-1, 2)
    return first, second, (w[:, None, None] * w[None, :, None] * np.ones_like(a)).ravel() / 48


@pytest.mark.parametrize("rho", [0.3, 1.0, 1.5])
def test_orthogonal_exponential_features_by_quadrature(rho):
    """Two directions in the plane: the covariance is that of positive features, whatever ρ is."""
    x, y = POINTS[2]
    first, second, w = orthogonal_pairs()
    f, g = (exponential(omega, x, y, a_of(rho)) for omega in (first, second))
    assert w @ f == pytest.approx(1, rel=1e-10)
    want = w @ ((f + g) / 2) ** 2 - 1
    assert variance(x, y, rho=rho, m=2, directions="orthogonal") == pytest.approx(want, rel=1e-9)
    positive = w @ (exponential(first, x, y, 0.0) * exponential(second, x, y, 0.0))
    assert w @ (f * g) == pytest.approx(positive, rel=1e-9)
    assert positive < 0.99


def test_orthogonal_phase_features_by_quadrature():
    x, y = POINTS[2]
    first, second, w = orthogonal_pairs()
    b = 2 * np.pi * np.arange(8) / 8
    f, g = (phase(omega, b, x, y) for omega in (first, second))  # averaged over independent phases
    want = (w @ (f**2).mean(1) + w @ (g**2).mean(1) + 2 * w @ (f.mean(1) * g.mean(1))) / 4 - 1
    got = ef.log_phase_variance(np.sum((x - y) ** 2), m=2, d=2, directions="orthogonal")
    assert np.exp(got) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("rho", [0.5, 0.8])
def test_orthogonal_exponential_features_in_four_dimensions(rho):
    """The covariance of two rows by 400 000 draws at t = 1, within four standard errors."""
    d, rng = 4, np.random.default_rng(3)
    x, y = np.full(d, 0.25), np.full(d, 0.25)
    u, v = rng.standard_normal((2, 400_000, d))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    v -= np.sum(u * v, axis=1, keepdims=True) * u
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    lengths = np.sqrt(rng.chisquare(d, (2, 400_000, 1)))
    f, g = (exponential(r * e, x, y, a_of(rho)) for r, e in zip(lengths, (u, v), strict=True))
    single, block = (variance(x, y, rho=rho, m=4, directions=e) for e in ("iid", "orthogonal"))
    covariance = (block - single) * 4 / 3
    assert covariance < -0.05
    assert abs(np.mean(f * g) - 1 - covariance) < 4 * np.std(f * g) / 400_000**0.5


@pytest.mark.parametrize("rho", [0.5, 1.3])
def test_simplex_in_the_plane_is_an_opposite_pair(rho):
    """u₂ = −u₁ in the plane, with independent norms: the quadrature of orthogonal pairs with the second one turned."""
    x, y = POINTS[2]
    first, second, w = orthogonal_pairs()
    lengths = np.linalg.norm(second, axis=1, keepdims=True) / np.linalg.norm(first, axis=1, keepdims=True)
    f, g = exponential(first, x, y, a_of(rho)), exponential(-lengths * first, x, y, a_of(rho))
    want = w @ ((f + g) / 2) ** 2 - 1
    assert variance(x, y, rho=rho, m=2, directions="simplex") == pytest.approx(want, rel=1e-9)
    assert want < variance(x, y, rho=rho, m=2, directions="orthogonal")
    b = 2 * np.pi * np.arange(8) / 8
    f, g = phase(first, b, x, y), phase(-lengths * first, b, x, y)
    want = (w @ (f**2).mean(1) + w @ (g**2).mean(1) + 2 * w @ (f.mean(1) * g.mean(1))) / 4 - 1
    got = ef.log_phase_variance(np.sum((x - y) ** 2), m=2, d=2, directions="simplex")
    assert np.exp(got) == pytest.approx(want, rel=1e-9)


def test_where_nothing_is_random_the_variance_vanishes():
    x = np.array([[0.5, -0.2]])
    for directions in ("iid", "orthogonal"):
        assert ef.exponential_theory(x, -x, rho=1.0, m=2, directions=directions).relative_variance()[0, 0] == 0
        assert ef.exponential_theory(x, -x, rho=0.5, m=2, directions=directions).relative_variance()[0, 0] > 0.05


def test_large_exponents_keep_their_logarithm():
    x = np.full((1, 4), 20.0)
    for directions in ("iid", "orthogonal"):
        got = ef.exponential_theory(x, x, rho=1.0, m=4, directions=directions).log_relative_variance()
        assert got[0, 0] == pytest.approx(6400 - np.log(4), rel=1e-12)
        assert ef.log_phase_variance(6400.0, m=4, d=4, directions="orthogonal") == pytest.approx(
            6400 - np.log(4), rel=1e-12
        )


def test_what_is_not_known_is_not_promised():
    x = np.ones((3, 2))
    assert ef.exponential_theory(x, x, rho=np.array([[0.5, 0.6]]), m=2, directions="orthogonal").covers == {"mean"}
    assert ef.exponential_theory(x, x, rho=0.5, m=2, directions="sobol").covers == {"mean"}
    assert ef.phase_theory(x, x, m=2, directions="sobol").covers == {"mean"}
    options = {"weight": "angular", "r": 1, "width": 1.0}
    assert ef.hybrid_theory(x, x, m=2, directions="orthogonal", **options).covers == {"mean"}


@pytest.mark.parametrize("rho", [0.0, -1.0, np.nan, np.inf])
def test_rho_out_of_range(rho):
    with pytest.raises(ValueError, match="rho must be positive and finite"):
        ef.log_exponential_moment(rho, 1.0)


# -- hybrid features ---------------------------------------------------------------------------------------------------


def separated(x, y):
    """Share of the directions in the plane whose hyperplanes separate x and y, by counting."""
    angle = np.linspace(0, 2 * np.pi, 400_000, endpoint=False) + 1e-7
    tau = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return float(np.mean((tau @ x >= 0) != (tau @ y >= 0)))


def fixed_weight_variance(weight, x, y):
    """Relative variance of weight · positive + (1 − weight) · trigonometric on one direction, by quadrature."""
    omega, w = gaussian_grid(2)
    a, b = omega @ x, omega @ y
    size = (x @ x + y @ y) / 2
    f = weight * np.exp(a + b - size) + (1 - weight) * np.exp(size) * np.cos(a - b)
    f /= np.exp(x @ y)
    assert w @ f == pytest.approx(1, rel=1e-11)
    return w @ f**2 - 1


@pytest.mark.parametrize(("m", "r"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_angular_hybrid_by_enumeration_and_quadrature(m, r):
    x, y = np.array([0.9, -0.3]), np.array([0.2, 0.8])
    p = separated(x, y)
    want = 0.0
    for k in range(r + 1):  # the weight is k/r with a binomial probability; given it, directions are averaged
        probability = float(np.prod([(r - i) / (i + 1) for i in range(k)])) * p**k * (1 - p) ** (r - k)
        want += probability * fixed_weight_variance(k / r, x, y) / m
    promise = ef.hybrid_theory(x[None], y[None], m=m, directions="iid", weight="angular", r=r, width=1.0)
    assert promise.relative_variance()[0, 0] == pytest.approx(want, rel=1e-4)  # p by counting 400 000 directions
    mean, variance_of_weight = ef.angular_weight(x[None], y[None], r=r)
    assert mean[0, 0] == pytest.approx(np.arccos(x @ y / np.sqrt(x @ x * y @ y)) / np.pi, rel=1e-12)
    assert variance_of_weight[0, 0] == pytest.approx(p * (1 - p) / r, rel=1e-4)


@pytest.mark.parametrize(("m", "width"), [(1, 0.7), (2, 1.3)])
def test_gaussian_hybrid_by_quadrature(m, width):
    """λ̂ = cos(σ τ·z) depends on N(0, σ²|z|²) alone: a quadrature over it, and one over the directions."""
    x, y = np.array([0.9, -0.3]), np.array([0.2, 0.8])
    t = np.sum((x + y) ** 2)
    tau, w = gaussian_grid(1)
    weight = np.cos(width * np.sqrt(t) * tau[:, 0])
    at = [fixed_weight_variance(a, x, y) for a in (0.0, 0.5, 1.0)]  # a parabola in the weight
    parabola = np.polyfit([0.0, 0.5, 1.0], at, 2)
    want = w @ np.polyval(parabola, weight) / m
    promise = ef.hybrid_theory(x[None], y[None], m=m, directions="iid", weight="gaussian", r=1, width=width)
    assert promise.relative_variance()[0, 0] == pytest.approx(want, rel=1e-9)
    mean, spread = ef.gaussian_weight(np.asarray(t), r=1, width=width)
    assert (mean, spread) == (pytest.approx(w @ weight), pytest.approx(w @ weight**2 - (w @ weight) ** 2))


def test_the_hybrid_is_exact_at_both_ends_and_better_than_both_in_the_worst_case():
    """On a circle of radius 1.5 the worst entry of the angular hybrid is below those of its parts."""
    angle = np.linspace(0, np.pi, 181)
    x = np.array([[1.5, 0.0]])
    y = 1.5 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    promise = ef.hybrid_theory(x, y, m=1, directions="iid", weight="angular", r=1, width=1.0)
    hybrid = promise.relative_variance()[0]
    assert hybrid[[0, -1]] == pytest.approx(0, abs=1e-11)
    for kind, plus in (("positive", True), ("trigonometric", False)):
        part = rf.relative_variance(kind, rf.squared_norms(x, y, scale=1.0, plus=plus)[0], m=1)
        assert hybrid.max() < part.max()


def test_sharing_the_directions_lowers_the_variance():
    """Independent ones would not have the term −4 E λ̂(1 − λ̂) sin²((|x|² − |y|²)/2)/m."""
    mean, spread, one = np.array([0.4]), np.array([0.05]), np.ones(1)
    shared, apart = (
        ef.hybrid_variance(mean, spread, s=one, t=one, difference=difference, m=2) for difference in (one, 0 * one)
    )
    assert shared[0] == pytest.approx(apart[0] - 2 * (0.24 - 0.05) * np.sin(0.5) ** 2, rel=1e-12)


def test_a_weight_from_the_same_directions_is_biased():
    """sgn(ω·x) sgn(ω·y) of the ω that also makes the features: the mean is no longer one."""
    x, y = np.array([0.9, -0.3]), np.array([0.2, 0.8])
    omega, w = gaussian_grid(2, step=0.05)
    a, b = omega @ x, omega @ y
    size, weight = (x @ x + y @ y) / 2, (np.sign(a) != np.sign(b)).astype(float)
    positive, wave = np.exp(a + b - size - x @ y), np.exp(size - x @ y) * np.cos(a - b)
    for part in (positive, wave):
        assert w @ part == pytest.approx(1, rel=1e-11)
    assert abs(w @ (weight * positive + (1 - weight) * wave) - 1) > 0.1
    independent = w @ weight
    assert independent * (w @ positive) + (1 - independent) * (w @ wave) == pytest.approx(1, rel=1e-11)
