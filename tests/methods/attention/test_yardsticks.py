"""Doing nothing, random keys and the best of a rank, each against its definition."""

import numpy as np
import pytest
from scipy.stats import chi2

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.operators import LowRank

EPS = np.finfo(np.float64).eps
STRUCTURES = ("full", "causal", "key_mask", "causal and key_mask")


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def problem(n=30, d=4, *, structure="full", batch=(), xp=np, **options):
    keep = np.arange(n) % 3 != 1
    return nl.AttentionProblem(
        xp.asarray(draw(0, *batch, n, d)),
        xp.asarray(draw(1, *batch, n, d)),
        causal="causal" in structure,
        key_mask=xp.asarray(keep) if "key_mask" in structure else None,
        **options,
    )


def visible(n, structure):
    seen = np.tri(n, dtype=bool) if "causal" in structure else np.ones((n, n), dtype=bool)
    return seen & (np.arange(n) % 3 != 1) if "key_mask" in structure else seen


# -- uniform -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_uniform_is_the_mean_over_visible_keys(structure, xp):
    seen = visible(150, structure)
    P = nl.method("uniform")(problem(150, structure=structure, xp=xp))
    want = seen / seen.sum(-1, keepdims=True)
    np.testing.assert_allclose(to_numpy(P.dense()), want, rtol=0, atol=10 * EPS)
    v = draw(2, 150, 3)
    np.testing.assert_allclose(to_numpy(P @ xp.asarray(v)), want @ v, rtol=0, atol=100 * EPS)


def test_uniform_is_exact_where_the_keys_are_equal():
    p = nl.AttentionProblem(draw(0, 20, 4), np.ones((20, 4)), causal=True)
    np.testing.assert_allclose(nl.method("uniform")(p).dense(), p.exact().dense(), rtol=0, atol=10 * EPS)


# -- random keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_keys_give_exact_attention(structure, xp):
    p = problem(structure=structure, xp=xp, batch=(2,))
    P = nl.method("random_keys", m=30)(p, rng=0)
    np.testing.assert_allclose(to_numpy(P.dense()), to_numpy(p.exact().dense()), rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_softmax_on_the_sample(structure):
    """The rest of the definition: a softmax over the drawn keys that a query sees, zero elsewhere."""
    p = problem(structure=structure, scale=0.8)
    P = nl.method("random_keys", m=12)(p, rng=3).dense()
    sample = np.flatnonzero(P.any(axis=0))
    assert len(sample) == 12
    seen = visible(30, structure)[:, sample]
    weights = np.where(seen, np.exp(0.8 * p.q @ p.k[sample].T), 0)
    np.testing.assert_allclose(P[:, sample], weights / weights.sum(-1, keepdims=True), rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("seed", range(20))
def test_causal_sample_holds_the_first_key(seed):
    P = nl.method("random_keys", m=2)(problem(structure="causal"), rng=seed).dense()
    assert P[0, 0] == 1
    assert np.all(P[:, 0] > 0)
    assert np.count_nonzero(P.any(axis=0)) == 2
    assert not np.triu(P, 1).any()


def test_masked_keys_are_drawn_last():
    p = problem(structure="key_mask")
    keep = to_numpy(p.key_mask)
    for m in (5, 20, 25):  # 20 keys are visible: with 25 the sample holds hidden ones, of weight zero
        drawn = nl.method("random_keys", m=m)(p, rng=1).dense().any(axis=0)
        assert drawn.sum() == min(m, keep.sum())
        assert not drawn[~keep].any()


@pytest.mark.parametrize("causal", [False, True])
def test_trailing_padding_is_as_good_as_removed(causal):
    n, m = 30, 6
    q, k = draw(0, n, 4), draw(1, n, 4)
    keep = np.arange(n) < 20
    method = nl.method("random_keys", m=m)
    padded = method(nl.AttentionProblem(q, k, key_mask=keep, causal=causal), rng=5).dense()
    short = method(nl.AttentionProblem(q[:20], k[:20], causal=causal), rng=5).dense()
    np.testing.assert_allclose(padded[:20, :20], short, rtol=0, atol=10 * EPS)
    assert not padded[:, 20:].any()


@pytest.mark.parametrize(("structure", "free"), [("full", 12), ("causal", 11), ("key_mask", 8)])
def test_the_sample_is_uniform(structure, free):
    """χ² of inclusion counts over 1500 seeds at level 1e-4; counts of a sample without replacement vary less.

    ``free`` keys are drawn at random: all, all but the first where it always belongs, or the visible ones.
    """
    n, m, draws = 12, 5, 1500
    p = problem(n, structure=structure)
    counts = sum(nl.method("random_keys", m=m)(p, rng=seed).factors[1].dense().sum(0) for seed in range(draws))
    random = counts[1:] if structure == "causal" else counts[visible(n, structure)[0]] if free == 8 else counts
    drawn = m - 1 if structure == "causal" else m
    assert random.shape == (free,)
    assert random.sum() == drawn * draws
    share = drawn / free
    statistic = np.sum((random - draws * share) ** 2) / (draws * share * (1 - share)) * (free - 1) / free
    assert chi2.ppf(1e-4, free - 1) < statistic < chi2.isf(1e-4, free - 1)


def test_error_of_the_output_on_independent_values():
    """With equal logits the error is that of a sample mean: relative error √(n/m − 1) in the Frobenius norm."""
    n, m = 64, 16
    p = nl.AttentionProblem(np.zeros((n, 2)), np.zeros((n, 2)))
    E = nl.method("random_keys", m=m)(p, rng=0).dense() - p.exact().dense()
    np.testing.assert_allclose(np.linalg.norm(E) / np.linalg.norm(p.exact().dense()), np.sqrt(n / m - 1), rtol=1e-12)


def test_each_mask_has_its_own_sample_and_the_same_mask_the_same():
    keep = np.ones((3, 30), dtype=bool)
    keep[2, ::2] = False
    q = draw(0, 3, 30, 4)
    P = nl.method("random_keys", m=6)(nl.AttentionProblem(q, q, key_mask=keep), rng=0).dense()
    drawn = [set(np.flatnonzero(P[h].any(axis=0))) for h in range(3)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert not any(j % 2 == 0 for j in drawn[2])


def test_too_many_keys_are_refused():
    with pytest.raises(ValueError, match="m=31 keys cannot be drawn without replacement from n_k=30"):
        nl.method("random_keys", m=31)(problem(), rng=0)


# -- the best of a rank ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("m", [1, 7, 30])
def test_eckart_young(structure, m, xp):
    """σ_i(P − P_m) = σ_{m+i}(P) for every i (theory C1 with equality), and P_m has the leading singular values."""
    p = problem(structure=structure, xp=xp)
    best = nl.method("optimal_rank", m=m)(p)
    P, B = to_numpy(p.exact().dense()), to_numpy(best.dense())
    sigma = np.linalg.svd(P, compute_uv=False)
    rest = np.concatenate([sigma[m:], np.zeros(m)])
    np.testing.assert_allclose(np.linalg.svd(P - B, compute_uv=False), rest, rtol=0, atol=100 * EPS * sigma[0])
    kept = np.concatenate([sigma[:m], np.zeros(30 - m)])
    np.testing.assert_allclose(np.linalg.svd(B, compute_uv=False), kept, rtol=0, atol=100 * EPS * sigma[0])
    assert isinstance(best, LowRank)
    assert best.rank == m


@pytest.mark.parametrize("method", ["uniform", "elu_features", "random_keys", "positive_features"])
def test_no_method_beats_the_best_of_its_rank(method):
    """Theory C1 as an inequality: σ_i(P − P̂) ≥ σ_{m+i}(P) where P̂ has rank at most m."""
    p = problem(60, d=6)
    rank = {"uniform": 1, "elu_features": 6}.get(method, 8)
    options = {"m": 8} if rank == 8 else {}
    P = p.exact().dense()
    sigma = np.linalg.svd(P, compute_uv=False)
    error = np.linalg.svd(P - nl.method(method, **options)(p, rng=0).dense(), compute_uv=False)
    assert np.all(error[:-rank] >= sigma[rank:] - 100 * EPS * sigma[0])


def test_window_and_bias_belong_to_the_matrix():
    q, k, bias = draw(0, 20, 4), draw(1, 20, 4), draw(2, 20, 20)
    p = nl.AttentionProblem(q, k, window=5, bias=bias)
    np.testing.assert_allclose(
        nl.method("optimal_rank", m=20)(p).dense(), p.exact().dense(), rtol=0, atol=100 * EPS * np.sqrt(20)
    )


def test_float32_problems_are_decomposed_in_float64():
    p = problem().astype(np.float32)
    best = nl.method("optimal_rank", m=30)(p)
    assert best.dtype == np.float64
    np.testing.assert_allclose(best.dense(), p.exact().dense(), rtol=0, atol=100 * EPS)


def test_heads_are_decomposed_one_by_one():
    q, k = draw(0, 2, 3, 20, 4), draw(1, 2, 1, 20, 4)
    p = nl.AttentionProblem(q, k)
    best = nl.method("optimal_rank", m=4)(p)
    for index in np.ndindex(2, 3):
        alone = nl.method("optimal_rank", m=4)(p.head(index)).dense()
        np.testing.assert_allclose(best.dense()[index], alone, rtol=0, atol=1e3 * EPS)


def test_long_sequences_go_through_block_krylov(monkeypatch):
    """n_q = 2100: both norms of the error within the stated 4.5e-4 (see ``linalg.truncated_svd``) of the dense SVD."""
    monkeypatch.delattr("nla_llm.linalg.svd._dense_svd")  # so that it cannot come to the rescue
    n_q, n_k, m = 2100, 520, 3
    p = nl.AttentionProblem(draw(0, n_q, 2), draw(1, n_k, 2))
    best = nl.method("optimal_rank", m=m)(p, rng=0)
    P = p.exact().dense()
    sigma = np.linalg.svd(P, compute_uv=False)
    E = P - best.dense()
    assert np.sqrt(np.sum(sigma[m:] ** 2)) * (1 - 1e-12) <= np.linalg.norm(E)
    assert np.linalg.norm(E) <= (1 + 4.5e-4) * np.sqrt(np.sum(sigma[m:] ** 2))
    gram = E.T @ E
    assert np.sqrt(np.linalg.eigvalsh(gram)[-1]) <= (1 + 4.5e-4) * sigma[m]
    again = nl.method("optimal_rank", m=m)(p)
    np.testing.assert_array_equal(again.dense(), best.dense())  # without a seed: that of 0


def test_rank_above_the_dimensions_is_refused():
    p = nl.AttentionProblem(draw(0, 5, 2), draw(1, 3, 2))
    with pytest.raises(ValueError, match="m=4 exceeds the dimensions of the matrix, 5 x 3"):
        nl.method("optimal_rank", m=4)(p)
