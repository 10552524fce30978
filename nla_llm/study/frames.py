"""Records as figures and tables want them: those that succeeded, group by group, an estimate as three columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

__all__ = ["groups", "standard_error", "succeeded", "valued"]


def succeeded(records: pd.DataFrame, **entries: Any) -> pd.DataFrame:
    """Records of the cells that came to an end, of those with the given entries where any are given.

    A column that does not exist, because no cell of its kind succeeded, leaves no record.

    Examples
    --------
    >>> import pandas as pd
    >>> records = pd.DataFrame({"status": ["ok", "ok", "failed"], "what": ["loss", "time", "loss"]})
    >>> len(succeeded(records)), len(succeeded(records, what="loss")), len(succeeded(records, how="quickly"))
    (2, 1, 0)
    """
    ok = records[records["status"] == "ok"]
    for column, value in entries.items():
        ok = ok[ok[column] == value] if column in ok.columns else ok.head(0)
    return ok


def groups(records: pd.DataFrame, keys: Sequence[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Groups in the order in which they appear; a missing entry is an entry like any other."""
    return iter(records.groupby(list(keys), dropna=False, sort=False))


def valued(records: pd.DataFrame, column: str, keep: Sequence[str] = ()) -> pd.DataFrame:
    """Columns ``keep`` and an estimate, as ``value``, ``lower`` and ``upper``.

    Examples
    --------
    >>> import pandas as pd
    >>> valued(pd.DataFrame({"n": [8], "error": [2.0], "error_lower": [1.0], "error_upper": [3.0]}), "error", ["n"])
       n  value  lower  upper
    0  8    2.0    1.0    3.0
    """
    names = {column: "value", f"{column}_lower": "lower", f"{column}_upper": "upper"}
    return records[[*keep, *names]].rename(columns=names)


def standard_error(records: pd.DataFrame, column: str, draws: pd.Series) -> pd.Series:
    """Standard error of means over draws, which have Student's 95 % intervals.

    Examples
    --------
    >>> import pandas as pd
    >>> from nla_llm.measures import Estimate
    >>> e = Estimate.from_samples([1.0, 2.0, 6.0])  # of standard deviation √7
    >>> records = pd.DataFrame({"error": [float(e.value)], "error_upper": [float(e.upper)], "draws": [3]})
    >>> round(float(standard_error(records, "error", records["draws"]).iloc[0] ** 2), 12) == round(7 / 3, 12)
    True
    """
    from scipy.special import stdtrit  # noqa: PLC0415 - only where records are judged

    above: pd.Series = records[f"{column}_upper"] - records[column]
    return above / stdtrit(draws.to_numpy(dtype=float) - 1, 0.975)
