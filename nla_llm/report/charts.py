"""Drawings that several studies share: error against budget, cost or entropy, one curve for each method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import LogFormatterSciNotation, LogLocator

from nla_llm.study.heads import curves

from . import style

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = [
    "draw_against_budget",
    "draw_against_cost",
    "draw_against_entropy",
    "draw_curve",
    "draw_curves",
    "draw_theory",
]


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
    for method, directions, label, curve in curves(data):
        if curve["median"].min() > top:
            above.append(f"{label}: {curve['median'].min():.3g} to {curve['median'].max():.3g}")
            continue
        known = curve[x].notna().all()
        xs = curve[x] if known else [span.min(), span.max()]
        y, low, high = (curve[c] if known else curve[c].iloc[0] for c in ("median", "lower", "upper"))
        draw_curve(ax, xs, y, low, high, method=method, label=label, variant=directions)
    if math.isfinite(top):
        ax.set_yscale("log")
        ax.set_ylim(top=top)
    if above:
        bottom, _ = ax.get_ylim()
        share = 0.08 * (len(above) + 1)  # of the height, for the lines below the curves
        ax.set_ylim(bottom=bottom * (bottom / top) ** (share / (1 - share)))
        ax.text(
            0.02, 0.03, "\n".join(["beyond this panel:", *above]), transform=ax.transAxes, va="bottom", fontsize=7.5
        )


def draw_curve(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    lower: ArrayLike,
    upper: ArrayLike,
    *,
    method: str,
    label: str,
    variant: str | None = None,
) -> None:
    """Curve of a method with its band: grey if it is a yardstick, else in the colour of its family (`style.line`)."""
    if method in style.YARDSTICKS:
        style.yardstick(ax, x, y, lower, upper, kind=method, label=label)
    else:
        style.line(ax, x, y, lower, upper, family=method, label=label, variant=variant)


def draw_theory(ax: Axes, data: pd.DataFrame, x: str, *, label: str = "theory") -> None:
    """Dashed curve of the column ``theory`` for each method that has one; other columns as in `draw_curves`."""
    for method, _, _, curve in curves(data):
        if curve["theory"].notna().any():
            style.theory_line(ax, curve[x], curve["theory"], family=method, label=label)


def draw_against_budget(figure: Figure, data: pd.DataFrame, *, top: float = math.inf) -> None:
    """Errors against budget, a panel for each norm, or for each kind of head.

    Columns ``m`` and either ``norm`` or ``kind`` beside those of `draw_curves`. Kinds share their ordinate, the error
    in the Frobenius norm.
    """
    by = "kind" if "kind" in data.columns else "norm"
    panels = list(data.groupby(by, sort=False))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=by == "kind")[0]
    for ax, (name, part) in zip(axes, panels, strict=True):
        draw_curves(ax, part, "m", top=top)
        style.log_axes(ax, x=2)
        if by == "norm":
            style.label(ax, "budget m", f"relative {name} error of P", f"{name} norm")
        else:
            style.label(ax, "budget m", "relative Frobenius error of P" if ax is axes[0] else "", f"{name} heads")


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
    for method, directions, label, part in curves(data):
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
