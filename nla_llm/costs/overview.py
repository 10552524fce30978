"""A table of costs: formulas by class, whole numbers for one problem, and crossovers against exact attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy

from nla_llm.costs.crossings import crossover
from nla_llm.costs.formulas import exact_attention
from nla_llm.costs.symbols import c, n, values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nla_llm.costs.cost import Cost

__all__ = ["CostRow", "CostTable", "table"]

_USUAL_LENGTH, _LONGEST = 4096, 1 << 15  # tokens of the problems whose formulas are compared
_SMOOTH = (sympy.floor, sympy.ceiling, sympy.log, sympy.Mod)  # functions that formulas of any size may hold
_LONGEST_WITH_BIAS = 1 << 10  # whose entries are checked


@dataclass(frozen=True)
class CostRow:
    """One method in a table of costs.

    Attributes
    ----------
    name
        What the row is called.
    cost
        The formula.
    value
        The same in whole numbers for the problem of the table.
    crossover
        Number of tokens from which it is cheaper than exact attention, at the sizes of the problem: a SymPy number,
        zero where it always is, None for exact attention itself, for updates, and where it never is.
    """

    name: str
    cost: Cost
    value: Cost
    crossover: Any = None


@dataclass(frozen=True)
class CostTable:
    """Rows of costs for one problem; prints as text and shows as HTML in a notebook."""

    rows: tuple[CostRow, ...]

    def __iter__(self) -> Iterator[CostRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def _cells(self) -> list[tuple[str, ...]]:
        head = ("method", "operations", "prepare", "apply", "multiply-adds", "exp", "cheaper beyond n")
        return [head, *(self._line(row) for row in self.rows)]

    @staticmethod
    def _line(row: CostRow) -> tuple[str, ...]:
        value, both = row.value, row.value.operations()
        numbers = (value.total(), value.prepare.total(), value.apply.total(), both.madd, both.exp)
        beyond = "" if row.crossover is None else f"{float(row.crossover):,.0f}"
        return (row.name, *(f"{x:,}" for x in numbers), beyond)

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        return "\n".join(_aligned(line, widths) for line in cells)

    def _repr_html_(self) -> str:
        head, *lines = self._cells()
        body = "".join("<tr>" + "".join(f"<td>{escape(x)}</td>" for x in line) + "</tr>" for line in lines)
        return f"<table><thead><tr>{''.join(f'<th>{x}</th>' for x in head)}</tr></thead><tbody>{body}</tbody></table>"


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    """Names to the left, numbers to the right."""
    name, *numbers = line
    return "  ".join([name.ljust(widths[0]), *(x.rjust(k) for x, k in zip(numbers, widths[1:], strict=True))])


def table(methods: Mapping[str, Any] | Iterable[Any], problem: Any) -> CostTable:
    """Costs of methods on a problem, exact attention first.

    Parameters
    ----------
    methods
        Methods with a ``cost``, or a mapping from the name of a row to one.
    problem
        Attention or update problem; its sizes give the whole numbers.

    Raises
    ------
    ValueError
        If a method has no form for the structure of the problem.

    Examples
    --------
    >>> import numpy as np
    >>> import nla_llm as nl
    >>> problem = nl.AttentionProblem(np.zeros((4096, 64)), np.zeros((4096, 64)))
    >>> for row in table([nl.method("elu_features")], problem):
    ...     print(row.name, row.value.total())
    exact 4362592256
    elu_features 70262720
    """
    methods = _named(methods)
    for name, method in methods.items():  # a formula for what a method has no form of would be of something else
        missing = problem.structure - method.properties.supports if hasattr(method, "properties") else ()
        if missing:
            raise ValueError(f"{name} has no form with {' and '.join(sorted(missing))}, so it has no cost there")
    rows, exact = [], None
    if not hasattr(problem, "d_out"):
        exact = exact_attention(problem)
        rows.append(CostRow("exact", exact, exact.at(problem)))
    for name, method in methods.items():
        cost = method.cost(problem)
        value = cost.at(problem, method)
        beyond = None if exact is None else _cheaper_beyond(problem, method)
        rows.append(CostRow(name, cost, value, beyond))
    return CostTable(tuple(rows))


def _named(methods: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    if isinstance(methods, Mapping):
        return dict(methods)
    return {getattr(method, "name", type(method).__name__): method for method in methods}


def _cheaper_beyond(problem: Any, method: Any) -> Any:
    """n from which a method stays below exact attention at these sizes; None if never, or if a mask fixes the pairs.

    Some formulas hold numbers that depend on n, like that of the buckets of a hash: then n is found for the formula of
    problems of n tokens, from long ones to short ones.
    """
    if problem.key_mask is not None:
        return None
    longest = _LONGEST if problem.bias is None else _LONGEST_WITH_BIAS
    if _opaque(method.cost(problem)):
        return _crossing_by_numbers(problem, method, longest)
    length, crossing, seen = min(_USUAL_LENGTH, longest), sympy.Integer(0), set()
    while length not in seen:
        seen.add(length)
        crossing = _crossing(_of_length(problem, length), method)
        if crossing is None:
            return None
        length = max(1, min(int(crossing) + 1, longest))
    far = 2 * (int(crossing) + problem.n_k + getattr(method, "chunk", 0))
    there = _of_length(problem, min(far, longest))
    sizes = {**values(there, method), n: far}
    if c in sizes:
        sizes[c] = method.chunk
    cheaper = method.cost(there).subs(sizes).total() < exact_attention(there).subs(sizes).total()
    return crossing if cheaper else None


def _crossing(problem: Any, method: Any) -> Any:
    """Where the formulas for a problem cross at its sizes, n left open; None where they are the same."""
    sizes = {s.name: v for s, v in values(problem, method).items() if s not in {n, c}}
    exact, cost = (formula.subs(sizes) for formula in (exact_attention(problem), method.cost(problem)))
    chunk = method.chunk if c in cost.free_symbols else 0
    long = cost.subs(c=chunk)
    if exact.total() == long.total():
        return None
    crossing = crossover(exact, long, n)
    if crossing < chunk:  # fewer tokens are a single chunk
        crossing = sympy.Min(crossover(exact, cost.subs(c=n), n), chunk)
    return crossing


def _opaque(cost: Cost) -> bool:
    """Whether a formula holds functions of its own, which have values for problems of moderate size only."""
    expressions = [sympy.sympify(x) for part in (cost.prepare, cost.apply) for _, x in part.items()]
    return any(not isinstance(f, _SMOOTH) for x in expressions for f in x.atoms(sympy.Function))


def _crossing_by_numbers(problem: Any, method: Any, longest: int) -> Any:
    """Last of the lengths up to ``longest`` at which the method is not cheaper, next to one where it is."""

    def cheaper(length: int) -> bool:
        there = _of_length(problem, length)
        total = method.cost(there).at(there, method).total()
        return bool(total < exact_attention(there).at(there).total())

    high = longest
    if not cheaper(high):
        return None
    low = high // 2
    while low and cheaper(low):
        low, high = low // 2, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if cheaper(middle) else (middle, high)
    return sympy.Integer(low)


def _of_length(problem: Any, length: int) -> Any:
    """The problem with that many queries and keys, all zeros that take no memory."""
    from nla_llm.problems import AttentionProblem  # noqa: PLC0415 - problems know costs

    def zeros(*shape: int) -> Any:
        return np.broadcast_to(np.float32(0), shape)

    return AttentionProblem(
        zeros(length, problem.d), zeros(length, problem.d), zeros(length, problem.d_v), causal=problem.causal,
        window=problem.window, bias=None if problem.bias is None else zeros(length, length),
    )  # fmt: skip
