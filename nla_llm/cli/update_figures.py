"""Figures of ``nla-llm update``: spectra, ranks by every rule, errors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nla_llm.study import Figure
from nla_llm.study.frames import groups, succeeded, valued

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["figures_of", "kind_of", "kinds_of", "truncations"]

MOST_GROUPS = 8  # colours that can be told apart
NORMS = ("Frobenius", "spectral")


def kind_of(tensor: str) -> str:
    """Kind of a tensor: the last word of its name, without numbers.

    Examples
    --------
    >>> kind_of("model.layers.3.self_attn.q_proj.weight"), kind_of("delta_12")
    ('q_proj', 'delta')
    """
    words = re.sub(r"\.weight$", "", tensor).split(".")
    words = [w for word in words if (w := re.sub(r"\d+", "", word).strip("_"))]
    return words[-1] if words else tensor


def kinds_of(tensors: pd.Series) -> pd.Series:
    """Kind of each, the rarer ones beyond eight together."""
    kinds = tensors.map(kind_of)
    most = MOST_GROUPS if kinds.nunique() <= MOST_GROUPS else MOST_GROUPS - 1
    common = list(kinds.value_counts().index[:most])
    return kinds.where(kinds.isin(common), "others")


def truncations(records: pd.DataFrame) -> pd.DataFrame:
    """Truncations, numbered within each tensor: the first rank that was asked for, the second, and so on."""
    part = succeeded(records, what="truncation")
    return part.assign(slot=part.groupby("tensor", sort=False).cumcount())


def figures_of(records: pd.DataFrame) -> list[Figure]:
    """Spectra, ranks by every rule, and errors: against the rank, or matrix by matrix where there is one rank."""
    if succeeded(records, what="tensor").empty:
        return []
    spectra = (
        "Singular values of the update of every matrix, relative to its largest, coloured by the kind of the matrix. "
        "Dashed: the spectral norm that the noise of storage has by itself; values below it cannot be told from it."
    )
    ranks = (
        "Rank by every rule: the median over the matrices of a kind, bars from the smallest to the largest, ends of "
        "ranges included."
    )
    found = [
        Figure("spectrum", spectra, _draw_spectra, _spectra(records), size=(6.5, 3.9)),
        Figure("ranks", ranks, _draw_ranks, _ranks(records), size=(6.5, 3.9)),
    ]
    errors = _errors(records)
    if errors["slot"].nunique() > 1:
        caption = (
            "Error of the update truncated at rank r, median over the matrices of a kind; bands: from the smallest to "
            "the largest. Grey: no update at all."
        )
        return [*found, Figure("truncation", caption, _draw_truncation, errors, size=(6.5, 3.7), panels=(1, 2))]
    caption = "Relative error of the update of every matrix, in the order of their names. Grey: no update at all."
    return [*found, Figure("errors", caption, _draw_errors, errors, size=(6.5, 3.7), panels=(1, 2))]


def _draw_spectra(fig: Canvas, data: pd.DataFrame) -> None:
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    ax = fig.subplots()
    seen: set[str] = set()
    for (kind, _), curve in groups(data, ["kind", "tensor"]):
        label = None if kind in seen else kind
        seen.add(kind)
        scale = curve["value"].iloc[0]
        drawn = style.line(ax, curve["index"], curve["value"] / scale, family=kind, label=label, marker="")
        drawn.set_linewidth(0.9)
        span, noise = [curve["index"].min(), curve["index"].max()], curve["noise_spectral"].iloc[0]
        style.theory_line(ax, span, noise, family=kind, label="noise of storage")
    style.log_axes(ax)
    floor = max(min(data["noise_spectral"].min() / 10, 0.1), data["relative"].min() / 2, 1e-10)
    ax.set_ylim(floor, 1.5)
    style.label(ax, "index i", "singular value of the update, relative to the largest")


def _draw_ranks(fig: Canvas, data: pd.DataFrame) -> None:
    from nla_llm.report import style  # noqa: PLC0415

    ax = fig.subplots()
    rules, kinds = list(dict.fromkeys(data["rule"])), list(dict.fromkeys(data["kind"]))
    for shift, kind in zip(np.linspace(-0.3, 0.3, len(kinds)) if len(kinds) > 1 else [0.0], kinds, strict=True):
        part = data[data["kind"] == kind].set_index("rule").loc[rules]
        bars = [part["median"] - part["lower"], part["upper"] - part["median"]]
        y = np.arange(len(rules)) + shift
        colour = style.colour(kind)
        ax.errorbar(part["median"], y, xerr=bars, fmt="o", color=colour, markersize=3, linewidth=0.8, label=kind)
    ax.set_yticks(range(len(rules)), rules)
    ax.invert_yaxis()
    ax.set_xscale("symlog", base=2, linthresh=1)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlim(left=0)
    style.label(ax, "rank", "")


def _draw_truncation(fig: Canvas, data: pd.DataFrame) -> None:
    from nla_llm.report import style  # noqa: PLC0415

    for ax, (norm, panel) in zip(fig.subplots(1, 2, sharey=True), data.groupby("norm", sort=False), strict=True):
        style.yardstick(ax, [panel["rank"].min(), panel["rank"].max()], 1.0, kind="zero_update")
        for (kind,), curve in groups(panel, ["kind"]):
            by_rank = curve.groupby("rank")["value"].agg(["median", "min", "max"]).reset_index()
            style.line(ax, by_rank["rank"], by_rank["median"], by_rank["min"], by_rank["max"], family=kind, label=kind)
        style.log_axes(ax, x=2, y=None)
        ax.set_ylim(0, 1.05)
        style.label(ax, "rank r", "" if norm == "spectral" else "relative error of the update", f"{norm} norm")


def _draw_errors(fig: Canvas, data: pd.DataFrame) -> None:
    from nla_llm.report import style  # noqa: PLC0415

    for ax, (norm, panel) in zip(fig.subplots(1, 2, sharey=True), data.groupby("norm", sort=False), strict=True):
        style.yardstick(ax, [1, max(panel["place"].max(), 2)], 1.0, kind="zero_update", marker="")
        for (kind,), part in groups(panel, ["kind"]):
            bars = [part["value"] - part["lower"], part["upper"] - part["value"]]
            colour = style.colour(kind)
            ax.errorbar(part["place"], part["value"], bars, fmt="o", color=colour, markersize=3, label=kind)
        ax.set_ylim(0, 1.05)
        style.label(ax, "matrix", "" if norm == "spectral" else "relative error of the update", f"{norm} norm")


def _spectra(records: pd.DataFrame) -> pd.DataFrame:
    part = succeeded(records, what="spectrum")
    noise = succeeded(records, what="tensor").set_index("tensor")["noise_spectral"]
    data = valued(part, "singular_value", ["tensor", "index"])
    data.insert(0, "kind", kinds_of(part["tensor"]))
    largest = data.groupby("tensor")["value"].transform("max")
    return data.assign(relative=data["value"] / largest, noise_spectral=data["tensor"].map(noise))


def _ranks(records: pd.DataFrame) -> pd.DataFrame:
    part = succeeded(records, what="rule")
    part = part.assign(kind=kinds_of(part["tensor"]), middle=(part["low"] + part["high"]) / 2)
    rows = [
        {
            "rule": rule,
            "kind": kind,
            "median": one["middle"].median(),
            "lower": one["low"].min(),
            "upper": one["high"].max(),
        }
        for (rule, kind), one in groups(part, ["rule", "kind"])
    ]
    return pd.DataFrame(rows)


def _errors(records: pd.DataFrame) -> pd.DataFrame:
    part = truncations(records)
    places = {tensor: place for place, tensor in enumerate(dict.fromkeys(part["tensor"]), start=1)}
    part = part.assign(kind=kinds_of(part["tensor"]), rank=part["rank"].astype(int), place=part["tensor"].map(places))
    keep = ["kind", "tensor", "place", "rank", "slot"]
    panels = [valued(part, f"relative_{norm.lower()}", keep).assign(norm=norm) for norm in NORMS]
    return pd.concat(panels)
