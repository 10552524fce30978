"""Random features against the textbook formulas with the same directions; scales, recentring, options."""

from dataclasses import replace

import numpy as np
import pytest
from methods.attention.kernels.written_out import EPS, draw, kernel_of

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods import Unsupported
from nla_llm.methods.attention.kernels.directions import draw_directions

KINDS = ("positive_features", "hyperbolic_features", "trigonometric_features")
POSITIVE_KINDS = KINDS[:2]


def textbook(kind, omega, x, y):
    """Â_ij = φ(x_i)·φ(y_j) as the papers write it, every exponential multiplied out."""
    m = len(omega)
    squares = np.sum(x**2, -1)[:, None] / 2, np.sum(y**2, -1)[None, :] / 2
    px, py = (x @ omega.T)[:, None, :], (y @ omega.T)[None, :, :]
    if kind == "positive_features":  # exp(ω·x − |x|²/2) exp(ω·y − |y|²/2)
        return np.exp(px + py).sum(-1) * np.exp(-squares[0] - squares[1]) / m
    if kind == "hyperbolic_features":  # half of the same for ω and for −ω
        return (np.exp(px + py) + np.exp(-px - py)).sum(-1) * np.exp(-squares[0] - squares[1]) / (2 * m)
    return (np.cos(px) * np.cos(py) + np.sin(px) * np.sin(py)).sum(-1) * np.exp(squares[0] + squares[1]) / m


def directions(method, d, seed):
    rng = np.random.default_rng(seed)
    if method.directions == "iid":
        return rng.standard_normal((method.m, d))
    return draw_directions("orthogonal", method.m, d, rng, like=np.zeros(1)).dense()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3, -0.8])
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_textbook_formula(kind, orthogonal, scale, causal):
    n, d = 70, 4
    q, k = 0.7 * draw(0, n, d), 0.7 * draw(1, n, d)
    problem = nl.AttentionProblem(q, k, scale=scale, causal=causal)
    method = nl.method(kind, m=6, orthogonal=orthogonal)
    root = np.sqrt(abs(problem.scale))
    want = textbook(kind, directions(method, d, 3), root * q, np.copysign(root, problem.scale) * k)
    want = np.tril(want) if causal else want
    P = method(problem, rng=3)
    np.testing.assert_allclose(kernel_of(P), want, rtol=0, atol=200 * EPS * np.abs(want).max())
    sums = want.sum(-1, keepdims=True)
    amplification = np.abs(want).sum(-1).max() / np.abs(sums).min()
    np.testing.assert_allclose(P.dense(), want / sums, rtol=0, atol=200 * EPS * max(amplification, 1) ** 2)


@pytest.mark.parametrize("kind", KINDS)
def test_libraries_agree(kind, xp):
    q, k = 0.7 * draw(0, 2, 20, 4), 0.7 * draw(1, 2, 20, 4)
    method = nl.method(kind, m=16, orthogonal=True)
    for causal in (False, True):
        problem = nl.AttentionProblem(q, k, causal=causal)
        want = method(problem, rng=0)
        got = method(problem.map(xp.asarray), rng=0)
        amplification = (np.abs(want.op.dense()).sum(-1) / np.abs(want.sums)).max()
        np.testing.assert_allclose(to_numpy(got.dense()), want.dense(), rtol=0, atol=200 * EPS * amplification**2)


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_has_the_mean_exp_of_the_logits(kind):
    """Over 400 draws of 64 directions, within four standard errors of the closed-form variance."""
    q, k = 0.6 * draw(0, 6, 4), 0.6 * draw(1, 6, 4)
    problem, draws = nl.AttentionProblem(q, k, scale=1.0), 400
    method = nl.method(kind, m=64)
    mean = sum(kernel_of(method(problem, rng=seed)) for seed in range(draws)) / draws
    want = np.exp(q @ k.T)
    t = np.sum((q[:, None] + k[None]) ** 2, -1)
    s = np.sum((q[:, None] - k[None]) ** 2, -1)
    relative = {  # relative variances of one direction (Choromanski et al. 2021, Lemma 2)
        "positive_features": np.expm1(t),
        "hyperbolic_features": np.cosh(t) - 1,
        "trigonometric_features": np.exp(s) * np.expm1(-s) ** 2 / 2,
    }[kind]
    assert np.max(np.abs(mean / want - 1) / np.sqrt(relative / (64 * draws))) < 4


def test_hyperbolic_features_are_the_positive_ones_of_both_signs():
    problem = nl.AttentionProblem(draw(0, 9, 3), draw(1, 9, 3))
    positive = kernel_of(nl.method("positive_features", m=5)(problem, rng=0))
    mirrored = nl.AttentionProblem(-problem.q, -problem.k)
    negative = kernel_of(nl.method("positive_features", m=5)(mirrored, rng=0))
    hyperbolic = kernel_of(nl.method("hyperbolic_features", m=5)(problem, rng=0))
    np.testing.assert_allclose(hyperbolic, (positive + negative) / 2, rtol=1e3 * EPS)


# -- large logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("level", [50.0, 300.0, 3000.0])
@pytest.mark.parametrize("kind", KINDS)
def test_large_logits_in_float32(kind, level, causal):
    """|logits| up to ``level``: float32 would overflow at 88."""
    n, d = 130, 8
    q, k = draw(0, n, d), draw(1, n, d)
    factor = np.sqrt(level / np.abs(q @ k.T / np.sqrt(d)).max())
    problem = nl.AttentionProblem((factor * q).astype(np.float32), (factor * k).astype(np.float32), causal=causal)
    P = nl.method(kind, m=32)(problem, rng=0)
    dense = P.dense()
    assert dense.dtype == np.float32
    assert np.isfinite(dense).all()
    assert np.isfinite(P.row_scale_log).all()
    size = np.abs(dense).sum(-1)  # trigonometric rows cancel: rounding is relative to the sum of magnitudes
    assert np.all(np.abs(dense.sum(-1) - 1) <= n * np.finfo(np.float32).eps * (size + 1))
    if kind in POSITIVE_KINDS:
        assert dense.min() >= 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", POSITIVE_KINDS)
def test_float32_agrees_with_float64(kind, causal):
    n, d = 130, 8
    q, k = 2 * draw(0, n, d), 2 * draw(1, n, d)
    single = nl.AttentionProblem(q.astype(np.float32), k.astype(np.float32), causal=causal)
    double = single.astype(np.float64)
    method = nl.method(kind, m=32)
    want, got = method(double, rng=0).dense(), method(single, rng=0).dense()
    logs = 0.5 * max(np.sum(q**2, -1).max(), np.sum(k**2, -1).max())  # the exponents are rounded before exp
    np.testing.assert_allclose(got, want, rtol=0, atol=20 * logs * np.finfo(np.float32).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_a_last_key_of_huge_norm_leaves_earlier_rows_alone(kind):
    n, d = 70, 4
    q, k = 0.3 * draw(0, n, d), 0.3 * draw(1, n, d)
    huge = k.copy()
    huge[-1] *= 1e3
    method = nl.method(kind, m=32)
    before = method(nl.AttentionProblem(q, k, causal=True), rng=0)
    after = method(nl.AttentionProblem(q, huge, causal=True), rng=0)
    if kind == "trigonometric_features":  # whose logs grow with the norm: the running scale must jump
        assert after.op.chunk == 1
    np.testing.assert_allclose(after.dense()[:-1], before.dense()[:-1], rtol=0, atol=1e4 * EPS)
    assert not after.dense()[:-1, -1].any()
    assert np.isfinite(after.dense()).all()


def test_norms_that_jump_between_neighbours():
    """Key norms between 0.1 and 60, one after the other: log φ(k) jumps by up to 1800."""
    n, d, m = 90, 4, 8
    norms = np.where(np.arange(n) % 3 == 0, 60.0, np.where(np.arange(n) % 3 == 1, 30.0, 0.1))
    k = draw(1, n, d)
    k *= (norms / np.linalg.norm(k, axis=1))[:, None]
    q = draw(0, n, d)
    P = nl.method("positive_features", m=m)(nl.AttentionProblem(q, k, causal=True, scale=1.0), rng=2)
    omega = np.random.default_rng(2).standard_normal((m, d))
    log_q, log_k = (x @ omega.T - np.sum(x**2, -1, keepdims=True) / 2 for x in (q, k))
    log_entries = np.logaddexp.reduce(log_q[:, None] + log_k[None], axis=-1)
    log_entries = np.where(np.tri(n, dtype=bool), log_entries, -np.inf)
    want = np.exp(log_entries - np.logaddexp.reduce(log_entries, axis=-1, keepdims=True))
    np.testing.assert_allclose(P.dense(), want, rtol=0, atol=10 * EPS * np.abs(log_k).max())
    assert P.op.chunk < 64


def test_negative_share_is_reported():
    q, k = 1.5 * draw(0, 200, 16), 1.5 * draw(1, 200, 16)
    P = nl.method("trigonometric_features", m=8)(nl.AttentionProblem(q, k), rng=0)
    want = np.mean(kernel_of(P).sum(-1) < 0)
    assert 0.1 < want < 0.9
    assert float(P.negative_share) == want
    assert not P.nonnegative
    assert float(nl.method("positive_features", m=8)(nl.AttentionProblem(q, k), rng=0).negative_share) == 0


# -- recentring (B4) ---------------------------------------------------------------------------------------------------


def shifted(n=60, d=5):
    return draw(0, n, d) + 0.8, draw(1, n, d) + 0.8


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 1.3])
def test_recentring_lowers_the_exponent_by_the_square_of_the_mean(scale, masked):
    q, k = shifted()
    keep = np.arange(60) % 3 != 0 if masked else np.ones(60, dtype=bool)
    problem = nl.AttentionProblem(q, k, scale=scale, key_mask=keep if masked else None)

    def mean_square(recentre):
        x, y = nl.method("positive_features", m=4, recentre=recentre)._scaled(problem)
        return np.mean(np.sum((x[:, None] + y[None, keep]) ** 2, -1))

    root = np.sqrt(problem.scale)
    drop = np.sum((root * q.mean(0) + root * k[keep].mean(0)) ** 2)
    assert drop > 1
    np.testing.assert_allclose(mean_square(False) - mean_square(True), drop, rtol=100 * EPS * mean_square(False))


@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_recentring_leaves_softmax_unchanged(scale):
    q, k = shifted()
    problem = nl.AttentionProblem(q, k, scale=scale)
    x, y = nl.method("positive_features", m=4, recentre=True)._scaled(problem)
    moved = nl.AttentionProblem(x, y, scale=1.0)
    np.testing.assert_allclose(moved.exact().dense(), problem.exact().dense(), rtol=0, atol=1e3 * EPS)


def test_recentred_features_ignore_shifts_of_the_keys():
    q, k = shifted()
    c = draw(2, 5)
    method = nl.method("positive_features", m=16, recentre=True)
    assert method.properties.shift_invariant
    a, b = (method(nl.AttentionProblem(q, keys), rng=0).dense() for keys in (k, k + c))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e3 * EPS)
    plain = replace(method, recentre=False)
    a, b = (plain(nl.AttentionProblem(q, keys), rng=0).dense() for keys in (k, k + c))
    assert np.abs(a - b).max() > 1e-3


def test_masked_keys_do_not_move_the_centre():
    q, k = shifted()
    keep = np.arange(60) < 40
    garbage = np.where(keep[:, None], k, 1e3)
    method = nl.method("positive_features", m=16, recentre=True)
    masked = method(nl.AttentionProblem(q, garbage, key_mask=keep), rng=0).dense()
    removed = method(nl.AttentionProblem(q, k[keep]), rng=0).dense()
    np.testing.assert_allclose(masked[:, keep], removed, rtol=0, atol=1e3 * EPS)


def test_each_head_has_its_own_centre():
    q, k = draw(0, 3, 20, 4), draw(1, 3, 20, 4) + np.arange(3)[:, None, None]
    method = nl.method("positive_features", m=8, recentre=True)
    together = method(nl.AttentionProblem(q, k), rng=0).dense()
    for h in range(3):
        alone = method(nl.AttentionProblem(q[h], k[h]), rng=0).dense()
        np.testing.assert_allclose(together[h], alone, rtol=0, atol=1e3 * EPS)


def test_recentring_lowers_the_error_where_the_means_are_not_zero():
    """Means of 2 a coordinate: |x̄ + ȳ|² = 45. The error of one draw is heavy-tailed, so medians are compared."""
    problem = nl.AttentionProblem(draw(0, 256, 8) + 2, draw(1, 256, 8) + 2)
    P = problem.exact().dense()

    def error(recentre):
        method = nl.method("positive_features", m=256, recentre=recentre)
        return np.median([np.linalg.norm(method(problem, rng=seed).dense() - P) for seed in range(9)])

    assert error(True) < 0.8 * error(False)


@pytest.mark.parametrize(
    ("name", "signs"),
    [
        ("positive_features", (1,)),
        ("hyperbolic_features", (1,)),
        ("trigonometric_features", (-1,)),
        ("phase_features", (-1,)),
        ("hybrid_features", (1, -1)),
    ],
)
@pytest.mark.parametrize("scale", [0.8, -0.8])
def test_recentring_goes_where_the_exponent_of_the_variance_is_least(name, signs, scale):
    """|x + y|², |x − y|² or their sum: the mean over all pairs has no gradient with respect to a shift of the keys."""
    q, k = shifted()
    x, y = nl.method(name, m=4, recentre=True)._scaled(nl.AttentionProblem(q + 0.5, k, scale=scale))
    gradient = sum(np.mean(y[None] + sign * x[:, None], axis=(0, 1)) for sign in signs)
    np.testing.assert_allclose(gradient, 0, atol=100 * EPS)


@pytest.mark.parametrize("name", ["trigonometric_features", "phase_features", "hybrid_features"])
@pytest.mark.parametrize("masked", [False, True])
def test_recentring_costs_what_its_formula_says(name, masked):
    mask = np.arange(7) != 3 if masked else None
    problem = nl.AttentionProblem(draw(0, 5, 3), draw(1, 7, 3), draw(2, 7, 2), key_mask=mask)
    method = nl.method(name, m=4, recentre=True)
    assert nl.costs.count(method, problem, rng=0) == method.cost(problem).at(problem, method)


@pytest.mark.parametrize("name", ["trigonometric_features", "phase_features"])
def test_recentring_does_not_harm_functions_of_the_difference(name):
    """Queries and keys of one mean are where these are good; minus the mean of the queries is where they are not."""
    problem = nl.AttentionProblem(0.4 * draw(0, 40, 6) + 0.4, 0.4 * draw(1, 40, 6) + 0.4, scale=1.0)
    plain, moved = (nl.method(name, m=64, recentre=r).theory(problem).relative_variance().mean() for r in (False, True))
    assert moved < 1.2 * plain  # more than a hundred times as large with the other sign


def test_recentring_has_no_causal_form():
    method = nl.method("positive_features", m=4, recentre=True)
    assert method.properties.supports == {"key_mask"}
    assert type(method).properties.supports == {"key_mask", "causal"}
    with pytest.raises(Unsupported, match="no form with causal"):
        method(nl.AttentionProblem(np.eye(3), np.eye(3), causal=True), rng=0)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_orthogonal_is_short_for_a_value_of_directions(kind):
    short, long = nl.method(kind, m=4, orthogonal=True), nl.method(kind, m=4, directions="orthogonal")
    assert short == long
    assert hash(short) == hash(long)
    problem = nl.AttentionProblem(np.eye(3), np.eye(3))
    np.testing.assert_array_equal(short(problem, rng=0).dense(), long(problem, rng=0).dense())
    assert np.any(short(problem, rng=0).dense() != nl.method(kind, m=4)(problem, rng=0).dense())


def test_unknown_directions():
    with pytest.raises(ValueError, match=r"directions must be one of iid, orthogonal, .*, sobol, got 'halton'"):
        nl.method("positive_features", m=4, directions="halton")


def test_two_kinds_of_directions_at_once():
    with pytest.raises(ValueError, match="orthogonal=True and directions='sobol' contradict"):
        nl.method("positive_features", m=4, directions="sobol", orthogonal=True)


def test_the_same_directions_serve_all_heads():
    q, k = 0.5 * draw(0, 2, 3, 20, 4), 0.5 * draw(1, 2, 1, 20, 4)  # grouped queries: three of them share keys
    for causal in (False, True):
        problem = nl.AttentionProblem(q, k, causal=causal)
        method = nl.method("positive_features", m=8)
        P = method(problem, rng=0)
        for index in np.ndindex(2, 3):
            alone = method(problem.head(index), rng=0).dense()
            np.testing.assert_allclose(P.dense()[index], alone, rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize("seed", [0, np.int64(0), np.random.default_rng(0)])
def test_a_seed_and_its_generator_draw_the_same(seed):
    problem = nl.AttentionProblem(np.eye(3), np.eye(3))
    method = nl.method("positive_features", m=4)
    np.testing.assert_array_equal(method(problem, rng=seed).dense(), method(problem, rng=0).dense())


def test_theory_is_that_of_the_scaled_problem():
    """Relative variance (exp|x + y|² − 1)/m, with x and y after scaling and recentring."""
    q, k = 0.5 * draw(0, 5, 4), 0.5 * draw(1, 6, 4)
    problem = nl.AttentionProblem(q, k, scale=0.9)
    for shift, method in (
        (0.0, nl.method("positive_features", m=8)),
        (q.mean(0) + k.mean(0), nl.method("positive_features", m=8, recentre=True)),
    ):
        z = np.sqrt(0.9) * (q[:, None] + k[None] - shift)
        theory = method.theory(problem)
        np.testing.assert_allclose(theory.relative_variance(), np.expm1(np.sum(z**2, -1)) / 8, rtol=1e-12)
        assert theory.unbiased
