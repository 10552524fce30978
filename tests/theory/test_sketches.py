"""Means and variances of sketches and series by enumeration of all draws, by Gauss–Hermite nodes, by summed series."""

from itertools import product
from math import factorial, lgamma

import numpy as np
import pytest
from scipy.special import i0

import nla_llm as nl
from nla_llm.theory import sketches

EPS = np.finfo(np.float64).eps
NODES = np.array([-np.sqrt(3.0), 0.0, np.sqrt(3.0)])  # three Gauss–Hermite nodes: exact for N(0, 1) up to degree 5
WEIGHTS = np.array([1.0, 4.0, 1.0]) / 6

X = np.array([[0.7, -0.4], [1.0, 0.5], [0.3, 0.9]])
Y = np.array([[0.2, 0.8], [-0.6, -0.3], [1.0, 0.5]])  # kernels of both signs, and one pair of equal vectors
X1, Y1 = X[:, :1], Y[:, :1]


def grid(values, dimensions):
    """All points of a Cartesian power, (values^dimensions, dimensions)."""
    return np.array(list(product(values, repeat=dimensions)))


def nodes_of(dimensions):
    """Nodes and weights of the standard normal law, exact up to degree 5 in every variable."""
    index = grid(range(3), dimensions)
    return NODES[index], np.prod(WEIGHTS[index], axis=1)


def moments(estimates, weights=None):
    """Mean and variance over the draws, the first axis."""
    mean = np.average(estimates, axis=0, weights=weights)
    return mean, np.average(np.abs(estimates - mean) ** 2, axis=0, weights=weights)


def agree(promise, estimates, weights=None, rtol=1e-12):
    """The promise, made for the kernel relative to exp(x·y), against all draws of the kernel itself."""
    mean, variance = moments(estimates, weights)
    exact = np.exp(X @ Y.T)
    np.testing.assert_allclose(promise.mean() * exact, mean, rtol=rtol, atol=1e3 * EPS * np.abs(mean).max())
    if "relative_variance" in promise.covers:
        got = promise.relative_variance() * exact**2
        np.testing.assert_allclose(got, variance, rtol=rtol, atol=1e3 * EPS * np.max(np.abs(mean) ** 2 + variance))
    return mean, variance


# -- product sketches --------------------------------------------------------------------------------------------------


def vectors(kind, count):
    """All draws of ``count`` numbers and their probabilities (Gaussian ones: nodes and weights)."""
    if kind == "rademacher":
        w = grid([-1.0, 1.0], count)
    elif kind == "complex_rademacher":
        w = grid([1.0, 1j, -1.0, -1j], count)
    elif kind == "gaussian":
        return nodes_of(count)
    else:
        w, weights = nodes_of(2 * count)
        return (w[:, :count] + 1j * w[:, count:]) / np.sqrt(2), weights
    return w, np.full(len(w), 1 / len(w))


def products(kind, degree, x, y):
    """Π_j (w_j·x) · conj Π_j (w_j·y) for all draws, and their weights."""
    d = x.shape[1]
    w, weights = vectors(kind, degree * d)
    w = w.reshape(len(w), degree, d)
    left, right = np.prod(w @ x.T, axis=1), np.prod(w @ y.T, axis=1)
    return left[:, :, None] * np.conj(right[:, None, :]), weights


@pytest.mark.parametrize(
    ("kind", "degree"),
    [("rademacher", p) for p in (1, 2, 3, 4)]
    + [("gaussian", p) for p in (1, 2, 3)]
    + [("complex_rademacher", p) for p in (1, 2, 3)]
    + [("complex_gaussian", p) for p in (1, 2)],
)
def test_product_sketch(kind, degree):
    estimates, weights = products(kind, degree, X, Y)
    promise = sketches.product_sketch_theory(X, Y, scale=1.0, m=1, degree=degree, kind=kind)
    mean, variance = agree(promise, estimates.real, weights)
    np.testing.assert_allclose(mean, (X @ Y.T) ** degree, rtol=1e-12)
    of_seven = sketches.product_sketch_theory(X, Y, scale=1.0, m=7, degree=degree, kind=kind)
    np.testing.assert_allclose(of_seven.relative_variance() * np.exp(2 * X @ Y.T), variance / 7, atol=1e-13)


@pytest.mark.parametrize(("kind", "degree"), [("complex_rademacher", 2), ("complex_gaussian", 2)])
def test_the_real_part_has_half_of_the_variance_or_more(kind, degree):
    """The published variance is E |z − mean|² of the complex number; its real part has at most that."""
    estimates, weights = products(kind, degree, X, Y)
    n = np.sum(X**2, 1)[:, None] * np.sum(Y**2, 1)
    alpha, sigma = (X @ Y.T) ** 2, X**2 @ (Y**2).T
    published = (n + alpha - (sigma if kind == "complex_rademacher" else 0)) ** degree - alpha**degree
    np.testing.assert_allclose(moments(estimates, weights)[1], published, rtol=1e-11, atol=1e-13)
    real = moments(estimates.real, weights)[1]
    assert np.all(real <= published * (1 + 1e-12))
    assert real.min() < 0.9 * published.min()


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind must be one of rademacher"):
        sketches.product_sketch_theory(X, Y, scale=1.0, m=1, degree=1, kind="gauss")


# -- TensorSketch ------------------------------------------------------------------------------------------------------


def tensor_sketches(m, degree, x, y):
    """Inner products of count sketches of the tensor powers for all hash and sign functions of the factors."""
    d = x.shape[1]
    estimates = []
    places = grid(range(d), degree)
    tensor_x, tensor_y = (np.prod(a[:, places], axis=-1) for a in (x, y))
    for draw in product(range(2 * m), repeat=degree * d):
        hashes, signs = np.divmod(np.array(draw).reshape(degree, d), 2)
        bucket = sum(hashes[j, places[:, j]] for j in range(degree)) % m
        sign = np.prod([1 - 2 * signs[j, places[:, j]] for j in range(degree)], axis=0)
        into = (np.arange(m)[:, None] == bucket) * sign
        estimates.append((tensor_x @ into.T) @ (tensor_y @ into.T).T)
    return np.array(estimates)


@pytest.mark.parametrize(
    ("m", "degree"), [(1, 1), (2, 1), (5, 1), (1, 2), (2, 2), (3, 2), (4, 2), (5, 2), (1, 3), (2, 3)]
)
def test_tensor_sketch(m, degree):
    promise = sketches.tensor_sketch_theory(X, Y, scale=1.0, m=m, degree=degree)
    mean, variance = agree(promise, tensor_sketches(m, degree, X, Y))
    np.testing.assert_allclose(mean, (X @ Y.T) ** degree, rtol=1e-11, atol=1e-14)
    n = np.sum(X**2, 1)[:, None] * np.sum(Y**2, 1)
    assert np.all(variance <= (3**degree - 1) * n**degree / m * (1 + 1e-12))  # Avron, Nguyen and Woodruff 2014
    if degree == 1:
        alpha, sigma = (X @ Y.T) ** 2, X**2 @ (Y**2).T
        np.testing.assert_allclose(variance, (n + alpha - 2 * sigma) / m, rtol=1e-11, atol=1e-13)


def test_tensor_sketch_with_one_coordinate_is_exact_for_any_number_of_buckets():
    """With d = 1 there is a single bucket: u² = N = σ, and nothing collides."""
    promise = sketches.tensor_sketch_theory(X1, Y1, scale=1.0, m=6, degree=3)
    assert promise.relative_variance().max() < 100 * EPS


def test_the_published_bound_is_far_above_the_variance():
    """(3^p − 1) N^p/m is exceeded for no vectors; spread-out parallel ones come near it."""
    rng = np.random.default_rng(0)
    for m, p in product((2, 3, 64, 65), (1, 2, 3, 5)):
        x = rng.standard_normal((20, 6))
        y = np.concatenate([x, -x, rng.standard_normal((20, 6)), np.eye(6)])
        promise = sketches.tensor_sketch_theory(x, y, scale=1.0, m=m, degree=p)
        bound = p * np.log(np.sum(x**2, 1)[:, None] * np.sum(y**2, 1)) + np.log((3.0**p - 1) / m)
        assert np.all(promise.log_relative_variance() + 2 * x @ y.T <= bound)
    flat = np.full((1, 10_000), 0.01)
    promise = sketches.tensor_sketch_theory(flat, flat, scale=1.0, m=1, degree=3)
    assert np.isclose(promise.relative_variance()[0, 0] * np.exp(2), 3.0**3 - 1, rtol=1e-3)


def test_tensor_sketch_differs_from_independent_complex_products_by_its_own_frequencies_alone():
    """Up to O(1/m²) it has the variance of m/2 complex Rademacher products, two features each."""
    m = 1000
    tensor = sketches.tensor_sketch_theory(X, Y, scale=1.0, m=m, degree=3).relative_variance()
    products_ = sketches.product_sketch_theory(X, Y, scale=1.0, m=m // 2, degree=3, kind="complex_rademacher")
    np.testing.assert_allclose(tensor, products_.relative_variance(), rtol=5 / m)


# -- PolySketch --------------------------------------------------------------------------------------------------------


def tree(x, m, degree, w):
    """The sketch (draws, n, m) of a degree as the paper writes it, and the numbers w that are left."""
    if degree == 1:
        return np.broadcast_to(x, (len(w), *x.shape)), w
    left, w = tree(x, m, degree // 2, w)
    right, w = tree(x, m, degree // 2, w)
    width = left.shape[-1] * m
    g, h = (w[:, i * width : (i + 1) * width].reshape(len(w), m, -1) for i in (0, 1))
    return (left @ np.swapaxes(g, 1, 2)) * (right @ np.swapaxes(h, 1, 2)) / np.sqrt(m), w[:, 2 * width :]


@pytest.mark.parametrize(("m", "degree", "d"), [(1, 4, 2), (2, 4, 2), (3, 4, 1), (1, 8, 2)])
def test_poly_sketch(m, degree, d):
    half = degree // 2
    numbers = half * m * d + (half - 2) * m**2
    w, weights = nodes_of(numbers)
    x, y = X[:2, :d], Y[:2, :d]
    s = tree(x, m, half, w)[0] @ np.swapaxes(tree(y, m, half, w)[0], 1, 2)
    np.testing.assert_allclose(np.average(s, axis=0, weights=weights), (x @ y.T) ** half, rtol=1e-11)
    mean = np.average(s**2, axis=0, weights=weights)
    promise = sketches.poly_sketch_theory(x, y, scale=1.0, m=m, degree=degree)
    np.testing.assert_allclose(promise.mean() * np.exp(x @ y.T), mean, rtol=1e-11)
    assert promise.covers == {"mean"}
    assert np.all(mean > (x @ y.T) ** degree)


@pytest.mark.parametrize("d", [1, 2])
def test_poly_sketch_of_degree_eight(d):
    """Given the two halves of the tree, the m = 2 products at its top are independent: moments of one are enough."""
    m, x, y = 2, X[0, :d], Y[0, :d]
    w, below = nodes_of(2 * m * d)
    both = tree(np.stack([x, y]), m, 2, w)[0]  # of either half: (draws, 2, m)
    g, top = nodes_of(m)
    projected = g @ np.swapaxes(both, 1, 2)  # (draws, nodes, 2)
    first, second = (np.einsum("nk,k->n", np.prod(projected, -1) ** p, top) for p in (1, 2))
    one = np.outer(first, first)  # E of one product at the top, for all pairs of halves
    square = np.outer(second, second)
    mean = below @ (square / m + (1 - 1 / m) * one**2) @ below
    promise = sketches.poly_sketch_theory(x[None], y[None], scale=1.0, m=m, degree=8)
    np.testing.assert_allclose(promise.mean()[0, 0] * np.exp(x @ y), mean, rtol=1e-11)


@pytest.mark.parametrize("degree", [4, 8, 16])
def test_poly_sketch_has_a_floor_under_its_weights(degree):
    """Orthogonal vectors: |x|^p |y|^p/m for p = 4, and little more for higher degrees, where the kernel is zero."""
    x, y, m = np.array([[1.5, 0.0]]), np.array([[0.0, 2.0]]), 100
    floor = sketches.poly_sketch_theory(x, y, scale=1.0, m=m, degree=degree).mean()[0, 0] * m / 3**degree
    assert 1 - 1e-12 < floor < 1.2
    assert (abs(floor - 1) < 1e-12) == (degree == 4)


def test_the_bias_of_poly_sketch_falls_as_its_size():
    bias = [
        sketches.poly_sketch_theory(X, Y, scale=1.0, m=m, degree=16).mean() * np.exp(X @ Y.T) / (X @ Y.T) ** 16 - 1
        for m in (10**6, 2 * 10**6)
    ]
    np.testing.assert_allclose(bias[0] / bias[1], 2, rtol=0.02)


@pytest.mark.parametrize("degree", [1, 2, 6])
def test_poly_sketch_needs_a_power_of_two(degree):
    with pytest.raises(ValueError, match="power of two"):
        sketches.poly_sketch_theory(X, Y, scale=1.0, m=2, degree=degree)


# -- random Maclaurin features -----------------------------------------------------------------------------------------


def one_feature(degree, law):
    """φ(x) φ(y) of a feature whose degrees are drawn from ``law``, for all degrees and signs, and the weights.

    Each term is divided by the probability in the law that all features share on average.
    """
    shared = 0.5 ** np.arange(1, degree + 2)
    shared /= shared.sum()
    estimates, weights = [], []
    for k in range(degree + 1):
        terms, equal = products("rademacher", k, X, Y) if k else (np.ones((1, 3, 3)), np.ones(1))
        estimates.append(terms / (factorial(k) * shared[k]))
        weights.append(equal * law[k])
    return np.concatenate(estimates), np.concatenate(weights)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_maclaurin_with_independent_degrees(degree):
    law = 0.5 ** np.arange(1, degree + 2)
    estimates, weights = one_feature(degree, law / law.sum())
    promise = sketches.maclaurin_theory(X, Y, scale=1.0, m=1, degree=degree)
    agree(promise, estimates, weights)
    cut = sum((X @ Y.T) ** k / factorial(k) for k in range(degree + 1))
    np.testing.assert_allclose(promise.mean() * np.exp(X @ Y.T), cut, rtol=1e-12)
    of_nine = sketches.maclaurin_theory(X, Y, scale=1.0, m=9, degree=degree)
    np.testing.assert_allclose(of_nine.relative_variance(), promise.relative_variance() / 9, rtol=1e-12)


def strata(m, degree):
    """Law of the degree of each feature: shares of the i-th of m equal parts of [0, 1)."""
    law = 0.5 ** np.arange(1, degree + 2)
    edges = np.concatenate([[0], np.cumsum(law / law.sum())])
    laws = np.zeros((m, degree + 1))
    for i, k in np.ndindex(laws.shape):
        laws[i, k] = m * max(0.0, min(edges[k + 1], (i + 1) / m) - max(edges[k], i / m))
    return laws


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_maclaurin_with_stratified_degrees(m):
    degree = 3
    each = [moments(*one_feature(degree, law)) for law in strata(m, degree)]  # features are independent
    mean = np.mean([e[0] for e in each], axis=0)
    variance = np.sum([e[1] for e in each], axis=0) / m**2
    promise = sketches.maclaurin_theory(X, Y, scale=1.0, m=m, degree=degree, stratified=True)
    exact = np.exp(X @ Y.T)
    np.testing.assert_allclose(promise.mean() * exact, mean, rtol=1e-12)
    np.testing.assert_allclose(promise.relative_variance() * exact**2, variance, rtol=1e-11)
    independent = sketches.maclaurin_theory(X, Y, scale=1.0, m=m, degree=degree).relative_variance()
    assert np.all(promise.relative_variance() <= independent * (1 + 1e-12))
    assert m == 1 or np.min(promise.relative_variance() / independent) < 0.9


def test_second_moment_of_the_uncut_series():
    """2 I₀(2√(2η)): the sum over all degrees."""
    promise = sketches.maclaurin_theory(X, Y, scale=1.0, m=1, degree=60)
    n, alpha = np.sum(X**2, 1)[:, None] * np.sum(Y**2, 1), (X @ Y.T) ** 2
    eta = n + 2 * (alpha - X**2 @ (Y**2).T)
    second = promise.relative_variance() + promise.mean() ** 2
    np.testing.assert_allclose(second * np.exp(2 * X @ Y.T), 2 * i0(2 * np.sqrt(2 * eta)), rtol=1e-12)
    np.testing.assert_allclose(promise.mean(), 1, rtol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-3, 30.0, 1e3])
def test_nothing_overflows_but_the_value_itself(size):
    x, y = size * X, size * Y
    for promise in (
        sketches.maclaurin_theory(x, y, scale=1.0, m=4, degree=12),
        sketches.maclaurin_theory(x, y, scale=1.0, m=4, degree=12, stratified=True),
        sketches.poisson_theory(x, y, scale=1.0, m=4, rate=max(size, 0.1)),
        sketches.product_sketch_theory(x, y, scale=1.0, m=4, degree=5, kind="complex_gaussian"),
        sketches.tensor_sketch_theory(x, y, scale=1.0, m=4, degree=5),
    ):
        assert not np.any(np.isnan(promise.log_relative_variance()))
        assert np.all(promise.log_relative_variance() < np.inf)
        assert not np.any(np.isnan(promise.mean()))


# -- Poisson features --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.7, 3.0])
def test_poisson_features(rate):
    """All powers up to 60 of both coordinates, whose probabilities beyond are below rounding."""
    omega = grid(range(60), 2)
    log_law = omega.sum(1) * np.log(rate) - 2 * rate - np.array([lgamma(a + 1) + lgamma(b + 1) for a, b in omega])
    x, y = np.concatenate([X, [[0.0, 0.5]]]), np.concatenate([Y, [[0.4, 0.0]]])
    left, right = (np.exp(rate) * np.prod((a[None] / np.sqrt(rate)) ** omega[:, None], axis=-1) for a in (x, y))
    estimates = left[:, :, None] * right[:, None, :]
    mean, variance = moments(estimates, np.exp(log_law))
    np.testing.assert_allclose(mean, np.exp(x @ y.T), rtol=1e-12)
    promise = sketches.poisson_theory(x, y, scale=1.0, m=1, rate=rate)
    np.testing.assert_allclose(promise.relative_variance() * np.exp(2 * x @ y.T), variance, rtol=1e-10)
    assert promise.unbiased


def test_the_best_rate():
    """√(σ/d) for one pair, with the second moment exp(2√(dσ))."""
    x, y = X[:1], Y[:1]
    sigma = float(np.sum(x**2 * y**2))
    best = np.sqrt(sigma / 2)
    rates = best * np.array([0.9, 1.0, 1.1])
    values = [sketches.poisson_theory(x, y, scale=1.0, m=1, rate=r).relative_variance()[0, 0] for r in rates]
    assert values[1] < min(values[0], values[2])
    np.testing.assert_allclose((values[1] + 1) * np.exp(2 * x @ y.T), np.exp(2 * np.sqrt(2 * sigma)), rtol=1e-12)


def test_a_rate_of_zero_belongs_to_vectors_without_common_coordinates():
    promise = sketches.poisson_theory(np.zeros((1, 2)), Y, scale=1.0, m=3, rate=np.zeros((1, 1)))
    assert promise.relative_variance().max() == 0
    assert promise.unbiased


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_scale_batch_and_blocks_of_rows():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((2, 1, 6, 4))
    for promise, single in (
        (
            sketches.tensor_sketch_theory(q, k, scale=0.5, m=4, degree=2),
            lambda a, b: sketches.tensor_sketch_theory(0.5 * a, b, scale=1.0, m=4, degree=2),
        ),
        (
            sketches.maclaurin_theory(q, k, scale=0.5, m=4, degree=9),
            lambda a, b: sketches.maclaurin_theory(0.5 * a, b, scale=1.0, m=4, degree=9),
        ),
    ):
        assert promise.shape == (2, 3, 5, 6)
        for index in np.ndindex(2, 3):
            alone = single(q[index], k[index[0], 0])
            np.testing.assert_allclose(promise.relative_variance(1, 3)[index], alone.relative_variance(1, 3), rtol=1e-9)
            np.testing.assert_allclose(promise.mean()[index], alone.mean(), rtol=1e-9)


def test_methods_hand_over_their_logits():
    q, k = np.random.default_rng(1).standard_normal((2, 5, 3))
    for scale in (0.7, -0.7):
        problem = nl.AttentionProblem(q, k, scale=scale)
        promise = nl.method("product_sketch", m=3, degree=3).theory(problem)
        np.testing.assert_allclose(promise.mean() * np.exp(scale * q @ k.T), (scale * q @ k.T) ** 3, rtol=1e-11)
