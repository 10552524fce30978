"""Where two costs cross: the length from which the cheaper method is another one."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import sympy

from nla_llm.costs.symbols import c, d, d_in, d_out, d_v, m, n, n_k, n_q, p, r, w

if TYPE_CHECKING:
    from nla_llm.costs.cost import Cost

__all__ = ["NoClosedFormError", "crossover"]

# Sizes in common use: they decide which of several roots is meant, never its formula.
_USUAL = {
    n: 4096,
    n_q: 4096,
    n_k: 4096,
    d: 64,
    d_v: 64,
    m: 256,
    r: 16,
    c: 64,
    w: 256,
    p: 4096**2,
    d_out: 4096,
    d_in: 4096,
}


class NoClosedFormError(ValueError):
    """Two costs cross where no formula says; with numbers for all other symbols it is found by bisection."""


def crossover(c1: Cost, c2: Cost, symbol: Any = "n", *, matmuls: bool = False, **values: Any) -> Any:
    """Largest positive value of ``symbol`` at which two costs are equal; beyond it their order does not change.

    Chunks and blocks are taken for full (floors and ceilings are dropped): a crossing inside a chunk means nothing.

    Parameters
    ----------
    c1, c2
        Costs, as ``method.cost(problem)`` gives them.
    symbol
        Name of the symbol to solve for.
    matmuls
        Compare the multiply-adds alone, which is what the usual formulas for flops do.
    **values
        Numbers or other symbols for symbols: ``d_v="d"``, ``m=256``.

    Returns
    -------
    SymPy expression
        In the other symbols, or a number where ``values`` leaves none. Where several roots are positive, the one that
        is largest at the usual sizes (d = d_v = 64, m = 256, c = 64, r = 16). Zero where the costs do not cross at any
        positive value for these sizes: the same one is cheaper from the start.

    Raises
    ------
    ValueError
        If the costs are the same expression, or ``symbol`` does not occur.
    NoClosedFormError
        A ValueError too: the equation has no closed form (sorting brings a logarithm); then give numbers to all other
        symbols.

    Examples
    --------
    >>> import nla_llm as nl
    >>> from nla_llm.costs import Cost, Operations, d, n
    >>> exact = Cost(apply=Operations(madd=2 * n**2 * d))
    >>> linear = Cost(apply=Operations(madd=2 * n * d**2 + n * d))
    >>> crossover(exact, linear)
    d + 1/2
    >>> crossover(exact, linear, d=64)
    129/2
    """
    x = sympy.Symbol(symbol) if isinstance(symbol, str) else symbol
    difference = _difference(c1.subs(values), c2.subs(values), matmuls=matmuls)
    if difference == 0:
        raise ValueError("the two costs are the same expression, so they do not cross")
    if x not in difference.free_symbols:
        names = ", ".join(sorted(map(str, difference.free_symbols)))
        raise ValueError(f"the difference of the costs does not depend on {x}, only on {names or 'nothing'}")
    if difference.is_polynomial(x):
        return _largest_root(difference, x)
    others = difference.free_symbols - {x}
    if others:
        names = ", ".join(sorted(map(str, others)))
        raise NoClosedFormError(f"no closed form: the equation is not a polynomial in {x}; give numbers to {names}")
    return _last_sign_change(difference, x)


def _difference(c1: Cost, c2: Cost, *, matmuls: bool) -> Any:
    a, b = (cost.matmuls() if matmuls else cost.total() for cost in (c1, c2))
    smooth = sympy.sympify(a - b).replace(sympy.Mod, lambda *_: sympy.Integer(0))
    for rounding in (sympy.floor, sympy.ceiling):
        smooth = smooth.replace(rounding, lambda x: x)
    return sympy.expand(sympy.numer(sympy.together(smooth)))


def _largest_root(polynomial: Any, x: sympy.Symbol) -> Any:
    """The root of a polynomial in ``x`` that is the largest positive one at the usual sizes, or zero."""
    positive = {s: sympy.Symbol(s.name, positive=True) for s in polynomial.free_symbols}
    back = {after: before for before, after in positive.items()}
    usual = {after: _USUAL.get(before, 64) for before, after in positive.items() if before != x}
    poly = sympy.Poly(polynomial.subs(positive), positive[x])
    found: list[tuple[float, Any]] = []
    for root in sympy.roots(poly):
        number = sympy.N(root.subs(usual))
        if abs(sympy.im(number)) <= 1e-12 * abs(number) and sympy.re(number) > 0:
            found.append((float(sympy.re(number)), root))
    if not found:
        return sympy.Integer(0)
    return _readable(max(found, key=lambda pair: pair[0])[1]).subs(back)


def _readable(root: Any) -> Any:
    """A rational root in the shorter of two forms, one with radicals as it stands."""
    if any(e.is_Pow and not e.exp.is_Integer for e in sympy.preorder_traversal(root)):
        return root
    fraction = sympy.cancel(root)
    return min(sympy.expand(fraction), fraction, key=lambda form: len(str(form)))


def _last_sign_change(function: Any, x: sympy.Symbol, largest: int = 2**40) -> Any:
    """Root between the last two powers of two at which the signs of ``function`` differ, by bisection; zero if none."""
    f = sympy.lambdify(x, function, "math")
    points = [2**k for k in range(largest.bit_length())]
    for low, high in reversed(list(pairwise(points))):
        if f(low) * f(high) <= 0:
            return sympy.nsolve(function, x, (low, high), solver="bisect", verify=False)
    return sympy.Integer(0)
