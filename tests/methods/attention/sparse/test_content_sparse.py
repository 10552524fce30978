"""The largest keys of each query: chosen as sorting chooses, the best that any pattern can do, in every structure."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.methods.attention.sparse import content_sparse
from nla_llm.theory.sparse import mass_left_out


def problem(n_q, n_k=None, *, d=3, seed=0, batch=(), **structure):
    rng = np.random.default_rng(seed)
    n_k = n_q if n_k is None else n_k
    q, k = rng.standard_normal((*batch, n_q, d)), rng.standard_normal((*batch, n_k, d))
    return nl.AttentionProblem(2 * q, k, rng.standard_normal((*batch, n_k, 2)), **structure)


def largest(p, m):
    """The m largest entries of each row of P, then the rows divided by their sums."""
    dense = p.exact().dense()
    kept = np.where(np.argsort(np.argsort(-dense, axis=-1), axis=-1) < m, dense, 0)
    return kept / kept.sum(-1, keepdims=True)


STRUCTURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 6},
    "causal window": {"causal": True, "window": 6},
    "mask": {"key_mask": np.arange(40) % 3 != 1},
    "bias": {"bias": np.where(np.random.default_rng(1).random((40, 40)) < 0.2, -np.inf, 0.5) + 9 * np.eye(40)},
    "batch": {"batch": (2, 3)},
    "causal mask": {"causal": True, "key_mask": np.arange(40) % 3 != 1},
    "window mask": {"window": 6, "key_mask": np.arange(40) % 5 == 2},  # of 11 keys a query sees two or three
    "causal window mask": {"causal": True, "window": 6, "key_mask": np.arange(40) % 4 == 0},
}


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("m", [1, 7, 40])
def test_it_keeps_the_largest_entries(name, m, monkeypatch):
    p = problem(
        40, **(STRUCTURES[name] | ({"bias": np.maximum(STRUCTURES["bias"]["bias"], -1e9)} if name == "bias" else {}))
    )
    for entries in (1 << 20, 300):  # one block of rows, and many
        monkeypatch.setattr(content_sparse, "_BLOCK_ENTRIES", entries)
        np.testing.assert_allclose(nl.method("top_k", m=m)(p).dense(), largest(p, m), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_generic_path_agrees_with_numpy(name, monkeypatch):
    strict = pytest.importorskip("array_api_strict")
    monkeypatch.setattr(content_sparse, "_BLOCK_ENTRIES", 700)
    p = problem(40, **STRUCTURES[name])
    here, there = (nl.method("top_k", m=9)(x) for x in (p, p.map(strict.asarray)))
    np.testing.assert_allclose(np.asarray(there @ strict.asarray(p.v)), here @ p.v, atol=1e-14)


@pytest.mark.parametrize("structure", ["plain", "causal", "window", "causal window", "bias"])
@pytest.mark.parametrize("m", [1, 4, 6, 8, 11, 13])
def test_the_count_is_the_formula_in_every_structure(structure, m):
    options = STRUCTURES[structure]
    for n in (13, 40):
        p = problem(n, **({"bias": options["bias"][:n, :n]} if structure == "bias" else options))
        method = nl.method("top_k", m=m)
        assert nl.costs.count(method, p) == method.cost(p).at(p, method)


def test_keys_that_a_mask_hides_count_alike_wherever_they_are():
    """Rows with fewer visible keys than m: what causality and window leave is kept, hidden or not."""
    rng, checked = np.random.default_rng(0), 0
    for n in (5, 12, 29):
        for _ in range(30):
            causal, window, m = bool(rng.integers(2)), int(rng.integers(1, n + 3)), int(rng.integers(1, n + 1))
            mask = rng.random(n) < 0.6
            structure = {"causal": causal, "window": window, "key_mask": mask}
            bias = np.where(rng.random((n, n)) < 0.1, -np.inf, 0.0)
            for options in (structure, {"causal": causal, "window": window, "bias": bias}):
                try:
                    p = problem(n, **options)
                except ValueError:  # a query is left without a key
                    continue
                method, checked = nl.method("top_k", m=m), checked + 1
                assert nl.costs.count(method, p) == method.cost(p).at(p, method)
                np.testing.assert_allclose(method(p).dense(), largest(p, m), rtol=0, atol=1e-14)
    assert checked > 80


@pytest.mark.parametrize("rival", ["sliding_window", "longformer", "bigbird", "block_sparse", "reformer"])
def test_no_pattern_of_as_many_keys_leaves_out_less(rival):
    p = problem(60)
    exact, m = p.exact().dense(), 8
    rows = slice(1, None)  # the global query of two patterns sees more than m keys
    left = [mass_left_out(exact, nl.method(name, m=m)(p, 0).dense() > 0)[rows] for name in ("top_k", rival)]
    assert np.all(left[0] <= left[1] + 1e-15)
    assert left[0].mean() < 0.9 * left[1].mean()


def test_the_error_is_the_promised_one_and_total_variation_the_mass_left_out():
    for options in ({}, {"causal": True}, {"batch": (2,)}):
        p = problem(300, **options)
        method = nl.method("top_k", m=20)
        exact, op = p.exact().dense(), method(p).dense()
        np.testing.assert_allclose(
            method.theory(p).error("frobenius"), np.linalg.norm(op - exact, axis=(-2, -1)), rtol=1e-12
        )
        np.testing.assert_allclose(mass_left_out(exact, op > 0), abs(op - exact).sum(-1) / 2, rtol=0, atol=1e-14)


def test_hidden_keys_are_never_chosen_where_fewer_than_m_are_visible():
    keep = np.arange(12) < 3
    p = problem(12, key_mask=keep)
    dense = nl.method("top_k", m=8)(p).dense()
    np.testing.assert_allclose(dense, p.exact().dense(), rtol=1e-13)


def test_a_budget_above_the_number_of_keys_is_refused():
    with pytest.raises(ValueError, match="exceeds the number of keys"):
        nl.method("top_k", m=6)(problem(5))
