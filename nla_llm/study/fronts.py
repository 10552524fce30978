"""Methods compared at equal cost: the Pareto front of cost and error, and who reaches a given error first."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

__all__ = ["first_to_reach", "pareto_front", "shares_of_firsts"]


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
    """The cheapest row with ``column`` at most ``error``, of equally cheap ones the least; None where no row is.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"label": ["a", "b"], "share": [0.5, 0.25], "median": [0.05, 0.3]})
    >>> first_to_reach(table, 0.1)["label"], first_to_reach(table, 0.01) is None
    ('a', True)
    """
    there = table[table[column] <= error].sort_values([cost, column], kind="stable")
    return None if there.empty else there.iloc[0]


def shares_of_firsts(
    records: pd.DataFrame, error: float, *, column: str, cost: str = "share", resamples: int = 1000, rng: int = 0
) -> dict[str, float]:
    """How sure it is who reaches an error first: in which share of bootstrap samples of the heads each label does.

    Heads are drawn with replacement, the same ones for all methods, and whoever is the cheapest with a median over them
    of at most ``error`` is the first of that sample, at whatever level of cost; of equally cheap ones the nearest. With
    few heads the shares are coarse.

    Parameters
    ----------
    records
        A row for each label, level and head, with columns ``label``, ``level``, ``layer``, ``head``, the error and the
        cost.
    error
        To be reached.
    column, cost
        Columns of the error and of the cost.

    Returns
    -------
    Share of each label that is ever the first, the largest first; of none under "none".

    Examples
    --------
    >>> import pandas as pd
    >>> rows = [("a", 0.5, h, 0.05) for h in range(9)] + [("b", 0.25, h, 0.01 + 0.02 * h) for h in range(9)]
    >>> records = pd.DataFrame(rows, columns=["label", "share", "head", "error"]).assign(layer=0, level=1.0)
    >>> shares = shares_of_firsts(records, 0.1, column="error")
    >>> list(shares), 0.6 < shares["b"] < 0.8
    (['b', 'a'], True)
    """
    heads = records.assign(layer=records["layer"].fillna(-1), level=records["level"].fillna(-1))
    table = heads.pivot_table(index=["label", "level"], columns=["layer", "head"], values=column, aggfunc="median")
    if table.empty:
        return {"none": 1.0}
    spent = heads.groupby(["label", "level"])[cost].median().loc[table.index].to_numpy()
    order = np.argsort(spent, kind="stable")
    values, labels = table.to_numpy(dtype=float)[order], table.index.get_level_values("label")[order]
    spent = spent[order]
    drawn = np.random.default_rng(rng).integers(values.shape[1], size=(resamples, values.shape[1]))
    count: Counter[str] = Counter()
    for heads_drawn in drawn:
        sample = np.where(np.isnan(values[:, heads_drawn]), np.inf, values[:, heads_drawn])  # a failure reaches nothing
        medians = np.median(sample, axis=1)
        there = np.flatnonzero(medians <= error)
        there = there[spent[there] == spent[there].min(initial=np.inf)]  # of equal cost the one of the least error
        count[str(labels[there[np.argmin(medians[there])]]) if there.size else "none"] += 1
    return {label: times / resamples for label, times in count.most_common()}
