"""Methods compared over heads: the curves that they make, their medians, and on how many heads they beat uniform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from .frames import groups
from .medians import median_text, medians

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Curve", "closer_than", "closer_than_uniform", "curve_label", "curves", "heads_table", "medians_by_norm"]

_HEAD = ["layer", "head"]


class Curve(NamedTuple):
    """Records of one method, drawn in one way, at all budgets."""

    method: str
    directions: str | None
    label: str
    records: pd.DataFrame


def curve_label(method: str, directions: str | None = None) -> str:
    """Name of a curve.

    Examples
    --------
    >>> curve_label("positive_features", "iid"), curve_label("my_package.my_file:MyMethod")
    ('positive i.i.d.', 'MyMethod')
    """
    kind = {"iid": " i.i.d.", "orthogonal": " orthogonal"}.get(directions or "", "")
    return method.rpartition(":")[2].removesuffix("_features").replace("_", " ") + kind


def curves(records: pd.DataFrame) -> Iterator[Curve]:
    """Curves by ``method`` and ``directions``; a column ``label`` names them, and tells curves of one method apart."""
    labelled = "label" in records.columns
    for (method, found, *label), part in groups(records, ["method", "directions", *(["label"] if labelled else [])]):
        directions = found if isinstance(found, str) else None
        yield Curve(method, directions, label[0] if labelled else curve_label(method, directions), part)


def medians_by_norm(
    records: pd.DataFrame, keys: Sequence[str], norms: Sequence[str] = ("Frobenius", "spectral")
) -> pd.DataFrame:
    """`medians` of the relative errors of P, one norm below the other; the column ``norm`` says which."""
    return pd.concat([medians(records, keys, f"relative_{norm.lower()}").assign(norm=norm) for norm in norms])


def closer_than_uniform(
    records: pd.DataFrame, group: pd.DataFrame
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """For each head of ``group``, whether it is surely and whether it is possibly closer to P than uniform attention.

    Surely: the whole interval of its relative Frobenius error is below the error of uniform attention on that head.
    None where ``records`` hold no uniform attention.

    Returns
    -------
    tuple of two arrays (heads,) of booleans, or None
    """
    return closer_than(records[records["method"] == "uniform"], group)


def closer_than(rivals: pd.DataFrame, group: pd.DataFrame) -> tuple[NDArray[np.bool_], NDArray[np.bool_]] | None:
    """For each head of ``group``, whether it is surely and whether it is possibly closer to P than the rival.

    Surely: the whole interval of its relative Frobenius error is below that of the rival on that head. Heads that the
    rival lacks are left out.

    Returns
    -------
    tuple of two arrays (heads,) of booleans, or None where there is no rival
    """
    if rivals.empty:
        return None
    ends = [f"relative_frobenius_{end}" for end in ("lower", "upper")]
    both = group[[*_HEAD, *ends]].merge(rivals[[*_HEAD, *ends]], on=_HEAD, suffixes=("", "_rival"))
    lower, upper, rival_lower, rival_upper = (both[c].to_numpy() for c in (*ends, *(f"{end}_rival" for end in ends)))
    return upper < rival_lower, lower < rival_upper


def heads_table(records: pd.DataFrame, more: Mapping[str, Callable[[pd.DataFrame], str]] | None = None) -> pd.DataFrame:
    """A row for each curve and budget: cost, medians of the errors over heads, and how many heads beat uniform.

    Parameters
    ----------
    records : pandas.DataFrame
        Records of `head_records` beside ``method``, ``directions``, ``m`` and ``layer``.
    more : mapping of str to callable, optional
        Further columns, each as text from the records of a row.
    """
    rows = [
        _row(records, curve.label, m, group, more or {})
        for curve in curves(records)
        for (m,), group in groups(curve.records, ["m"])
    ]
    return pd.DataFrame(rows)


def _row(
    records: pd.DataFrame, label: str, m: float, group: pd.DataFrame, more: Mapping[str, Callable[[pd.DataFrame], str]]
) -> dict[str, Any]:
    operations = group["operations"].iloc[0]
    row = {
        "method": label,
        "m": "" if pd.isna(m) else int(m),
        "operations": "unknown" if pd.isna(operations) else int(operations),
        "Frobenius": median_text(group, "relative_frobenius"),
        "spectral": median_text(group, "relative_spectral"),
    }
    if "output_error" in records.columns:
        row["output"] = median_text(group, "output_error")
    better = closer_than_uniform(records, group)
    if better is not None:
        row["better than uniform"] = f"{better[0].sum()} of {len(better[0])}"
    return row | {name: column(group) for name, column in more.items()}
