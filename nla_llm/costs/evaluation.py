"""Exact values of formulas at whole numbers, many times faster than by substitution.

A formula is walked once and computed in Python's own whole numbers and fractions. Where it holds something that is not
rational at these values (a logarithm that no rounding encloses, say), the part is left to SymPy.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor, prod
from numbers import Integral
from typing import TYPE_CHECKING, Any

import sympy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["evaluate"]

Rational = int | Fraction


class _NotRationalError(Exception):
    """A part of a formula is no fraction at these values, or of a kind that is not known here."""


def evaluate(expression: Any, values: Mapping[str, int]) -> Any:
    """Value of a formula with whole numbers for its symbols, by name.

    Returns
    -------
    int or SymPy expression
        An int where the value is whole; what SymPy makes of it where it is not, or where a symbol has no value.

    Examples
    --------
    >>> n, m = sympy.symbols("n m")
    >>> evaluate(sympy.ceiling(n / m) + n * (n + 1) / 2, {"n": 5, "m": 2}), evaluate(n / 2, {"n": 3})
    (18, 3/2)
    """
    if isinstance(expression, int):
        return expression
    try:
        value = _value(expression, values)
    except _NotRationalError:
        return _by_substitution(expression, values)
    return int(value) if value.denominator == 1 else sympy.Rational(value.numerator, value.denominator)


def _by_substitution(expression: Any, values: Mapping[str, int]) -> Any:
    x = sympy.sympify(expression)
    x = x.subs({s: values[s.name] for s in x.free_symbols if s.name in values})
    return int(x) if x.is_Integer else x


def _value(x: Any, values: Mapping[str, int]) -> Rational:
    if isinstance(x, int):
        return x
    for kind in type(x).__mro__:
        if kind in _RULES:
            return _RULES[kind](x, values)
    raise _NotRationalError


def _symbol(x: Any, values: Mapping[str, int]) -> Rational:
    value: Any = values.get(x.name)
    if not isinstance(value, Integral):
        raise _NotRationalError
    return int(value)


def _power(x: Any, values: Mapping[str, int]) -> Rational:
    base, exponent = _value(x.base, values), _value(x.exp, values)
    if exponent.denominator != 1 or (base == 0 and exponent < 0):
        raise _NotRationalError
    return _whole(Fraction(base) ** int(exponent)) if exponent < 0 else base ** int(exponent)


def _whole(x: Fraction) -> Rational:
    return x.numerator if x.denominator == 1 else x


def _sum(x: Any, values: Mapping[str, int]) -> Rational:
    return sum(_value(part, values) for part in x.args)


def _product(x: Any, values: Mapping[str, int]) -> Rational:
    value: Rational = prod(_value(part, values) for part in x.args)
    return value


def _modulo(x: Any, values: Mapping[str, int]) -> Rational:
    dividend, divisor = (_value(part, values) for part in x.args)
    if divisor == 0:
        raise _NotRationalError
    return dividend % divisor


def _function(x: Any, values: Mapping[str, int]) -> Rational:
    """A function of somebody else that makes a number out of numbers."""
    value = x.func(*(sympy.sympify(_value(part, values)) for part in x.args))
    if not value.is_Rational:
        raise _NotRationalError
    return _whole(Fraction(int(value.p), int(value.q)))


def _rounded(*, up: bool) -> Callable[[Any, Mapping[str, int]], Rational]:
    def rule(x: Any, values: Mapping[str, int]) -> Rational:
        (argument,) = x.args
        power = _argument_of_binary_logarithm(argument)
        if power is None:
            return (ceil if up else floor)(_value(argument, values))
        return _rounded_logarithm(_value(power, values), up=up)

    return rule


def _argument_of_binary_logarithm(x: Any) -> Any:
    """y where x is log(y)/log(2), else None."""
    if not x.is_Mul or len(x.args) != 2:
        return None
    inverse, logarithm = sorted(x.args, key=lambda part: not part.is_Pow)
    if not isinstance(logarithm, sympy.log) or inverse != 1 / sympy.log(2):
        return None
    return logarithm.args[0]


def _rounded_logarithm(y: Rational, *, up: bool) -> int:
    """⌈lg y⌉ or ⌊lg y⌋, exactly."""
    if y <= 0:
        raise _NotRationalError
    exponent = y.numerator.bit_length() - y.denominator.bit_length() - 1  # 2^exponent < y < 2^(exponent + 2)
    while Fraction(2) ** (exponent + 1) <= y:
        exponent += 1
    return exponent + (up and Fraction(2) ** exponent != y)


_RULES: dict[Any, Callable[[Any, Mapping[str, int]], Rational]] = {
    sympy.Symbol: _symbol,
    sympy.Mul: _product,
    sympy.Add: _sum,
    sympy.Pow: _power,
    sympy.Integer: lambda x, _: int(x),
    sympy.Rational: lambda x, _: Fraction(int(x.p), int(x.q)),
    sympy.ceiling: _rounded(up=True),
    sympy.floor: _rounded(up=False),
    sympy.Mod: _modulo,
    sympy.Function: _function,
    sympy.Max: lambda x, values: max(_value(part, values) for part in x.args),
    sympy.Min: lambda x, values: min(_value(part, values) for part in x.args),
}
