"""Operations by class, and a cost: the operations of preparing an operator and of applying it.

What counts as what, for arrays of floating numbers (arithmetic of integers and booleans is bookkeeping):

=========  ==========================================================================================================
madd       a multiply-add: an inner product of length L has L of them, a matrix product m × k by k × n has mkn;
           the factorisations, by their textbook formulas (:mod:`nla_llm.arithmetic.factorisations`)
add        addition, subtraction; L − 1 in a sum, mean or running sum of L entries
mul        multiplication, square
div        division, reciprocal; one for a mean
exp        every transcendental function: exp, log, sin, cos, tanh, …, a general power
sqrt       square root
compare    comparison, maximum, minimum, rounding, test for finiteness; L − 1 in a maximum over L entries;
           n⌈lg n⌉ − 2^⌈lg n⌉ + 1 in sorting n entries
draw       a random number drawn: reported, but not an operation
nothing    moving data (slices, transposes, concatenation, gathering, ``where``), conversion, signs, logic
=========  ==========================================================================================================

A multiply-add is two operations, everything else is one. Entries that causality, a window or a mask of keys removes
from exact attention do not count: causal attention has n(n+1)/2 pairs, not n². Costs are per head, that is for one
entry of the batch axes. Counted arrays (:mod:`nla_llm.arithmetic`) count by the same table.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import sympy

from nla_llm.costs.evaluation import evaluate
from nla_llm.costs.symbols import values as values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Cost", "Operations"]

Number = Any  # an int, or an expression of SymPy (which has no types)


@dataclass(frozen=True)
class Operations:
    """Numbers of operations by class, each an int or a SymPy expression.

    Examples
    --------
    >>> ops = Operations(madd=3, exp=1) + 2 * Operations(add=5)
    >>> ops.add, ops.total()
    (10, 17)
    """

    madd: Number = 0
    add: Number = 0
    mul: Number = 0
    div: Number = 0
    exp: Number = 0
    sqrt: Number = 0
    compare: Number = 0
    draw: Number = 0

    def __add__(self, other: Operations) -> Operations:
        if not isinstance(other, Operations):
            return NotImplemented
        return Operations(**{kind: number + getattr(other, kind) for kind, number in self.items()})

    def __mul__(self, factor: Number) -> Operations:
        return self.map(lambda number: factor * number)

    __rmul__ = __mul__

    def items(self) -> list[tuple[str, Number]]:
        """Classes and their numbers, in the order of the table."""
        return [(f.name, getattr(self, f.name)) for f in fields(self)]

    def map(self, function: Callable[[Number], Number]) -> Operations:
        """The same with ``function`` applied to every number."""
        return Operations(**{kind: function(number) for kind, number in self.items()})

    def total(self) -> Number:
        """All operations, a multiply-add being two; random numbers are not operations."""
        whole = 2 * self.madd + self.add + self.mul + self.div + self.exp + self.sqrt + self.compare
        return whole if isinstance(whole, int) else sympy.expand(whole)

    def matmuls(self) -> Number:
        """Operations of the multiply-adds alone: what the usual formulas for flops state."""
        return 2 * self.madd if isinstance(self.madd, int) else sympy.expand(2 * self.madd)


@dataclass(frozen=True)
class Cost:
    """Operations of preparing an operator from q and k (or an update), and of applying it to v (or an input), per head.

    Examples
    --------
    >>> from nla_llm.costs import n, d
    >>> cost = Cost(prepare=Operations(exp=n * d), apply=Operations(madd=n * d**2))
    >>> cost.total(), cost.subs({"n": 10, "d": 2}).total()
    (2*d**2*n + d*n, 100)
    >>> print(cost)
             prepare  apply
    madd     0        d**2*n
    exp      d*n      0
    total    d*n      2*d**2*n
    """

    prepare: Operations = Operations()
    apply: Operations = Operations()

    def __add__(self, other: Cost) -> Cost:
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(self.prepare + other.prepare, self.apply + other.apply)

    def __mul__(self, factor: Number) -> Cost:
        return Cost(self.prepare * factor, self.apply * factor)

    __rmul__ = __mul__

    def map(self, function: Callable[[Number], Number]) -> Cost:
        """The same with ``function`` applied to every number."""
        return Cost(self.prepare.map(function), self.apply.map(function))

    def operations(self) -> Operations:
        """Preparing and applying together."""
        return self.prepare + self.apply

    def total(self) -> Number:
        """All operations: a SymPy expression in n, d, d_v, m, …, or an int."""
        return self.operations().total()

    def matmuls(self) -> Number:
        """Operations of the multiply-adds alone."""
        return self.operations().matmuls()

    @property
    def free_symbols(self) -> set[sympy.Symbol]:
        """Symbols that occur."""
        return {s for ops in (self.prepare, self.apply) for _, x in ops.items() for s in sympy.sympify(x).free_symbols}

    def subs(self, values: Mapping[Any, Any] | None = None, **names: Any) -> Cost:
        """The same with symbols replaced, named by themselves or by strings, by numbers or other symbols."""
        table = {**(values or {}), **names}
        return self.map(lambda x: _tidy(sympy.sympify(x).subs({_symbol(s): _symbol(v) for s, v in table.items()})))

    def at(self, problem: Any, method: Any = None, **hyperparameters: int) -> Cost:
        """The cost in whole numbers for the sizes of a problem and the hyper-parameters of a method.

        Raises
        ------
        ValueError
            If a symbol is left without a value, naming it.

        Examples
        --------
        >>> import numpy as np
        >>> from nla_llm.problems import AttentionProblem
        >>> from nla_llm.costs import exact_attention
        >>> problem = AttentionProblem(np.zeros((4, 2)), np.zeros((4, 2)))
        >>> exact_attention(problem).at(problem).matmuls()
        128
        """
        known = hyperparameters | {symbol.name: value for symbol, value in values_of(problem, method).items()}
        whole = self.map(lambda x: evaluate(x, known))
        missing = sorted(map(str, whole.free_symbols))
        if missing:
            raise ValueError(f"no value for {', '.join(missing)}; pass the method, or {missing[0]}=... by name")
        return whole

    # -- display ---------------------------------------------------------------------------------------------------

    def _rows(self, write: Callable[[Any], str]) -> list[tuple[str, str, str]]:
        """(class, prepare, apply) of the classes that occur, then the totals."""
        pairs = zip(self.prepare.items(), self.apply.items(), strict=True)
        rows = [(kind, x, y) for (kind, x), (_, y) in pairs if not (x == 0 and y == 0)]
        rows.append(("total", self.prepare.total(), self.apply.total()))
        return [(kind, write(_readable(x)), write(_readable(y))) for kind, x, y in rows]

    def __str__(self) -> str:
        rows = [("", "prepare", "apply"), *self._rows(str)]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        left, middle = max(8, widths[0]), widths[1]
        return "\n".join(f"{kind:<{left}} {x:<{middle}}  {y}" for kind, x, y in rows)

    def _repr_latex_(self) -> str:
        rows = [rf"\text{{{kind}}} & {x} & {y}" for kind, x, y in self._rows(sympy.latex)]
        head = r"\text{class} & \text{prepare} & \text{apply} \\ \hline "
        body = r" \\ ".join(rows)
        return rf"$\displaystyle \begin{{array}}{{l|l|l}} {head}{body} \end{{array}}$"

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{kind}</th><td>${x}$</td><td>${y}$</td></tr>" for kind, x, y in self._rows(sympy.latex))
        head = "<tr><th></th><th>prepare</th><th>apply</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _symbol(name: Any) -> Any:
    return sympy.Symbol(name) if isinstance(name, str) else name


def _tidy(x: Any) -> Number:
    """Whole numbers as ints."""
    return int(x) if x.is_Integer else x


def _readable(x: Any) -> Any:
    """The shortest of the expanded form, the factored form and the form in which it was composed."""
    forms = (sympy.expand(x), sympy.factor(x), sympy.sympify(x))
    return min(forms, key=lambda form: (len(str(form)), form.is_Mul))
