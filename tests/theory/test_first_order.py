"""The covariances are exact (quadrature); the prediction built of them holds to first order (Monte Carlo)."""

import numpy as np
import pytest
from scipy.stats import ortho_group

from nla_llm.operators import Dense
from nla_llm.theory import first_order_error
from nla_llm.theory.first_order import entry_covariance, row_error
from nla_llm.theory.random_features import relative_variance

KINDS = ("trigonometric", "positive", "hyperbolic")


def relative_features(kind, phase, norm):
    """f/SM of one frequency as a function of ω·z and |z|²."""
    if kind == "positive":
        return np.exp(phase - norm / 2)
    if kind == "hyperbolic":
        return np.cosh(phase) * np.exp(-norm / 2)
    return np.cos(phase) * np.exp(norm / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_covariance_of_independent_frequencies_by_quadrature(kind):
    z = np.array([[0.8, -0.4], [0.1, 1.0], [-0.7, 0.2]])
    nodes, weights = np.polynomial.hermite_e.hermegauss(50)
    omega = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    w = np.multiply.outer(weights, weights).ravel() / weights.sum() ** 2
    f = relative_features(kind, omega @ z.T, np.sum(z**2, axis=-1))
    want = (f * w[:, None]).T @ f - 1
    np.testing.assert_allclose(entry_covariance(z, z, m=1, features=kind), want, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_diagonal_is_the_variance_of_an_entry(kind):
    z = np.random.default_rng(0).standard_normal((4, 3))
    for directions in ("iid", "orthogonal", "simplex"):
        got = np.diagonal(entry_covariance(z, z, m=7, features=kind, directions=directions))
        want = relative_variance(kind, np.sum(z**2, axis=-1), m=7, d=3, directions=directions)
        np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", ["orthogonal", "simplex"])
def test_covariance_within_a_block_is_right_to_fourth_order(kind, directions):
    """d = 2, exactly by quadrature: radii by Gauss–Legendre, the angle and the sign of ω₂ by equal weights.

    The second direction of a block is orthogonal to the first, with either sign; in a simplex it is the opposite one.
    """
    r, w = np.polynomial.legendre.leggauss(120)
    r = 6 * (r + 1)
    w = 6 * w * r * np.exp(-(r**2) / 2)  # the density of χ₂
    angle = 2 * np.pi * np.arange(48) / 48
    u, v = np.stack([np.cos(angle), np.sin(angle)], -1), np.stack([-np.sin(angle), np.cos(angle)], -1)
    seconds = (v, -v) if directions == "orthogonal" else (-u,)
    base = np.array([[0.9, -0.4], [0.3, 1.1]])

    def error(h, sign):
        z = h * base * np.array([[1], [sign]])
        norms = np.sum(z**2, axis=-1)

        def mean_over_radius(direction, j):
            return w @ relative_features(kind, np.multiply.outer(r, direction @ z[j]), norms[j])

        exact = np.mean([mean_over_radius(u, 0) * mean_over_radius(s, 1) for s in seconds]) - 1
        both = entry_covariance(z, z, m=2, features=kind, directions=directions)[0, 1]
        alone = entry_covariance(z, z, m=2, features=kind)[0, 1]
        return abs(2 * (both - alone) - exact), abs(exact)

    for sign in (1, -1):  # both signs of the inner product
        (coarse, size), (fine, _) = error(0.4, sign), error(0.2, sign)
        assert coarse < 0.08 * size
        assert fine < coarse / 2**5.5  # sixth order


def test_other_directions_have_no_prediction():
    with pytest.raises(ValueError, match="'iid', 'orthogonal' or 'simplex'"):
        entry_covariance(np.eye(2), np.eye(2), m=2, features="positive", directions="sobol")


def normalised(kind, omega, x, y):
    """Kernel attention P̂ for draws of frequencies (draws, m, d), by the definition of the features."""
    if kind == "trigonometric":
        phase = omega @ (x[:, None] - y[None]).reshape(-1, x.shape[-1]).T
        f = np.cos(phase)
    else:
        phase = omega @ (x[:, None] + y[None]).reshape(-1, x.shape[-1]).T
        f = np.exp(phase) if kind == "positive" else np.cosh(phase)
    kernel = f.mean(axis=1).reshape(-1, len(x), len(y))
    sign = 1 if kind == "trigonometric" else -1
    kernel = kernel * np.exp(sign * np.sum(y**2, axis=-1) / 2)  # the factor of the query cancels
    return kernel / kernel.sum(axis=-1, keepdims=True)


def softmax(s):
    w = np.exp(s)
    return w / w.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", ["iid", "orthogonal", "simplex"])
def test_prediction_against_simulation(kind, directions):
    rng, d, m, draws = np.random.default_rng(2), 3, 96, 4_000
    q, k = 0.25 * rng.standard_normal((2, 5, d))
    prediction = first_order_error(q, k, scale=0.6, m=m, features=kind, directions=directions, rows=5)
    assert prediction.valid
    omega = rng.standard_normal((draws, m, d))
    if directions != "iid":
        u = ortho_group(d, seed=rng).rvs(draws * m // d)
        if directions == "simplex":  # three vectors of a plane, 120° apart
            u = np.sqrt(1.5) * (u - u.mean(axis=1, keepdims=True))
        u = u.reshape(draws, m, d)
        omega = u * np.sqrt(rng.chisquare(d, size=(draws, m)))[..., None]
    x, y = np.sqrt(0.6) * q, np.sqrt(0.6) * k
    squares = np.sum((normalised(kind, omega, x, y) - softmax(x @ y.T)) ** 2, axis=(1, 2))
    # The next order is proportional to 1/m; its constant, at most 2.4 here over m = 12, 24, 96, is empirical.
    tolerance = 4 * squares.std() / np.sqrt(draws) + 3 / m * prediction.value
    assert abs(squares.mean() - prediction.value) < tolerance
    assert tolerance < 0.12 * prediction.value


def test_forgetting_the_normaliser_would_be_seen():
    rng = np.random.default_rng(2)
    x, y = 0.4 * rng.standard_normal(3), 0.4 * rng.standard_normal((5, 3)) + 0.5
    p = softmax(y @ x)
    error, spread = row_error(p, x, y, m=10, features="positive")
    entry_only = p**2 @ relative_variance("positive", np.sum((x + y) ** 2, -1), m=10)
    assert error < 0.8 * entry_only
    assert spread > 0


def test_interval_over_rows_covers_the_sum_over_all_rows():
    q, k = 0.4 * np.random.default_rng(1).standard_normal((2, 200, 4))
    call = {"scale": 0.5, "m": 32, "features": "positive"}
    everything = first_order_error(q, k, rows=200, **call)
    assert everything.lower == everything.value == everything.upper
    sampled = [first_order_error(q, k, rows=20, rng=i, **call) for i in range(40)]
    assert sum(s.lower <= everything.value <= s.upper for s in sampled) >= 33  # 38 expected
    assert any(s.value != everything.value for s in sampled)


def test_masks_come_with_the_exact_operator():
    q, k = 0.4 * np.random.default_rng(3).standard_normal((2, 6, 2))
    p = np.tril(np.exp(0.5 * q @ k.T))
    p /= p.sum(axis=1, keepdims=True)
    got = first_order_error(q, k, scale=0.5, m=9, features="positive", exact=Dense(p), rows=6)
    root = np.sqrt(0.5)
    want = sum(row_error(p[i, : i + 1], root * q[i], root * k[: i + 1], m=9, features="positive")[0] for i in range(6))
    assert got.value == pytest.approx(want, rel=1e-12)
    assert row_error(p[0, :1], root * q[0], root * k[:1], m=9, features="positive")[0] < 1e-16  # one key: no error


def test_large_norms_are_declared_invalid_not_overflowed():
    q = 40 * np.ones((3, 2))
    prediction = first_order_error(q, q, scale=0.7, m=8, features="positive")
    assert prediction.value == np.inf
    assert not prediction.valid


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"m": 0}, "m must be a whole number"),
        ({"features": "cosine"}, "features must be one of"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"confidence": 1.0}, "confidence must lie"),
        ({"q": np.zeros((1, 4, 2))}, "one head"),
    ],
)
def test_bad_input(change, sentence):
    call = {"q": np.zeros((4, 2)), "k": np.zeros((4, 2)), "scale": 0.5, "m": 4, "features": "positive"} | change
    with pytest.raises(ValueError, match=sentence):
        first_order_error(call.pop("q"), call.pop("k"), **call)
