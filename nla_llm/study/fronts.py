"""Methods compared at equal cost: the Pareto front of cost and error, and who reaches a given error first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

__all__ = ["first_to_reach", "pareto_front"]


def pareto_front(cost: ArrayLike, error: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other point beats: none is at most as dear and better, or cheaper and at most as wrong.

    A point that is not finite is never on the front.

    Examples
    --------
    >>> pareto_front([1, 2, 3, 2], [0.9, 0.5, 0.6, 0.5]).tolist()
    [True, True, False, True]
    """
    c, e = (np.asarray(a, dtype=np.float64) for a in (cost, error))
    known = np.isfinite(c) & np.isfinite(e)
    dominated = [bool(np.any(known & (c <= x) & (e <= y) & ((c < x) | (e < y)))) for x, y in zip(c, e, strict=True)]
    return np.asarray(known & ~np.asarray(dominated, dtype=bool))


def first_to_reach(
    table: pd.DataFrame, error: float, *, cost: str = "share", column: str = "median"
) -> pd.Series | None:
    """The cheapest row of a table whose ``column`` is at most ``error``; None where no row gets there.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"label": ["a", "b"], "share": [0.5, 0.25], "median": [0.05, 0.3]})
    >>> first_to_reach(table, 0.1)["label"], first_to_reach(table, 0.01) is None
    ('a', True)
    """
    there = table[table[column] <= error].sort_values(cost, kind="stable")
    return None if there.empty else there.iloc[0]
