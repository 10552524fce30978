"""Drawings of many methods at once: a map of their errors, and the front of cost and error."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nla_llm.study.fronts import pareto_front

from . import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["draw_correlations", "draw_front", "draw_map"]

_OCTAVES = 3.0  # ratios beyond 2³ either way take the last colour
_BETTER = 0.9  # of the error of uniform attention: what is nearer to it is not named
_GAP = 0.055  # of the height of a panel, between names beside it
_GREYS = {"uniform", "random_keys", "optimal_rank"}


def draw_map(figure: Figure, data: pd.DataFrame) -> None:
    """A table of errors in colour: a row for each method, a column for each kind of input.

    Columns ``label``, ``method``, ``kind``, ``median``, ``share`` and ``oracle``. The colour is the ratio to
    ``uniform`` of the same kind, on a logarithmic scale; the rows are sorted by its mean, those that cost more than
    exact attention below the others, with their cost. What has no number is left white.
    """
    values = data.pivot_table(index="label", columns="kind", values="median", sort=False)
    values = values[list(dict.fromkeys(data["kind"]))]
    uniform = data.loc[data["method"] == "uniform"].set_index("kind")["median"]
    ratios = (values / uniform).map(np.log2)
    share = data.groupby("label")["share"].median()
    places = pd.DataFrame({"dear": share > 1, "mean": ratios.clip(-_OCTAVES, _OCTAVES).mean(axis=1)})
    order = places.sort_values(["dear", "mean"]).index
    values, ratios = values.loc[order], ratios.loc[order]
    oracle = set(data.loc[data["oracle"].astype(bool), "label"])
    dear = {label: f", at {share[label]:.2g} × exact" for label in order if share[label] > 1}
    rows = [label + (" *" if label in oracle else dear.get(label, "")) for label in order]
    words = values.map(short).to_numpy()
    _coloured_table(figure, ratios.to_numpy(dtype=float) / _OCTAVES, words, rows, list(values.columns))


def draw_correlations(figure: Figure, data: pd.DataFrame) -> None:
    """A table of correlations in colour: a row for each method, a column for each fact, white where zero is possible.

    Columns ``label``, ``fact``, ``value``, ``lower`` and ``upper``.
    """
    certain = (data["lower"] > 0) | (data["upper"] < 0)
    data = data.assign(colour=data["value"].where(certain))
    table = {
        column: data.pivot_table(index="label", columns="fact", values=column, sort=False, dropna=False)
        for column in ("value", "colour")
    }
    facts = list(dict.fromkeys(data["fact"]))
    words = table["value"][facts].map("{:+.2f}".format).to_numpy()
    colours = table["colour"].reindex_like(table["value"])[facts].to_numpy(dtype=float)
    _coloured_table(figure, colours, words, list(table["value"].index), facts)


def _coloured_table(
    figure: Figure, colours: NDArray[Any], words: NDArray[Any], rows: list[str], columns: list[str]
) -> None:
    """Words on a ground from blue (−1) over white to red (1); what has no colour is set in grey."""
    ax = figure.subplots()
    ax.imshow(colours, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for (i, j), word in np.ndenumerate(words):
        shade = colours[i, j]
        ink = "#8C8C8C" if not np.isfinite(shade) else "white" if abs(shade) > 0.65 else style.INK
        ax.text(j, i, word, ha="center", va="center", fontsize=7, color=ink)
    ax.set_xticks(range(len(columns)), [_two_lines(column) for column in columns], fontsize=7.5)
    ax.set_yticks(range(len(rows)), rows, fontsize=7.5)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)


def short(error: float) -> str:
    """Two digits of an error, nothing where there is none.

    Examples
    --------
    >>> [short(x) for x in (0.01234, 0.567, 3.21, 1234.5, float("nan"))]
    ['.012', '.57', '3.2', '1e3', '']
    """
    if not math.isfinite(error):
        return ""
    if error >= 100:
        return f"{error:.0e}".replace("e+0", "e").replace("e+", "e")
    digits = f"{error:.2g}" if error >= 1e-3 else f"{error:.0e}".replace("e-0", "e-")
    return digits.removeprefix("0") if error < 1 else digits


def _two_lines(kind: str) -> str:
    return kind.replace(", ", "\n").replace(" ", "\n", 1) if "\n" not in kind else kind


def draw_front(figure: Figure, data: pd.DataFrame) -> None:
    """Error against cost in each norm, yardsticks in grey; methods on the front are named where they beat uniform.

    What costs more than exact attention is left out, and a method counts as better where its error is nine tenths of
    that of uniform attention or less. Columns ``label``, ``method``, ``share``, ``median``, ``lower``, ``upper``,
    ``oracle`` and ``norm``.
    """
    norms = list(dict.fromkeys(data["norm"]))
    for ax, norm in zip(figure.subplots(1, len(norms), squeeze=False)[0], norms, strict=True):
        part = data[data["norm"] == norm]
        _yardsticks(ax, part)
        level = part.loc[part["method"] == "uniform", "median"]
        uniform = float(level.iloc[0]) if len(level) else math.inf  # without it nothing is known to be worse
        paying = part[~part["method"].isin(_GREYS) & ~part["oracle"].astype(bool) & (part["share"] <= 1)]
        _methods(ax, paying, uniform)
        style.log_axes(ax)
        if math.isfinite(uniform):
            ax.set_ylim(top=4 * uniform)
        _names(ax, paying, uniform)
        style.label(ax, "cost, as a share of exact attention", f"relative {norm} error of P", f"{norm} norm")


def _yardsticks(ax: Axes, part: pd.DataFrame) -> None:
    for method in ("uniform", "random_keys", "optimal_rank"):
        curve = part[part["method"] == method].sort_values("share")
        if curve.empty:
            continue
        level = method == "uniform"  # it has one cost, and is there at every higher one
        x = [part["share"].min(), part["share"].max()] if level else curve["share"]
        y, low, high = (curve[c].iloc[0] if level else curve[c] for c in ("median", "lower", "upper"))
        style.yardstick(ax, x, y, low, high, kind=method, marker="" if level else None)


def _methods(ax: Axes, part: pd.DataFrame, uniform: float) -> None:
    on_front = pareto_front(part["share"], part["median"]) & (part["median"] <= uniform).to_numpy()
    rest, front = part[~on_front], part[on_front].sort_values("share")
    blue = style.FAMILIES["kernel"]
    ax.plot(rest["share"], rest["median"], "o", color="#B8C4CE", markersize=2.6, label="other methods", zorder=1.6)
    ax.plot(front["share"], front["median"], "-", color=blue, label="Pareto front")
    bars = np.abs(np.stack([front["median"] - front["lower"], front["upper"] - front["median"]]))
    ax.errorbar(front["share"], front["median"], bars, fmt="o", color=blue, markersize=4, elinewidth=0.8)


def _names(ax: Axes, part: pd.DataFrame, uniform: float) -> None:
    """Names of the methods on the front in a column beside the panel, each with a line to its best point."""
    on_front = pareto_front(part["share"], part["median"]) & (part["median"] <= _BETTER * uniform).to_numpy()
    named = part[on_front].sort_values("median", ascending=False).drop_duplicates("label", keep="last")
    low, high = np.log(ax.get_ylim())
    wanted = (np.log(named["median"].to_numpy()) - low) / (high - low)
    for (_, point), height in zip(named.iterrows(), spread(wanted, _GAP), strict=True):
        ax.annotate(
            point["label"], (point["share"], point["median"]), xytext=(1.02, height), textcoords="axes fraction",
            va="center", fontsize=6.5, arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#8C8C8C"},
        )  # fmt: skip


def spread(heights: NDArray[Any], gap: float) -> NDArray[Any]:
    """Descending heights moved down until neighbours are a gap apart, then up as a whole if the last falls below zero.

    Examples
    --------
    >>> spread(np.array([0.5, 0.49, 0.1]), 0.1).round(2).tolist()
    [0.5, 0.4, 0.1]
    """
    moved = np.array(heights, dtype=float)
    for i in range(1, moved.size):
        moved[i] = min(moved[i], moved[i - 1] - gap)
    return moved + max(0.0, -float(moved[-1])) if moved.size else moved
