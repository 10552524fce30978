"""Sampling of keys with replacement against its definition, and the laws that conformance cannot see."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.theory.sampling import product_error

EPS = np.finfo(np.float64).eps
UNEQUAL = ("value_norms", "key_norms", "optimal")


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def problem(n=30, d=4, *, batch=(), n_q=None, **options):
    q, k, v = draw(0, *batch, n_q or n, d), draw(1, *batch, n, d), draw(2, *batch, n, 3)
    return nl.AttentionProblem(q, k, v, **options)


def probabilities(p, rule):
    """p_j written out."""
    keep = np.ones(p.n_k, bool) if p.key_mask is None else p.key_mask
    if rule == "uniform":
        w = np.ones(p.n_k)
    elif rule == "key_norms":
        w = np.linalg.norm(p.k, axis=-1)
    else:
        w = np.linalg.norm(p.v, axis=-1)
    if rule == "optimal":
        a = np.exp(p.scale * p.q @ p.k.T) * keep
        w = w * np.linalg.norm(a / a.sum(-1, keepdims=True), axis=0)
    w = w * keep
    return w / w.sum()


def kernel(op):
    """The kernel before normalisation."""
    return to_numpy(op.op.dense()) * np.exp(to_numpy(op.row_scale_log))[..., None]


def counts_of(op, p, m, prob):
    """How often each key was drawn, from the kernel: Â_ij / A_ij = c_j / (m p_j)."""
    ratio = kernel(op) / np.exp(p.scale * p.q @ np.swapaxes(p.k, -1, -2))
    return ratio[0] * m * prob


# -- sampled keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["uniform", *UNEQUAL])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_is_that_of_the_definition(rule, masked):
    """Â_ij = A_ij c_j/(m p_j) with whole numbers c_j that add up to m, the same in every row."""
    keep = np.arange(30) % 3 != 1
    p, m = problem(key_mask=keep if masked else None), 12
    op = nl.method("sampled_keys", m=m, probabilities=rule)(p, rng=3)
    prob = probabilities(p, rule)
    with np.errstate(divide="ignore", invalid="ignore"):
        counts = counts_of(op, p, m, prob)
    np.testing.assert_allclose(counts, np.round(counts), rtol=0, atol=1e4 * EPS)
    assert np.round(counts).sum() == m
    if masked:
        assert not counts[~keep].any()
    want = np.exp(p.scale * p.q @ p.k.T) * np.round(counts) / np.where(prob > 0, m * prob, 1)
    np.testing.assert_allclose(kernel(op), want, rtol=0, atol=1e3 * EPS * np.max(want))
    np.testing.assert_allclose(op.dense(), want / want.sum(-1, keepdims=True), rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize("rule", ["uniform", *UNEQUAL])
@pytest.mark.parametrize("stratified", [False, True])
def test_the_mean_over_draws_is_the_kernel(rule, stratified):
    """With a mask, which the conformance suite does not try: 4.5 standard errors over all keys."""
    keep = np.arange(10) % 3 != 1
    p = problem(10, d=2, key_mask=keep)
    method = nl.method("sampled_keys", m=8, probabilities=rule, stratified=stratified)
    ratios = np.stack([(kernel(method(p, rng=s)) / np.exp(p.scale * p.q @ p.k.T))[0] for s in range(800)])
    error = ratios.std(0, ddof=1) / np.sqrt(len(ratios))
    assert np.all(np.abs(ratios.mean(0) - keep)[keep] < 4.5 * error[keep] + 1e-12)
    assert not ratios[:, ~keep].any()


@pytest.mark.parametrize("rule", ["uniform", *UNEQUAL])
def test_the_mean_square_error_of_the_product_is_that_of_theory(rule):
    """‖A V − Â V‖_F² before normalisation over 600 draws, within 4.5 standard errors of theory C6."""
    p, m = problem(12, d=3), 6
    A = np.exp(p.scale * p.q @ p.k.T)
    method = nl.method("sampled_keys", m=m, probabilities=rule)
    errors = np.asarray([np.sum((A @ p.v - kernel(method(p, rng=s)) @ p.v) ** 2) for s in range(600)])
    promised = product_error(A, p.v, probabilities(p, rule), m)
    assert abs(errors.mean() - promised) < 4.5 * errors.std(ddof=1) / np.sqrt(len(errors))


def test_optimal_probabilities_have_the_least_mean_square_error_of_the_product():
    """Of P V with P exact, in closed form (theory C6), on values and keys of unequal size."""
    p = problem(40)
    v = p.v * np.exp(draw(5, 40, 1))
    p = nl.AttentionProblem(3 * p.q, p.k, v)
    P = p.exact().dense()
    error = {rule: product_error(P, v, probabilities(p, rule), 10) for rule in ("uniform", *UNEQUAL)}
    assert min(error, key=error.get) == "optimal"
    assert error["optimal"] < 0.8 * min(error[rule] for rule in ("uniform", "value_norms", "key_norms"))


@pytest.mark.parametrize(("stratified", "rate"), [(False, 0.5), (True, 1.0)])
def test_rate_of_convergence(stratified, rate):
    """Sixteen times the draws: a quarter of the error, or a sixteenth with stratified ones beyond n draws."""
    p = problem(20)
    P = p.exact().dense()

    def error(m):
        method = nl.method("sampled_keys", m=m, stratified=stratified)
        return np.sqrt(np.mean([np.sum((method(p, rng=s).dense() - P) ** 2) for s in range(60)]))

    assert error(256) / error(16 * 256) == pytest.approx(16**rate, rel=0.25)


def test_no_values_stand_for_the_identity():
    p = problem()
    bare = nl.AttentionProblem(p.q, p.k)
    same = nl.AttentionProblem(p.q, p.k, np.eye(30))
    for rule in ("value_norms", "optimal"):
        method = nl.method("sampled_keys", m=9, probabilities=rule)
        np.testing.assert_allclose(method(bare, rng=1).dense(), method(same, rng=1).dense(), rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("rule", UNEQUAL)
def test_causal_forms_are_refused_with_the_reason(rule):
    with pytest.raises(nl.Unsupported, match=f"{rule}.*earlier queries may not see"):
        nl.method("sampled_keys", m=4, probabilities=rule)(problem(causal=True), rng=0)


@pytest.mark.parametrize("masked", [False, True])
def test_causal_kernel(masked):
    """Column 0 exactly, every other with the weight n/(m − 1) for each draw; the mean over draws is the kernel."""
    n, m = 9, 6
    keep = np.arange(n) % 3 != 1
    p = problem(n, causal=True, key_mask=keep if masked else None)
    method = nl.method("sampled_keys", m=m)
    A = np.exp(p.scale * p.q @ p.k.T)
    seen = np.tri(n, dtype=bool) & (keep if masked else True)
    ratios = np.stack([kernel(method(p, rng=s)) / A for s in range(800)])
    np.testing.assert_allclose(ratios[:, :, 0], 1, rtol=1e3 * EPS)
    assert not ratios[:, ~seen].any()
    np.testing.assert_allclose(ratios * (m - 1) / n, np.where(
        np.arange(n) > 0, np.round(ratios * (m - 1) / n), (m - 1) / n), rtol=0, atol=1e4 * EPS)  # fmt: skip
    last = ratios[:, -1, 1:][:, seen[-1, 1:]]
    assert np.all(np.abs(last.mean(0) - 1) < 4.5 * last.std(0, ddof=1) / np.sqrt(800))
    variance = method.theory(p).relative_variance()[-1, 1:][seen[-1, 1:]]
    np.testing.assert_allclose(last.var(0).mean(), variance.mean(), rtol=0.2)


def test_causal_draws_do_not_look_at_later_masks():
    """The conformance suite changes later keys; here later keys are hidden."""
    n = 20
    keep = np.arange(n) < 15
    q, k = draw(0, n, 4), draw(1, n, 4)
    method = nl.method("sampled_keys", m=12)
    whole = method(nl.AttentionProblem(q, k, causal=True), rng=4).dense()
    part = method(nl.AttentionProblem(q, k, causal=True, key_mask=keep), rng=4).dense()
    np.testing.assert_array_equal(whole[:15], part[:15])


def test_a_causal_sample_needs_two_keys():
    with pytest.raises(ValueError, match="m must be at least 2"):
        nl.method("sampled_keys", m=1)(problem(causal=True), rng=0)
    one = nl.method("sampled_keys", m=1)(problem(1, causal=True), rng=0)
    assert one.dense().tolist() == [[1.0]]


@pytest.mark.parametrize("name", ["sampled_keys", "kdeformer"])
def test_grouped_queries_share_no_more_than_their_keys(name):
    q, k, v = draw(0, 2, 3, 11, 4), draw(1, 2, 1, 11, 4), draw(2, 2, 1, 11, 5)
    p = nl.AttentionProblem(q, k, v)
    options = {"probabilities": "optimal"} if name == "sampled_keys" else {}
    op = nl.method(name, m=7, **options)(p, rng=0)
    assert op.shape == (2, 3, 11, 11)
    for index in np.ndindex(2, 3):
        alone = nl.method(name, m=7, **options)(p.head(index), rng=0)
        np.testing.assert_allclose(op.dense()[index], alone.dense(), rtol=0, atol=1e3 * EPS)


def test_unknown_probabilities_are_refused():
    with pytest.raises(ValueError, match="probabilities must be one of uniform, value_norms, key_norms, optimal"):
        nl.method("sampled_keys", m=4, probabilities="norms")


# -- KDEformer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("values", [False, True])
def test_kdeformer_probabilities_from_all_queries_are_exact(masked, values):
    """One query drawn again and again knows all columns of a matrix with equal rows."""
    keep = np.arange(30) % 3 != 1
    p = problem()
    q = np.broadcast_to(p.q[:1], (30, 4))
    p = nl.AttentionProblem(q, p.k, p.v if values else None, key_mask=keep if masked else None)
    P = p.exact().dense()
    sizes = np.sum(p.v**2, -1) if values else np.ones(30)
    sizes = sizes * (keep if masked else 1)
    want = 0.5 * (P[0] ** 2 / np.sum(P[0] ** 2) + sizes / sizes.sum())
    op, m = nl.method("kdeformer", m=50)(p, rng=2), 50
    counts = counts_of(op, p, m, want)
    np.testing.assert_allclose(counts, np.round(counts), rtol=0, atol=1e5 * EPS)
    assert np.round(counts).sum() == m


def test_kdeformer_finds_the_keys_that_matter():
    """A few long keys take nearly all weight: uniform samples miss them."""
    rng = np.random.default_rng(0)
    n = 400
    q, k = np.abs(rng.standard_normal((n, 4))), 0.1 * rng.standard_normal((n, 4))
    k[::100] = 4 * np.abs(rng.standard_normal((4, 4)))
    p = nl.AttentionProblem(q, k, rng.standard_normal((n, 3)), scale=1.0)
    P = p.exact().dense()

    def error(name, **options):
        method = nl.method(name, m=24, **options)
        return np.mean([np.linalg.norm(method(p, rng=s).dense() - P) for s in range(5)]) / np.linalg.norm(P)

    assert error("kdeformer") < 0.4 * min(error("sampled_keys"), error("random_keys"))
    assert error("sampled_keys", probabilities="optimal") < 0.4 * error("random_keys")


def test_kdeformer_refuses_values_that_are_all_zero():
    p = nl.AttentionProblem(draw(0, 5, 2), draw(1, 5, 2), np.zeros((5, 3)))
    with pytest.raises(ValueError, match="all values of a head are zero"):
        nl.method("kdeformer", m=4)(p, rng=0)


def test_kdeformer_has_no_causal_form():
    with pytest.raises(nl.Unsupported, match="look at all keys and values, later ones included"):
        nl.method("kdeformer", m=4)(problem(causal=True), rng=0)
