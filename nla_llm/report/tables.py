"""Tables of a study as the typesetter needs them: heads, alignments and cells."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

from nla_llm.study.cells import is_estimate

from . import text
from .figures import interval_columns
from .formula import symbol, typst_math

if TYPE_CHECKING:
    import pandas as pd

Cell = dict[str, Any]

WIDE = 34  # letters from which a column of words shares the width of the page


def typeset(data: pd.DataFrame) -> dict[str, Any]:
    """Heads, alignments and rows of a table.

    Columns ``x``, ``x_lower`` and ``x_upper`` become one of estimates (two for the typesetter: value and bracket);
    ``x_confidence`` and ``x_how`` are left to the CSV. A column of floats gets as many decimals everywhere; a SymPy
    expression or a cost becomes a formula.
    """
    head: list[Cell] = []
    columns: list[tuple[str, list[Cell]]] = []  # alignment and cells
    for name, ends in _columns(data):
        found = _body(data, name, ends)
        head.append({**_head(name), "span": len(found), "align": found[0][0]})
        columns += found
    cells = [body for _, body in columns]
    return {
        "head": head,
        "align": [alignment for alignment, _ in columns],
        "wide": [max(map(_length, body), default=0) > WIDE for body in cells],
        "brackets": [place > 0 for entry in head for place in range(entry["span"])],
        "tall": any("math" in cell for body in cells for cell in body),
        "rows": [list(row) for row in zip(*cells, strict=True)] if cells else [],
    }


def _columns(data: pd.DataFrame) -> list[tuple[Any, tuple[str, str] | None]]:
    """Columns to print, each with the columns of its interval where it has them."""
    names = list(data.columns)
    ends: dict[Any, tuple[str, str]] = {}
    hidden: set[str] = set()
    for low, high in interval_columns(names):
        stem = low.removesuffix("lower").removesuffix("_") or "value"
        if stem in names:
            prefix = low.removesuffix("lower")
            ends[stem] = (low, high)
            hidden |= {low, high, f"{prefix}confidence", f"{prefix}how"}
    return [(name, ends.get(name)) for name in names if name not in hidden]


def _head(name: Any) -> Cell:
    short = str(name)
    base, _, index = short.partition("_")
    if len(base) == 1 and base.isalpha() and len(index) <= 2:  # n, d_v: quantities; everything else: words
        return {"math": symbol(short)}
    return {"runs": text.runs(short.replace("_", " "))}


def _body(data: pd.DataFrame, name: Any, ends: tuple[str, str] | None) -> list[tuple[str, list[Cell]]]:
    """Columns of the typesetter for one column of the data, each with its alignment."""
    values = list(data[name])
    if ends is not None:
        return _estimates([_printed(*row) for row in zip(values, data[ends[0]], data[ends[1]], strict=True)])
    if values and all(is_estimate(value) for value in values):
        return _estimates([text.format_estimate(v.value, v.lower, v.upper) for v in values])
    if values and all(_is_number(value) for value in values):
        if all(isinstance(value, numbers.Integral) for value in values):
            return [("right", [_text(text.format_number(int(value))) for value in values])]
        printed = text.aligned(text.format_column([float(value) for value in values]))
        return [("right", [_text(entry) for entry in printed])]
    return [("left", [cell(value) for value in values])]


def _estimates(printed: list[str]) -> list[tuple[str, list[Cell]]]:
    """Column of the values, points under one another, and column of the brackets."""
    parts = [entry.partition(" ") for entry in printed]
    values = text.aligned([value for value, _, _ in parts])
    return [("right", [_text(value) for value in values]), ("left", [_text(bracket) for _, _, bracket in parts])]


def _printed(value: Any, lower: Any, upper: Any) -> str:
    if not _is_number(value):
        return "n/a" if value is None else text.plain(value, 40)
    if value == lower == upper:
        return text.format_number(float(value), 3)  # beside rounded neighbours; the CSV has all digits
    ends = [float(end) if _is_number(end) else math.nan for end in (lower, upper)]
    if all(math.isnan(end) for end in ends):
        number = text.format_number(float(value))
        return number if math.isnan(float(value)) else f"{number} [no interval]"
    return text.format_estimate(float(value), ends[0], ends[1])


def _length(entry: Cell) -> int:
    if "math" in entry:
        return int(0.7 * len(entry["math"]))  # brackets and commands of the source are not printed
    return sum(len(run.get("text", run.get("code", ""))) for run in entry["runs"])


def cell(value: Any) -> Cell:
    """One entry: a formula, an estimate, a number, a truth value or text."""
    if callable(getattr(value, "total", None)) and hasattr(value, "prepare"):  # nla_llm.costs.Cost
        return {"math": typst_math(value.total())}
    if type(value).__module__.startswith("sympy"):
        return {"math": typst_math(value)}
    return {"runs": text.runs(_words(value))}


def _words(value: Any) -> str:
    if value is None or type(value).__name__ in {"NAType", "NaTType"}:
        return "n/a"
    if is_estimate(value):
        return text.format_estimate(value.value, value.lower, value.upper)
    if isinstance(value, bool) or type(value).__name__ == "bool":  # NumPy has one of its own
        return "yes" if value else "no"
    if _is_number(value):
        return text.format_number(int(value) if isinstance(value, numbers.Integral) else float(value))
    return str(value)


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Real)


def _text(content: str) -> Cell:
    return {"runs": [{"text": content}]}
