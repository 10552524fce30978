"""Tables of a study as the typesetter needs them: heads, alignments and cells."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any

from . import text
from .figures import interval_columns
from .formula import symbol, typst_math

if TYPE_CHECKING:
    import pandas as pd

Cell = dict[str, Any]


def typeset(data: pd.DataFrame) -> dict[str, Any]:
    """Heads, alignments and rows of a table.

    Columns ``x``, ``x_lower`` and ``x_upper`` become one column of estimates, ``x_confidence`` and ``x_how`` are left
    to the CSV. A column of floats gets as many decimals everywhere; a SymPy expression or a cost becomes a formula.
    """
    columns = _columns(data)
    bodies = [_body(data, name, ends) for name, ends in columns]
    return {
        "head": [_head(name) for name, _ in columns],
        "align": ["right" if _numeric(data, name) else "left" for name, _ in columns],
        "rows": [list(row) for row in zip(*bodies, strict=True)] if columns else [],
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


def _numeric(data: pd.DataFrame, name: Any) -> bool:
    values = [value for value in data[name] if value is not None]
    return bool(values) and all(_is_number(value) or is_estimate(value) for value in values)


def _body(data: pd.DataFrame, name: Any, ends: tuple[str, str] | None) -> list[Cell]:
    values = list(data[name])
    if ends is not None:
        rows = zip(values, data[ends[0]], data[ends[1]], strict=True)
        return [_estimate_cell(*row) for row in rows]
    if values and all(isinstance(value, numbers.Real) and _is_number(value) for value in values):
        if all(isinstance(value, numbers.Integral) for value in values):
            return [_text(text.format_number(int(value))) for value in values]
        return [_text(entry) for entry in text.format_column([float(value) for value in values])]
    return [cell(value) for value in values]


def _estimate_cell(value: Any, lower: Any, upper: Any) -> Cell:
    if not _is_number(value):
        return cell(value)
    ends = [float(end) if _is_number(end) else math.nan for end in (lower, upper)]
    if all(math.isnan(end) for end in ends):
        return _text(f"{text.format_number(float(value))} [no interval]")
    return _text(text.format_estimate(float(value), ends[0], ends[1]))


def cell(value: Any) -> Cell:
    """One entry: a formula, an estimate, a number, a truth value or text."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ in {"NAType", "NaTType"}:
        return _text("n/a")
    if is_estimate(value):
        return _text(text.format_estimate(value.value, value.lower, value.upper))
    if isinstance(value, bool) or type(value).__name__ == "bool":
        return _text("yes" if value else "no")
    if isinstance(value, numbers.Integral):
        return _text(text.format_number(int(value)))
    if isinstance(value, numbers.Real):
        return _text(text.format_number(float(value)))
    if callable(getattr(value, "total", None)) and hasattr(value, "prepare"):  # nla_llm.costs.Cost
        return {"math": typst_math(value.total())}
    if type(value).__module__.startswith("sympy"):
        return {"math": typst_math(value)}
    return {"runs": text.runs(str(value))}


def is_estimate(value: object) -> bool:
    """Tell whether ``value`` is an estimate of one number."""
    return all(hasattr(value, name) for name in ("value", "lower", "upper", "confidence"))


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and type(value).__name__ != "bool"


def _text(content: str) -> Cell:
    return {"runs": [{"text": content}]}
