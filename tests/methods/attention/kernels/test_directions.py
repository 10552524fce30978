"""Ensembles of directions: their laws, projections against the dense matrix, biases against theory."""

import itertools

import numpy as np
import pytest
from scipy import stats
from scipy.linalg import hadamard

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.linalg import next_power_of_two
from nla_llm.methods.attention.kernels import directions as module
from nla_llm.methods.attention.kernels.directions import ENSEMBLES, draw_directions

EPS = np.finfo(np.float64).eps
KINDS = ("positive_features", "hyperbolic_features", "trigonometric_features")
STRUCTURED = ("hadamard", "hadamard1")


def drawn(ensemble, m, d, seed=0):
    return draw_directions(ensemble, m, d, np.random.default_rng(seed), like=np.zeros(1)).dense()


def many(ensemble, m, d, draws, stream=0):
    return np.stack([drawn(ensemble, m, d, seed=[stream, i]) for i in range(draws)])


def test_independent_directions_are_standard_normal_numbers():
    np.testing.assert_array_equal(drawn("iid", 6, 3), np.random.default_rng(0).standard_normal((6, 3)))


@pytest.mark.parametrize("ensemble", ["orthogonal", "regularised", "hadamard", "hadamard1"])
@pytest.mark.parametrize("d", [1, 2, 8])
def test_directions_are_orthogonal_within_blocks(ensemble, d):
    blocks = drawn(ensemble, 3 * d, d)
    for block in blocks.reshape(3, d, d):
        gram = block @ block.T
        assert np.abs(gram - np.diag(np.diagonal(gram))).max() < 100 * EPS * gram.max()
        if ensemble in {"regularised", "hadamard1"}:
            np.testing.assert_allclose(np.diagonal(gram), d, rtol=1e-14)


# -- laws of every ensemble --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize(("m", "d"), [(5, 4), (11, 3), (3, 1)])  # d of a power of two and not; more than 2d directions
def test_second_moment_of_every_row_is_the_identity(ensemble, m, d):
    """A zero block, a transposed matrix or a missing normalisation would show in some row."""
    draws = 600
    w = many(ensemble, m, d, draws, stream=1)
    assert w.shape == (draws, m, d)
    for row in np.moveaxis(w, 1, 0):
        deviation = row.T @ row / draws - np.eye(d)
        allowed = 4.5 * np.sqrt(2.2 * (1 + np.eye(d)) / draws)  # fourth moments up to those of a normal law and 10 %
        assert np.all(np.abs(deviation) < allowed), deviation
        assert np.all(np.abs(row.mean(axis=0)) < 4.5 / np.sqrt(draws))


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_norms_have_their_law(ensemble):
    """χ_d, or √d, at d = 4, where structured matrices are not cut."""
    squares = np.sum(many(ensemble, 9, 4, 700, stream=2) ** 2, axis=-1)
    if ensemble in {"regularised", "hadamard1"}:
        np.testing.assert_allclose(squares, 4, rtol=1e-13)
        return
    for row in (0, 3, 8):
        assert stats.kstest(squares[:, row], stats.chi2(4).cdf).pvalue > 0.002


def test_norms_of_a_cut_matrix_have_the_mean_of_theirs():
    """d = 5 of D = 8 coordinates: |ω|² = r²|s|², E r² = 8, E |s|² = 5/8; the law of |s|² is not Beta, but near it."""
    squares = np.sum(many("hadamard", 8, 5, 3000, stream=3) ** 2, axis=-1)
    assert np.all(np.abs(squares.mean(axis=0) - 5) < 4.5 * np.sqrt(10 / 3000))
    assert squares.var() == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("d", [3, 4])
def test_mean_of_the_kernel_is_one_or_what_theory_says(ensemble, d):
    """Over 800 draws of 12 directions; the biases of the structured ones are far above what chance allows."""
    x = np.array([0.5, 0.1, 0.2, 0.3])[:d]
    x *= np.sqrt(0.5 / (x @ x))  # |x + y|² = 2 for x = y
    w = many(ensemble, 12, d, 800, stream=4)
    for axis in (x, np.sqrt(0.5) * np.eye(d)[0]):
        q = axis[None]
        method = nl.method("positive_features", m=12, directions=ensemble)
        promise = method.theory(nl.AttentionProblem(q, q, scale=1.0))
        ratio = np.exp(w @ (2 * axis) - 2 * axis @ axis).mean(axis=-1)
        error = ratio.std() / np.sqrt(len(ratio))
        left_out = 0.005 if promise.kind == "first order" else 0.0
        assert abs(ratio.mean() - promise.mean()[0, 0]) < 4.5 * error + left_out
        if not ENSEMBLES[ensemble].gaussian:
            assert promise.unbiased is False
    if ensemble in {"regularised", "hadamard1"}:
        assert ratio.mean() < 1 - 6 * error


def test_unnormalised_or_unsigned_directions_would_be_caught():
    """What the tests above look at, for matrices with the faults of published code."""
    d, draws = 4, 1500
    rng = np.random.default_rng(0)
    unnormalised = np.stack([hadamard(d) * rng.choice([-1, 1], d) @ hadamard(d) for _ in range(draws)])
    assert abs(np.mean(unnormalised[:, 0, 0] ** 2) - 1) > 1
    unsigned = np.linalg.qr(rng.standard_normal((draws, d, d)))[0] * np.sqrt(rng.chisquare(d, (draws, d, 1)))
    assert abs(unsigned[:, 0, 0].mean()) > 10 / np.sqrt(draws)


# -- structure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "d"), [(16, 8), (19, 8), (5, 8), (13, 6), (3, 1), (1, 5)])
@pytest.mark.parametrize("ensemble", STRUCTURED)
def test_structured_directions_are_the_product_that_defines_them(ensemble, m, d):
    """ω_i = r_i D^(−k/2) times the rows of H D_k … H D_1, cut to d coordinates; every matrix written out."""
    rng, size = np.random.default_rng(5), next_power_of_two(d)
    factors, blocks = {"hadamard": 3, "hadamard1": 1}[ensemble], -(-m // size)
    signs = 2.0 * rng.integers(0, 2, size=(blocks, factors, size)) - 1
    rows = []
    for block in signs:
        product = np.eye(size)
        for diagonal in block:
            product = hadamard(size) @ np.diag(diagonal) @ product / np.sqrt(size)
        rows.append(product)
    lengths = np.sqrt(rng.chisquare(size, size=m)) if ensemble == "hadamard" else np.full(m, np.sqrt(size))
    want = lengths[:, None] * np.concatenate(rows)[:m, :d]
    np.testing.assert_allclose(drawn(ensemble, m, d, seed=5), want, rtol=0, atol=50 * EPS * np.abs(want).max())


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_projections_are_those_of_the_dense_matrix(ensemble, dtype, xp, monkeypatch):
    x = np.random.default_rng(0).standard_normal((2, 3, 10, 6)).astype(dtype)
    rng = lambda: np.random.default_rng(1)  # noqa: E731 - a fresh one for each draw
    want = x @ drawn(ensemble, 21, 6, seed=1).astype(dtype).T
    tolerance = 100 * np.finfo(dtype).eps * np.abs(want).max()
    for length in (module._DENSE_IS_FASTER, 0):  # by NumPy's product, and by transforms
        monkeypatch.setattr(module, "_DENSE_IS_FASTER", length)
        for a in (x, xp.asarray(x)):
            omega = draw_directions(ensemble, 21, 6, rng(), like=a)
            got = omega.project(a)
            assert got.dtype == a.dtype
            assert tuple(omega.dense().shape) == (21, 6)
            np.testing.assert_allclose(to_numpy(got), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("ensemble", STRUCTURED)
def test_transforms_are_cheaper_than_products(ensemble):
    """At d = 64, m = 256: four blocks of three transforms, six additions a coordinate each."""
    one, product = ENSEMBLES[ensemble].project_cost(1, 256, 64), ENSEMBLES["iid"].project_cost(1, 256, 64)
    additions, multiplications = {"hadamard": (4 * 3 * 64 * 6, 4 * 3 * 64 + 256), "hadamard1": (4 * 64 * 6, 4 * 64)}[
        ensemble
    ]
    assert (one.add, one.mul, one.madd) == (additions, multiplications, 0)
    assert product.total() > 5 * one.total()


# -- evenness ----------------------------------------------------------------------------------------------------------


def test_sobol_error_over_that_of_independent_directions_falls():
    """d = 2, |x + y| = 1; independent directions give one at every m."""
    z = np.array([0.6, 0.8])
    found = []
    for m in (16, 64, 256, 1024):
        estimates = np.array([np.exp(drawn("sobol", m, 2, seed=[9, i]) @ z - 0.5).mean() for i in range(150)])
        found.append(np.mean((estimates - 1) ** 2) / (np.expm1(1) / m))
        assert abs(estimates.mean() - 1) < 4.5 * estimates.std() / np.sqrt(150)
    assert found[0] < 0.6
    assert all(later < 0.8 * earlier for earlier, later in itertools.pairwise(found)), found
    assert found[-1] < 0.05


# -- promises ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("kind", KINDS)
def test_promises_follow_the_ensemble(kind, ensemble):
    properties = nl.method(kind, m=4, directions=ensemble).properties
    gaussian = ensemble in {"iid", "orthogonal", "simplex", "sobol"}
    assert properties.unbiased is properties.converges is gaussian
    assert properties.target == ("softmax" if gaussian else f"kernel of {ensemble} directions")


@pytest.mark.parametrize(("kind", "ensemble"), [
    ("hyperbolic_features", "regularised"), ("trigonometric_features", "regularised"),
    ("hyperbolic_features", "hadamard1"), ("trigonometric_features", "hadamard1"),
    ("trigonometric_features", "hadamard"),
])  # fmt: skip
def test_suite(kind, ensemble):
    """Beside the rows of the registry."""
    report = nl.testing.check_method(nl.method(kind, m=16, directions=ensemble))
    assert report.checks_run >= 24
