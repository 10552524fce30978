"""Running one cell: whatever happens in it becomes a result with a word."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .catalogue import load
from .cells import Diverged, Scalar, Skip, records_of, seed
from .provenance import scrub
from .store import Result

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

    from .study import Study

_LOADED: dict[str, Study] = {}
_LOCK = threading.Lock()  # workers of other executors may be threads
_FRAMES = 3  # of the traceback kept with a failure
_LONGEST = 600  # characters of its message


class TimeLimit(BaseException):
    """Raised inside a cell when its time is over."""


class Task(NamedTuple):
    """One cell to run: only names and plain values, so that any executor can send it."""

    source: str | Study
    cell: Mapping[str, Scalar]
    version: str | None = None
    timeout: float | None = None


def run_cell(
    source: str | Study, cell: Mapping[str, Scalar], version: str | None = None, timeout: float | None = None
) -> Result:
    """Run one cell, in this process.

    Parameters
    ----------
    source : str or Study
        Name or file of the study, or the study itself.
    cell : mapping
        Full content of the cell.
    version : str, optional
        Version of the code that the result will be stored under; where this process has another, the cell fails.
    timeout : float, optional
        Seconds after which the cell is stopped. It can be stopped in the main thread on POSIX systems; in another
        thread it runs to its end, and is then recorded as ``timeout``.

    Returns
    -------
    Result
        Of status ok, failed, skipped, timeout or diverged.
    """
    started = time.perf_counter()
    number = seed(cell)
    status, reason = "ok", ""
    records: tuple[dict[str, Scalar], ...] = ()
    try:
        study = loaded(source, cell, version)
        with time_limit(timeout):
            records = tuple(records_of(study.measure(dict(cell), number), cell))
    except Skip as reason_to_skip:
        status, reason = "skipped", scrub(str(reason_to_skip)) or "no reason given"
    except (Diverged, FloatingPointError) as error:
        status, reason = "diverged", describe(error)
    except TimeLimit:
        status, reason, records = "timeout", f"not finished after {timeout:g} seconds", ()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: no cell may end the run
        status, reason = "failed", describe(error)
    seconds = time.perf_counter() - started
    return Result(str(cell["study"]), cell, version or "", status, reason, records, number, seconds)


def loaded(source: str | Study, cell: Mapping[str, Scalar], version: str | None = None) -> Study:
    """Study of a task, imported once in this process, and again if its file changed.

    Raises
    ------
    RuntimeError
        If this process has another version of the code than ``version``.
    """
    if not isinstance(source, str):
        return source
    with _LOCK:
        study = _LOADED.get(source)
        if study is None or (version is not None and study.version(cell) != version):
            study = _LOADED[source] = load(source)
        if version is not None and study.version(cell) != version:
            raise RuntimeError(
                "the code was changed during the run, or this worker has another version: start it again"
            )
        return study


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `TimeLimit` in the block when ``seconds`` are over; outside the main thread, at its end."""
    if seconds is None:
        yield
        return
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        started = time.monotonic()
        yield
        if time.monotonic() - started > seconds:
            raise TimeLimit
        return
    before = signal.signal(signal.SIGALRM, _raise)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second, should the block swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _raise(_number: int, _frame: FrameType | None) -> None:
    raise TimeLimit


def describe(error: BaseException) -> str:
    """Type, message and the last frames of an exception, without paths of the machine."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__][-_FRAMES:]
    places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return scrub(f"{text} [{places}]" if places else text)
