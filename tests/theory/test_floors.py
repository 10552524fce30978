"""Floors: attained by the nearest matrix of the structure, and never passed by any other."""

import numpy as np
import pytest

from nla_llm.theory.floors import (
    block_rank_floor,
    block_rank_floor_theory,
    blocks_below_diagonal,
    few_columns_floor,
    few_columns_floor_theory,
    few_entries_floor,
    few_entries_floor_theory,
    rank_floor_theory,
)


def test_no_blocks_of_that_rank_come_nearer_than_the_floor():
    rng = np.random.default_rng(3)
    a = rng.standard_normal((12, 10))
    blocks = [(slice(0, 5), slice(5, 10)), (slice(6, 12), slice(0, 4))]
    floor = block_rank_floor(a, blocks, 2)
    best = a.copy()
    for block in blocks:
        u, s, vt = np.linalg.svd(a[block])
        best[block] = (u[:, :2] * s[:2]) @ vt[:2]
    assert np.linalg.norm(a - best) == pytest.approx(floor, rel=1e-12)
    for _ in range(20):
        other = a.copy()
        for block in blocks:
            basis, _ = np.linalg.qr(a[block] @ rng.standard_normal((a[block].shape[1], 2)))
            other[block] = basis @ (basis.T @ a[block])
        assert np.linalg.norm(a - other) > floor
    assert block_rank_floor(a, blocks, 5) < 1e-12


def test_blocks_may_be_scattered_and_come_in_batches():
    rng = np.random.default_rng(0)
    a, (rows, columns) = rng.standard_normal((3, 8, 9)), (np.array([6, 1, 4]), np.array([0, 8, 3, 2]))
    tails = [np.linalg.svd(head[np.ix_(rows, columns)])[1][1:] for head in a]
    whole = [(rows, columns), (slice(5, 6), slice(None))]  # one row has rank one anyway
    np.testing.assert_allclose(block_rank_floor(a, whole, 1), np.linalg.norm(tails, axis=-1))
    np.testing.assert_allclose(block_rank_floor(a, whole, 1, "spectral"), [t[0] for t in tails])
    np.testing.assert_array_equal(block_rank_floor(a, [], 1), np.zeros(3))
    with pytest.raises(ValueError, match="got 'nuclear'"):
        block_rank_floor(a, whole, 1, "nuclear")


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_blocks_cover_what_is_below_the_diagonal_once(n):
    covered = np.zeros((n, n), int)
    for block in blocks_below_diagonal(n):
        covered[block] += 1
    np.testing.assert_array_equal(covered, np.tri(n, k=-1, dtype=int))
    rng = np.random.default_rng(0)
    half = np.tril(rng.standard_normal((n, 2)) @ rng.standard_normal((2, n)))
    assert block_rank_floor(half, blocks_below_diagonal(n), 2) < 1e-13 * (1 + np.linalg.norm(half))


def test_few_entries_and_few_columns_by_enumeration():
    from itertools import combinations

    a = np.random.default_rng(0).standard_normal((3, 5))
    kept = [1, 4, 5]
    best = [
        min(np.sum(np.delete(row, c) ** 2) for c in combinations(range(5), k)) for row, k in zip(a, kept, strict=True)
    ]
    assert few_entries_floor(a, kept) == pytest.approx(np.sqrt(sum(best)))
    columns = min(np.linalg.norm(np.delete(a, c, axis=1)) for c in combinations(range(5), 2))
    assert few_columns_floor(a, 2) == pytest.approx(columns)
    assert few_columns_floor(a, 2) > np.linalg.norm(np.linalg.svd(a)[1][2:])
    assert few_columns_floor(a, 9) == 0


def test_as_promises_they_are_computed_when_asked_for():
    calls, a = [], np.random.default_rng(0).standard_normal((2, 4, 4))

    def entries():
        calls.append(1)
        return a

    whole = [(slice(None), slice(None))]
    promises = [
        rank_floor_theory(entries, 1, a.shape), block_rank_floor_theory(entries, whole, 1, a.shape),
        few_entries_floor_theory(entries, [2] * 4, a.shape), few_columns_floor_theory(entries, 2, a.shape),
    ]  # fmt: skip
    assert not calls
    assert all(p.kind == "floor" and p.covers == {"error"} and p.error("frobenius").shape == (2,) for p in promises)
    np.testing.assert_allclose(promises[0].error("spectral"), promises[1].error("spectral"))
    for promise in promises[2:]:
        with pytest.raises(ValueError, match="'frobenius' only"):
            promise.error("spectral")
