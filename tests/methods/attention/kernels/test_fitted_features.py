"""Fitted features against their dense definition, differences of the cost, its lower bound, and tokens not seen."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.attention.kernels import fitted_features as fitted
from nla_llm.methods.attention.kernels.fitted_features import FeatureMaps, FittedFeatures

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def problem(seed, n=50, d=3, batch=(), **structure):
    return nl.AttentionProblem(2 * draw([seed, 0], *batch, n, d), draw([seed, 1], *batch, n, d), **structure)


def maps(d, h, batch=(), seed=9):
    return FeatureMaps(0.7 * draw([seed, 0], *batch, d + 1, h), 0.7 * draw([seed, 1], *batch, d + 1, h))


def frobenius(p, op):
    return np.linalg.norm(p.exact().dense() - op.dense(), axis=(-2, -1))


# -- the definition ----------------------------------------------------------------------------------------------------


def dense(p, m, w):
    """Softmax over the features, written out for one problem; W and b from the last two axes of the maps."""
    root = abs(p.scale) ** 0.5
    x, y = root * p.q, np.sign(p.scale) * root * p.k
    z_q, z_k = (a @ u[..., :-1, :] + u[..., -1:, :] for a, u in ((x, w.queries), (y, w.keys)))
    phi_q, phi_k = (softmax(np.concatenate([z, -z], -1)[..., :m], axis=-1) for z in (z_q, z_k))
    kernel = phi_q @ np.swapaxes(phi_k, -1, -2)
    kernel = np.tril(kernel) if p.causal else kernel
    kernel = kernel if p.key_mask is None else kernel * p.key_mask
    return kernel / kernel.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("structure", [{}, {"causal": True}, {"scale": -0.4}, {"key_mask": np.arange(70) % 3 > 0}])
@pytest.mark.parametrize("m", [1, 6, 7])
def test_definition(m, structure):
    p = problem(0, n=70, batch=(2,), **structure)
    w = maps(3, -(-m // 2), batch=(2,))
    op = FittedFeatures(m, maps=w)(p)
    np.testing.assert_allclose(op.dense(), dense(p, m, w), rtol=0, atol=100 * EPS)
    np.testing.assert_allclose(op @ p.k, dense(p, m, w) @ p.k, rtol=0, atol=1000 * EPS)


def test_before_the_fit_it_is_the_published_start(xp):
    """W = I, b = 0: features exp(±x_l), the same for all heads."""
    p = problem(1, batch=(2,))
    start = np.vstack([np.eye(3), np.zeros(3)])
    op = FittedFeatures(6)(p.map(xp.asarray))
    np.testing.assert_allclose(to_numpy(op.dense()), dense(p, 6, FeatureMaps(start, start)), rtol=0, atol=100 * EPS)


def test_a_start_with_more_columns_than_dimensions_repeats_none():
    w = fitted.initial_map(3, 8)
    assert w.shape == (4, 8)
    np.testing.assert_allclose(np.linalg.norm(w, axis=0), 1, rtol=1e-14)
    distance = np.linalg.norm(w[:, :, None] - w[:, None, :], axis=0) + np.eye(8)
    assert distance.min() > 0.1
    np.testing.assert_array_equal(w, fitted.initial_map(3, 8))


def test_grouped_queries_may_have_maps_for_every_query_head():
    q, k = draw(0, 2, 3, 20, 4), draw(1, 2, 1, 20, 4)
    w = maps(4, 3, batch=(2, 3))
    op = FittedFeatures(6, maps=w)(nl.AttentionProblem(q, k))
    assert op.shape == (2, 3, 20, 20)
    for i, g in np.ndindex(2, 3):
        one = nl.AttentionProblem(q[i, g], k[i, 0])
        want = dense(one, 6, FeatureMaps(w.queries[i, g], w.keys[i, g]))
        np.testing.assert_allclose(op.dense()[i, g], want, rtol=0, atol=100 * EPS)


# -- the cost and its gradient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [5, 6])
@pytest.mark.parametrize("structure", [{}, {"causal": True}, {"key_mask": np.arange(12) > 3}])
def test_the_cost_is_the_cross_entropy_of_the_rows(m, structure):
    ps = [problem(s, n=12, **structure) for s in (0, 1)]
    w = maps(3, 3)
    entropies = []
    for p in ps:
        exact, approximate = p.exact().dense(), dense(p, m, w)
        entropies.append(-np.sum(exact[exact > 0] * np.log(approximate[exact > 0])))
    rows = [fitted._calibration(p) for p in ps]
    assert fitted.cross_entropy(w.queries, w.keys, rows, m)[0] == pytest.approx(sum(entropies) / 24, rel=1e-12)


@pytest.mark.parametrize("m", [5, 6])
@pytest.mark.parametrize("structure", [{}, {"causal": True}, {"key_mask": np.arange(12) > 3}])
def test_gradient_by_differences(m, structure):
    """Richardson's extrapolation of central differences, whose error is of the order h⁴ + eps/h ≈ 1e-12."""
    rows = [fitted._calibration(problem(s, n=12, **structure)) for s in (0, 1)]
    w = maps(3, 3)
    _, *gradients = fitted.cross_entropy(w.queries, w.keys, rows, m)
    for side, gradient in zip(("queries", "keys"), gradients, strict=True):
        for index in np.ndindex(gradient.shape):

            def along(t, side=side, index=index):
                moved = {"queries": w.queries.copy(), "keys": w.keys.copy()}
                moved[side][index] += t
                return fitted.cross_entropy(**moved, rows=rows, m=m)[0]

            wide, narrow = ((along(h) - along(-h)) / (2 * h) for h in (2e-3, 1e-3))
            assert gradient[index] == pytest.approx((4 * narrow - wide) / 3, rel=1e-8, abs=1e-10)
    assert min(np.abs(g).max() for g in gradients) > 1e-3


def test_a_step_too_far_costs_much_but_stays_finite():
    rows = [fitted._calibration(problem(0, n=12))]
    w = maps(3, 3)
    value, *gradients = fitted.cross_entropy(1e4 * w.queries, 1e4 * w.keys, rows, 6)
    assert np.isfinite(value)
    assert value > 100
    assert all(np.all(np.isfinite(g)) for g in gradients)


# -- the fit -----------------------------------------------------------------------------------------------------------


def test_the_fit_is_judged_on_other_tokens():
    start = FittedFeatures(16)
    calibration = [problem(s, n=120) for s in range(4)]
    found = start.fit(*calibration, steps=80)
    for p, allowed in ((calibration[0], 0.65), (problem(99, n=120), 0.8)):
        assert frobenius(p, found(p)) < allowed * frobenius(p, start(p))
        assert frobenius(p, found(p)) < allowed * frobenius(p, nl.method("elu_features")(p))
    assert start.maps is None


def test_the_cost_comes_down_to_the_entropy_where_features_suffice():
    """Keys of two values: the kernel has rank two, and its rows are reached to any accuracy by four features."""
    k = np.array([[1.0, 0.5], [-0.5, 1.0]])[np.arange(30) % 2]
    p = nl.AttentionProblem(draw(0, 40, 2), k, scale=1.0)
    rows = [fitted._calibration(p)]
    exact = p.exact().dense()
    entropy = -np.sum(exact * np.log(exact)) / 40
    found = FittedFeatures(4).fit(p, steps=500)
    start = fitted.initial_map(2, 2)
    gaps = [
        fitted.cross_entropy(a, b, rows, 4)[0] - entropy
        for a, b in ((found.maps.queries, found.maps.keys), (start, start))
    ]
    assert -1e-12 < gaps[0] < 1e-3 * gaps[1]


@pytest.mark.parametrize("tied", [False, True])
def test_heads_are_fitted_apart(tied):
    p = problem(3, batch=(2, 2))
    start = FittedFeatures(6, tied=tied)
    whole = start.fit(p, steps=5)
    assert whole.maps.queries.shape == (2, 2, 4, 3)
    assert np.array_equal(whole.maps.queries, whole.maps.keys) == tied
    for index in np.ndindex(2, 2):
        alone = start.fit(p.head(index), steps=5)
        np.testing.assert_array_equal(whole.head(index).maps.keys, alone.maps.keys)
        np.testing.assert_allclose(
            whole.head(index)(p.head(index)).dense(), whole(p).dense()[index], rtol=0, atol=100 * EPS
        )


def test_a_fit_goes_on_from_where_it_is():
    p = problem(4, n=80)
    rows = [fitted._calibration(p)]
    once = FittedFeatures(8).fit(p, steps=10)
    fits = (once, once.fit(p, steps=30))
    cost = [fitted.cross_entropy(f.maps.queries, f.maps.keys, rows, 8)[0] for f in fits]
    assert cost[1] < cost[0] - 1e-3


def test_hidden_keys_and_later_keys_do_not_teach():
    keep = np.arange(50) % 3 > 0
    p = problem(5, key_mask=keep)
    junk = nl.AttentionProblem(p.q, np.where(keep[:, None], p.k, 9.0), key_mask=keep)
    one, two = (FittedFeatures(6).fit(a, steps=5).maps.keys for a in (p, junk))
    np.testing.assert_array_equal(one, two)
    causal, full = (FittedFeatures(6).fit(problem(5, causal=c), steps=5).maps.keys for c in (True, False))
    assert np.abs(causal - full).max() > 1e-3


@pytest.mark.parametrize("causal", [False, True])
def test_a_fitted_method_keeps_the_laws(causal):
    found = FittedFeatures(6).fit(problem(6, d=4), steps=20)
    given = [problem(7, d=4, causal=causal), problem(8, n=1, d=4)]
    report = nl.testing.check_method(found, problems=given)
    assert report.passed
    assert report.checks_run > 15


def test_precision_and_other_libraries(xp):
    found = FittedFeatures(6).fit(problem(6, causal=True).map(xp.asarray), steps=10)
    p = problem(9, causal=True)
    op = found(p.map(lambda a: xp.asarray(a, dtype=xp.float32)))
    assert op.dtype == xp.float32
    np.testing.assert_allclose(to_numpy(op.dense()), found(p).dense(), rtol=0, atol=1e3 * np.finfo(np.float32).eps)


def test_its_name_is_one_line_and_two_fits_are_two_methods():
    found = FittedFeatures(6).fit(problem(6, batch=(2,)), steps=1)
    assert repr(found) == "FittedFeatures(m=6, tied=False, maps=<maps of 2 heads, d=3, h=3>)"
    assert found != FittedFeatures(6)
    assert found == found  # noqa: PLR0124 - the maps are compared by identity
    assert hash(found)
    assert found.properties.budget is None
    assert FittedFeatures(6).properties.budget == "m"


def test_logits_of_any_size():
    p = nl.AttentionProblem(
        100 * draw(0, 60, 3).astype(np.float32), 100 * draw(1, 60, 3).astype(np.float32), causal=True
    )
    op = FittedFeatures(6, maps=maps(3, 3))(p)
    root = p.scale**0.5
    z = [root * a.astype(np.float64) @ w[:-1] + w[-1] for a, w in ((p.q, maps(3, 3).queries), (p.k, maps(3, 3).keys))]
    log_q, log_k = (log_softmax(np.concatenate([a, -a], -1), axis=-1) for a in z)
    logs = np.logaddexp.reduce(log_q[:, None] + log_k[None], axis=-1)
    logs = np.where(np.tri(60), logs, -np.inf)
    np.testing.assert_allclose(op.dense(), softmax(logs, axis=-1), rtol=0, atol=1e3 * np.finfo(np.float32).eps)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: FittedFeatures(0), "m must be a whole number"),
        (lambda: FittedFeatures(9, maps=maps(3, 4)), "h=4 columns, which do not make m=9"),
        (lambda: FittedFeatures(6, maps=maps(4, 3))(problem(0)), "of dimension 4, the problem has"),
        (lambda: FittedFeatures(6, maps=maps(3, 3, (2,)))(problem(0)), r"for heads \(2,\)"),
        (lambda: FittedFeatures(6, maps=maps(3, 3, (2,)))(problem(0, batch=(3,))), r"for heads \(2,\)"),
        (lambda: FittedFeatures(6).fit(), "got none"),
        (lambda: FittedFeatures(6).fit(problem(0), problem(0, batch=(2,))), "same batch axes"),
        (lambda: FittedFeatures(6).fit(problem(0), steps=0), "steps must be a whole number"),
        (lambda: FittedFeatures(6).fit(problem(0, window=4)), "window"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_maps_are_feature_maps():
    with pytest.raises(ValueError, match="maps must be the FeatureMaps that fit finds, or None, got 'fitted'"):
        nl.method("fitted_features", m=4, maps="fitted")
