"""HyperAttention against a dense definition, and the traps that published code has fallen into."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.attention.sampled.hyper import bucket_order

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def kernel(op):
    """The kernel before normalisation."""
    return to_numpy(op.op.dense()) * np.exp(to_numpy(op.row_scale_log))[..., None]


def parts(op):
    """The blocks and the sample."""
    return op.op.terms


def definition(p, op):
    """A [same block] + (n/s) A [j sampled] [another block], from the blocks and the sample that were drawn."""
    blocks, rest = parts(op)
    keep = np.ones(p.n_k, bool) if p.key_mask is None else p.key_mask
    query_block, key_block = blocks.queries.block, blocks.keys.block
    same = (query_block[:, None] == key_block[None, :]) & keep
    sampled = np.isin(np.arange(p.n_k), rest.factors[1].index) & keep
    A = np.exp(p.scale * p.q @ p.k.T)
    return A * (same + ~same * sampled * (keep.sum() / sampled.sum()))


# -- the order of the buckets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 7])
def test_neighbouring_buckets_differ_by_one_sign(bits, xp):
    """All sign words: their places are all numbers, and words in the order of their places differ by one sign."""
    words = np.where(np.arange(2**bits)[:, None] >> np.arange(bits) & 1, 1.0, -1.0)
    place = to_numpy(bucket_order(xp.asarray(words)))
    assert sorted(place.tolist()) == list(range(2**bits))
    ordered = words[np.argsort(place)]
    assert np.all(np.sum(ordered[1:] != ordered[:-1], axis=-1) == 1)


def test_gray_code_applied_instead_of_inverted_jumps():
    """Sorting by g(word) where its inverse is meant leaves jumps of up to four signs from three bits on."""
    words = np.arange(2**7)
    wrong = np.argsort(words ^ (words >> 1))
    jumps = [int(a ^ b).bit_count() for a, b in zip(wrong[1:], wrong[:-1], strict=True)]
    assert max(jumps) == 4
    right = bucket_order(np.where(words[:, None] >> np.arange(7) & 1, 1.0, -1.0))
    order = np.argsort(right)
    assert max(int(a ^ b).bit_count() for a, b in zip(order[1:], order[:-1], strict=True)) == 1


# -- the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_q", "n_k", "m"), [(31, 31, 8), (29, 53, 13), (3, 50, 9), (64, 7, 4), (17, 17, 1), (1, 9, 2)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_is_that_of_the_definition(n_q, n_k, m, masked):
    keep = np.arange(n_k) % 3 != 1
    p = nl.AttentionProblem(draw(0, n_q, 4), draw(1, n_k, 4), key_mask=keep if masked else None)
    op = nl.method("hyper_attention", m=m, bits=3)(p, rng=5)
    want = definition(p, op)
    np.testing.assert_allclose(kernel(op), want, rtol=0, atol=1e3 * EPS * want.max())
    np.testing.assert_allclose(op.dense(), want / want.sum(-1, keepdims=True), rtol=0, atol=1e3 * EPS)
    v = draw(2, n_k, 3)
    np.testing.assert_allclose(op @ v, op.dense() @ v, rtol=0, atol=1e3 * EPS)


@pytest.mark.parametrize("n", [1, 2, 13, 64, 67, 127])
@pytest.mark.parametrize("m", [2, 7, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_every_token_has_one_slot(n, m, masked):
    """No key is lost at an awkward length, and no masked key is in a block or counts in the sample."""
    keep = (np.arange(n) % 3 != 1) if masked else np.ones(n, bool)
    p = nl.AttentionProblem(draw(0, n, 4), draw(1, n, 4), key_mask=keep if masked else None)
    blocks, rest = parts(nl.method("hyper_attention", m=m)(p, rng=0))
    for sorting, present in ((blocks.queries, np.ones(n, bool)), (blocks.keys, keep)):
        held = sorting.token.index[sorting.filled.ravel()]
        assert sorted(held.tolist()) == np.flatnonzero(present).tolist()
        assert np.array_equal(sorting.token.index[sorting.slot.index][present], np.arange(n)[present])
        sizes = sorting.filled.sum(-1)
        assert sizes.max() - sizes.min() <= 1
    assert np.all(blocks.keys.block[~keep] == -1)
    drawn = rest.factors[1].index
    assert len(set(drawn.tolist())) == min(-(-m // 2), n)
    assert not rest.dense()[:, ~keep].any()


def test_the_mean_over_draws_is_the_kernel():
    """With a mask, which the conformance suite does not try: 4.5 standard errors over all pairs."""
    keep = np.arange(11) % 3 != 1
    p = nl.AttentionProblem(draw(0, 5, 2), draw(1, 11, 2), key_mask=keep)
    method = nl.method("hyper_attention", m=6, bits=2)
    ratios = np.stack([kernel(method(p, rng=s)) / np.exp(p.scale * p.q @ p.k.T) for s in range(1500)])[..., keep]
    error = ratios.std(0, ddof=1) / np.sqrt(len(ratios))
    assert np.all(error > 0)
    assert np.all(np.abs(ratios.mean(0) - 1) < 4.5 * error)
    assert np.all(ratios.var(0) < 1.15 * (7 / 3 - 1))


@pytest.mark.parametrize("masked", [False, True])
def test_one_block_is_exact(masked, xp):
    n = 23
    keep = xp.asarray(np.arange(n) % 3 != 1)
    q, k = (xp.asarray(draw(s, 2, n, 4)) for s in range(2))
    p = nl.AttentionProblem(q, k, key_mask=keep if masked else None)
    P = nl.method("hyper_attention", m=2 * n)(p, rng=0)
    np.testing.assert_allclose(to_numpy(P.dense()), to_numpy(p.exact().dense()), rtol=0, atol=100 * EPS)


def test_clusters_are_found():
    """Clusters as large as a block, in shuffled order: blocks leave hardly any error, a random sample does."""
    rng = np.random.default_rng(3)
    centres = np.repeat(3 * rng.standard_normal((8, 16)), 64, axis=0)
    q, k = ((centres + 0.01 * rng.standard_normal((512, 16)))[rng.permutation(512)] for _ in range(2))
    p = nl.AttentionProblem(q, k)
    P = p.exact().dense()

    def error(name, **options):
        method = nl.method(name, m=128, **options)
        return np.median([np.linalg.norm(method(p, rng=s).dense() - P) for s in range(5)]) / np.linalg.norm(P)

    assert error("hyper_attention", bits=12) < 0.01  # with 7 bits two of the clusters often share a bucket
    assert error("random_keys") > 1


def test_a_negative_scale_pairs_opposite_tokens():
    q = np.repeat(8 * np.eye(2), 3, axis=0) - 4
    p = nl.AttentionProblem(q, -q, scale=-1.0)
    error = (p.exact() - nl.method("hyper_attention", m=6)(p, rng=0)).dense()
    assert np.abs(error).max() < 1e-6


def test_parts_of_very_different_size_add_without_a_cap():
    """Logits of a block that are 600 above or below those of the sample: float64, no epsilon, all finite."""
    for sign in (1, -1):
        k = np.concatenate([np.full((4, 1), 1.0), np.full((4, 1), -1.0)])
        p = nl.AttentionProblem(sign * 300.0 * k, k, scale=1.0)
        for seed in range(5):
            op = nl.method("hyper_attention", m=8)(p, rng=seed)
            want = definition(p, op) * np.exp(-300.0)
            np.testing.assert_allclose(op.dense(), want / want.sum(-1, keepdims=True), rtol=0, atol=1e3 * EPS)


def test_each_mask_has_blocks_of_its_own():
    """Heads with different masks in one call are what they are alone."""
    keep = np.ones((3, 30), bool)
    keep[1, 20:] = False
    keep[2, ::2] = False
    q, k = draw(0, 3, 30, 4), draw(1, 3, 30, 4)
    p = nl.AttentionProblem(q, k, key_mask=keep)
    op = nl.method("hyper_attention", m=8)(p, rng=0).dense()
    for h in range(3):
        alone = nl.method("hyper_attention", m=8)(p.head(h), rng=0).dense()
        np.testing.assert_allclose(op[h], alone, rtol=0, atol=100 * EPS)


def test_the_causal_form_is_refused_with_the_reason():
    with pytest.raises(nl.Unsupported, match="later queries decide"):
        nl.method("hyper_attention", m=4)(nl.AttentionProblem(draw(0, 5, 2), draw(1, 5, 2), causal=True), rng=0)


def test_too_many_bits_are_refused():
    with pytest.raises(ValueError, match="bits must be at most 30"):
        nl.method("hyper_attention", m=4, bits=31)
