"""The file of the store: made in one step, checked before it is trusted, and its failures told in one sentence."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

APPLICATION_ID = 0x6E6C616C  # "nlal", in the header of the file
FORMAT = 1
BUSY_SECONDS = 60.0
_MAGIC = b"SQLite format 3\x00"
_SCHEMA = """
CREATE TABLE runs (id TEXT PRIMARY KEY, started TEXT NOT NULL, provenance TEXT NOT NULL);
CREATE TABLE results (
    key TEXT PRIMARY KEY, study TEXT NOT NULL, cell TEXT NOT NULL, code_version TEXT NOT NULL, status TEXT NOT NULL,
    reason TEXT NOT NULL, records TEXT NOT NULL, seed INTEGER NOT NULL, seconds REAL NOT NULL,
    run TEXT NOT NULL REFERENCES runs (id), created TEXT NOT NULL
);
CREATE INDEX results_of_study ON results (study);
"""


class StoreError(OSError):
    """The store cannot be read or written; the sentence says why and what to do."""


def open_store(path: Path, *, create: bool) -> sqlite3.Connection:
    """Connect to the store at ``path``; see `nla_llm.study.store.Store`."""
    with sentences(path):
        if not path.exists():
            if not create:
                raise StoreError(f"there is no store {_name(path)}; a run makes one: nla-llm run")
            _make(path)
        _check_header(path)
        reading = "ro" if create or _writable(path) else "ro&immutable=1"
        _check_content(path, reading)
        return _connect(path, "rw" if reading == "ro" else reading)


def _name(path: Path) -> str:
    return f"'{path}'"


@contextmanager
def sentences(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system say into one sentence."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(_sentence(path, error)) from error
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"the store {_name(path)} cannot be used: {error.strerror or error}; name another with --store"
        ) from error


def _sentence(path: Path, error: sqlite3.Error) -> str:
    text = str(error)
    if "full" in text:
        return f"the disk that holds the store {_name(path)} is full; finished cells are kept: make room and run again"
    if "readonly" in text or "unable to open" in text:
        return f"the store {_name(path)} cannot be written: its file or folder is read-only; name another with --store"
    if "locked" in text:
        return f"the store {_name(path)} was locked for {BUSY_SECONDS:.0f} s by another process; end it and run again"
    if "malformed" in text or "not a database" in text:
        return _damaged(path, text)
    return f"the store {_name(path)} cannot be used: {text}; name another with --store"


def _damaged(path: Path, what: str) -> str:
    return f"the store {_name(path)} is damaged ({what}); it was left as it is: move it away, or name another one"


def _writable(path: Path) -> bool:
    """Whether SQLite can keep its log beside the file; where it cannot and there is none, nobody writes to the file."""
    return _has_log(path) or (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))


def _has_log(path: Path) -> bool:
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    database = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None
    )
    database.execute("PRAGMA synchronous = NORMAL")  # in WAL mode a killed process loses nothing committed
    return database


def _make(path: Path) -> None:
    """Make an empty store in one step: it appears complete, and never in place of a file that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    made = Path(name)
    try:
        with closing(sqlite3.connect(made, isolation_level=None)) as database:
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; COMMIT;"
            )
        made.chmod(0o644)
        _place(made, path)
    finally:
        made.unlink(missing_ok=True)


def _place(made: Path, path: Path) -> None:
    try:
        path.hardlink_to(made)
    except FileExistsError:
        pass  # another run was first: its store is as good
    except OSError:  # a file system without links
        if not path.exists():
            made.rename(path)


def _check_header(path: Path) -> None:
    """Refuse what is no store by its first hundred bytes, before SQLite touches the file."""
    if path.is_dir():
        raise StoreError(f"the store {_name(path)} is a folder; name a file with --store")
    with path.open("rb") as file:
        head = file.read(100)
    if not head.startswith(_MAGIC[: len(head)]):
        raise StoreError(
            f"{_name(path)} is not a store of nla-llm; it was left as it is: name another file with --store"
        )
    if len(head) < 100:
        raise StoreError(_damaged(path, f"it ends after {len(head)} bytes"))
    if int.from_bytes(head[68:72], "big") != APPLICATION_ID:
        raise StoreError(
            f"{_name(path)} is an SQLite file of another program; it was left as it is: name another with --store"
        )
    if int.from_bytes(head[60:64], "big") > FORMAT:
        raise StoreError(
            f"the store {_name(path)} was written by a later nla-llm; install that one, or name another with --store"
        )
    page = int.from_bytes(head[16:18], "big")
    expected = (65536 if page == 1 else page) * int.from_bytes(head[28:32], "big")
    # with a log, an interrupted checkpoint may have left a short file, which SQLite completes
    if not _has_log(path) and path.stat().st_size < expected:
        raise StoreError(_damaged(path, f"it ends after {path.stat().st_size} of {expected} bytes"))


def _check_content(path: Path, mode: str) -> None:
    """Check the pages through a connection that cannot write."""
    with closing(_connect(path, mode)) as database:
        found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if found != "ok" or not {"runs", "results"} <= tables:
        raise StoreError(_damaged(path, found if found != "ok" else "its tables are missing"))
