"""Clustered attention against naive definitions; Lloyd steps against SciPy; the bound of its error."""

import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods import Unsupported
from nla_llm.methods.attention.landmarks.clustered import cluster
from nla_llm.theory import columns

EPS = np.finfo(np.float64).eps
NAMES = ("clustered_attention", "improved_clustered_attention")


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def naive_improved(q, k, centroids, labels, *, top, keep=None, scale=0.5):
    """Row by row, as in the paper."""
    keep = np.ones(len(k), bool) if keep is None else keep
    shared = softmax(np.where(keep, scale * centroids @ k.T, -np.inf))
    rows = []
    for i, j in enumerate(labels):
        row = shared[j].copy()
        largest = np.argsort(-row)[:top]
        largest = largest[keep[largest]]
        mass = row[largest].sum()
        row[largest] = mass * softmax(scale * k[largest] @ q[i])
        rows.append(row)
    return np.array(rows)


# -- clusters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_lloyd_steps_are_those_of_scipy(steps, xp):
    x = draw(0, 60, 3)
    start = x[np.sort(np.random.default_rng(7).permutation(60)[:8])]
    centroids, labels = cluster(xp.asarray(x), 8, steps, np.random.default_rng(7))
    want, _ = kmeans2(x, start, iter=steps, minit="matrix", missing="raise")
    np.testing.assert_allclose(to_numpy(centroids), want, rtol=0, atol=100 * EPS)
    nearest = np.argmin(((x[:, None] - want[None]) ** 2).sum(-1), axis=1)
    assert np.array_equal(to_numpy(labels), nearest)


def test_heads_are_clustered_alone_in_threads_and_without():
    x = draw(0, 3, 1200, 60)  # large enough for threads over heads
    centroids, labels = cluster(x, 5, 3, np.random.default_rng(1))
    for head in range(3):
        alone = cluster(x[head], 5, 3, np.random.default_rng(1))
        np.testing.assert_allclose(centroids[head], alone[0], rtol=0, atol=100 * EPS)
        assert np.array_equal(labels[head], alone[1])


def test_an_empty_cluster_keeps_its_centroid():
    x = np.zeros((6, 1))
    centroids, labels = cluster(x, 3, 4, np.random.default_rng(0))
    assert np.array_equal(centroids, np.zeros((3, 1)))
    assert np.array_equal(labels, np.zeros(6))


# -- the operators -----------------------------------------------------------------------------------------------------


def test_queries_take_the_row_of_their_centroid(xp):
    q, k, v = draw(0, 30, 4), draw(1, 23, 4), draw(2, 23, 3)
    P = nl.method("clustered_attention", m=5)(nl.AttentionProblem(xp.asarray(q), xp.asarray(k)), rng=3)
    centroids, labels = cluster(q, 5, 5, np.random.default_rng(3))
    want = softmax(0.5 * centroids @ k.T)[labels]
    np.testing.assert_allclose(to_numpy(P.dense()), want, rtol=0, atol=100 * EPS)
    np.testing.assert_allclose(to_numpy(P @ xp.asarray(v)), want @ v, rtol=0, atol=100 * EPS)
    assert np.linalg.matrix_rank(want) == 5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top", [1, 4])
def test_top_keys_are_recomputed_and_the_mass_is_preserved(top, masked, xp):
    q, k = draw(0, 30, 4), draw(1, 23, 4)
    keep = np.arange(23) % 3 != 0
    problem = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), key_mask=xp.asarray(keep) if masked else None)
    P = nl.method("improved_clustered_attention", m=5, k=top)(problem, rng=3)
    centroids, labels = cluster(q, 5, 5, np.random.default_rng(3))
    want = naive_improved(q, k, centroids, labels, top=top, keep=keep if masked else None)
    got = to_numpy(P.dense())
    np.testing.assert_allclose(got, want, rtol=0, atol=100 * EPS)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=0, atol=100 * EPS)
    y = draw(4, 30, 2)
    np.testing.assert_allclose(to_numpy(P.T @ xp.asarray(y)), want.T @ y, rtol=0, atol=1000 * EPS)


@pytest.mark.parametrize("keep", [None, np.arange(23) % 3 != 0], ids=["all", "masked"])
def test_all_keys_recomputed_is_exact_attention(keep):
    problem = nl.AttentionProblem(draw(0, 30, 4), draw(1, 23, 4), key_mask=keep)
    exact = problem.exact().dense()
    for k in (23, 100):
        P = nl.method("improved_clustered_attention", m=3, k=k)(problem, rng=0)
        np.testing.assert_allclose(P.dense(), exact, rtol=0, atol=100 * EPS)


def test_as_many_clusters_as_queries_is_exact_attention():
    problem = nl.AttentionProblem(draw(0, 12, 4), draw(1, 23, 4))
    P = nl.method("clustered_attention", m=12)(problem, rng=0)
    np.testing.assert_allclose(P.dense(), problem.exact().dense(), rtol=0, atol=100 * EPS)


def test_error_stays_below_the_bound_and_the_top_keys_lower_it():
    q, k = draw(0, 80, 4), draw(1, 60, 4)
    problem = nl.AttentionProblem(q, k)
    exact = problem.exact().dense()
    centroids, labels = cluster(q, 10, 5, np.random.default_rng(0))
    bound = columns.clustering_bound(np.linalg.norm(q - centroids[labels], axis=1), np.linalg.norm(k, 2), 0.5)
    errors = np.linalg.norm(nl.method("clustered_attention", m=10)(problem, rng=0).dense() - exact, axis=1)
    assert np.all(errors <= bound)
    assert errors.max() > 0.01 * bound.max()
    improved = nl.method("improved_clustered_attention", m=10, k=20)(problem, rng=0).dense() - exact
    assert np.linalg.norm(improved) < 0.7 * np.linalg.norm(errors)


def test_grouped_queries():
    q, k = draw(0, 2, 3, 20, 4), draw(1, 2, 1, 20, 4)
    for name in NAMES:
        method = nl.method(name, m=4)
        whole = method(nl.AttentionProblem(q, k), rng=0)
        for index in np.ndindex(2, 3):
            alone = method(nl.AttentionProblem(q[index], k[index[0], 0]), rng=0)
            np.testing.assert_allclose(whole.dense()[index], alone.dense(), rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name):
    q = draw(0, 6, 2)
    with pytest.raises(ValueError, match="m=7 clusters cannot be made of 6 queries"):
        nl.method(name, m=7)(nl.AttentionProblem(q, q), rng=0)
    with pytest.raises(Unsupported, match="a mean over later queries too"):
        nl.method(name, m=2)(nl.AttentionProblem(q, q, causal=True), rng=0)
    with pytest.raises(ValueError, match="steps must be"):
        nl.method(name, m=2, steps=0)
