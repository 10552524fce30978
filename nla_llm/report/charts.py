"""Drawings that several studies share: error against budget, cost or entropy, one curve for each method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import LogFormatterSciNotation, LogLocator

from nla_llm.study.medians import groups

from . import style

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curve_label", "draw_against_cost", "draw_against_entropy", "draw_curves"]


def curve_label(method: str, directions: str | None = None) -> str:
    """Name of a curve.

    Examples
    --------
    >>> curve_label("positive_features", "iid"), curve_label("my_package.my_file:MyMethod")
    ('positive i.i.d.', 'MyMethod')
    """
    kind = {"iid": " i.i.d.", "orthogonal": " orthogonal"}.get(directions or "", "")
    return method.rpartition(":")[2].removesuffix("_features").replace("_", " ") + kind


def _curves(data: pd.DataFrame) -> Iterator[tuple[str, str | None, str, pd.DataFrame]]:
    """Method, directions, label and rows of each curve; a column ``label`` tells curves of one method apart."""
    keys = ["method", "directions", *(["label"] if "label" in data.columns else [])]
    for (method, directions, *label), rows in groups(data, keys):
        variant = directions if isinstance(directions, str) else None
        yield method, variant, label[0] if label else curve_label(method, variant), rows


def draw_curves(ax: Axes, data: pd.DataFrame, x: str, *, top: float = math.inf) -> None:
    """One curve for each method; a method without a budget is a level (against budget) or a point (against cost).

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    data : pandas.DataFrame
        Columns ``method``, ``directions`` (None, "iid" or "orthogonal"), ``median``, ``lower``, ``upper``, the one
        named ``x``, NaN for a level, and optionally ``label``.
    x : str
        Column of the abscissae.
    top : float
        Upper end of the ordinate, then logarithmic. A curve that lies above it altogether is named in the panel with
        its range, so that it does not squeeze all others into a line.
    """
    span, above = data[x].dropna(), []
    for method, directions, label, curve in _curves(data):
        if curve["median"].min() > top:
            above.append(f"{label}: {curve['median'].min():.2g} to {curve['median'].max():.2g}")
            continue
        known = curve[x].notna().all()
        xs = curve[x] if known else [span.min(), span.max()]
        y, low, high = (curve[c] if known else [curve[c].iloc[0]] * 2 for c in ("median", "lower", "upper"))
        if method in style.YARDSTICKS:
            style.yardstick(ax, xs, y, low, high, kind=method)
        else:
            style.line(ax, xs, y, low, high, family=method, label=label, variant=directions)
    if math.isfinite(top):
        ax.set_yscale("log")
        ax.set_ylim(top=top)
    if above:
        low, high = ax.get_ylim()
        ax.set_ylim(bottom=low * (low / high) ** (0.05 * (len(above) + 1)))  # room for the lines below the curves
        ax.text(
            0.02, 0.03, "\n".join(["beyond this panel:", *above]), transform=ax.transAxes, va="bottom", fontsize=7.5
        )


def draw_against_cost(figure: Figure, data: pd.DataFrame, *, top: float = math.inf) -> None:
    """Errors in several norms against operations, the cost of exact attention as a vertical line.

    Columns ``norm``, ``operations`` and ``exact_operations`` beside those of `draw_curves`. The optimal rank is left
    out: it costs more than what it replaces.
    """
    panels = list(data.groupby("norm", sort=False))
    for ax, (norm, part) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_curves(ax, part[part["method"] != "optimal_rank"], "operations", top=top)
        ax.axvline(part["exact_operations"].iloc[0], color=style.INK, linewidth=0.9)
        style.log_axes(ax)
        _thin_ticks(ax)
        style.label(ax, "operations for one head", f"relative {norm} error of P", f"{norm} norm")


def _thin_ticks(ax: Axes) -> None:
    """Over less than two decades, label 1, 2 and 5 only: more would run into one another."""
    low, high = ax.get_xlim()
    if high < 100 * low:
        ax.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        ax.xaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2.0, 2.0)))


def draw_against_entropy(figure: Figure, data: pd.DataFrame, *, top: float = math.inf) -> None:
    """Every head: its error (``value``, ``lower``, ``upper``) against the entropy of its rows."""
    ax = figure.subplots()
    for method, directions, label, part in _curves(data):
        marker, colour = _mark(method, directions)
        bars: Sequence[Any] = [part["value"] - part["lower"], part["upper"] - part["value"]]
        ax.errorbar(part["entropy"], part["value"], bars, fmt=marker, color=colour, markersize=3.5, linewidth=0.8,
                    label=label)  # fmt: skip
    style.log_axes(ax, x=None)
    if math.isfinite(top):
        ax.set_ylim(top=top)
    style.label(ax, "mean row entropy relative to uniform attention (0 sharp, 1 flat)", "relative Frobenius error of P")


def _mark(method: str, directions: str | None) -> tuple[str, str]:
    if method in style.YARDSTICKS:
        colour, _, marker = style.YARDSTICKS[method]
        return marker, colour
    return "s" if directions == "orthogonal" else "o", style.colour(method)
