"""Phase and exponential features against the papers' formulas with the same directions; parameters from the data."""

from dataclasses import replace

import numpy as np
import pytest
from methods.attention.kernels.written_out import EPS, draw, kernel_of

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods import Unsupported
from nla_llm.methods.attention.kernels.directions import draw_directions
from nla_llm.methods.attention.kernels.exponential_features import optimal_rho
from nla_llm.theory import random_features as rf

FITTED = (("gerf_features", {}), ("saderf_features", {}), ("sderf_features", {}))
ALL = (("phase_features", {}), ("gerf_features", {"rho": 0.6}), *FITTED)


def textbook(method, x, y, seed):
    """Â of one head as the papers write it; parameters from means over all pairs, written out as such."""
    d, m, rng = x.shape[1], method.m, np.random.default_rng(seed)
    omega = draw_directions(method.directions, m, d, rng, like=x).dense()
    if method.name == "phase_features":
        b = rng.uniform(0, 2 * np.pi, m)
        phi = [2**0.5 * np.exp(np.sum(a**2, -1, keepdims=True) / 2) * np.cos(a @ omega.T + b) for a in (x, y)]
        return phi[0] @ phi[1].T / m
    if method.name == "saderf_features":
        psi = (np.mean(y**2, 0) / np.mean(x**2, 0)) ** 0.25
        x, y = psi * x, y / psi
    z = (x[:, None] + y[None]).reshape(-1, d)
    if method.name == "sderf_features":
        values, basis = np.linalg.eigh(z.T @ z / len(z))
        a = (basis * (1 - 2 * values - np.sqrt((2 * values + 1) ** 2 + 8 * values)) / 16) @ basis.T
    else:
        rho = rf.optimal_rho(np.mean(np.sum(z**2, -1)), d) if method.rho == "optimal" else method.rho
        a = (1 - 1 / rho) / 8 * np.eye(d)
    values, basis = np.linalg.eigh(np.eye(d) - 4 * a)
    b = (basis * np.sqrt(values)) @ basis.T
    form = np.sum((omega @ a) * omega, -1)
    phi = [
        np.prod(values) ** 0.25 * np.exp(form + u @ b @ omega.T - np.sum(u**2, -1, keepdims=True) / 2) for u in (x, y)
    ]
    return phi[0] @ phi[1].T / m


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, -0.8])
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_textbook_formula(name, options, orthogonal, scale, masked):
    q, k = 0.9 * draw(0, 23, 4) + 0.2, 0.5 * draw(1, 37, 4)
    keep = np.arange(37) % 3 != 1 if masked else np.ones(37, dtype=bool)
    problem = nl.AttentionProblem(q, np.where(keep[:, None], k, 1e3), scale=scale, key_mask=keep if masked else None)
    method = nl.method(name, m=6, orthogonal=orthogonal, **options)
    root = np.sqrt(abs(problem.scale))
    want = textbook(method, root * q, np.copysign(root, problem.scale) * k[keep], 3)
    P = method(problem, rng=3)
    np.testing.assert_allclose(kernel_of(P)[:, keep], want, rtol=0, atol=1e3 * EPS * np.abs(want).max())
    sums = want.sum(-1, keepdims=True)
    amplification = max(1, np.abs(want).sum(-1).max() / np.abs(sums).min())
    np.testing.assert_allclose(P.dense()[:, keep], want / sums, rtol=0, atol=1e3 * EPS * amplification**2)
    assert not P.dense()[:, ~keep].any()


@pytest.mark.parametrize(("name", "options"), [("phase_features", {}), ("gerf_features", {"rho": 0.4})], ids=str)
def test_causal_form_is_the_triangle_of_the_same_kernel(name, options):
    q, k = 0.7 * draw(0, 150, 4), 0.7 * draw(1, 150, 4)
    method = nl.method(name, m=32, **options)
    full = kernel_of(method(nl.AttentionProblem(q, k), rng=0))
    causal = kernel_of(method(nl.AttentionProblem(q, k, causal=True), rng=0))
    np.testing.assert_allclose(causal, np.tril(full), rtol=0, atol=1e3 * EPS * np.abs(full).max())


@pytest.mark.parametrize("directions", ["orthogonal", "simplex", "sobol", "hadamard"])
@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_every_ensemble_composes(name, options, directions):
    """512 directions: near softmax, also where the rows of the ensemble are not Gaussian and nothing is promised."""
    problem = nl.AttentionProblem(0.5 * draw(0, 19, 4), 0.5 * draw(1, 19, 4))
    method = nl.method(name, m=512, directions=directions, **options)
    error = np.linalg.norm(method(problem, rng=0).dense() - problem.exact().dense())
    assert error < 0.15 * np.linalg.norm(problem.exact().dense())
    assert method.properties.unbiased == (directions != "hadamard")
    assert (method.theory(problem) is None) == (directions == "hadamard")


# -- parameters --------------------------------------------------------------------------------------------------------


def test_rho_one_is_the_positive_features():
    problem = nl.AttentionProblem(draw(0, 9, 3), draw(1, 9, 3))
    one = kernel_of(nl.method("gerf_features", m=5, rho=1)(problem, rng=0))
    np.testing.assert_allclose(one, kernel_of(nl.method("positive_features", m=5)(problem, rng=0)), rtol=1e3 * EPS)


@pytest.mark.parametrize(("t", "d", "rho"), [(0.5, 4, 0.701562), (4.0, 16, 0.561553), (30.0, 64, 0.427640)])
def test_known_optima(t, d, rho, xp):
    assert float(optimal_rho(xp.asarray(t, dtype=xp.float64), d)) == pytest.approx(rho, abs=6e-7)
    x = np.full((1, d), (t / d) ** 0.5 / 2)  # one pair with |x + y|² = t
    method = nl.method("gerf_features", m=2)
    arrays = [xp.asarray(x)] * 2
    halves = [xp.sum(a * a, axis=-1, keepdims=True) / 2 for a in arrays]
    assert float(method._rho(*arrays, *halves, None)[0, 0]) == pytest.approx(rho, abs=6e-7)


def test_the_balance_is_the_best_diagonal():
    """mean |Ψx + Ψ⁻¹y|² is least at Ψ, with unequal numbers of queries and keys; inner products stay."""
    x, y = draw(0, 11, 3) * [1, 3, 0.2], draw(1, 29, 3) * [2, 0.1, 1] + 0.3
    method = nl.method("saderf_features", m=2)
    u, v = method._balance(x, y, None)
    np.testing.assert_allclose(u @ v.T, x @ y.T, atol=100 * EPS * np.abs(x @ y.T).max())

    def objective(factor):
        return np.mean(np.sum((u[:, None] * factor + v[None] / factor) ** 2, -1))

    best = objective(np.ones(3))
    assert best < 0.8 * np.mean(np.sum((x[:, None] + y[None]) ** 2, -1))
    for coordinate in np.eye(3):
        assert min(objective(np.exp(0.01 * coordinate)), objective(np.exp(-0.01 * coordinate))) > best


def test_a_coordinate_without_queries_is_left_alone():
    x, y = draw(0, 11, 3), draw(1, 7, 3)
    x[:, 1] = 0
    u, v = nl.method("saderf_features", m=2)._balance(x, y, None)
    np.testing.assert_array_equal(v[:, 1], y[:, 1])
    assert np.isfinite(u).all()


def test_the_objective_falls_from_positive_to_dense_features():
    """Mean log of the second moment over all pairs, at the parameters that the methods read off the data."""
    q, k = draw(0, 60, 6) * [3, 2, 1, 0.5, 0.3, 0.1], draw(1, 50, 6) + 2 * np.eye(6)[0]
    problem = nl.AttentionProblem(q, k)

    def objective(name, **options):
        theory = nl.method(name, m=1, **options).theory(problem)
        return np.mean(np.logaddexp(0, theory.log_relative_variance()))

    one, spherical, dense = objective("gerf_features", rho=1), objective("gerf_features"), objective("sderf_features")
    assert one > spherical + 0.5
    assert spherical > dense + 0.5
    assert one == pytest.approx(objective("positive_features"), rel=1e-12)
    assert objective("gerf_features", rho=1.001 * _rho(problem)) > spherical
    assert objective("gerf_features", rho=0.999 * _rho(problem)) > spherical


def _rho(problem):
    root = problem.scale**0.5
    z = root * problem.q[:, None] + root * problem.k[None]
    return float(rf.optimal_rho(np.mean(np.sum(z**2, -1)), problem.d))


def test_no_basis_is_better_than_the_eigenvectors():
    """Among 200 random bases, each with the best ρ for its own coordinates."""
    x, y = draw(0, 40, 4) * [2, 1, 0.5, 0.2], draw(1, 40, 4) * [0.3, 2, 1, 0.5]
    z = (x[:, None] + y[None]).reshape(-1, 4)

    def objective(basis):
        t = np.mean((z @ basis) ** 2, axis=0)
        rho = rf.optimal_rho(t, 1)
        return np.sum(np.log((1 + rho) ** 2 / (4 * rho)) / 2 + rho * t)

    best = objective(to_numpy(nl.method("sderf_features", m=1)._axes(x, y, None)[1]))
    others = [objective(np.linalg.qr(draw(seed, 4, 4))[0]) for seed in range(200)]
    assert best < min(others)


@pytest.mark.parametrize(("name", "options"), FITTED, ids=str)
def test_each_head_has_its_own_parameters(name, options):
    """Grouped queries: two heads of keys, three of queries each, of very different lengths."""
    q = draw(0, 2, 3, 20, 4) * np.array([0.2, 0.7, 1.5])[:, None, None]
    k = draw(1, 2, 1, 20, 4) * np.array([0.3, 1.2])[:, None, None, None]
    method = nl.method(name, m=8, **options)
    problem = nl.AttentionProblem(q, k)
    together = method(problem, rng=0).dense()
    for index in np.ndindex(2, 3):
        alone = method(problem.head(index), rng=0).dense()
        np.testing.assert_allclose(together[index], alone, rtol=0, atol=1e4 * EPS)


def test_equal_eigenvalues_and_signs_of_eigenvectors_do_not_matter():
    """±e_l as tokens: M is a multiple of the identity, whose eigenvectors are arbitrary."""
    tokens = np.concatenate([np.eye(4), -np.eye(4)])
    order = np.random.default_rng(0).permutation(8)
    method = nl.method("sderf_features", m=8)
    one = method(nl.AttentionProblem(tokens, tokens), rng=0).dense()
    other = method(nl.AttentionProblem(tokens, tokens[order]), rng=0).dense()
    np.testing.assert_allclose(other, one[:, order], rtol=0, atol=1e3 * EPS)
    spherical = nl.method("gerf_features", m=8)(nl.AttentionProblem(tokens, tokens), rng=0).dense()
    np.testing.assert_allclose(one, spherical, rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize(("name", "options"), FITTED, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_degenerate_data(name, options, dtype):
    """All tokens zero, or on one line: second moments are singular, and rounding makes eigenvalues negative."""
    method = nl.method(name, m=8, **options)
    zero = np.zeros((5, 3), dtype)
    np.testing.assert_allclose(method(nl.AttentionProblem(zero, zero), rng=0).dense(), 0.2, rtol=1e-5)
    line = (1e3 * draw(0, 30, 1) * np.array([1.0, 1.0, 1e-3])).astype(dtype)
    assert np.isfinite(method(nl.AttentionProblem(line, 0.1 * line), rng=0).dense()).all()


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_libraries_agree(name, options, xp):
    q, k = 0.7 * draw(0, 2, 20, 4), 0.7 * draw(1, 2, 20, 4)
    method = nl.method(name, m=16, **options)
    problem = nl.AttentionProblem(q, k)
    want, got = method(problem, rng=0), method(problem.map(xp.asarray), rng=0)
    amplification = (np.abs(want.op.dense()).sum(-1) / np.abs(want.sums)).max()
    np.testing.assert_allclose(to_numpy(got.dense()), want.dense(), rtol=0, atol=1e3 * EPS * amplification**2)


@pytest.mark.parametrize(("name", "options"), [*FITTED, ("gerf_features", {"rho": 0.5})], ids=str)
def test_float32_agrees_with_float64(name, options):
    single = nl.AttentionProblem(draw(0, 130, 8).astype(np.float32), 2 * draw(1, 130, 8).astype(np.float32))
    method = nl.method(name, m=32, **options)
    want, got = (method(p, rng=0).dense() for p in (single.astype(np.float64), single))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e3 * np.finfo(np.float32).eps)


def test_large_exponents_are_cheaper_with_the_optimum():
    """E |x + y|² = 16: medians over seeds of the error of the kernel, relative to each entry."""
    problem = nl.AttentionProblem(2 * draw(0, 64, 16), 2 * draw(1, 64, 16))
    exact = np.exp(problem.scale * problem.q @ problem.k.T)

    def error(name):
        draws = [kernel_of(nl.method(name, m=256)(problem, rng=seed)) / exact for seed in range(9)]
        return np.median([np.mean(np.abs(np.log(np.maximum(a, 1e-300)))) for a in draws])

    assert error("gerf_features") < 0.75 * error("positive_features")


# -- recentring (B4) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "options"), [*ALL, ("hybrid_features", {})], ids=str)
def test_recentring_lowers_the_exponent_by_the_square_of_the_mean(name, options, masked):
    """That of |x + y|²; of |x − y|² for phases; of their mean for hybrids."""
    signs = {"phase_features": (-1,), "hybrid_features": (1, -1)}.get(name, (1,))
    q, k = draw(0, 60, 5) + 0.8, draw(1, 60, 5) + 1.9
    keep = np.arange(60) % 3 != 0 if masked else np.ones(60, dtype=bool)
    problem = nl.AttentionProblem(q, k, key_mask=keep if masked else None)
    plain = nl.method(name, m=4, **options)
    moved = replace(plain, recentre=True)

    def mean_square(method):
        x, y = method._scaled(problem)
        return np.mean([np.mean(np.sum((sign * x[:, None] + y[None, keep]) ** 2, -1)) for sign in signs])

    drop = problem.scale * np.sum((np.mean(signs) * q.mean(0) + k[keep].mean(0)) ** 2)
    assert drop > 1
    np.testing.assert_allclose(mean_square(plain) - mean_square(moved), drop, rtol=1e-12)
    assert moved.properties.shift_invariant
    assert not plain.properties.shift_invariant
    assert "causal" not in moved.properties.supports


def test_recentring_moves_the_optimum():
    problem = nl.AttentionProblem(draw(0, 60, 5) + 2, draw(1, 60, 5) + 2)
    found = []
    for recentre in (False, True):
        method = nl.method("gerf_features", m=4, recentre=recentre)
        x, y = method._scaled(problem)
        found.append(float(method._rho(x, y, *(np.sum(a**2, -1, keepdims=True) / 2 for a in (x, y)), None)[0, 0]))
    assert found[0] < 0.7 * found[1]


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gerf_features", "rho='optimal' is read off all keys; pass a number"),
        ("saderf_features", "the balance of queries and keys is read off all keys"),
        ("sderf_features", "the matrix of the exponent is read off all keys"),
    ],
)
def test_parameters_of_all_keys_have_no_causal_form(name, why):
    with pytest.raises(Unsupported, match=f"no form with causal .*{why}"):
        nl.method(name, m=4)(nl.AttentionProblem(np.eye(3), np.eye(3), causal=True), rng=0)


@pytest.mark.parametrize("rho", [0, -0.5, np.nan, np.inf, "best", None, True])
def test_bad_rho(rho):
    with pytest.raises(ValueError, match="rho must be a number > 0 or 'optimal'"):
        nl.method("gerf_features", m=4, rho=rho)


def test_the_options_make_the_method_again():
    for name, options in ALL:
        method = nl.method(name, m=4, orthogonal=True, **options)
        again = nl.methods.describe(method)
        assert nl.method(again.pop("method"), **again) == method
