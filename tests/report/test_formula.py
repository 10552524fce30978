import pytest
import sympy
from sympy import Rational, Symbol, symbols

from nla_llm.report.formula import symbol, typst_math
from nla_llm.report.typst import typst as engine

n, d, m, r, n_q, d_v, x, i = symbols("n d m r n_q d_v x i", positive=True)

TABLE = {
    "0": sympy.Integer(0),
    "2 n^(2) d": 2 * n**2 * d,
    "3 - n": 3 - n,
    "n - 1": n - 1,
    "4 n m (d + d_(v))": 4 * n * m * (d + d_v),
    "frac(n (n + 1), 2)": n * (n + 1) / 2,
    "1/n": 1 / n,
    "n/m": n / m,
    "frac(1, n^(2))": n**-2,
    "sqrt(n)": sympy.sqrt(n),
    "frac(1, sqrt(n))": 1 / sympy.sqrt(n),
    "root(3, n)": n ** Rational(1, 3),
    "n^(3/2)": n ** Rational(3, 2),
    "(n + 1)^(2)": (n + 1) ** 2,
    "2^(n)": 2**n,
    "3 dot 2^(n)": 3 * 2**n,
    "2^(-x)": sympy.Pow(Rational(1, 2), x, evaluate=False),
    "e^(-x)": sympy.exp(-x),
    "log(n) n": None,
    "ceil(n/64)": sympy.ceiling(n / 64),
    "floor(x)": sympy.floor(x),
    "abs(i - x)": sympy.Abs(i - x),
    "max(m, n)": sympy.Max(n, m),
    "binom(n, r)": sympy.binomial(n, r),
    "n!": sympy.factorial(n),
    "(n + 1)!": sympy.factorial(n + 1),
    "sum_(i = 1)^(n) i^(2)": sympy.Sum(i**2, (i, 1, n)),
    "product_(i = 1)^(n) (i + x)": sympy.Product(i + x, (i, 1, n)),
    "n <= m": sympy.Le(n, m),
    "I_(1)(x)": sympy.besseli(1, x),
    "Gamma(x)": sympy.gamma(x),
    "f(x)": sympy.Function("f")(x),
    'op("rank")(x)': sympy.Function("rank")(x),
    "1.5 dot 10^(-7)": sympy.Float("1.5e-7"),
    "infinity": sympy.oo,
    "pi": sympy.pi,
    "lambda_(1)": Symbol("lambda_1"),
    'cases(n & "if" m > n, m & "otherwise")': sympy.Piecewise((n, n < m), (m, True)),
    '"a\\"; #b"': Symbol('a"; #b'),
    "n_(q) d": n_q * d,
}
TABLE["n log(n)"] = n * sympy.log(n)
del TABLE["log(n) n"]


@pytest.mark.parametrize("written", TABLE, ids=list(TABLE))
def test_expression_is_written_as_expected(written):
    assert typst_math(TABLE[written]) == written


def _compile(formulas):
    return engine.compile("\n\n".join(f"$ {formula} $" for formula in formulas).encode(), format="pdf")


def test_every_expression_compiles():
    assert _compile(typst_math(expression) for expression in TABLE.values()).startswith(b"%PDF")


def test_anything_compiles():
    x, y = symbols("x y")
    strange = [
        sympy.Integral(sympy.exp(-(x**2)), (x, 0, sympy.oo)),
        sympy.Derivative(sympy.sin(x), x),
        sympy.Matrix([[1, x], [y, 2]]),
        sympy.S.EmptySet,
        sympy.nan,
        sympy.zoo,
        sympy.I * x,
        sympy.hyper([1], [2], x),
        x**y**2 / (x + y) - sympy.Mod(x, 3),
        sympy.true,
        Symbol("a b"),
        Symbol("\\"),
        Symbol("κ"),
        Symbol("_"),
        Symbol("漢字"),
    ]
    assert _compile(typst_math(expression) for expression in strange).startswith(b"%PDF")


def test_the_test_of_compiling_can_fail():
    with pytest.raises(RuntimeError):
        _compile(["unknownname + frac("])


def test_text_is_never_evaluated():
    with pytest.raises(TypeError, match="must be a SymPy expression"):
        typst_math("__import__('os').getcwd()")


def test_names_are_quoted():
    assert symbol("let") == '"let"'
    assert symbol("a_b_c") == 'a_("b_c")'
    assert symbol("") == '""'
