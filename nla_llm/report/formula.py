"""SymPy expressions as Typst mathematics."""
# ruff: noqa: N802 - SymPy calls the methods of a printer by the names of its classes

from __future__ import annotations

from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE, precedence
from sympy.printing.printer import Printer

# fmt: off
_GREEK = frozenset([
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu",
    "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda",
    "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega",
])
_OPERATORS = frozenset([
    "sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "arcsin", "arccos", "arctan", "log",
    "min", "max", "gcd", "det",
])
# fmt: on
_RELATIONS = {"==": "=", "!=": "eq.not", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


def typst_math(expression: Any) -> str:
    r"""Write an expression as Typst mathematics, to be set between dollars.

    Names are never evaluated: a symbol is one letter, a Greek letter or quoted text, so any name is safe. What has no
    rule is printed as SymPy's own text.

    Raises
    ------
    TypeError
        If it is a string: SymPy would run it as a program.

    Examples
    --------
    >>> n, d_v = sympy.symbols("n d_v")
    >>> typst_math(2 * n**2 * d_v + n / 2)
    '2 n^(2) d_(v) + n/2'
    >>> typst_math(sympy.sqrt(n) * sympy.ceiling(n / 3))
    'sqrt(n) ceil(n/3)'
    """
    if isinstance(expression, str):
        raise TypeError(f"expression must be a SymPy expression or a number, got the text {expression!r:.60}")
    return str(_TypstPrinter().doprint(sympy.sympify(expression)))


def symbol(name: str) -> str:
    """Name of a quantity as mathematics: one letter italic, what follows an underscore as an index.

    Examples
    --------
    >>> symbol("n"), symbol("d_v"), symbol("sigma_1"), symbol("rank"), symbol("x2")
    ('n', 'd_(v)', 'sigma_(1)', '"rank"', 'x_(2)')
    """
    base, _, index = name.partition("_")
    if not index and len(base) > 1 and base[0].isalpha() and base[1:].isdigit():
        base, index = base[0], base[1:]
    if not base or not index:
        return _word(name)
    return f"{_word(base)}_({_word(index)})"


def _word(name: str) -> str:
    if (len(name) == 1 and name.isalpha()) or (name.isascii() and name.isdigit()):
        return name
    if name in _GREEK:
        return name
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _customary(factor: Any) -> int:
    """Place of a factor: numbers, then n, m, r, d as papers write costs, then the rest as SymPy orders it."""
    base = factor.as_base_exp()[0]
    if factor.is_number:
        return 0
    return 1 + "nmrd".find(base.name[0]) if base.is_Symbol and base.name[0] in "nmrd" else 5


class _TypstPrinter(Printer):  # type: ignore[misc]  # SymPy has no types
    """One method for each class of expression, called by the name of the class."""

    printmethod = "_typst"

    def emptyPrinter(self, expr: Any) -> str:
        return _word(str(expr))

    def _in(self, expr: Any, level: int) -> str:
        text = str(self._print(expr))
        return f"({text})" if precedence(expr) < level else text

    def _list(self, items: Any) -> str:
        return ", ".join(str(self._print(item)) for item in items)

    def _print_Symbol(self, expr: Any) -> str:
        return symbol(expr.name)

    def _print_Integer(self, expr: Any) -> str:
        return str(int(expr))

    def _print_Rational(self, expr: Any) -> str:
        return f"{expr.p}/{expr.q}"

    def _print_Float(self, expr: Any) -> str:
        mantissa, _, exponent = f"{float(expr):.6g}".partition("e")
        return f"{mantissa} dot 10^({int(exponent)})" if exponent else mantissa

    def _print_Infinity(self, _: Any) -> str:
        return "infinity"

    def _print_NegativeInfinity(self, _: Any) -> str:
        return "-infinity"

    def _print_NaN(self, _: Any) -> str:
        return '"n/a"'

    def _print_ComplexInfinity(self, _: Any) -> str:
        return "infinity"

    def _print_Pi(self, _: Any) -> str:
        return "pi"

    def _print_Exp1(self, _: Any) -> str:
        return "e"

    def _print_ImaginaryUnit(self, _: Any) -> str:
        return "i"

    def _print_Add(self, expr: Any) -> str:
        text = ""
        for term in expr.as_ordered_terms():
            negative = bool(term.could_extract_minus_sign())
            part = self._in(-term if negative else term, PRECEDENCE["Add"] + (1 if negative else 0))
            text += (" - " if negative else " + ") + part if text else ("-" if negative else "") + part
        return text

    def _print_Mul(self, expr: Any) -> str:
        if expr.could_extract_minus_sign():
            return f"-{self._in(-expr, PRECEDENCE['Mul'])}"
        numerator, denominator = sympy.fraction(expr, exact=True)
        if denominator != 1:
            return self._fraction(numerator, denominator)
        text = ""
        for factor in sorted(expr.as_ordered_factors(), key=_customary):
            part = self._in(factor, PRECEDENCE["Mul"])
            text += (" dot " if part[0].isdigit() else " ") + part if text else part
        return text

    def _fraction(self, numerator: Any, denominator: Any) -> str:
        if numerator.is_Atom and denominator.is_Atom:
            return f"{self._print(numerator)}/{self._print(denominator)}"
        return f"frac({self._print(numerator)}, {self._print(denominator)})"

    def _print_Pow(self, expr: Any) -> str:
        base, exponent = expr.as_base_exp()
        if exponent.is_Rational and exponent < 0:
            return self._fraction(sympy.Integer(1), base**-exponent)
        if exponent == sympy.Rational(1, 2):
            return f"sqrt({self._print(base)})"
        if exponent.is_Rational and exponent.p == 1 and exponent.q <= 4:
            return f"root({exponent.q}, {self._print(base)})"
        return f"{self._in(base, PRECEDENCE['Pow'] + 1)}^({self._print(exponent)})"

    def _print_exp(self, expr: Any) -> str:
        return f"e^({self._print(expr.args[0])})"

    def _print_Abs(self, expr: Any) -> str:
        return f"abs({self._print(expr.args[0])})"

    def _print_ceiling(self, expr: Any) -> str:
        return f"ceil({self._print(expr.args[0])})"

    def _print_floor(self, expr: Any) -> str:
        return f"floor({self._print(expr.args[0])})"

    def _print_Max(self, expr: Any) -> str:
        return f"max({self._list(sorted(expr.args, key=str))})"

    def _print_Min(self, expr: Any) -> str:
        return f"min({self._list(sorted(expr.args, key=str))})"

    def _print_factorial(self, expr: Any) -> str:
        return f"{self._in(expr.args[0], PRECEDENCE['Atom'])}!"

    def _print_binomial(self, expr: Any) -> str:
        return f"binom({self._list(expr.args)})"

    def _print_gamma(self, expr: Any) -> str:
        return f"Gamma({self._print(expr.args[0])})"

    def _print_besseli(self, expr: Any) -> str:
        return f"I_({self._print(expr.order)})({self._print(expr.argument)})"

    def _print_Function(self, expr: Any) -> str:
        name = expr.func.__name__
        head = name if name in _OPERATORS else symbol(name)
        head = f"op({head})" if head.startswith('"') else head
        return f"{head}({self._list(expr.args)})"

    def _print_Sum(self, expr: Any) -> str:
        return self._big("sum", expr)

    def _print_Product(self, expr: Any) -> str:
        return self._big("product", expr)

    def _big(self, sign: str, expr: Any) -> str:
        limits = " ".join(
            f"{sign}_({self._print(v)} = {self._print(low)})^({self._print(high)})" for v, low, high in expr.limits
        )
        return f"{limits} {self._in(expr.function, PRECEDENCE['Mul'])}"

    def _print_Relational(self, expr: Any) -> str:
        return f"{self._print(expr.lhs)} {_RELATIONS.get(expr.rel_op, expr.rel_op)} {self._print(expr.rhs)}"

    def _print_Tuple(self, expr: Any) -> str:
        return f"({self._list(expr)})"

    def _print_Piecewise(self, expr: Any) -> str:
        rows = [
            f'{self._print(value)} & "otherwise"'
            if condition is sympy.true
            else f'{self._print(value)} & "if" {self._print(condition)}'
            for value, condition in expr.args
        ]
        return f"cases({', '.join(rows)})"
