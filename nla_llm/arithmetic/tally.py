"""The tally: how many operations of each class have been done since it was opened."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, SupportsInt

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CLASSES", "Tally", "record", "tally", "untallied"]

CLASSES = ("madd", "add", "mul", "div", "exp", "sqrt", "compare", "draw")


@dataclass
class Tally:
    """Operations done, by class; what each class means stands in :mod:`nla_llm.costs.cost`.

    Attributes
    ----------
    madd, add, mul, div, exp, sqrt, compare, draw
        Numbers of operations.
    escaped
        Entries of counted arrays that were handed to plain NumPy, where nothing can be counted.
    """

    madd: int = 0
    add: int = 0
    mul: int = 0
    div: int = 0
    exp: int = 0
    sqrt: int = 0
    compare: int = 0
    draw: int = 0
    escaped: int = 0

    def record(self, kind: str, number: int) -> None:
        """Add ``number`` operations of the class ``kind``."""
        setattr(self, kind, getattr(self, kind) + number)


_current: ContextVar[Tally | None] = ContextVar("nla_llm_tally", default=None)


@contextmanager
def tally() -> Iterator[Tally]:
    """Count the operations done on counted arrays inside the block; an enclosing tally counts them too.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.arithmetic import counted
    >>> x = counted(np.ones((2, 3)))
    >>> with tally() as t:
    ...     y = x @ x.mT + 1.0
    >>> t.madd, t.add
    (12, 4)
    """
    outer, inner = _current.get(), Tally()
    token = _current.set(inner)
    try:
        yield inner
    finally:
        _current.reset(token)
        if outer is not None:
            for kind, number in asdict(inner).items():
                outer.record(kind, number)


@contextmanager
def untallied() -> Iterator[None]:
    """Let what is done on counted arrays inside the block go uncounted: checks of the input.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.arithmetic import counted
    >>> x = counted(np.ones(3))
    >>> with tally() as t, untallied():
    ...     y = x + x
    >>> t.add
    0
    """
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def record(kind: str, number: SupportsInt) -> None:
    """Add to the open tally, if one is open."""
    current = _current.get()
    if current is not None:
        current.record(kind, int(number))
