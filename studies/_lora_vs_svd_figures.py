"""Figures of the study of LoRA and the truncated SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

LABELS = {
    "truncated_svd": "truncated SVD of the full update",
    "data_aware_svd": "data-aware truncation",
    "lora": "LoRA, trained",
}
FAMILY = {"truncated_svd": "update", "data_aware_svd": "data-aware", "lora": "trained LoRA"}
MARKS = {"truncated_svd": "s", "data_aware_svd": "^", "lora": "o"}


def _curves(ax: Axes, data: pd.DataFrame) -> None:
    """A curve with its band for each update that has a rank."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    for update, label in LABELS.items():
        part = data[data["update"] == update].sort_values("rank")
        if len(part):
            band = [part[c] for c in ("rank", "value", "lower", "upper")]
            style.line(ax, *band, family=FAMILY[update], label=label, marker=MARKS[update])
    style.log_axes(ax, x=2, y=None)


def draw_losses(fig: Canvas, data: pd.DataFrame) -> None:
    """Loss against rank on both domains, relative to the full fine-tuning and to the base."""
    from nla_llm.report import style  # noqa: PLC0415

    names = {
        "new": ("loss above that of the full update, nats", "new domain"),
        "old": ("loss above that of the base model, nats", "old domain: what is forgotten"),
    }
    for ax, (domain, part) in zip(fig.subplots(1, 2), data.groupby("domain", sort=False), strict=True):
        _curves(ax, part)
        span = [part["rank"].min(), part["rank"].max()]
        for update, kind, label in (("none", "zero_update", "no update"), ("full", "optimal_rank", "full update")):
            level = part[part["update"] == update].iloc[0]
            values = [level[c] for c in ("value", "lower", "upper")]
            style.yardstick(ax, span, *([v, v] for v in values), kind=kind, label=label)
        style.label(ax, "rank r", *names[str(domain)])


def draw_norms(fig: Canvas, data: pd.DataFrame) -> None:
    """Relative errors of every matrix against rank, in three measures."""
    from nla_llm.report import style  # noqa: PLC0415

    titles = {"frobenius": "Frobenius norm", "spectral": "spectral norm", "output": "outputs"}
    for ax, (norm, part) in zip(fig.subplots(1, 3, sharey=True), data.groupby("norm", sort=False), strict=True):
        _curves(ax, part)
        span = [part["rank"][part["rank"] > 0].min(), part["rank"].max()]
        style.yardstick(ax, span, [1.0, 1.0], kind="zero_update", label="no update")
        second = part[part["update"] == "second"]
        if len(second):
            values = ([float(second[c].iloc[0])] * 2 for c in ("value", "lower", "upper"))
            style.yardstick(ax, span, *values, kind="optimal_rank", label="second full fine-tuning")
        first = ax.get_subplotspec().is_first_col()
        ax.set_yscale("log")
        style.label(ax, "rank r", "relative distance from the full update" if first else "", titles[str(norm)])


def draw_trade(fig: Canvas, data: pd.DataFrame) -> None:
    """Loss on the new domain against the distance from the full update, and against what is forgotten of the old."""
    from nla_llm.report import style  # noqa: PLC0415

    names = {
        "total_frobenius": "distance from the full update, Frobenius norm",
        "forgotten": "old domain: loss above that of the base, nats",
    }
    for ax, (column, name) in zip(fig.subplots(1, 2, sharey=True), names.items(), strict=True):
        for update, label in LABELS.items():
            part = data[data["update"] == update].sort_values("rank")
            colour = style.colour(FAMILY[update])
            ax.plot(part[column], part["value"], MARKS[update], color=colour, label=label, linestyle="-", linewidth=0.6)
            for row in part.to_dict("records") if update != "data_aware_svd" else ():  # beside the truncated SVD
                ax.annotate(f"{row['rank']:.0f}", (row[column], row["value"]), xytext=(4, 3),
                            textcoords="offset points", fontsize=7, color=colour)  # fmt: skip
        for update, label, mark in (("none", "no update", "x"), ("full", "full update", "D")):
            row = data[data["update"] == update].iloc[0]
            ax.plot([row[column]], [row["value"]], mark, color=style.INK, label=label, linestyle="none")
        first = ax.get_subplotspec().is_first_col()
        style.label(ax, name, "loss above that of the full update, nats" if first else "")


def draw_subspaces(fig: Canvas, data: pd.DataFrame) -> None:
    """Similarity of column and row spaces against rank."""
    from nla_llm.report import style  # noqa: PLC0415

    titles = {"left": "column spaces (outputs)", "right": "row spaces (inputs)"}
    for ax, (side, part) in zip(fig.subplots(1, 2, sharey=True), data.groupby("side", sort=False), strict=True):
        _curves(ax, part)
        seeds = part[part["update"] == "seeds"].sort_values("rank")
        band = [seeds[c] for c in ("rank", "value", "lower", "upper")]
        style.line(ax, *band, family="seeds", label="LoRA, one seed and another", marker="v")
        chance = part[part["update"] == "random"].sort_values("rank")
        style.theory_line(ax, chance["rank"], chance["value"], label="random spaces")
        style.label(ax, "rank r", "similarity φ" if ax.get_subplotspec().is_first_col() else "", titles[str(side)])
        ax.set_ylim(0, 1.02)


def draw_conditioning(fig: Canvas, data: pd.DataFrame) -> None:
    """Condition numbers of the product and of both factors."""
    from nla_llm.report import style  # noqa: PLC0415

    titles = {"product": "product", "left": "left factor", "right": "right factor"}
    for ax, (what, part) in zip(fig.subplots(1, 3, sharey=True), data.groupby("factor", sort=False), strict=True):
        _curves(ax, part)
        ax.set_yscale("log")
        style.label(ax, "rank r", "condition number" if ax.get_subplotspec().is_first_col() else "", titles[str(what)])
