import math

import pytest
import sympy

from nla_llm.arithmetic import factorisations

SHAPES = [(1, 1), (2, 1), (5, 3), (7, 7), (40, 12)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_reflections_are_the_sum_over_trailing_blocks(rows, columns):
    assert factorisations.reflections(rows, columns) == sum(2 * (rows - i) * (columns - i) for i in range(columns))


@pytest.mark.parametrize(
    ("name", "leading"),  # operations of Golub and Van Loan, as polynomials in m, n; two of them are a multiply-add
    [
        ("qr", "4*m*n**2 - 4*n**3/3"),
        ("svd", "14*m*n**2 + 8*n**3"),
        ("svdvals", "4*m*n**2 - 4*n**3/3"),
    ],
)
def test_leading_terms_are_those_of_the_book(name, leading):
    m, n, t = sympy.symbols("m n t")
    formula = sympy.expand(2 * getattr(factorisations, name)(m, n)).subs({m: t * m, n: t * n})
    assert sympy.expand(sympy.limit(formula / t**3, t, sympy.oo) - sympy.sympify(leading)) == 0


def test_symmetric_eigenvalues_cost_nine_cubes():
    n = sympy.Symbol("n")
    assert sympy.limit(2 * factorisations.eigh(n) / n**3, n, sympy.oo) == 9


def test_solving_eliminates_and_substitutes():
    """Step i of the elimination divides i entries and updates i² others; each right-hand side meets all of L and U."""
    for n in range(1, 9):
        assert factorisations.solve(n, 0) == sum(i + i**2 for i in range(n))
        assert factorisations.solve(n, 5) - factorisations.solve(n, 0) == 5 * n**2


@pytest.mark.parametrize("name", ["qr", "svd", "svdvals"])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_formula_of_symbols_and_of_integers_agree(name, rows, columns):
    m, n = sympy.symbols("m n")
    function = getattr(factorisations, name)
    assert sympy.sympify(function(m, n)).subs({m: rows, n: columns}) == function(rows, columns)


def test_merge_sort_is_within_its_bounds():
    for n in range(1, 200):
        comparisons = factorisations.merge_sort(n)
        assert math.log2(math.factorial(n)) - 1e-9 <= comparisons <= max(0, n * math.log2(n)) + 1e-9


@pytest.mark.parametrize("n", range(1, 40))
def test_merge_sort_satisfies_its_recurrence(n):
    small, large = n // 2, n - n // 2
    merged = factorisations.merge_sort(small) + factorisations.merge_sort(large) + n - 1 if n > 1 else 0
    assert factorisations.merge_sort(n) == merged
