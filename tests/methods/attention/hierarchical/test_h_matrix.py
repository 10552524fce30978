"""Hierarchical matrices: exact leaves, blocks of low rank, floors below them, orders, causality of the pivots."""

from itertools import pairwise

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.methods.attention.hierarchical.boxes import boxes_of
from nla_llm.operators import BlockLowRank, Sum
from nla_llm.theory.floors import block_rank_floor

BOXES = [(37, 37, 4), (64, 64, 8), (100, 100, 3), (29, 83, 5), (83, 29, 5), (1, 50, 2)]
SHAPES = [(64, 64, 4), (101, 101, 5), (150, 61, 5), (31, 140, 4), (7, 90, 4)]


def problem(n_q, n_k=None, *, d=3, seed=0, size=1.0, values=None, batch=(), **structure):
    """Gaussian tokens; with ``values`` the keys take so many different ones, so that the kernel has that rank."""
    rng = np.random.default_rng(seed)
    n_k = n_q if n_k is None else n_k
    q, k = size * rng.standard_normal((*batch, n_q, d)), size * rng.standard_normal((*batch, n_k, d))
    if values is not None:
        k = k[..., rng.integers(0, values, n_k), :]
    return nl.AttentionProblem(q, k, rng.standard_normal((*batch, n_k, 2)), **structure)


def logits(p):
    s = p.scale * p.q @ p.k.T
    if p.causal:
        s = np.where(np.tri(p.n_q, dtype=bool), s, -np.inf)
    return s if p.key_mask is None else np.where(p.key_mask, s, -np.inf)


def far_blocks(op):
    """The blocks of low rank in a sum."""
    if isinstance(op, Sum):
        return [block for term in op.terms for block in far_blocks(term)]
    return [op] if isinstance(op, BlockLowRank) else []


def error(p, m, **options):
    exact = p.exact().dense()
    return np.linalg.norm(nl.method("h_matrix", m=m, **options)(p).dense() - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("reach", [0, 1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k", "size"), BOXES)
def test_boxes_cover_every_pair_once(n_q, n_k, size, causal, reach):
    if causal and n_q != n_k:
        return
    boxes = boxes_of(n_q, n_k, size, reach, causal)
    times = np.zeros((n_q, n_k), int)
    for near in boxes.near():
        tiles, tall, _ = near.seen.shape
        for t, row in np.ndindex(tiles, tall):
            np.add.at(times[near.start + t * tall + row], near.keys[t][near.seen[t, row]], 1)
    for level in boxes.levels:
        for i, j in zip(level.rows, level.columns, strict=True):
            assert abs(i - j) > reach
            times[i * level.size : (i + 1) * level.size, j * level.size : (j + 1) * level.size] += 1
    np.testing.assert_array_equal(times, np.tri(n_q, dtype=int) if causal else 1)


@pytest.mark.parametrize("size", [0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("admissibility", ["weak", "strong"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_kernel_of_rank_m_is_found_exactly(shape, admissibility, masked, size):
    """Keys of m different values: every block has rank m at most."""
    n_q, n_k, m = shape
    for causal in {False, n_q == n_k}:
        mask = (np.arange(n_k) % 5 != 2) & (np.arange(n_k) // 9 != 1) if masked else None
        p = problem(n_q, n_k, size=size, values=m, causal=causal, key_mask=mask)
        op = nl.method("h_matrix", m=m, admissibility=admissibility)(p)
        np.testing.assert_allclose(op.dense(), p.exact().dense(), rtol=0, atol=1e-10)
        np.testing.assert_allclose(op @ p.v, p.exact() @ p.v, rtol=0, atol=1e-9)
        assert all(int(block.ranks.max()) <= m for block in far_blocks(op.op))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_logits_of_hundreds_are_exact_where_ranks_are_small(causal, dtype):
    """Half as many values as crosses, since a row whose largest weight is found looks empty and costs a cross."""
    p = problem(120, size=12.0, values=3, causal=causal).astype(dtype)
    fine = p.astype(np.float64)
    size = abs(fine.scale * fine.q @ fine.k.T).max()
    assert size > 200
    here = nl.method("h_matrix", m=12)(p).dense()
    assert here.dtype == dtype
    np.testing.assert_allclose(here, fine.exact().dense(), rtol=0, atol=100 * np.finfo(dtype).eps * size)


@pytest.mark.parametrize("admissibility", ["weak", "strong"])
@pytest.mark.parametrize("causal", [False, True])
def test_leaves_are_exact_and_blocks_lie_near_their_floor(causal, admissibility):
    p, m = problem(256, d=2, causal=causal), 8
    op = nl.method("h_matrix", m=m, admissibility=admissibility)(p)
    kernel, found = np.exp(logits(p)), op.op.dense() * np.exp(op.row_scale_log)[:, None]
    far, blocks = np.zeros(kernel.shape, bool), []
    for level in boxes_of(256, 256, 2 * m, int(admissibility == "strong"), causal).levels:
        for i, j in zip(level.rows, level.columns, strict=True):
            blocks.append(tuple(slice(a * level.size, (a + 1) * level.size) for a in (i, j)))
            far[blocks[-1]] = True
    np.testing.assert_allclose(found[~far], kernel[~far], rtol=1e-13, atol=0)
    weights = 1 / kernel.sum(axis=-1, keepdims=True)
    floor = block_rank_floor(weights * kernel, blocks, m)
    wrong = np.linalg.norm(weights * (found - kernel))
    assert floor <= wrong < 20 * floor
    assert wrong > 1e-6 * np.linalg.norm(weights * kernel)


def test_the_error_falls_with_the_rank():
    p = problem(512, d=3)
    errors = [error(p, m) for m in (4, 16, 64, 256)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.1 * errors[1]
    assert errors[3] < 1e-12


@pytest.mark.parametrize("admissibility", ["weak", "strong"])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_later_keys_do_not_reach_earlier_rows_through_pivots(m, admissibility):
    """Not even through the near fields of later rows, which say how much a row matters."""
    p = problem(130, causal=True)
    method = nl.method("h_matrix", m=m, admissibility=admissibility)
    before = method(p).dense()
    for first in (40, 70, 100, 129):
        k = p.k.copy()
        k[first:] *= -3.0
        after = method(nl.AttentionProblem(p.q, k, causal=True)).dense()
        np.testing.assert_allclose(after[:first], before[:first], rtol=0, atol=1e-12)
        assert not np.allclose(after[first:], before[first:])


def test_a_sequence_that_grows_keeps_whole_boxes():
    p = problem(96, causal=True)
    short = nl.AttentionProblem(p.q[:48], p.k[:48], causal=True)
    method = nl.method("h_matrix", m=6)
    np.testing.assert_allclose(method(p).dense()[:48, :48], method(short).dense(), atol=1e-13)


def test_strong_admissibility_keeps_what_lies_across_a_border():
    """exp(−(a − b)²/2) about the diagonal, row by row: siblings meet where it is largest."""
    a = np.linspace(0, 60, 256)
    q, k = np.stack([a, np.ones(256)], axis=-1), np.stack([a, -(a**2) / 2], axis=-1)
    p = nl.AttentionProblem(q, k, scale=1.0)
    assert error(p, 4, admissibility="strong") < 0.3 * error(p, 4, admissibility="weak")


def test_the_order_of_a_projection_finds_a_shuffled_line():
    rng = np.random.default_rng(0)
    line = np.linspace(-4, 4, 400)[:, None] * np.array([[1.0, 0.5, -1.0]]) + 0.01 * rng.standard_normal((400, 3))
    p = nl.AttentionProblem(rng.permutation(line), rng.permutation(line))
    assert error(p, 4, order="projection") < 0.2 * error(p, 4)


def test_the_order_of_a_projection_undoes_permutations():
    p, rng = problem(80, d=3), np.random.default_rng(1)
    rows, columns = rng.permutation(80), rng.permutation(80)
    method = nl.method("h_matrix", m=5, order="projection")
    shuffled = method(nl.AttentionProblem(p.q[rows], p.k[columns]))
    np.testing.assert_allclose(shuffled.dense(), method(p).dense()[rows][:, columns], atol=1e-11)
    assert not np.allclose(method(p).dense(), nl.method("h_matrix", m=5)(p).dense(), atol=1e-6)


@pytest.mark.parametrize("order", ["tokens", "projection"])
def test_threads_over_blocks_agree_with_another_library(order):
    strict = pytest.importorskip("array_api_strict")
    p = problem(700, d=4, batch=(2,))
    method = nl.method("h_matrix", m=20, order=order)
    here, there = method(p), method(p.map(strict.asarray))
    np.testing.assert_allclose(np.asarray(there @ strict.asarray(p.v)), here @ p.v, atol=1e-9)
    np.testing.assert_allclose(np.asarray(there.T @ strict.asarray(p.q)), here.T @ p.q, atol=1e-8)


def test_ranks_are_those_of_the_blocks():
    p = problem(256, d=1, size=0.3)  # exp(xy) of small numbers: a few terms of its series
    for block in far_blocks(nl.method("h_matrix", m=16)(p).op):
        assert 4 <= int(block.ranks.min()) <= int(block.ranks.max()) < 16
    with pytest.raises(ValueError, match="no pivots to count"):
        _ = BlockLowRank(np.ones((1, 1, 2)), np.ones((1, 1, 2)), np.array([0]), np.array([0]), (2, 2)).ranks


def test_refusals_say_why():
    with pytest.raises(ValueError, match="exceeds the number of keys"):
        nl.method("h_matrix", m=6)(problem(5))
    with pytest.raises(ValueError, match="admissibility"):
        nl.method("h_matrix", m=6, admissibility="middling")
    with pytest.raises(ValueError, match="order"):
        nl.method("h_matrix", m=6, order="random")
    with pytest.raises(nl.methods.Unsupported, match="not earlier than its queries"):
        nl.method("h_matrix", m=2, order="projection")(problem(9, causal=True))


@pytest.mark.parametrize("options", [{}, {"admissibility": "strong"}, {"order": "projection"}])
def test_leaves_that_hold_everything_are_exact(options):
    assert error(problem(67, d=4), 34, **options) < 100 * np.finfo(np.float64).eps


def test_more_crosses_make_the_far_field_better():
    """Smooth in token order: the error falls by orders of magnitude, and is not zero before."""
    x = np.linspace(-2, 2, 256)[:, None]
    errors = [error(nl.AttentionProblem(x, x), m) for m in (1, 2, 4, 8)]
    assert errors[0] > 1e-2
    assert all(later < earlier / 3 for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-9
