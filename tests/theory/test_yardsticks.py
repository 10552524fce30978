"""Yardsticks against enumeration of all draws and dense singular value decompositions."""

import itertools

import numpy as np
import pytest

from nla_llm.theory import yardsticks


def rows(rng, n, spread, count=3):
    w = np.exp(spread * rng.standard_normal((count, n)))
    return w / w.sum(axis=-1, keepdims=True)


def enumerated(p, m, *, replacement):
    n = len(p)
    draws = itertools.product(range(n), repeat=m) if replacement else itertools.combinations(range(n), m)
    errors = []
    for draw in draws:
        weights = np.bincount(draw, minlength=n) * p
        errors.append(np.sum((weights / weights.sum() - p) ** 2))
    return np.mean(errors)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_random_keys_by_enumeration_of_all_draws(replacement, spread, m):
    p = rows(np.random.default_rng(0), 7, spread)
    want = [enumerated(row, m, replacement=replacement) for row in p]
    np.testing.assert_allclose(
        yardsticks.random_keys_error(p, m, replacement=replacement), want, rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("spread", [80.0, 300.0])
@pytest.mark.parametrize("m", [1, 3, 7])
def test_random_keys_on_sharp_rows(spread, m):
    """Logits that differ by hundreds, against all subsets: entries of p differ by more digits than a float64 has."""
    p = np.exp(np.linspace(-spread, 0.0, 8))
    p /= p.sum()
    errors = []
    for subset in itertools.combinations(range(8), m):
        kept = np.isin(np.arange(8), subset)
        errors.append(np.sum((np.where(kept, p / p[kept].sum(), 0) - p) ** 2))
    assert yardsticks.random_keys_error(p, m) == pytest.approx(np.mean(errors), rel=1e-10)


def test_all_keys_without_replacement_leave_no_error():
    p = rows(np.random.default_rng(1), 6, 1.0)
    assert np.all(yardsticks.random_keys_error(p, 6) == 0)
    assert np.all(yardsticks.random_keys_error_first_order(p, 6) < 1e-15)
    assert np.all(yardsticks.random_keys_error(p, 6, replacement=True) > 1e-2)


@pytest.mark.parametrize(("replacement", "worst"), [(False, (3e-3, 2e-3)), (True, (0.05, 0.015))])
def test_first_order_is_the_limit_of_flat_rows_and_many_keys(replacement, worst):
    p = rows(np.random.default_rng(2), 200, 0.3, count=1)
    for m, allowed in zip((25, 100), worst, strict=True):
        exact = yardsticks.random_keys_error(p, m, replacement=replacement)
        predicted = yardsticks.random_keys_error_first_order(p, m, replacement=replacement)
        np.testing.assert_allclose(predicted, exact, rtol=allowed)


def test_rule_of_thumb_for_flat_rows():
    p = rows(np.random.default_rng(3), 512, 0.2, count=1)[0]
    relative = np.sqrt(yardsticks.random_keys_error(p, 64) / np.sum(p**2))
    assert relative == pytest.approx(yardsticks.random_keys_relative_error(512, 64), rel=0.02)


def test_uniform_rows_are_exact_at_first_order():
    for n, m in ((5, 2), (64, 17)):
        p = np.full(n, 1 / n)
        assert yardsticks.random_keys_error_first_order(p, m) == pytest.approx(1 / m - 1 / n, rel=1e-13)
        assert yardsticks.random_keys_error(p, m) == pytest.approx(1 / m - 1 / n, rel=1e-10)


def test_uniform_error_dense_causal_and_batched():
    rng = np.random.default_rng(4)
    w = np.exp(rng.standard_normal((2, 5, 5)))
    for mask in (np.ones((5, 5)), np.tril(np.ones((5, 5)))):
        p, u = w * mask, mask / mask.sum(axis=1, keepdims=True)
        p = p / p.sum(axis=-1, keepdims=True)
        got = yardsticks.uniform_error(np.sum(p**2, axis=(1, 2)), mask.sum(axis=1))
        np.testing.assert_allclose(got, np.linalg.norm(p - u, axis=(1, 2)), rtol=1e-12)


@pytest.mark.parametrize(("norm", "order"), [("spectral", 2), ("frobenius", "fro"), ("nuclear", "nuc")])
def test_eckart_young_is_attained_by_truncation_and_beaten_by_nobody(norm, order):
    rng = np.random.default_rng(5)
    a = rng.standard_normal((6, 9)) * np.geomspace(1, 1e-2, 9)
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    promise = yardsticks.eckart_young_theory(s, 2, a.shape)
    attained = np.linalg.norm(a - (u[:, :2] * s[:2]) @ vt[:2], order)
    assert promise.error(norm) == pytest.approx(attained, rel=1e-12)
    assert promise.covers == {"error"}
    for _ in range(50):
        left = u[:, :2] + 0.05 * rng.standard_normal((6, 2))
        other = left @ np.linalg.lstsq(left, a, rcond=None)[0]
        assert np.linalg.norm(a - other, order) > attained
    assert yardsticks.eckart_young(np.stack([s[::-1], 2 * s]), 2, norm) == pytest.approx([attained, 2 * attained])
    assert yardsticks.eckart_young(s, 6, norm) == 0
    assert yardsticks.eckart_young(s, 0, norm) == pytest.approx(np.linalg.norm(a, order))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: yardsticks.eckart_young([1.0], -1), "rank must be"),
        (lambda: yardsticks.eckart_young([1.0, np.nan], 1), "singular_values must be"),
        (lambda: yardsticks.eckart_young([1.0], 0, "max"), "norm must be"),
        (lambda: yardsticks.random_keys_error([0.5, 0.6], 1), "sum to one"),
        (lambda: yardsticks.random_keys_error([1.0, 0.0], 1), "positive entries"),
        (lambda: yardsticks.random_keys_error([1.0, 1e-200], 1), "above 1e-140"),
        (lambda: yardsticks.random_keys_error([0.5, 0.5], 3), "without replacement from 2"),
        (lambda: yardsticks.random_keys_relative_error(4, 0), "m must be"),
        (lambda: yardsticks.uniform_error(1.0, [0, 1]), "keys_seen must be"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
