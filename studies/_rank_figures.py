"""Figures of the study of rank rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.study import Figure
from nla_llm.study.frames import groups, succeeded, valued
from nla_llm.theory.updates import spiked_model

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Canvas

__all__ = ["TRUE_RANK", "figures", "setting"]

TRUE_RANK = 16


def setting(row: Any) -> str:
    """Name of a stored pair."""
    history = "base as stored" if row["history"] == "stored" else "base rounded"
    return f"{row['dtype']}, {row['size']:g}, {history}"


def draw_spikes(fig: Canvas, data: pd.DataFrame) -> None:
    """Measured values and cosines beside their limits."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    ratio = data["ratio"].iloc[0]
    grid = np.linspace(0.4, 4.1, 200)
    limits = dict(zip(("singular value", "left", "right"), spiked_model(grid, ratio), strict=True))
    left, right = fig.subplots(1, 2)
    for ax, names in ((left, ["singular value"]), (right, ["left", "right"])):
        for name, family in zip(names, ("update", "kernel"), strict=False):
            part = data[data["quantity"] == name]
            bars = [part["value"] - part["lower"], part["upper"] - part["value"]]
            ax.errorbar(
                part["strength"], part["value"], bars, fmt="o", color=style.colour(family), markersize=3.5, label=name
            )
            style.theory_line(ax, grid, limits[name], family=family, label="limit")
    style.label(left, "strength θ of the spike", "singular value")
    style.label(right, "strength θ of the spike", "squared cosine with the true vector")


def draw_rules(fig: Canvas, data: pd.DataFrame) -> None:
    """Rank by every rule, for every stored pair; the true rank as a line."""
    from nla_llm.report import style  # noqa: PLC0415

    rules = list(dict.fromkeys(data["rule"]))
    panels = list(data.groupby("size", sort=True))
    for ax, (size, panel) in zip(fig.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        kinds = list(groups(panel, ["dtype", "history"]))
        for shift, ((dtype, history), part) in zip(np.linspace(-0.27, 0.27, len(kinds)), kinds, strict=True):
            y = [rules.index(rule) + shift for rule in part["rule"]]
            bars = [part["rank"] - part["smallest"], part["largest"] - part["rank"]]
            label = f"{dtype}, {'base as stored' if history == 'stored' else 'base rounded'}"
            ax.errorbar(part["rank"], y, xerr=bars, fmt="o", color=style.colour(label), markersize=3.5, label=label)
        ax.axvline(TRUE_RANK, color=style.INK, linewidth=0.9)
        ax.set_yticks(range(len(rules)), rules)
        ax.set_xscale("log", base=2)
        style.label(ax, "rank", "", f"|ΔW|/|W| = {size:g}")
    fig.axes[0].invert_yaxis()


def draw_errors(fig: Canvas, data: pd.DataFrame) -> None:
    """Distance of the truncated stored update from the trained one, against the rank."""
    from nla_llm.report import style  # noqa: PLC0415

    panels = list(data.groupby("size", sort=True))
    for ax, (size, panel) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (dtype, history), curve in groups(panel, ["dtype", "history"]):
            label = f"{dtype}, {'base as stored' if history == 'stored' else 'base rounded'}"
            style.line(ax, curve["r"], curve["value"], curve["lower"], curve["upper"], family=label, label=label)
        style.yardstick(ax, [panel["r"].min(), panel["r"].max()], 1.0, kind="zero_update", marker="")
        ax.axvline(TRUE_RANK, color=style.INK, linewidth=0.9)
        style.log_axes(ax, x=2)
        style.label(
            ax,
            "rank r",
            "distance from the trained update, relative" if ax is fig.axes[0] else "",
            f"|ΔW|/|W| = {size:g}",
        )


def figures(records: pd.DataFrame) -> list[Figure]:
    """Ranks by every rule, errors against the rank, spikes beside their limits."""
    stored = succeeded(records, what="stored")
    rules = stored[stored["kind"] == "rule"]
    errors = valued(stored[stored["kind"] == "error"], "error", ["dtype", "size", "history", "r"])
    spikes = succeeded(records, what="spikes")
    spike_data = valued(spikes, "measured", ["strength", "quantity", "theory"])
    spike_data = spike_data.assign(ratio=(spikes["rows"] / spikes["columns"]).to_numpy())
    n = int(stored["order"].iloc[0])
    columns = ["rule", "dtype", "size", "history", "rank", "rank_lower", "rank_upper", "smallest", "largest", "exact"]
    return [
        Figure(
            "rules",
            f"Rank of the stored update of a {n} × {n} matrix by every rule, mean over seeds, bars from the "
            "smallest to the "
            f"largest. Line: the rank {TRUE_RANK} that was trained.",
            draw_rules,
            rules[columns],
            size=(6.5, 4.2),
            panels=(1, 2),
        ),
        Figure(
            "errors",
            "Distance of the stored update, truncated at rank r, from the update that was trained, relative to "
            "it, with 95 % "
            f"intervals over seeds. Line: the trained rank {TRUE_RANK}; grey: no update. Beyond that rank "
            "truncation stores noise.",
            draw_errors,
            errors,
            size=(6.5, 3.7),
            panels=(1, 2),
        ),
        Figure(
            "spikes",
            "Spikes θ u vᵀ in noise: singular value, and squared cosines of its vectors with u and v, mean and "
            "95 % interval "
            "over seeds, beside the limits for large sizes (dashed).",
            draw_spikes,
            spike_data,
            size=(6.5, 3.5),
            panels=(1, 2),
        ),
    ]
