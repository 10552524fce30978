from fractions import Fraction
from math import comb

import numpy as np
import pytest
import sympy
from costs.cost_rows import attention_problem, rows_of
from hypothesis import given
from hypothesis import strategies as st

import nla_llm as nl
from nla_llm.costs.evaluation import evaluate

N, M = sympy.symbols("n m")


class Divisors(sympy.Function):
    """Has values at numbers only."""

    @classmethod
    def eval(cls, k):
        return sympy.Integer(sum(int(k) % i == 0 for i in range(1, int(k) + 1))) if k.is_Integer else None


FORMULAS = {
    "function": N * Divisors(N + 1) / 2,
    "function without value": Divisors(N / (M + 100)) + 1,
    "polynomial": N**2 * (M + 3) - 7 * N + 5,
    "fraction": N * (N + 1) / 2 + N / M,
    "roundings": sympy.ceiling(N / M) * sympy.floor((N + 3) / (2 * M)) + sympy.ceiling(N / 2 - M),
    "remainders": sympy.Mod(N, M) * sympy.Mod(2 * N + 1, M + 1) + sympy.Mod(-N, 7),
    "extremes": sympy.Max(N, M, 10) - sympy.Min(N - 5, M) * sympy.Max(0, M - N),
    "logarithms": 2 ** sympy.ceiling(sympy.log(N, 2)) + sympy.floor(sympy.log(N / M, 2)) + M ** sympy.floor(N / 9),
    "inverse power": 3 * (N + M) ** -2 + sympy.Integer(4) ** -1,
    "number": sympy.Integer(12),
    "bare logarithm": N * sympy.log(M + 1) + 1,
    "root": sympy.sqrt(N) + M,
    "missing": N + sympy.Symbol("x") * M,
}


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
@given(n=st.integers(1, 70), m=st.integers(1, 70))
def test_it_is_what_substitution_gives(formula, n, m):
    expected = formula.subs({"n": n, "m": m})
    value = evaluate(formula, {"n": n, "m": m})
    assert value == expected
    assert isinstance(value, int) == bool(expected.is_Integer)


@pytest.mark.parametrize("method", rows_of("attention"), ids=repr)
def test_formulas_of_methods_are_what_substitution_gives(method):
    for causal in (False, True):
        if not causal or "causal" in method.properties.supports:
            problem = attention_problem(61, 61, causal=causal)
            cost = method.cost(problem)
            assert cost.at(problem, method) == cost.subs(nl.costs.values(problem, method))


def test_binary_logarithms_are_exact_at_powers_and_beside_them():
    rounded = [sympy.ceiling(sympy.log(N, 2)), sympy.floor(sympy.log(N, 2))]
    for k in (2, 10, 53, 64, 200):
        assert [evaluate(f, {"n": 2**k}) for f in rounded] == [k, k]
        assert [evaluate(f, {"n": 2**k + 1}) for f in rounded] == [k + 1, k]
        assert [evaluate(f, {"n": 2**k - 1}) for f in rounded] == [k, k - 1]
    below_one = sympy.ceiling(sympy.log(1 / N, 2))
    assert [evaluate(below_one, {"n": n}) for n in (1, 2, 3, 4, 5)] == [0, -1, -1, -2, -2]


def test_numbers_beyond_floating_point_are_exact():
    assert evaluate(N * (N + 1) / 2, {"n": 10**40 + 1}) == comb(10**40 + 2, 2)
    assert evaluate(N / 3, {"n": 10**40}) == sympy.Rational(10**40, 3)
    assert evaluate(5, {}) == 5
    assert evaluate(sympy.Rational(1, 2), {}) == Fraction(1, 2)


def test_what_has_no_value_stays_a_symbol():
    assert evaluate(N * M, {"n": 3}) == 3 * M
    assert evaluate(1 / (N - M), {"n": 3, "m": 3}) == sympy.zoo
    assert evaluate(sympy.Mod(N, M), {"n": 3}).free_symbols == {M}


def test_numbers_of_numpy_are_taken():
    assert evaluate(N**2, {"n": np.int64(7)}) == 49
    assert type(evaluate(N**2, {"n": np.int64(7)})) is int
