"""Kernel halving against a walk written out pair by pair, and that no key is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.attention.sampled.thinning import halvings

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def problem(n, d=3, *, d_v=2, values=True, batch=(), **options):
    v = draw(2, *batch, n, d_v) if values else None
    return nl.AttentionProblem(draw(0, *batch, 5, d), draw(1, *batch, n, d), v, **options)


def weights(op, p):
    """Weight of each key, (n_k,): the ratio of the kernel before normalisation to exp(logits)."""
    kernel = to_numpy(op.op.dense()) * np.exp(to_numpy(op.row_scale_log))[..., None]
    return (kernel / np.exp(p.scale * p.q @ np.swapaxes(p.k, -1, -2)))[..., 0, :]


# -- the plan ----------------------------------------------------------------------------------------------------------


@given(n=st.integers(1, 5000), m=st.integers(1, 300), bucket=st.integers(2, 100))
def test_the_plan_leaves_m_keys(n, m, bucket):
    if m > n:
        return
    points = n
    for step in halvings(n, m, bucket):
        paired = points - step.kept
        assert 0 <= 2 * step.buckets * step.pairs - paired < 2 * step.buckets  # at most one empty pair in a bucket
        assert paired > 0
        points = step.kept + step.buckets * step.pairs
    assert points == m


def test_work_grows_linearly():
    """Entries of all Gram matrices over n · bucket · rounds stay bounded."""
    for n in (1 << 10, 1 << 13, 1 << 16, (1 << 16) + 1, 99_991):
        plan = halvings(n, 256, 64)
        assert sum(4 * s.buckets * s.pairs**2 for s in plan) < 3 * n * 64 * len(plan)


# -- the weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 31, 64, 67, 127, 1000])
@pytest.mark.parametrize("m", [1, 3, 8, 29])
@pytest.mark.parametrize("greedy", [False, True])
def test_weights_are_whole_and_sum_to_the_number_of_keys(n, m, greedy):
    if m > n:
        return
    p = problem(n)
    w = weights(nl.method("thinformer", m=m, bucket=8, greedy=greedy)(p, rng=0), p)
    np.testing.assert_allclose(w, np.round(w), rtol=0, atol=1e4 * EPS * n)
    assert np.round(w).sum() == n
    assert m - 8 <= np.count_nonzero(np.round(w)) <= m  # points of weight zero can take the place of a few


@pytest.mark.parametrize("kept", [1, 2, 20])
def test_masked_keys_have_no_weight_and_pass_none_on(kept):
    keep = np.zeros(31, bool)
    keep[np.random.default_rng(0).permutation(31)[:kept]] = True
    p = problem(31, key_mask=keep)
    for seed in range(5):
        w = weights(nl.method("thinformer", m=4, bucket=4)(p, rng=seed), p)
        assert not w[~keep].any()
        np.testing.assert_allclose(w.sum(), kept, rtol=1e3 * EPS)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_mean_weight_is_one(greedy, masked):
    """n = 11 to m = 3 passes through odd buckets and a partial round; 4.5 standard errors over all keys."""
    keep = np.arange(11) % 3 != 1 if masked else np.ones(11, bool)
    p = problem(11, key_mask=keep if masked else None)
    method = nl.method("thinformer", m=3, bucket=4, greedy=greedy)
    w = np.stack([weights(method(p, rng=s), p) for s in range(1500)])[:, keep]
    error = w.std(0, ddof=1) / np.sqrt(len(w))
    assert np.all(error > 0)
    assert np.all(np.abs(w.mean(0) - 1) < 4.5 * error)


def test_all_keys_are_exact(xp):
    q, k = (xp.asarray(draw(s, 2, 13, 4)) for s in range(2))
    p = nl.AttentionProblem(q, k)
    P = nl.method("thinformer", m=13)(p, rng=0)
    np.testing.assert_allclose(to_numpy(P.dense()), to_numpy(p.exact().dense()), rtol=0, atol=100 * EPS)


# -- the walk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_one_halving_is_the_walk_written_out(values, greedy):
    """16 keys to 8 in one bucket: signs by the inner product with the sum of signed differences so far."""
    p, m = problem(16, values=values, scale=-0.7), 8
    method = nl.method("thinformer", m=m, greedy=greedy, delta=0.3)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        u, flip = rng.random((1, 8))[0], rng.random((1, 1))[0, 0] < 0.5
        K = np.exp(0.7 * p.k @ p.k.T)
        if values:
            K *= p.v @ p.v.T / np.max(np.abs(p.v)) ** 2 + 1
        D = np.zeros((8, 16))
        D[np.arange(8), 2 * np.arange(8)], D[np.arange(8), 2 * np.arange(8) + 1] = 1, -1
        signed, longest, chosen = np.zeros(16), 0.0, []
        for i in range(8):
            length = np.sqrt(D[i] @ K @ D[i])
            longest = max(longest, length)
            threshold = 0.0 if greedy else (0.5 + np.log(2 * 8 * 16 / (8 * 0.3))) * length * longest
            first = D[i] @ K @ signed + threshold * (2 * u[i] - 1) < 0
            signed += D[i] if first else -D[i]
            chosen.append(2 * i + (first == flip))
        w = weights(method(p, rng=seed), p)
        np.testing.assert_allclose(w, 2.0 * np.isin(np.arange(16), chosen), rtol=0, atol=1e4 * EPS)


@pytest.mark.parametrize("greedy", [False, True])
def test_thinning_beats_a_random_sample_on_smooth_values(greedy):
    """Output errors on values that vary smoothly with the keys: the threshold of the walk costs most of the gain."""
    n, m = 1024, 16
    rng = np.random.default_rng(4)
    q, k = rng.uniform(-1, 1, (2, n, 1))
    v = np.concatenate([k, k**2], axis=-1)
    p = nl.AttentionProblem(q, k, v)
    exact = p.exact() @ v

    def error(name, **options):
        method = nl.method(name, m=m, **options)
        return np.sqrt(np.mean([np.sum((method(p, rng=s) @ v - exact) ** 2) for s in range(20)]))

    assert error("thinformer", greedy=greedy) < (0.45 if greedy else 0.85) * error("random_keys")


def test_heads_are_thinned_one_by_one():
    p = nl.AttentionProblem(draw(0, 2, 3, 9, 4), draw(1, 2, 1, 40, 4), draw(2, 2, 1, 40, 2))
    op = nl.method("thinformer", m=7, bucket=8)(p, rng=0)
    assert op.shape == (2, 3, 9, 40)
    for index in np.ndindex(2, 3):
        alone = nl.method("thinformer", m=7, bucket=8)(p.head(index), rng=0)
        np.testing.assert_allclose(op.dense()[index], alone.dense(), rtol=0, atol=1e3 * EPS)


def test_values_that_are_all_zero_leave_a_fair_choice():
    p = nl.AttentionProblem(draw(0, 5, 3), draw(1, 20, 3), np.zeros((20, 2)))
    w = weights(nl.method("thinformer", m=5)(p, rng=0), p)
    np.testing.assert_allclose(w.sum(), 20, rtol=1e3 * EPS)


def test_refusals():
    with pytest.raises(ValueError, match="m=6 keys cannot be left of n_k=5"):
        nl.method("thinformer", m=6)(problem(5), rng=0)
    with pytest.raises(nl.Unsupported, match="later ones included"):
        nl.method("thinformer", m=2)(nl.AttentionProblem(draw(0, 5, 2), draw(1, 5, 2), causal=True), rng=0)
    with pytest.raises(ValueError, match="delta must be a number > 0 and <= 1"):
        nl.method("thinformer", m=2, delta=0.0)
    with pytest.raises(ValueError, match="bucket must be a whole number >= 2"):
        nl.method("thinformer", m=2, bucket=1)
