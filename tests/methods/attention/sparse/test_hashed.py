"""Buckets of an angular hash against a definition written with loops over tokens."""

import numpy as np
import pytest

import nla_llm as nl


def problem(n_q, n_k=None, *, d=3, seed=0, batch=(), **structure):
    rng = np.random.default_rng(seed)
    n_k = n_q if n_k is None else n_k
    q, k = rng.standard_normal((*batch, n_q, d)), rng.standard_normal((*batch, n_k, d))
    return nl.AttentionProblem(q, k, rng.standard_normal((*batch, n_k, 2)), **structure)


def buckets(x, rotations):
    """Numbers of the buckets, in the order of the tuples of all hashes."""
    return [tuple(int(np.argmax(np.concatenate([r @ row, -(r @ row)]))) for r in rotations) for row in x]


def seen_in_one_round(q, k, m, rotations, visible):
    """Which keys each query sees: a chunk of sorted queries, m sorted keys around the bucket of its middle one."""
    of_q, of_k = buckets(q, rotations), buckets(k, rotations)
    queries = sorted(range(len(q)), key=lambda i: of_q[i])
    keys = sorted((j for j in range(len(k)) if visible[j]), key=lambda j: of_k[j])
    seen = np.zeros((len(q), len(k)), bool)
    height = min(64, -(-m // 4))
    for start in range(0, len(q), height):
        chunk = queries[start : start + height]
        bucket = of_q[chunk[len(chunk) // 2]]
        before = sum(of_k[j] < bucket for j in keys)
        upto = sum(of_k[j] <= bucket for j in keys)
        begin = max(0, min((before + upto) // 2 - m // 2, len(keys) - m))
        seen[np.ix_(chunk, keys[begin : begin + m])] = True
    return seen


def definition(p, m, rounds, seed):
    rng = np.random.default_rng(seed)
    visible = np.ones(p.n_k, bool) if p.key_mask is None else p.key_mask
    seen = np.zeros((p.n_q, p.n_k), bool)
    for i in range(rounds):
        share = m // rounds + (i < m % rounds)
        wanted = 2 * -(-p.n_k // share)
        hashes = next(c for c in (1, 2, 3) if 64**c >= wanted)
        directions = next(s for s in range(1, 33) if (2 * s) ** hashes >= wanted)
        rotations = rng.standard_normal((hashes, directions, p.d))
        seen |= seen_in_one_round(p.q, p.k, share, rotations, visible)
    kernel = np.where(seen, np.exp(p.scale * p.q @ p.k.T), 0)
    return kernel / kernel.sum(-1, keepdims=True)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize(
    ("n_q", "n_k", "m"), [(37, 37, 8), (50, 23, 7), (20, 90, 33), (11, 11, 11), (300, 300, 256), (300, 310, 5)]
)
def test_it_is_softmax_over_the_union_of_the_rounds(n_q, n_k, m, rounds):
    p = problem(n_q, n_k)
    op = nl.method("reformer", m=m, rounds=rounds)(p, 5)
    np.testing.assert_allclose(op.dense(), definition(p, m, rounds, 5), rtol=0, atol=1e-14)
    np.testing.assert_allclose(op @ p.v, definition(p, m, rounds, 5) @ p.v, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rounds", [1, 2])
def test_hidden_keys_are_not_hashed(rounds):
    p = problem(40, key_mask=np.arange(40) % 5 < 2)
    for m in (6, 30):
        op = nl.method("reformer", m=m, rounds=rounds)(p, 5)
        np.testing.assert_allclose(op.dense(), definition(p, m, rounds, 5), rtol=0, atol=1e-14)


def test_heads_have_orders_of_their_own_and_the_same_rotation():
    p = problem(40, batch=(2, 3))
    op = nl.method("reformer", m=6, rounds=2)(p, 5).dense()
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(op[index], definition(p.head(index), 6, 2, 5), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_generic_path_agrees_with_numpy(rounds):
    strict = pytest.importorskip("array_api_strict")
    p = problem(40, batch=(2,))
    here, there = (nl.method("reformer", m=9, rounds=rounds)(x, 1) for x in (p, p.map(strict.asarray)))
    np.testing.assert_allclose(np.asarray(there @ strict.asarray(p.v)), here @ p.v, atol=1e-14)
    np.testing.assert_allclose(np.asarray(there.T @ strict.asarray(p.q)), here.T @ p.q, atol=1e-13)


def test_clusters_are_found():
    """Four well separated directions: a query sees its own cluster, where random keys see a quarter of it."""
    rng = np.random.default_rng(0)
    centres = 6 * np.linalg.qr(rng.standard_normal((8, 8)))[0][:4]
    tokens = centres[rng.integers(0, 4, 256)] + 0.3 * rng.standard_normal((256, 8))
    p = nl.AttentionProblem(tokens, tokens)
    exact = p.exact().dense()
    errors = [
        np.mean([np.linalg.norm(nl.method(name, m=96)(p, s).dense() - exact) for s in range(4)])
        for name in ("reformer", "random_keys")
    ]
    assert errors[0] < 0.75 * errors[1]


def test_lengths_of_tokens_do_not_matter_to_the_hash():
    p = problem(50)
    lengths = np.random.default_rng(3).uniform(0.5, 2, (2, 50, 1))
    other = nl.AttentionProblem(lengths[0] * p.q, lengths[1] * p.k)
    seen = [nl.method("reformer", m=10)(x, 1).dense() > 0 for x in (p, other)]
    np.testing.assert_array_equal(*seen)


def test_a_negative_scale_turns_the_queries():
    p = problem(50)
    turned = nl.AttentionProblem(-p.q, p.k, scale=-p.scale)
    np.testing.assert_allclose(*(nl.method("reformer", m=10)(x, 1).dense() for x in (p, turned)), rtol=1e-13)


def test_refusals_say_why():
    with pytest.raises(nl.methods.Unsupported, match="a later key changes the sorted order"):
        nl.method("reformer", m=4)(problem(9, causal=True), 0)
    with pytest.raises(ValueError, match="exceeds the number of keys"):
        nl.method("reformer", m=6)(problem(5), 0)
    with pytest.raises(ValueError, match="rounds"):
        nl.method("reformer", m=6, rounds=0)
