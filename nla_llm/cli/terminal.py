"""What the verbs print: sentences, tables and verdicts."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pandas import DataFrame
    from rich.table import Table

    from nla_llm.study import StudySummary

__all__ = ["reading", "say", "sentence", "show_frame", "show_skipped", "show_studies", "tell"]

ROWS = 40  # of a table on the terminal; the CSV beside the report has all
_WIDE = 10_000  # letters; no table is wider
_NAMES = 3  # of what was skipped for one reason
_VERDICTS = {"confirmed": "green", "refuted": "red", "open": "yellow"}


def say(*things: Any) -> None:
    """Print sentences and rich tables to standard output; sentences are left to the terminal to wrap."""
    from rich.console import Console  # noqa: PLC0415 - so that --help stays fast
    from rich.text import Text  # noqa: PLC0415

    console = Console(highlight=False)
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str | Text), markup=False)


def tell(sentence: str, style: str = "red") -> None:
    """Print a sentence to standard error."""
    from rich.console import Console  # noqa: PLC0415 - only where something is amiss

    Console(stderr=True, soft_wrap=True).print(sentence, style=style, markup=False, highlight=False)


@contextmanager
def reading(what: str) -> Iterator[Callable[[int], None]]:
    """Show on standard error how many bytes have been read, on a terminal; gives the function to call with more."""
    from rich.console import Console  # noqa: PLC0415 - so that --help stays fast
    from rich.progress import FileSizeColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    parts = (TextColumn("{task.description}"), FileSizeColumn(), TransferSpeedColumn())
    with Progress(*parts, console=console, transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda count: shown.update(task, advance=count)


def sentence(error: BaseException) -> str:
    """What an exception says to a user.

    Examples
    --------
    >>> sentence(FileNotFoundError(2, "No such file or directory", "notes.txt"))
    "cannot open 'notes.txt': no such file or directory"
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"cannot open {str(error.filename)!r}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error) or type(error).__name__


def show_studies(summaries: Iterable[StudySummary]) -> None:
    """Print what became of studies, with the verdicts of their claims in colour."""
    from rich.text import Text  # noqa: PLC0415 - so that --help stays fast

    for summary in summaries:
        for line in summary.lines():
            text = Text(line)
            for word, colour in _VERDICTS.items():
                if line.startswith(f"  {word}"):
                    text.stylize(f"bold {colour}", 2, 2 + len(word))
            say(text)


def show_skipped(summary: StudySummary, entry: str) -> None:
    """Print why cells were skipped, and some of the names that they have under ``entry``."""
    skipped = [result for result in summary.results if result.status == "skipped"]
    for reason in dict.fromkeys(result.reason for result in skipped):
        names = list(dict.fromkeys(str(result.cell[entry]) for result in skipped if result.reason == reason))
        more = ", ..." if len(names) > _NAMES else ""
        say(f"skipped, {reason}: {len(names)} ({', '.join(names[:_NAMES])}{more})")


def show_frame(data: DataFrame, title: str = "", rest: str = "") -> None:
    """Print a DataFrame as a table, numbers to the right; of a long one the first rows and where the ``rest`` is."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - so that --help stays fast
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(data.columns):
        numeric = number > 0 and data[name].map(_is_numeric).all()
        table.add_column(str(name), justify="right" if numeric else "left", overflow="fold")
    for row in data.head(ROWS).itertuples(index=False):
        table.add_row(*(_word(value) for value in row))
    _fit(table)
    say(table, *([] if table.show_edge else [""]))  # an edge is a blank line
    if len(data) > ROWS:
        say(f"and {len(data) - ROWS} more rows{f', {rest}' if rest else ''}")


def _fit(table: Table) -> None:
    """Close up a table wider than the terminal, one word of the headings a line: rich would break the words."""
    from rich.console import Console  # noqa: PLC0415 - so that --help stays fast

    console = Console()
    if console.measure(table, options=console.options.update(max_width=_WIDE)).maximum <= console.width:
        return
    table.padding, table.show_edge = 0, False
    for column in table.columns:
        column.header = str(column.header).replace(" %", "\N{NO-BREAK SPACE}%").replace(" ", "\n")


def _is_numeric(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and value[:1].isdigit()) or value == ""


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
