"""The store: one SQLite file in WAL mode that keeps every record, whatever happens to the run.

A result is keyed by the content of its cell and the version of the code that computed it, and committed as soon as the
cell is finished: ``kill -9`` loses the running cells and nothing else. Several runs may write at once. A file that is
not a store, or is damaged, is refused before anything is written to it.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from .cells import Scalar, canonical, key
from .export import export_csv, export_parquet, to_frame
from .store_file import open_store, sentences

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pandas import DataFrame

    from .study import Study

DEFAULT_PATH = Path("results") / "nla_llm.sqlite"
_COLUMNS = "study, cell, code_version, status, reason, records, seed, seconds, run, created"
_AT_ONCE = 500  # SQLite takes at least 999 values in a statement
_PUT = f"""
INSERT INTO results (key, {_COLUMNS}) VALUES ({", ".join("?" * 11)})
ON CONFLICT (key) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in _COLUMNS.split(", "))}
WHERE ? OR excluded.status = 'ok' OR results.status <> 'ok'
"""  # noqa: S608 - made of names of our own


@dataclass(frozen=True)
class Result:
    """What became of one cell: its records, or a word and a reason."""

    study: str
    cell: Mapping[str, Scalar]
    code_version: str
    status: str
    reason: str
    records: tuple[Mapping[str, Scalar], ...]
    seed: int
    seconds: float
    run: str = ""
    created: str = ""

    @property
    def key(self) -> str:
        """Key in the store."""
        return key(self.cell, self.code_version)


class Store:
    """The results in one file.

    Parameters
    ----------
    path : str or pathlib.Path
        The file; made, with its folders, where there is none.
    create : bool
        Whether to make it; a reader does not want an empty one.

    Raises
    ------
    StoreError
        If the file is missing (with ``create=False``), is no store, is damaged, was written by a later version, or the
        folder cannot be written to.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder, Store(Path(folder) / "s.sqlite") as store:
    ...     run = store.begin({"python": "3.12"})
    ...     store.put(Result("demo", {"study": "demo", "n": 2}, "v1", "ok", "", ({"error": 0.5},), 7, 0.1, run))
    ...     [(result.cell["n"], result.records[0]["error"]) for result in store.results("demo")]
    [(2, 0.5)]
    """

    def __init__(self, path: str | Path = DEFAULT_PATH, *, create: bool = True) -> None:
        self.path = Path(path)
        self._database = open_store(self.path, create=create)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def begin(self, provenance: Mapping[str, Any]) -> str:
        """Enter a run with its provenance; the id goes into every result of the run."""
        run = uuid.uuid4().hex
        self._execute("INSERT INTO runs VALUES (?, ?, ?)", (run, _now(), json.dumps(provenance)))
        return run

    def finish(self, run: str, provenance: Mapping[str, Any]) -> None:
        """Replace the provenance of a run by the one known at its end, with the wall time."""
        self._execute("UPDATE runs SET provenance = ? WHERE id = ?", (json.dumps(provenance), run))

    def put(self, result: Result, *, replace_ok: bool = False) -> None:
        """Write one result and commit it.

        A result under the same key is replaced, except that a failure does not replace an ``ok`` unless ``replace_ok``.
        """
        row = (
            *(result.key, result.study, canonical(result.cell), result.code_version, result.status, result.reason),
            *(json.dumps(result.records), result.seed, result.seconds, result.run, result.created or _now()),
        )
        self._execute(_PUT, (*row, replace_ok))

    def results(self, study: str | None = None) -> Iterator[Result]:
        """All results, or those of one study, in the order of their cells' contents."""
        yield from self._results(*(("", ()) if study is None else ("WHERE study = ?", (study,))))

    def select(self, keys: Iterable[str]) -> list[Result]:
        """Results with these keys, in their order; keys without a result are left out."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Result] = {}
        for start in range(0, len(wanted), _AT_ONCE):
            part = tuple(wanted[start : start + _AT_ONCE])
            found |= {r.key: r for r in self._results(f"WHERE key IN ({', '.join('?' * len(part))})", part)}
        return [found[k] for k in wanted if k in found]

    def _results(self, where: str, values: tuple[str, ...]) -> Iterator[Result]:
        for row in self._execute(f"SELECT {_COLUMNS} FROM results {where} ORDER BY study, cell, created", values):  # noqa: S608 - made of names of our own
            yield replace(Result(*row), cell=json.loads(row[1]), records=tuple(json.loads(row[5])))

    def frame(self, study: Study | str, only_current: bool = True, scale: str | None = None) -> DataFrame:
        """Make a DataFrame of the records: columns of the cell, of the record, and status, reason, seconds.

        A cell without records (failed, skipped, ...) has one row, so that none is lost.

        Parameters
        ----------
        study : Study or str
            The study, or its name.
        only_current : bool
            Leave out what an older version of the code computed.
        scale : str, optional
            Only the cells of this scale, in the order of the grid.
        """
        if isinstance(study, str) and (only_current or scale is not None):
            from .catalogue import load  # noqa: PLC0415 - a store is read without any study at hand

            study = load(study)
        if isinstance(study, str) or not (only_current or scale is not None):
            return to_frame(self.results(study if isinstance(study, str) else study.name))
        cells = [result.cell for result in self.results(study.name)] if scale is None else study.grid(scale)
        return to_frame(self.select(key(cell, study.version(cell)) for cell in cells))

    def provenance(self, run: str) -> dict[str, Any]:
        """Provenance of a run."""
        for (text,) in self._execute("SELECT provenance FROM runs WHERE id = ?", (run,)):
            return dict(json.loads(text))
        raise ValueError(f"the store '{self.path}' has no run {run!r}; it has {self.runs()}")

    def runs(self) -> list[str]:
        """Ids of all runs, oldest first."""
        return [run for (run,) in self._execute("SELECT id FROM runs ORDER BY started, id")]

    def export_csv(self, path: str | Path, study: str | None = None, *, overwrite: bool = False) -> int:
        """Write all records, or those of one study, as CSV; the number of rows is returned.

        Beside the columns of `frame` it has the seed, the version of the code, the run and the time. A missing entry is
        empty, NaN is ``nan``; infinities are ``inf`` and ``-inf``.

        Raises
        ------
        FileExistsError
            If there is such a file, unless ``overwrite`` is True.
        """
        return export_csv(self.results(study), Path(path), overwrite=overwrite)

    def export_parquet(self, path: str | Path, study: str | None = None, *, overwrite: bool = False) -> int:
        """Write the same table as `export_csv` as Parquet.

        A column of numbers with gaps is one of floats; a column of mixed types is written as text.

        Raises
        ------
        FileExistsError
            If there is such a file, unless ``overwrite`` is True.
        ModuleNotFoundError
            If pyarrow is not installed.
        """
        return export_parquet(self.results(study), Path(path), overwrite=overwrite)

    def _execute(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with sentences(self.path):
            return self._database.execute(sql, values).fetchall()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
