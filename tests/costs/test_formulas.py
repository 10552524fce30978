import numpy as np
import pytest
import sympy
from costs.cost_rows import attention_problem

import nla_llm as nl
from nla_llm.costs import Cost, Operations, c, d, d_in, d_out, d_v, formulas, m, n, n_k, n_q, p, r, w


@pytest.fixture
def square():
    return attention_problem(20, 20)


@pytest.fixture
def wide():
    return attention_problem(20, 30)


# Matrix products alone, as they stand in the papers: 2 operations for a multiply-add, elementwise work ignored.
@pytest.mark.parametrize(
    ("name", "options", "flops"),
    [
        ("elu_features", {}, 4 * n * d * d_v + 2 * n * d),
        ("relu_features", {}, 4 * n * d * d_v + 2 * n * d),
        ("positive_features", {"m": 8}, 4 * n * m * d + 4 * n * m * d_v + 2 * n * m),
        ("hyperbolic_features", {"m": 8}, 4 * n * m * d + 8 * n * m * d_v + 4 * n * m),
        ("optimal_rank", {"m": 8}, 2 * n**2 * d + 22 * n**3 + 4 * n * m * d_v),
        ("random_keys", {"m": 8}, 2 * n * m * (d + d_v)),
        ("uniform", {}, 4 * n * d_v + 2 * n),
        (
            "nystromformer",
            {"m": 8},
            4 * n * m * d + 2 * m**2 * d + 4 * n * m * d_v + 2 * m**2 * d_v + 8 * m**3 * sympy.Symbol("iterations"),
        ),
    ],
)
def test_matrix_products_are_those_of_the_literature(name, options, flops, square):
    cost = nl.method(name, **options).cost(square)
    assert sympy.expand(cost.matmuls() - flops) == 0


def test_exact_attention_has_two_products_a_pair(square, wide):
    assert sympy.expand(nl.costs.exact_attention(square).matmuls() - 2 * n**2 * (d + d_v)) == 0
    assert sympy.expand(nl.costs.exact_attention(wide).matmuls() - 2 * n_q * n_k * (d + d_v)) == 0
    causal = attention_problem(20, 20, causal=True)
    assert sympy.expand(nl.costs.exact_attention(causal).matmuls() - n * (n + 1) * (d + d_v)) == 0
    masked = attention_problem(20, 20, causal=True, mask=True)
    assert sympy.expand(nl.costs.exact_attention(masked).matmuls() - 2 * p * (d + d_v)) == 0
    window = attention_problem(20, 20, causal=True, window=5)
    assert sympy.expand(nl.costs.exact_attention(window).matmuls() - (2 * n * w - w * (w - 1)) * (d + d_v)) == 0


def test_truncated_updates():
    cost = nl.method("truncated_svd", rank=2).cost(nl.UpdateProblem(np.ones((4, 4))))
    assert cost.apply.madd == d_in * r + d_out * r
    assert cost.free_symbols == {d_in, d_out, r}


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 100])
def test_merge_sort_agrees_with_the_integers(size):
    from nla_llm.arithmetic import factorisations

    assert formulas.merge_sort(n).compare.subs({n: size}) == factorisations.merge_sort(size)


@pytest.mark.parametrize(("size", "chunk"), [(64, 64), (65, 64), (10, 64), (130, 64), (7, 1), (7, 3)])
def test_pairs_in_chunks(size, chunk):
    chunk = min(size, chunk)
    by_hand = sum((min(i, chunk) * (min(i, chunk) + 1)) // 2 for i in [chunk] * (size // chunk) + [size % chunk])
    shape = formulas.CausalLowRankShape(n, m, c)
    assert shape.pairs.subs({n: size, c: chunk}) == by_hand
    assert shape.chunks.subs({n: size, c: chunk}) == len(range(0, size, chunk))


def test_causal_attention_is_linear_in_n():
    cost = nl.method("elu_features").cost(attention_problem(200, 200, causal=True))
    per_row = cost.total().subs({d: 8, d_v: 8, c: 64})
    growth = [int(per_row.subs({n: 64 * k})) for k in (2, 4, 8)]
    assert growth[2] - growth[1] == 2 * (growth[1] - growth[0])


def test_pieces_add_up():
    low_rank = formulas.LowRankShape(n_q, n_k, m)
    assert low_rank.apply(d_v) == Operations(madd=m * n_k * d_v + n_q * m * d_v)
    assert formulas.row_normalised(low_rank, n_q, d_v).apply.div == n_q * d_v
    assert Cost(prepare=formulas.sum_of(n, times=m)).total() == sympy.expand(m * (n - 1))
    assert formulas.svd(n_q, n_k).madd.subs({n_q: 3, n_k: 10}) == 7 * 10 * 9 + 4 * 27
