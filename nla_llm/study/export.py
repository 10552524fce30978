"""Results as tables: rows, DataFrame, CSV, Parquet."""

from __future__ import annotations

import csv
import json
import math
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pandas import DataFrame

    from .cells import Scalar
    from .store import Result

_TAIL = ("status", "reason", "seconds")
_KEYS = ("seed", "code_version", "run", "created")


def to_table(results: Iterable[Result], *, keys: bool = False) -> tuple[list[str], list[dict[str, Scalar]]]:
    """Results as the names of columns and one flat dict per record, or per cell where it has none.

    The columns of the cells come first, then those of the records, then status, reason and seconds; with ``keys`` also
    the seed, the version of the code, the run and the time.
    """
    results = list(results)
    tail = (*_TAIL, *(_KEYS if keys else ()))
    of_cells = [name for result in results for name in result.cell]
    of_records = [name for result in results for record in result.records for name in record]
    table = [
        {**result.cell, **record, **{name: getattr(result, name) for name in tail}}
        for result in results
        for record in result.records or ({},)
    ]
    return list(dict.fromkeys(["study", *of_cells, *of_records, *tail])), table


def to_frame(results: Iterable[Result]) -> DataFrame:
    """Results as the DataFrame that figures, tables and claims are made from."""
    import pandas as pd  # noqa: PLC0415 - heavy, and no use to a worker

    columns, table = to_table(results)
    return pd.DataFrame(table, columns=columns)


def export_csv(results: Iterable[Result], path: Path, *, overwrite: bool = False) -> int:
    """Write results as CSV; see `nla_llm.study.store.Store.export_csv`."""
    columns, table = to_table(results, keys=True)
    with _target(path, overwrite=overwrite) as made, made.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return len(table)


def export_parquet(results: Iterable[Result], path: Path, *, overwrite: bool = False) -> int:
    """Write results as Parquet; see `nla_llm.study.store.Store.export_parquet`."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - heavy, and no use to a worker
        import pyarrow.parquet as pq  # noqa: PLC0415 - heavy, and no use to a worker
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Parquet needs pyarrow: pip install "nla-llm[parquet]", or export CSV') from error
    columns, table = to_table(results, keys=True)
    data = {name: _uniform([row.get(name) for row in table]) for name in columns}
    with _target(path, overwrite=overwrite) as made:
        pq.write_table(pa.table(data), made)
    return len(table)


def _uniform(values: list[Scalar]) -> list[Scalar]:
    """Values of one type: as they are, or integers and floats as floats, or all as text."""
    kinds = {type(value) for value in values if value is not None}
    large = any(isinstance(value, int) and abs(value) >= 2**63 for value in values)
    if len(kinds) <= 1 and not large:
        return values
    if kinds <= {int, float} and not large:
        return [None if value is None else float(value) for value in values]
    return [value if value is None or isinstance(value, str) else _text(value) for value in values]


def _text(value: float) -> str:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else json.dumps(value)


@contextmanager
def _target(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a file to write, which takes the place of ``path`` when it is complete."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"there is a file '{path}'; pass another path, or overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        yield made
        made.replace(path)
