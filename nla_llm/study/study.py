"""A study: a question, a grid of cells, what is measured in each, and what figures, tables and claims follow."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from .cells import Cell, Record, Scalar, canonical, complete
from .versions import version_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pandas import DataFrame

    from .claims import Claim
    from .content import Figure, Table

Scale = Literal["default", "small", "full"]
Piece = Callable[[], Any]


def _nothing(_: DataFrame) -> list[Any]:
    return []


@dataclass(frozen=True)
class Study:
    """A question to the bench, in a file of its own that ends with ``study = Study(...)``.

    Attributes
    ----------
    name : str
        Name on the command line; the stem of its file in ``studies/``.
    title, question, setup : str
        What the first page of the report says; ``question`` in one sentence.
    cells : callable
        ``cells(scale)`` is the grid, a list of flat dicts of JSON scalars that say everything about one computation;
        scale is "default", "small" or "full". The name of the study is added; a cell listed twice is computed once.
    measure : callable
        ``measure(cell, seed)`` gives one record or a list of them, flat dicts of scalars and estimates. All its
        randomness comes from ``seed``. It raises ``Skip(reason)`` where there is nothing to compute, ``Diverged`` or
        ``FloatingPointError`` where numbers left the finite ones.
    figures, tables, claims : callable
        From the DataFrame of all records to lists of `Figure`, `Table` and `Claim`. In place of an entry a list may
        have a function without arguments that makes it, or a list of such: where that fails, because a method has no
        records, say, the other entries are there all the same.
    code_version : callable, optional
        ``code_version(cell)``: text that changes when the numbers may change. By default a hash of the sources that
        compute (see ``nla_llm.study.versions``).
    references : sequence of str
        Works cited in the report.
    headline : {"", "default", "small", "full"}
        The scale at which ``nla-llm run`` without arguments runs it; "" for a study that has to be named.
    exclusive : bool
        Whether the cells measure time, and so run one at a time after all others, with every core to themselves.
    size : callable, optional
        ``size(cell)``: bytes that a cell reads, where they say better than its number how far a run is.
    source : str
        Name or file under which other processes find the study; set by the catalogue.

    Raises
    ------
    ValueError
        If the name cannot be a file name, or ``headline`` is no scale.

    Examples
    --------
    >>> study = Study("squares", "Squares", "Is n² even?", "n = 1, 2",
    ...               cells=lambda scale: [{"n": 1}, {"n": 2}],
    ...               measure=lambda cell, seed: {"even": cell["n"] ** 2 % 2 == 0})
    >>> study.grid("default")
    [{'study': 'squares', 'n': 1}, {'study': 'squares', 'n': 2}]
    """

    name: str
    title: str
    question: str
    setup: str
    cells: Callable[[str], Sequence[Cell]]
    measure: Callable[[Cell, int], Record | Sequence[Record]]
    figures: Callable[[DataFrame], Sequence[Figure | Piece]] = _nothing
    tables: Callable[[DataFrame], Sequence[Table | Piece]] = _nothing
    claims: Callable[[DataFrame], Sequence[Claim | Piece]] = _nothing
    code_version: Callable[[Cell], str] | None = None
    references: Sequence[str] = ()
    headline: Scale | Literal[""] = ""
    exclusive: bool = False
    size: Callable[[Cell], int] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.name):
            raise ValueError(
                f"the name of a study becomes a file name: letters, digits, - and _ only, got {self.name!r}"
            )
        if self.headline and self.headline not in get_args(Scale):
            raise ValueError(f"headline must be '' or one of {get_args(Scale)}, got {self.headline!r}")

    def grid(self, scale: str = "default") -> list[dict[str, Scalar]]:
        """Full cells of a scale, each once, in the order in which the study lists them.

        Raises
        ------
        ValueError
            If the scale is unknown, or a cell is not what a cell must be.
        TypeError
            If an entry of a cell is not a JSON scalar.
        """
        if scale not in get_args(Scale):
            raise ValueError(f"scale must be one of {get_args(Scale)}, got {scale!r}")
        full = (complete(self.name, cell) for cell in self.cells(scale))
        return list({canonical(cell): cell for cell in full}.values())

    def version(self, cell: Cell) -> str:
        """Version of the code that computes ``cell``."""
        return self.code_version(cell) if self.code_version is not None else version_of(self.measure)
