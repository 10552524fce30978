"""Figures of the study of quantised matrices: their data, and who draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from nla_llm.study.frames import succeeded, valued
from nla_llm.study.medians import medians

from ._quantised import ALONE, LEAST, METHODS, NORMS, SPECTRA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

BAND = ("value", "lower", "upper")
WORDS = {"nuclear": "nuclear", "frobenius": "Frobenius", "spectral": "spectral", "output": "output"}
MARKERS = dict(zip(METHODS, "osDPv^X", strict=True))
CODES = "no correction, codes of 2 to 8 bits"


def curve(ax: Axes, x: Any, band: Any, label: str) -> None:
    """A method in its colour, the same in all figures; quantising alone in grey."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    for name in METHODS:  # colours are handed out in the order in which they are asked for
        style.colour(name)
    if label == ALONE:
        style.yardstick(ax, x, *band, kind="uniform", label=CODES)
    else:
        style.line(ax, x, *band, family=label, label=label, marker=MARKERS[label])


def ordered(data: pd.DataFrame, column: str = "label") -> list[tuple[str, pd.DataFrame]]:
    """Groups of the methods in their order, quantising alone first."""
    return [(label, part) for label in (ALONE, *METHODS) if len(part := data[data[column] == label])]


# -- data --------------------------------------------------------------------------------------------------------------


def ratios(records: pd.DataFrame) -> pd.DataFrame:
    """PiSSA's ratio of every method by spectrum and rank."""
    ok = succeeded(records, what="spectrum", form="nf4")
    return valued(ok, "ratio", ["spectrum", "rank", "label"]).sort_values("rank", kind="stable")


def errors(records: pd.DataFrame) -> pd.DataFrame:
    """Relative errors by norm, spectrum and bits: NF4 with corrections, and integer codes without."""
    corrected = succeeded(records, what="spectrum", form="nf4")
    alone = succeeded(records, what="alone")
    alone = alone[alone["form"].str.fullmatch(r"int\d")]
    rows = pd.concat([alone, corrected[corrected["label"] != LEAST]])
    parts = [valued(rows, n, ["spectrum", "label", "form", "rank", "bits"]).assign(norm=n) for n in NORMS]
    return pd.concat(parts, ignore_index=True).sort_values("bits", kind="stable")


def turns(records: pd.DataFrame) -> pd.DataFrame:
    """Errors of LoftQ turn by turn."""
    ok = succeeded(records, what="turns").sort_values("turn", kind="stable")
    parts = [valued(ok, n, ["spectrum", "turn", "rises", "draws"]).assign(norm=n) for n in ("frobenius", "nuclear")]
    return pd.concat(parts, ignore_index=True)


def tensors(records: pd.DataFrame) -> pd.DataFrame:
    """Records of single matrices of the model."""
    ok = succeeded(records, what="model")
    return ok[ok["tensor"] != "all"]


def losses(records: pd.DataFrame) -> pd.DataFrame:
    """Records of the loss when all matrices are replaced."""
    return succeeded(records, what="model", tensor="all").sort_values("bits", kind="stable")


def model_errors(records: pd.DataFrame) -> pd.DataFrame:
    """Medians over the matrices of the model of the relative errors: NF4 with corrections, integer codes without."""
    single = tensors(records)
    alone = (single["label"] == ALONE) & single["form"].str.fullmatch(r"int\d")
    single = single[alone | ((single["label"] != ALONE) & (single["form"] == "nf4"))]
    keys = ["label", "form", "rank", "bits"]
    parts = [medians(single, keys, norm).rename(columns={"median": "value"}).assign(norm=norm) for norm in WORDS]
    return pd.concat(parts, ignore_index=True).sort_values("bits", kind="stable")


# -- drawings ----------------------------------------------------------------------------------------------------------


def draw_ratios(fig: Canvas, data: pd.DataFrame) -> None:
    """A panel for each spectrum: PiSSA's ratio against the rank."""
    from nla_llm.report import style  # noqa: PLC0415

    for ax, name in zip(fig.subplots(1, 3, sharey=True), SPECTRA, strict=True):
        panel = data[data["spectrum"] == name]
        for label, part in ordered(panel):
            curve(ax, part["rank"], [part[c] for c in BAND], label)
        least = panel[panel["label"] == LEAST]
        style.theory_line(ax, least["rank"], least["value"], label="optimum for Q(W)")
        style.log_axes(ax, x=2, y=None)
        first = ax.get_subplotspec().is_first_col()
        style.label(ax, "rank r", "ratio of PiSSA in per cent" if first else "", name)


def draw_errors(fig: Canvas, data: pd.DataFrame) -> None:
    """A row for each norm, a column for each spectrum: relative error against bits."""
    from nla_llm.report import style  # noqa: PLC0415

    for row, norm in zip(fig.subplots(3, 3, sharex=True), NORMS, strict=True):
        for ax, name in zip(row, SPECTRA, strict=True):
            for label, part in ordered(data[(data["norm"] == norm) & (data["spectrum"] == name)]):
                curve(ax, part["bits"], [part[c] for c in BAND], label)
            style.log_axes(ax, x=None)
            place = ax.get_subplotspec()
            x, y = "bits for an entry" if place.is_last_row() else "", f"{WORDS[norm]} error"
            style.label(ax, x, y if place.is_first_col() else "", name if place.is_first_row() else None)


def draw_turns(fig: Canvas, data: pd.DataFrame) -> None:
    """Errors of LoftQ over those of its first turn."""
    from nla_llm.report import style  # noqa: PLC0415

    for ax, (norm, panel) in zip(fig.subplots(1, 2, sharey=True), data.groupby("norm", sort=False), strict=True):
        for name, family, marker in zip(SPECTRA, ("exact", "kernel", "update"), "os^", strict=True):
            part = panel[panel["spectrum"] == name]
            style.line(ax, part["turn"], *(part[c] for c in BAND), family=family, label=name, marker=marker)
        first = ax.get_subplotspec().is_first_col()
        style.label(ax, "turn", "error over that of the first turn" if first else "", f"{WORDS[norm]} norm")


def draw_model(fig: Canvas, data: pd.DataFrame) -> None:
    """A panel for each norm: median error of the matrices of the model against bits."""
    from nla_llm.report import style  # noqa: PLC0415

    for ax, norm in zip(fig.subplots(2, 2, sharex=True).flat, WORDS, strict=True):
        for label, part in ordered(data[data["norm"] == norm]):
            curve(ax, part["bits"], [part[c] for c in BAND], label)
        style.log_axes(ax, x=None)
        x = "bits for an entry" if ax.get_subplotspec().is_last_row() else ""
        style.label(ax, x, f"relative {WORDS[norm]} error", None)


def draw_losses(fig: Canvas, data: pd.DataFrame) -> None:
    """A panel for each format that was corrected: increase of the loss against bits."""
    from nla_llm.report import style  # noqa: PLC0415

    forms = corrected_formats(data)
    alone = data[(data["label"] == ALONE) & data["form"].str.fullmatch(r"int\d")]
    for ax, form in zip(fig.subplots(1, len(forms), sharey=True, squeeze=False)[0], forms, strict=True):
        for label, part in ordered(pd.concat([alone, data[(data["label"] != ALONE) & (data["form"] == form)]])):
            ends = ("", "_lower", "_upper") if label == ALONE else ("",)
            curve(ax, part["bits"], [part[f"increase{end}"] for end in ends], label)
        ax.set_yscale("symlog", linthresh=0.01)
        first = ax.get_subplotspec().is_first_col()
        style.label(ax, "bits for an entry", "increase of the loss, nats per token" if first else "", form.upper())


def corrected_formats(data: pd.DataFrame) -> list[str]:
    """Formats with corrections at more than one rank, or all where there is none."""
    ranks = data[data["label"] != ALONE].groupby("form", sort=False)["rank"].nunique()
    several = [form for form in ranks.index if ranks[form] > 1]
    return sorted(several or list(ranks.index), reverse=True)
