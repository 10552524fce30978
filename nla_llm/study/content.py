"""Figures and tables as plain data: what a study wants to show, without the library that draws it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pandas import DataFrame


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"name becomes a file name: letters, digits, - and _ only, got {name!r}")


@dataclass(frozen=True)
class Figure:
    """A figure: who draws it, from which data, and what it says.

    Attributes
    ----------
    name : str
        Stem of the files it is written to.
    caption : str
        What the reader sees in it, in sentences.
    draw : callable
        ``draw(figure, data)`` draws into a ``matplotlib.figure.Figure`` that the report made.
    data : pandas.DataFrame
        All that is drawn; written as CSV beside the figure.
    size : tuple of float
        Width and height in inches.
    panels : tuple of int
        Rows and columns of panels, a hint for who lays the page out.
    """

    name: str
    caption: str
    draw: Callable[[Any, DataFrame], None]
    data: DataFrame = field(repr=False)
    size: tuple[float, float] = (6.5, 3.6)
    panels: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True)
class Table:
    """A table: ``data`` as it is printed, one row a line; its columns are the heads.

    One that ``leads`` stands beside the answers on the first page, before the figures.
    """

    name: str
    caption: str
    data: DataFrame = field(repr=False)
    leads: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name)


def pieces(
    make: Callable[[DataFrame], Sequence[Any]], records: DataFrame
) -> tuple[list[Any], list[tuple[str, Exception]]]:
    """What ``make(records)`` lists, entries that are functions called; one that fails costs no other.

    Returns
    -------
    tuple of a list and a list of (str, Exception)
        The pieces, and the functions that failed by name; the name is empty where ``make`` itself did.

    Examples
    --------
    >>> pieces(lambda records: [1, lambda: 2, lambda: [3, 4], lambda: records["no such"]], {})
    ([1, 2, 3, 4], [('<lambda>', KeyError('no such'))])
    """
    found: list[Any] = []
    failed: list[tuple[str, Exception]] = []
    entries: Sequence[Any] = ()
    try:
        entries = list(make(records))
    except Exception as error:  # a study's own code, met with records that it did not foresee
        failed.append(("", error))
    for entry in entries:
        try:
            made = entry() if callable(entry) else entry
        except Exception as error:
            failed.append((getattr(entry, "func", entry).__name__.replace("_", " "), error))
        else:
            found += made if isinstance(made, list) else [made]
    return found, failed
