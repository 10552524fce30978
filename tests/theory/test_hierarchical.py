"""Theory of hierarchical and Monarch attention against brute force."""

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from nla_llm.theory.hierarchical import (
    block_constant_error,
    block_constant_theory,
    coarse_logit_error,
    normalised_error,
    variational_gap,
)


@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
def test_constant_blocks_err_by_no_more(spread):
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (rng.standard_normal(3) + spread * rng.standard_normal((size, 3)) for size in (4, 5))
        error = abs(np.exp(a @ b.T) - np.exp(a.mean(axis=0) @ b.mean(axis=0))).max()
        assert 0 < error <= block_constant_error(a, b)


def test_the_bound_of_constant_blocks_is_reached_to_first_order():
    """Queries that differ along the direction of the keys, which are equal."""
    h = 1e-6
    x, y = np.array([[1.0 - h], [1.0 + h]]), np.ones((2, 1))
    error = abs(np.exp(x @ y.T) - np.e).max()
    assert error == pytest.approx(block_constant_error(x, y), rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_logits_of_means_err_by_no_more(masked):
    rng = np.random.default_rng(1)
    rows, columns = np.array([0, 3, 3, 7, 10]), np.array([0, 4, 9, 12])
    seen = np.arange(12) % 4 != 1 if masked else np.ones(12, bool)
    x, y = rng.standard_normal((2, 10, 3)), rng.standard_normal((12, 3))
    delta = coarse_logit_error(x, y, rows, columns, seen if masked else None)
    worst = np.zeros((2, 10))
    for h, i, j in np.ndindex(2, len(rows) - 1, len(columns) - 1):
        a, b = rows[i : i + 2]
        keys = np.arange(*columns[j : j + 2])
        keys = keys[seen[keys]]
        if b > a:
            off = abs(x[h, a:b] @ y[keys].T - x[h, a:b].mean(axis=0) @ y[keys].mean(axis=0))
            worst[h, a:b] = np.maximum(worst[h, a:b], off.max(axis=-1))
    assert np.all(worst <= delta)
    assert np.all(delta < 10 * worst)


def test_wrong_logits_move_rows_by_no_more():
    rng = np.random.default_rng(2)
    s = 2 * rng.standard_normal((30, 20))
    P = softmax(s, axis=-1)
    for delta in (1e-4, 0.1, 1.0, 30.0):
        wrong = softmax(s + delta * np.sign(rng.standard_normal(s.shape)), axis=-1)
        error = np.linalg.norm(wrong - P)
        bound = normalised_error(np.linalg.norm(P, axis=-1), np.full(30, delta))
        assert error <= bound <= np.sqrt(2 * 30) * (1 + 1e-15)
        if delta < 1e-2:
            assert error > 0.1 * bound


def test_the_promise_speaks_of_one_norm():
    promise = block_constant_theory([1.0, 1.0], [0.1, 0.2], (2, 2))
    assert promise.kind == "bound"
    assert float(promise.error("frobenius")) == pytest.approx(np.hypot(np.expm1(0.2), np.expm1(0.4)))
    with pytest.raises(ValueError, match="'frobenius' only"):
        promise.error("spectral")


def test_the_gap_is_a_divergence():
    rng = np.random.default_rng(4)
    s, p = 3 * rng.standard_normal((6, 9)), rng.dirichlet(np.full(9, 0.3), 6)
    s[:, 2] = -np.inf
    p[:, [2, 4]] = 0
    p /= p.sum(axis=-1, keepdims=True)
    P = softmax(s, axis=-1)
    np.testing.assert_allclose(variational_gap(p, s), rel_entr(p, P).sum(axis=-1), rtol=1e-12)
    np.testing.assert_allclose(variational_gap(P, s), 0, atol=1e-14)
    assert variational_gap(p, s).min() > 0.1
