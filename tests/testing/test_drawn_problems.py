"""Every registered method on problems drawn by our own strategies, and on every array library."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from registry import ROWS

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods import properties_of
from nla_llm.operators import CausalLowRank, LowRank
from nla_llm.testing import strategies

ATTENTION = [row for row in ROWS if properties_of(row.make()).problem == "attention"]
STRUCTURES = ("causal", "window", "key_mask", "bias")


def limited(method, most):
    """The method with a budget that a small problem allows; a stride that was made for the other budget is left out."""
    budget = properties_of(method).budget
    if budget is None or getattr(method, budget) <= most:
        return method
    made_for_it = {"stride": None} if getattr(method, "stride", None) else {}
    return replace(method, **{budget: most}, **made_for_it)


def cancellation(op):
    """Σ_r |φ_r(q)||φ_r(K)| over |row sum|, in the worst row: what features of both signs make of a unit of rounding."""
    kernel = getattr(op, "op", None)
    if not isinstance(kernel, LowRank | CausalLowRank):
        return 1.0
    factors = np.abs(kernel.left), np.abs(kernel.right)
    causal = {"decay": kernel.decay, "chunk": kernel.chunk} if isinstance(kernel, CausalLowRank) else {}
    return float(np.max(type(kernel)(*factors, **causal).row_sums() / np.abs(op.sums)))


@pytest.mark.parametrize("attention_row", ATTENTION, ids=str)
@given(data=st.data())
def test_drawn_attention_problem(attention_row, data):
    method = attention_row.make()
    supported = [s for s in STRUCTURES if s in method.properties.supports]
    problem = data.draw(
        strategies.attention_problems(structures=supported, max_tokens=24, logit_sizes=(1.0, 0.1, 10.0))
    )
    method = limited(method, min(problem.n_q, problem.n_k))
    fewest = problem.n_k if problem.key_mask is None else int(problem.key_mask.sum(axis=-1).min())
    if method.properties.family in {"landmarks", "columns"}:  # which refuse more landmarks than there are visible keys
        method = limited(method, fewest)
    try:
        op = method(problem, rng=0)
    except FloatingPointError:
        assert method.properties.partial
        return
    dense, eps = op.dense(), float(np.finfo(op.dtype).eps)
    assert dense.shape == problem.exact().shape
    assert np.isfinite(dense).all()
    size = float(abs(dense).max())
    if method.properties.row_stochastic:
        assert abs(dense.sum(axis=-1) - 1).max() <= eps * max(1e4 * max(1.0, size), 1e2 * cancellation(op))
    if method.properties.nonnegative:
        assert dense.min() >= -1e2 * eps * size
    floor = method.properties.yardstick and method.properties.converges
    if problem.causal and not floor:
        assert not np.triu(dense, 1).any()
    if problem.key_mask is not None:
        hidden = np.where(problem.key_mask[..., None, :], 0.0, dense)
        assert abs(hidden).max() <= 1e3 * eps * size
    x = np.random.default_rng(0).standard_normal((problem.n_k, 2)).astype(op.dtype)
    if "operator_laws" in method.properties.exceptions:
        return
    allowed = max(1e4 * max(1.0, size), 1e2 * cancellation(op))
    assert abs(op @ x - dense @ x).max() <= eps * allowed * problem.n_k


@given(problem=strategies.attention_problems(max_tokens=24))
def test_optimal_rank_of_full_rank_is_exact(problem):
    full = nl.method("optimal_rank", m=min(problem.n_q, problem.n_k))(problem)
    assert abs(full.dense() - problem.exact().dense()).max() < 1e-12


@given(problem=strategies.update_problems())
def test_truncated_svd_is_never_worse_than_no_update(problem):
    error = problem.delta - nl.method("truncated_svd", rank=1)(problem).dense()
    norm = np.linalg.norm(problem.delta, axis=(-2, -1))
    assert (np.linalg.norm(error, axis=(-2, -1)) <= norm).all()


def test_same_answer_on_every_library(row, xp):
    method = row.make()
    supports = properties_of(method).supports
    rng = np.random.default_rng(1)
    q, k, v = np.abs(rng.standard_normal((3, 2, 67, 4)))
    delta, base, inputs = rng.standard_normal((3, 67, 12))
    for structure in ({}, {"causal": True}, {"key_mask": np.arange(67) % 3 != 1}):
        if properties_of(method).problem == "update":
            problem = nl.UpdateProblem(delta, base=base, inputs=inputs)
        elif set(structure) <= supports:
            problem = nl.AttentionProblem(q, k, v, **structure)
        else:
            continue
        here, there = method(problem, rng=0), method(problem.map(xp.asarray), rng=0)
        x = rng.standard_normal((here.shape[-1], 2))
        y = rng.standard_normal((here.shape[-2], 2))
        pairs = [
            (here.dense(), there.dense()),
            (here @ x, there @ xp.asarray(x)),
            (here.T @ y, there.T @ xp.asarray(y)),
        ]
        for one, other in pairs:
            np.testing.assert_allclose(to_numpy(other), one, rtol=1e-9, atol=1e-9 * abs(one).max())
