"""What ``nla-llm cost`` shows: formulas by class of operation, totals, crossovers with exact attention, and a plot."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from nla_llm import costs
from nla_llm.cli.terminal import say
from nla_llm.costs.crossings import NoClosedFormError
from nla_llm.methods import properties_of
from nla_llm.methods.registry import require
from nla_llm.problems import AttentionProblem, UpdateProblem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from nla_llm.costs import Cost

__all__ = ["check_plot", "draw_costs", "formula", "show_costs"]

_NAMES = {"madd": "multiply-add", "mul": "multiply", "div": "divide", "draw": "random draw"}
_FORMATS = (".svg", ".pdf", ".png")
_SHORT = 18  # letters of a formula that fits into a column
_POINTS = 41  # of a curve


@dataclass(frozen=True)
class Sizes:
    """Sizes at which formulas are evaluated."""

    n: int
    d: int
    causal: bool

    def problem(self, method: Any) -> Any:
        """A problem of these sizes for a method; an update is n × n, of n inputs. Its entries are zeros without memory.

        Raises
        ------
        ValueError
            If a size is not positive.
        """
        for name, size in (("n", self.n), ("d", self.d)):
            if size < 1:
                raise ValueError(f"--{name} must be at least 1, got {size}")
        if properties_of(method).problem == "update":
            square = np.broadcast_to(np.float32(0), (self.n, self.n))
            return UpdateProblem(square, inputs=square)
        zeros = np.broadcast_to(np.float32(0), (self.n, self.d))
        return AttentionProblem(zeros, zeros, zeros, causal=self.causal)


@dataclass(frozen=True)
class Row:
    """A method at some sizes: its formulas, its numbers, and where it crosses exact attention."""

    name: str
    method: Any
    sizes: Sizes

    @cached_property
    def problem(self) -> Any:
        """What it is applied to."""
        return self.sizes.problem(self.method)

    @cached_property
    def cost(self) -> Cost:
        """Its formulas; d_v = d."""
        if self.method is None:
            return costs.exact_attention(self.problem).subs(d_v="d")
        if not hasattr(self.method, "cost"):
            raise ValueError(f"{self.name} has no cost(problem), so there is no formula to show")
        cost: Cost = self.method.cost(self.problem)
        return cost.subs(d_v="d")

    @cached_property
    def value(self) -> Cost:
        """Its numbers."""
        return self.cost.at(self.problem, self.method)

    @property
    def of_attention(self) -> bool:
        """Whether exact attention is what it competes with."""
        return self.method is not None and isinstance(self.problem, AttentionProblem)

    def crossings(self, exact: Cost) -> tuple[str, str]:
        """Length from which it is cheaper: by multiply-adds as a formula, and by all operations as a number."""
        if not self.of_attention:
            return "", ""
        try:
            star = formula(costs.crossover(exact, self.cost, "n", matmuls=True))
        except NoClosedFormError:
            star = "no closed form"
        except ValueError:  # the same multiply-adds
            star = "never"
        row = next(r for r in costs.table({self.name: self.method}, self.problem) if r.name == self.name)
        number = (
            "never" if row.crossover is None else "always" if row.crossover == 0 else f"{float(row.crossover):,.0f}"
        )
        return "always" if star == "0" else star, number


def show_costs(methods: Mapping[str, Any], *, n: int, d: int, causal: bool) -> None:
    """Print the formulas of methods by class of operation, their totals, and where they cross exact attention.

    Parameters
    ----------
    methods : mapping
        From the name of a row to a method with a ``cost``.
    n, d : int
        Sizes at which the formulas are evaluated, with d_v = d; an update is n × n.
    causal : bool
        Of the causal form.

    Raises
    ------
    ValueError
        If a method has no cost, or no form for what is asked.
    """
    sizes = Sizes(n, d, causal)
    rows = [Row(name, method, sizes) for name, method in methods.items()]
    for row in rows:
        if hasattr(row.method, "properties"):
            require(row.method, row.problem)
    exact = Row("exact attention", None, sizes)
    shown = [*([exact] if any(row.of_attention for row in rows) else []), *rows]
    for row in shown:
        _show_classes(row)
    _show_totals(shown, exact)


def _show_classes(row: Row) -> None:
    """One method: a line for each class of operation."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - so that --help stays fast
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=SIMPLE_HEAD, title=f"{row.name}: {_where(row)}", title_justify="left", pad_edge=False)
    for name, justify in (("class", "left"), ("prepare", "left"), ("apply", "left"), ("number", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    numbers = dict(row.value.operations().items())
    for (kind, prepare), (_, apply) in zip(row.cost.prepare.items(), row.cost.apply.items(), strict=True):
        if numbers[kind] or prepare != 0 or apply != 0:
            table.add_row(_NAMES.get(kind, kind), formula(prepare), formula(apply), f"{numbers[kind]:,}")
    table.add_section()
    totals = (row.cost.prepare.total(), row.cost.apply.total())
    table.add_row("operations", *map(formula, totals), f"{row.value.total():,}")
    say(table)


def _where(row: Row) -> str:
    values = {str(s): v for s, v in costs.values(row.problem, row.method).items() if s in row.cost.free_symbols}
    form = "causal, " if row.sizes.causal and isinstance(row.problem, AttentionProblem) else ""
    return form + ", ".join(f"{name} = {value:,}" for name, value in sorted(values.items()))


def _show_totals(rows: list[Row], exact: Row) -> None:
    """All methods beside one another."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - so that --help stays fast
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=SIMPLE_HEAD, title="a multiply-add is two operations", title_justify="left", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in ("operations", "of exact", "cheaper\nfor n >"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("by multiply-\nadds, for n >", justify="right", overflow="fold")
    long = []
    for row in rows:
        star, number = row.crossings(exact.cost)
        if len(star) > _SHORT:
            long.append(f"by multiply-adds, {row.name} is cheaper for n > {star}")
            star = "see below"
        share = f"{100 * row.value.total() / exact.value.total():.3g} %" if row.of_attention else ""
        table.add_row(row.name, f"{row.value.total():,}", share, number, star)
    say(table, *long)


class _Printer(StrPrinter):  # type: ignore[misc] # SymPy has no types
    """Roundings, remainders and binary logarithms as in a paper."""

    def _print_floor(self, x: Any) -> str:
        return f"⌊{self._rounded(x)}⌋"

    def _print_ceiling(self, x: Any) -> str:
        return f"⌈{self._rounded(x)}⌉"

    def _rounded(self, x: Any) -> str:
        (inside,) = x.args
        ratio = inside * sympy.log(2)
        return f"lg({self._print(ratio.args[0])})" if isinstance(ratio, sympy.log) else str(self._print(inside))

    def _print_Mod(self, x: Any) -> str:  # noqa: N802 - called by SymPy
        dividend, divisor = (self.parenthesize(part, PRECEDENCE["Pow"]) for part in x.args)
        return f"({dividend} mod {divisor})"

    def parenthesize(self, item: Any, level: int, strict: bool = False) -> str:
        if isinstance(item, sympy.Mod):
            return str(self._print(item))
        return str(super().parenthesize(item, level, strict=strict))


def formula(expression: Any) -> str:
    """Write an expression as in a paper: the shortest of its forms, powers raised, no signs of multiplication.

    Examples
    --------
    >>> n, d_v = sympy.symbols("n d_v")
    >>> formula(2 * n**2 * d_v), formula(0), formula(n * sympy.ceiling(sympy.log(n, 2)) - sympy.Mod(n, 8))
    ('2 d_v n²', '0', 'n ⌈lg(n)⌉ - (n mod 8)')
    """
    expression = sympy.sympify(expression)
    printer = _Printer()
    forms = (sympy.expand(expression), sympy.factor(expression), expression)
    _, _, text = min((len(text), form.is_Mul, text) for form in forms for text in [printer.doprint(form)])
    for power, raised in (("**2", "²"), ("**3", "³"), ("**4", "⁴")):
        text = re.sub(re.escape(power) + r"(?!\d)", raised, text)
    return re.sub(r"(?<!\*)\*(?!\*)", " ", text)


def check_plot(path: Path) -> None:
    """Refuse a file that cannot be drawn into, before anything is computed.

    Raises
    ------
    ValueError
        If its ending is unknown or its folder does not exist.
    """
    if path.suffix not in _FORMATS:
        raise ValueError(f"--plot draws {', '.join(_FORMATS)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot: there is no folder {str(path.parent)!r}")


def draw_costs(methods: Mapping[str, Any], path: Path, *, n: int, d: int, causal: bool) -> None:
    """Draw operations against length, from 16 tokens to sixteen times ``n``, exact attention in black."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - heavy

    from nla_llm.report import style  # noqa: PLC0415

    sizes = Sizes(n, d, causal)
    rows = [Row(name, method, sizes) for name, method in methods.items()]
    lengths = np.unique(np.geomspace(16, 16 * n, _POINTS).round().astype(int))
    with style.figure_style():
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        ax = figure.subplots()
        for row in [Row("exact attention", None, sizes), *(row for row in rows if row.of_attention)]:
            family = "exact" if row.method is None else row.name.partition(":")[0]
            draw = {"kind": family} if family in style.YARDSTICKS else {"family": family}
            curve = style.yardstick if family in style.YARDSTICKS else style.line
            curve(ax, lengths, [_total_at(row, int(length)) for length in lengths], label=row.name, marker="", **draw)
        style.log_axes(ax, x=2)
        style.label(ax, "tokens n", "operations of one head", f"d = {d}{', causal' if causal else ''}")
        style.legend(figure)
        figure.savefig(path)


def _total_at(row: Row, length: int) -> int:
    return int(Row(row.name, row.method, replace(row.sizes, n=length)).value.total())
