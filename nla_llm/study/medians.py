"""Medians over heads or tensors with intervals that assume no distribution, and findings that rest on them."""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .claims import Claim
from .frames import groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .claims import Sense, Verdict

__all__ = ["binomial_tail", "finding", "median_claim", "median_interval", "median_text", "medians"]


def median_interval(count: int) -> tuple[int, int]:
    """Order statistics that enclose the median with at least 95 % where ``count`` > 5, the extremes otherwise.

    Examples
    --------
    >>> median_interval(36), median_interval(3)
    ((11, 24), (0, 2))
    """
    low = 0
    while binomial_tail(low + 1, count) < 0.05:
        low += 1
    return low, count - 1 - low


def binomial_tail(low: int, count: int) -> float:
    """Probability that the median lies outside the order statistics ``low`` and ``count − 1 − low`` of a sample.

    Examples
    --------
    >>> binomial_tail(0, 6)
    0.03125
    """
    return float(2 * sum(comb(count, i) for i in range(low + 1)) / 2**count)


def medians(records: pd.DataFrame, keys: Sequence[str], column: str) -> pd.DataFrame:
    """Median of a column in each group, with its interval; the interval of the estimate itself where there is but one.

    Returns
    -------
    pandas.DataFrame
        Columns ``keys``, ``median``, ``lower``, ``upper`` and ``heads``, how many the median is over.
    """
    rows = (dict(zip(keys, key, strict=True)) | _median(group, column) for key, group in groups(records, keys))
    return pd.DataFrame(list(rows))


def _median(group: pd.DataFrame, column: str) -> dict[str, Any]:
    values = np.sort(group[column].to_numpy(dtype=float))
    low, high = (values[i] for i in median_interval(len(values)))
    if len(values) == 1 and f"{column}_lower" in group.columns:
        low, high = (float(group[f"{column}_{end}"].iloc[0]) for end in ("lower", "upper"))
    return {"median": np.median(values), "lower": low, "upper": high, "heads": len(values)}


def median_text(group: pd.DataFrame, column: str) -> str:
    """Median with its interval, in words.

    Examples
    --------
    >>> import pandas as pd
    >>> median_text(pd.DataFrame({"error": [0.5, 0.25, 0.75]}), "error")
    '0.5 [0.25, 0.75]'
    """
    m = _median(group, column)
    return f"{m['median']:.3g} [{m['lower']:.3g}, {m['upper']:.3g}]"


def median_claim(
    sentence: str,
    values: pd.Series,
    threshold: float,
    sense: Sense,
    *,
    what: str,
    expected: Verdict = "confirmed",
    source: str = "",
) -> Claim:
    """Claim that the median over heads of a number, ``what``, is on one side of a threshold.

    Examples
    --------
    >>> median_claim("the error is below one", pd.Series([0.5, 0.25, 0.75]), 1.0, "<", what="error").number
    'median over 3 heads of the error 0.5 [0.25, 0.75]'
    """
    found = medians(pd.DataFrame({"all": 0, "value": values}), ["all"], "value").iloc[0]
    number = "median over {heads:.0f} heads of the {what} {median:.3g} [{lower:.3g}, {upper:.3g}]"
    number = (number if len(values) > 1 else "{what} {median:.3g}").format(what=what, **found)
    return Claim.decide(
        sentence, found["lower"], found["upper"], threshold, sense, number=number, expected=expected, source=source
    )


def finding(holds: str, fails: str, low: float, high: float, threshold: float, *, number: str) -> Claim:
    """What somebody's own data say: whichever of two sentences is true of a quantity in [low, high].

    Nothing is expected of unknown data, so a finding is confirmed as it stands, or left open.

    Parameters
    ----------
    holds, fails : str
        What is so where the quantity is above the threshold, and where it is not.
    low, high, threshold : float
        Interval of the quantity, and the threshold.
    number : str
        The number on which it rests.

    Examples
    --------
    >>> finding("most heads agree", "most heads disagree", 0.1, 0.2, 0.5, number="1 of 8").sentence
    'most heads disagree'
    """
    if high <= threshold:
        return Claim(fails, "confirmed", number)
    return Claim.decide(holds, low, high, threshold, ">", number=number)
