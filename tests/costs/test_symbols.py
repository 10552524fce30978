import numpy as np
import pytest
from costs.cost_rows import attention_problem

import nla_llm as nl
from nla_llm.costs import c, d, d_in, d_out, d_v, m, n, n_k, n_q, p, r, symbols_of, values, w
from nla_llm.costs.symbols import visible_pairs
from nla_llm.operators import SoftmaxAttention


def visible_by_hand(problem):
    op = problem.exact()
    assert isinstance(op, SoftmaxAttention)
    keep = op.structure(0, problem.n_q, 0, problem.n_k)
    keep = np.ones((problem.n_q, problem.n_k), bool) if keep is None else keep
    return int(np.sum(keep if problem.key_mask is None else keep & problem.key_mask[None, :]))


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 6, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_visible_pairs(size, window, causal):
    q = np.zeros((size, 1))
    problem = nl.AttentionProblem(q, q, causal=causal, window=window)
    assert visible_pairs(problem).subs(values(problem)) == visible_by_hand(problem)


@pytest.mark.parametrize("window", [None, 2, 5, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_visible_pairs_under_a_mask(window, causal):
    q, key_mask = np.zeros((12, 1)), np.arange(12) % 2 == 0
    problem = nl.AttentionProblem(q, q, causal=causal, window=window, key_mask=key_mask)
    assert visible_pairs(problem).subs(values(problem)) == visible_by_hand(problem)


def test_queries_and_keys_share_a_letter_where_they_are_as_many():
    assert tuple(symbols_of(attention_problem(5, 5))) == (n, n, d, d_v)
    assert tuple(symbols_of(attention_problem(5, 6))) == (n_q, n_k, d, d_v)


def test_values_of_problem_and_method():
    method = nl.method("positive_features", m=7)
    assert values(attention_problem(100, 100, 4, 3), method) == {n: 100, d: 4, d_v: 3, m: 7, c: 64}
    assert values(attention_problem(10, 12, 4, 3), method) == {n_q: 10, n_k: 12, d: 4, d_v: 3, m: 7, c: 12}
    assert values(attention_problem(10, 10, window=50))[w] == 10
    masked = attention_problem(10, 10, mask=True)
    assert values(masked)[p] == 10 * int(np.sum(masked.key_mask))
    update = nl.UpdateProblem(np.ones((4, 6)))
    assert values(update, nl.method("truncated_svd", rank=2)) == {d_out: 4, d_in: 6, r: 2}


def test_fields_of_a_foreign_method_are_symbols_of_their_names():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Mine:
        landmarks: int = 5
        exact: bool = True
        factor: float = 2.0

    found = {str(s): x for s, x in values(attention_problem(8, 8), Mine()).items()}
    assert found == {"n": 8, "d": 4, "d_v": 3, "landmarks": 5}


def test_an_update_has_no_symbols_of_attention():
    with pytest.raises(TypeError, match="an AttentionProblem, got UpdateProblem"):
        symbols_of(nl.UpdateProblem(np.eye(3)))
