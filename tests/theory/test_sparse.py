"""Errors of restricted rows against their definition, and the best choice of keys by trying all."""

from itertools import combinations

import numpy as np
import pytest

from nla_llm.theory.sparse import mass_left_out, restriction_error, restriction_theory


def rows(n, count=5, seed=0):
    p = np.random.default_rng(seed).exponential(size=(count, n)) ** 2
    return p / p.sum(-1, keepdims=True)


def restrict(p, keep):
    inside = np.where(keep, p, 0)
    return inside / inside.sum(-1, keepdims=True)


def test_errors_are_those_of_the_restricted_rows():
    p = rows(7)
    keep = np.random.default_rng(1).random(p.shape) < 0.5
    keep[:, 0] = True
    hat = restrict(p, keep)
    np.testing.assert_allclose(mass_left_out(p, keep), abs(hat - p).sum(-1) / 2, rtol=0, atol=4e-16)
    np.testing.assert_allclose(restriction_error(p, keep), ((hat - p) ** 2).sum(-1), rtol=1e-12)


def test_a_row_that_keeps_nearly_all_has_no_cancellation():
    p = np.array([1 - 2.0**-60, 2.0**-60])
    assert restriction_error(p, [True, False]) == 2 * 2.0**-120


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_no_keys_are_better_in_total_variation_than_the_largest(n):
    p = rows(n)
    for m in range(1, n + 1):
        masks = [np.isin(np.arange(n), chosen) for chosen in combinations(range(n), m)]
        losses = np.stack([mass_left_out(p, np.broadcast_to(mask, p.shape)) for mask in masks])
        largest = np.argsort(np.argsort(-p, axis=-1), axis=-1) < m
        np.testing.assert_allclose(mass_left_out(p, largest), losses.min(axis=0), atol=1e-15)
        assert m == n or losses.max() > losses.min()


def test_blocks_of_rows_add_up():
    p = rows(11, count=700)
    keep = p > 0.05

    def block(start, stop):
        return p[start:stop], keep[start:stop]

    promise = restriction_theory(block, (700, 11))
    np.testing.assert_allclose(promise.error("frobenius"), np.linalg.norm(restrict(p, keep) - p), rtol=1e-13)
    with pytest.raises(ValueError, match="frobenius"):
        promise.error("nuclear")


def test_rows_without_mass_and_masks_of_numbers_are_refused():
    with pytest.raises(ValueError, match="some mass"):
        restriction_error([1.0, 0.0], [False, True])
    with pytest.raises(ValueError, match="boolean"):
        mass_left_out([1.0, 0.0], [1, 0])
