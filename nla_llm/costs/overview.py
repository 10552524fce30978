"""A table of costs: formulas by class, whole numbers for one problem, and crossovers against exact attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from nla_llm.costs.crossings import crossover
from nla_llm.costs.formulas import exact_attention
from nla_llm.costs.symbols import n, n_k, n_q, values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from nla_llm.costs.cost import Cost

__all__ = ["CostRow", "CostTable", "table"]


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
    rows, exact = [], None
    if not hasattr(problem, "d_out"):
        exact = exact_attention(problem)
        rows.append(CostRow("exact", exact, exact.at(problem)))
    for name, method in _named(methods).items():
        cost = method.cost(problem)
        beyond = None if exact is None else _cheaper_beyond(exact, cost, problem, method)
        rows.append(CostRow(name, cost, cost.at(problem, method), beyond))
    return CostTable(tuple(rows))


def _named(methods: Mapping[str, Any] | Iterable[Any]) -> dict[str, Any]:
    if isinstance(methods, Mapping):
        return dict(methods)
    return {getattr(method, "name", type(method).__name__): method for method in methods}


def _cheaper_beyond(exact: Cost, cost: Cost, problem: Any, method: Any) -> Any:
    """n from which ``cost`` stays below ``exact`` at these sizes; None if never, or if a mask fixes the pairs."""
    if problem.key_mask is not None:
        return None
    sizes = {s.name: v for s, v in values(problem, method).items() if s not in {n, n_q, n_k}} | {"n_q": n, "n_k": n}
    crossing = crossover(exact, cost, n, **sizes)
    far = 2 * (int(crossing) + problem.n_k)
    cheaper = cost.subs(sizes).subs({n: far}).total() < exact.subs(sizes).subs({n: far}).total()
    return crossing if cheaper else None
