"""Hierarchical attention: where it is exact, what it is in between, and that the far field is really compressed."""

from itertools import pairwise

import numpy as np
import pytest

import nla_llm as nl

EPS = np.finfo(np.float64).eps


def gaussian(n, d, scale=0.5, seed=0, **structure):
    q, k = scale * np.random.default_rng(seed).standard_normal((2, n, d))
    return nl.AttentionProblem(q, k, **structure)


def error(method, problem):
    P = problem.exact().dense()
    return np.linalg.norm(method(problem, rng=0).dense() - P) / np.linalg.norm(P)


@pytest.mark.parametrize("options", [{}, {"admissibility": "strong"}, {"order": "projection"}])
def test_leaves_that_hold_everything_are_exact(options):
    assert error(nl.method("h_matrix", m=34, **options), gaussian(67, 4)) < 100 * EPS


@pytest.mark.parametrize("n", [64, 67, 131])
@pytest.mark.parametrize("options", [{}, {"admissibility": "strong"}, {"order": "projection"}])
def test_a_kernel_of_rank_one_takes_one_cross(n, options):
    """Logits a_i + b_j make the product of e^a and e^b: far blocks of rank one are exact, in every order."""
    a, b = np.random.default_rng(1).standard_normal((2, n))
    q, k = np.stack([a, np.ones(n)], axis=-1), np.stack([np.ones(n), b], axis=-1)
    p = nl.AttentionProblem(q, k, scale=1.0)
    assert error(nl.method("h_matrix", m=1, **options), p) < 1e3 * EPS
    assert error(nl.method("h_matrix", m=1, **options), gaussian(n, 2)) > 1e-3


def test_more_crosses_make_the_far_field_better():
    """Smooth in token order: the error falls by orders of magnitude, and is not zero before."""
    x = np.linspace(-2, 2, 256)[:, None]
    errors = [error(nl.method("h_matrix", m=m), nl.AttentionProblem(x, x)) for m in (1, 2, 4, 8)]
    assert errors[0] > 1e-2
    assert all(later < earlier / 3 for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-9


def test_an_order_by_projection_finds_what_tokens_hide():
    x = np.random.default_rng(2).permutation(np.linspace(-2, 2, 256))[:, None]
    p = nl.AttentionProblem(x, x)
    assert error(nl.method("h_matrix", m=6, order="projection"), p) < 1e-6
    assert error(nl.method("h_matrix", m=6), p) > 1e-6 or error(nl.method("h_matrix", m=1), p) > 1e-2


@pytest.mark.parametrize("name", ["h_matrix", "h_transformer"])
def test_the_causal_form_is_triangular_and_its_first_rows_are_those_of_the_exact_one(name):
    p = gaussian(90, 4, causal=True)
    dense = nl.method(name, m=8)(p).dense()
    assert not np.triu(dense, 1).any()
    np.testing.assert_allclose(dense[:8], p.exact().dense()[:8], rtol=0, atol=100 * EPS)


def test_the_averages_of_equal_tokens_are_exact():
    q = np.repeat(np.random.default_rng(0).standard_normal((6, 3)), 16, axis=0)
    assert error(nl.method("h_transformer", m=8), nl.AttentionProblem(q, q)) < 1e3 * EPS
    assert error(nl.method("h_transformer", m=8), gaussian(96, 3)) > 1e-3


@pytest.mark.parametrize("options", [{}, {"admissibility": "strong"}, {"order": "projection"}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="m=9"):
        nl.method("h_matrix", m=9, **options)(gaussian(8, 2))
    with pytest.raises(ValueError, match="admissibility must be"):
        nl.method("h_matrix", m=2, admissibility="none")
