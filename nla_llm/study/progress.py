"""Progress of a run: a bar with the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from .store import Result

_LINE_SECONDS = 30.0
_TROUBLE = ("failed", "timeout", "diverged")
_MOST = 10  # cells in trouble that are told of while the run goes on; the summary counts all


@contextmanager
def progress(
    total: int,
    *,
    enabled: bool = True,
    console: Console | None = None,
    size: Callable[[Result], int] | None = None,
) -> Iterator[Callable[[Result], None]]:
    """Show how far a run of ``total`` cells is; gives the function to call with each result.

    With ``size`` the total is in bytes, and ``size(result)`` is what a cell adds to them.
    """
    if not enabled or total == 0:
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415 - not for a run without progress

    console = console or Console(stderr=True)
    with (_bar if console.is_terminal else _lines)(total, console, size) as advance:
        yield advance


@contextmanager
def _bar(total: int, console: Console, size: Callable[[Result], int] | None) -> Iterator[Callable[[Result], None]]:
    from rich.progress import (  # noqa: PLC0415 - not for a run without progress
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    left = TimeRemainingColumn(elapsed_when_finished=True)
    parts = (TextColumn("{task.description}"), BarColumn(), DownloadColumn() if size else MofNCompleteColumn(), left)
    with Progress(*parts, console=console, transient=True, speed_estimate_period=600) as shown:
        task = shown.add_task("cells", total=total)

        tell = _teller(console)

        def advance(result: Result) -> None:
            tell(result)
            shown.update(task, advance=size(result) if size else 1, description=result.study)

        yield advance


@contextmanager
def _lines(total: int, console: Console, size: Callable[[Result], int] | None) -> Iterator[Callable[[Result], None]]:
    started = shown = time.monotonic()
    done, whole = 0, _amount(total) if size else f"{total} cells"

    tell = _teller(console)

    def advance(result: Result) -> None:
        nonlocal shown, done
        done += size(result) if size else 1
        tell(result)
        now, so_far = time.monotonic(), _amount(done) if size else done
        if done == total:
            _say(console, f"{so_far} of {whole} in {duration(now - started)}")
        elif done and now - shown >= _LINE_SECONDS:
            shown = now
            _say(console, f"{so_far} of {whole}, about {duration((now - started) * (total - done) / done)} left")

    yield advance


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _teller(console: Console) -> Callable[[Result], None]:
    told = 0

    def tell(result: Result) -> None:
        nonlocal told
        if result.status not in _TROUBLE:
            return
        told += 1
        if told <= _MOST:
            _say(console, line(result))
        elif told == _MOST + 1:
            _say(console, "more cells did not end well; the summary counts them")

    return tell


def line(result: Result) -> str:
    """Result that is not as wished, in one line."""
    cell = ", ".join(f"{name}={value}" for name, value in result.cell.items() if name != "study")
    return f"{result.status}: {result.study} ({cell}): {result.reason}"


def duration(seconds: float) -> str:
    """Time for a reader.

    Examples
    --------
    >>> [duration(s) for s in (0.25, 42, 3725)]
    ['0.2 s', '42 s', '1 h 2 min']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
