import subprocess
import sys

import numpy as np
import pytest
import sympy
from costs.cost_rows import attention_problem

import nla_llm as nl
from nla_llm.costs import Cost, Operations, c, d, d_v, m, n


def test_a_multiply_add_is_two_operations_and_a_draw_is_none():
    one_of_each = Operations(madd=1, add=1, mul=1, div=1, exp=1, sqrt=1, compare=1, draw=1)
    assert one_of_each.total() == 2 + 6
    assert one_of_each.matmuls() == 2


def test_algebra_is_by_class():
    a, b = Operations(madd=n, exp=2), Operations(madd=3, exp=n)
    assert a + 2 * b == Operations(madd=n + 6, exp=2 * n + 2)
    whole = Cost(a, b) + 2 * Cost(b, a)
    assert whole == Cost(a + b + b, b + a + a)
    assert sympy.expand(whole.total() - 3 * (a.total() + b.total())) == 0
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError):
        Cost(a, b) + a


def test_symbols_are_found_by_name_in_a_total():
    total = nl.method("elu_features").cost(attention_problem(8, 8)).total()
    assert total.free_symbols == {n, d, d_v}
    by_name = total.subs({"n": 100, "d": 8, "d_v": 4})
    assert by_name == total.subs({nl.costs.n: 100, nl.costs.d: 8, nl.costs.d_v: 4})
    assert by_name.is_Integer


def test_substitution_of_names_symbols_and_numbers():
    cost = Cost(apply=Operations(madd=n * d * d_v))
    assert cost.subs({"d_v": "d"}).apply.madd == n * d**2
    assert cost.subs({d_v: d}, n=10).apply.madd == 10 * d**2
    assert cost.subs(n=2, d=3, d_v=4).apply == Operations(madd=24)
    assert isinstance(cost.subs(n=2, d=3, d_v=4).apply.madd, int)


def test_at_a_problem_everything_is_a_whole_number():
    problem = attention_problem(70, 70, causal=True)
    method = nl.method("positive_features", m=5)
    cost = method.cost(problem)
    assert cost.free_symbols == {n, d, d_v, m, c}
    whole = cost.at(problem, method)
    assert all(isinstance(x, int) for part in (whole.prepare, whole.apply) for _, x in part.items())
    assert cost.at(problem, m=5, c=64) == whole


def test_a_symbol_without_a_value_is_named():
    problem = attention_problem(5, 5)
    with pytest.raises(ValueError, match="no value for m"):
        nl.method("positive_features", m=5).cost(problem).at(problem)


def test_displays():
    cost = Cost(prepare=Operations(exp=n * m), apply=Operations(madd=n * d_v, draw=3))
    text = str(cost)
    assert [line.split()[0] for line in text.splitlines()] == ["prepare", "madd", "exp", "draw", "total"]
    assert "div" not in text
    assert r"\text{madd} & 0 & d_{v} n" in cost._repr_latex_()
    assert "<td>$m n$</td>" in cost._repr_html_()


def test_sympy_is_loaded_by_the_first_formula_only():
    code = (
        "import sys, nla_llm as nl; nl.method('elu_features'); nl.method('truncated_svd', rank=1); nl.costs; "
        "assert 'sympy' not in sys.modules; nl.costs.n; assert 'sympy' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603 - our own interpreter


def test_a_head_of_a_masked_batch_is_the_first():
    many = attention_problem(9, 9, batch=(3,), mask=True)
    whole = nl.costs.exact_attention(many).at(many)
    assert whole == nl.costs.count_exact(many)
    assert whole.apply.exp == 9 * int(np.sum(many.key_mask[0]))
