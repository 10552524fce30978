"""Cells and records: what is computed, what came out, and the seed and key that follow from the content alone.

A cell is a flat dict of JSON scalars that says everything about one computation. Its canonical JSON is hashed into the
seed and into the key of the store, so neither depends on the order of the cells, on the number of workers or on which
cells ran before; and as JSON quotes its strings, two different cells never join into the same text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Scalar = str | int | float | bool | None
Cell = Mapping[str, Scalar]
Record = Mapping[str, Any]

STATUSES = ("ok", "failed", "skipped", "timeout", "diverged")
RESERVED = frozenset({"status", "reason", "seconds"})  # columns that every frame has beside those of cell and record
SEED_BITS = 53  # survives a spreadsheet and a float64 column; a collision among 10⁵ cells has a chance below 10⁻⁶
_ESTIMATE = ("value", "lower", "upper", "confidence", "how")


class Skip(Exception):  # noqa: N818 - the word of the status, no error of the program
    """Raised by ``measure`` where a cell has nothing to compute; the reason is stored with status ``skipped``."""


class Diverged(ArithmeticError):  # noqa: N818 - the word of the status, no error of the program
    """Raised by ``measure`` where an iteration or an arithmetic left the finite numbers; status ``diverged``."""


def scalar(value: object, name: str) -> Scalar:
    """``value`` as a plain JSON scalar; NumPy, torch and SymPy numbers of one entry become Python's.

    Raises
    ------
    TypeError
        If it is not a scalar.
    """
    if value is None or (isinstance(value, str | bool | int | float) and type(value).__module__ == "builtins"):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return scalar(value.item(), name)
    if getattr(value, "is_number", False):  # SymPy
        return int(value) if getattr(value, "is_Integer", False) else float(value)  # type: ignore[call-overload,arg-type]
    what = (
        f"an array of shape {tuple(value.shape)}"
        if hasattr(value, "shape")
        else f"{type(value).__name__} {value!r:.60}"
    )
    raise TypeError(
        f"{name} must be a scalar (str, int, float, bool or None), got {what}; give each entry a column or a record"
    )


def complete(study: str, cell: Cell) -> dict[str, Scalar]:
    """Complete a cell to its full content: its entries as JSON scalars, with the name of its study.

    Raises
    ------
    ValueError
        If the cell names another study, a column that every frame has, or a float that is not finite.
    TypeError
        If an entry is not a JSON scalar.
    """
    if not isinstance(cell, Mapping):
        raise TypeError(f"a cell of study {study!r} must be a flat dict of JSON scalars, got {type(cell).__name__}")
    if cell.get("study", study) != study:
        raise ValueError(f"a cell of study {study!r} names study {cell['study']!r}; leave the entry out")
    full: dict[str, Scalar] = {"study": study}
    for name, value in cell.items():
        if not isinstance(name, str) or name in RESERVED:
            raise ValueError(
                f"a cell of study {study!r} has an entry {name!r}; use another name: frames have {sorted(RESERVED)}"
            )
        full[name] = scalar(value, f"entry {name!r} of a cell of study {study!r}")
        entry = full[name]
        if isinstance(entry, float) and not math.isfinite(entry):
            raise ValueError(
                f"entry {name!r} of a cell of study {study!r} is {entry}; a cell holds finite numbers, or None"
            )
    return full


def canonical(cell: Cell) -> str:
    """JSON of a cell with sorted names: the same text for the same content.

    Examples
    --------
    >>> canonical({"n": 8, "method": "uniform"})
    '{"method":"uniform","n":8}'
    """
    return json.dumps(dict(cell), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def seed(cell: Cell) -> int:
    """Seed of a cell: the first 53 bits of the SHA-256 of its canonical JSON.

    Examples
    --------
    >>> seed({"n": 8, "method": "uniform"}) == seed({"method": "uniform", "n": 8})
    True
    """
    digest = hashlib.sha256(canonical(cell).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def key(cell: Cell, version: str) -> str:
    """Key of a cell in the store: SHA-256 of its canonical JSON and the version of the code that computes it."""
    return hashlib.sha256(f"{version}\n{canonical(cell)}".encode()).hexdigest()


def is_estimate(value: object) -> bool:
    """Tell whether ``value`` looks like ``nla_llm.measures.Estimate``."""
    return all(hasattr(value, name) for name in _ESTIMATE)


def flatten(estimate: Any, name: str = "value") -> dict[str, Scalar]:
    """Columns of an estimate: ``name``, ``name_lower``, ``name_upper``, ``name_confidence`` and ``name_how``.

    Raises
    ------
    TypeError
        If the estimate is of a batch: a record holds scalars, so give each entry of the batch its own record.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> flatten(SimpleNamespace(value=2.0, lower=1.9, upper=2.1, confidence=0.95, how="five seeds"), "error")
    {'error': 2.0, 'error_lower': 1.9, 'error_upper': 2.1, 'error_confidence': 0.95, 'error_how': 'five seeds'}
    """
    names = [name, *(f"{name}_{part}" for part in _ESTIMATE[1:])]
    return {column: scalar(getattr(estimate, part), column) for column, part in zip(names, _ESTIMATE, strict=True)}


def records_of(result: Record | Sequence[Record], cell: Cell) -> list[dict[str, Scalar]]:
    """Turn what ``measure`` returned into a list of flat dicts of scalars, estimates into columns.

    Raises
    ------
    TypeError
        If it is neither a dict nor a sequence of dicts, or an entry is not a scalar.
    ValueError
        If a column appears twice, belongs to every frame, or contradicts the cell.
    """
    several = [result] if isinstance(result, Mapping) else result
    if not isinstance(several, Sequence) or not all(isinstance(record, Mapping) for record in several):
        raise TypeError(f"measure must return a dict or a list of dicts, got {type(result).__name__}")
    return [_record(record, cell) for record in several]


def _record(record: Record, cell: Cell) -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for name, value in record.items():
        columns = flatten(value, name) if is_estimate(value) else {name: scalar(value, f"column {name!r} of a record")}
        for column, entry in columns.items():
            if column in flat:
                raise ValueError(
                    f"a record has the column {column!r} twice; the columns of an estimate use name_lower and so on"
                )
            if column in RESERVED or (column in cell and cell[column] != entry):
                raise ValueError(
                    f"a record must not change the column {column!r} of its cell or frame; use another name"
                )
            flat[column] = entry
    return flat
