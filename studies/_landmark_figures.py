"""Figures of the study of landmarks: their data, and who draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nla_llm.study.medians import medians
from nla_llm.theory import columns

from ._landmarks import FILTERS, KINDS, METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

NORMS = {
    "relative_frobenius": "Frobenius error of P",
    "relative_spectral": "spectral error of P",
    "output_error": "error of P v",
}
YARDSTICKS = ("uniform", "random keys", "optimal rank")
TOP = 12.0  # errors beyond are written, not drawn: they would squeeze all others into a line
DRAWN = tuple(label for label in METHODS if label not in {"Linformer, Gaussian", "Gaussian projection"})
PROJECTIONS = ("Gaussian projection", "Linformer, Gaussian", "Linformer, means")


AXIS = r"$a\,/\sqrt{\|A\|_1\|A\|_\infty}$"
SAME_COLOUR = {  # as the curve of another figure
    "j steps": "Nyströmformer, 6 steps",
    "pseudo-inverse": "Nyströmformer, pinv",
    "ridge of j steps": "CUR, ridge",
    "Skyformer to its target": "CUR, optimal core",
    "Skyformer to softmax": "Linformer, means",
}
MARKERS = dict(zip((label for label in METHODS if label not in YARDSTICKS), "osv^DPX*", strict=True))


def key(label: str) -> str:
    """Name by which a curve takes its colour, the same in all figures."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    for name in MARKERS:  # colours are handed out in the order in which they are asked for
        style.colour(name)
    return label.replace(" ", "_") if label in YARDSTICKS else SAME_COLOUR.get(label, label)


def curve(ax: Axes, part: pd.DataFrame, x: str, label: str, **look: Any) -> None:
    """Medians with their band; a yardstick in grey, a level where it has no budget."""
    from nla_llm.report import style  # noqa: PLC0415

    if part[x].isna().all():
        low, high = ax.get_xlim() if not look.get("span") else look["span"]
        row = part.iloc[0]
        style.yardstick(
            ax, [low, high], row["median"], row["lower"], row["upper"], kind=key(label), label=label, marker=""
        )
        return
    part = part.sort_values(x)
    name = key(label)
    values = (part[x], part["median"], part["lower"], part["upper"])
    if label in YARDSTICKS:
        style.yardstick(ax, *values, kind=name, label=label)
    else:
        style.line(ax, *values, family=name, label=label, marker=MARKERS[name])


# -- steps of the iteration --------------------------------------------------------------------------------------------


def iterations(cores: pd.DataFrame, methods: pd.DataFrame) -> pd.DataFrame:
    """Medians over heads of three errors, for each way to invert the core and for the yardsticks at that budget."""
    grey = methods[methods["label"].isin(YARDSTICKS) & (methods["m"].isna() | (methods["m"] == cores["m"].iloc[0]))]
    parts = [
        medians(found, ["problem", name, "iterations"], column).rename(columns={name: "curve"}).assign(error=words)
        for column, words in NORMS.items()
        for found, name in ((cores, "core"), (grey.assign(iterations=np.nan), "label"))
    ]
    return pd.concat(parts, ignore_index=True)


def draw_iterations(fig: Canvas, data: pd.DataFrame) -> None:
    """A row for each error, a column for each kind of head."""
    from nla_llm.report import style  # noqa: PLC0415

    axes = fig.subplots(len(NORMS), len(KINDS), squeeze=False, sharex=True)
    span = (data["iterations"].min(), data["iterations"].max())
    named = {"iteration": "j steps", "ridge": "ridge of j steps"}
    for row, words in zip(axes, NORMS.values(), strict=True):
        for ax, kind in zip(row, KINDS, strict=True):
            ax.tick_params(labelsize=7)
            part = data[(data["problem"] == kind) & (data["error"] == words)]
            for label in YARDSTICKS:
                curve(ax, part[part["curve"] == label], "iterations", label, span=span)
            for core, label in named.items():
                curve(ax, part[part["curve"] == core], "iterations", label)
            style.log_axes(ax, x=None)
            ax.set_ylim(0.6 * part["median"].min(), min(1.4 * part["median"].max(), TOP))
            level(ax, part[part["curve"] == "pinv"].iloc[0], span)
            first_row, first_column = ax is axes[0, list(KINDS).index(kind)], ax is row[0]
            style.label(
                ax,
                "steps j" if row is axes[-1] else "",
                f"relative {words}" if first_column else "",
                kind if first_row else None,
            )


def level(ax: Axes, pinv: pd.Series, span: tuple[float, float]) -> None:
    """The pseudo-inverse as a level, or as words where it lies above the panel."""
    from nla_llm.report import style  # noqa: PLC0415

    if pinv["median"] <= TOP:
        style.theory_line(ax, list(span), pinv["median"], family=key("pseudo-inverse"), label="pseudo-inverse")
    else:
        text = f"pseudo-inverse:\n{pinv['median']:.2g}"
        ax.text(0.04, 0.97, text, transform=ax.transAxes, va="top", fontsize=7)


# -- the filter --------------------------------------------------------------------------------------------------------


def shares(filters: pd.DataFrame) -> pd.DataFrame:
    """Measured and promised shares of the singular values of one head of each kind; the first layer of the model."""
    found = filters[filters["value"].notna() & (filters["layer"].isna() | (filters["layer"] == 0))]
    return found[["problem", "iterations", "value", "share", "promised"]]


def draw_filters(fig: Canvas, data: pd.DataFrame) -> None:
    """Left: shares against singular values. Right: the singular values themselves."""
    from nla_llm.report import style  # noqa: PLC0415

    left, right = fig.subplots(1, 2)
    a = np.geomspace(max(1e-6, data["value"].min()), 1.0, 200)
    left.axhline(1.0, color=style.YARDSTICKS["uniform"][0], linewidth=1.0, label="pseudo-inverse")
    ridge = a**2 / (a**2 + columns.iteration_ridge(6))
    left.plot(a, ridge, color=style.YARDSTICKS["random_keys"][0], label="ridge, 6 steps")
    for i, steps in enumerate(FILTERS):
        colour = style.SPARE_COLOURS[i]
        measured = data[data["iterations"] == steps]
        left.plot(measured["value"], measured["share"], "o", markersize=2.2, color=colour, label=f"{steps} steps")
        left.plot(a, columns.inverted_share(a, 1.0, steps), "--", linewidth=1.0, color=colour)
    style.log_axes(left)
    left.set_xlim(a[0], 1.3)
    left.set_ylim(1e-8, 3)
    style.label(left, AXIS, "share that is inverted", "filter")
    for i, kind in enumerate(KINDS):
        part = data[(data["problem"] == kind) & (data["iterations"] == FILTERS[0])]
        values = np.sort(part["value"])[::-1]
        right.plot(np.arange(1, len(values) + 1), values, style_of(i), markersize=2.4, color=tint(i), label=kind)
    for steps in FILTERS[::2]:
        half = a[np.argmin(np.abs(columns.inverted_share(a, 1.0, steps) - 0.5))]
        right.axhline(half, color=style.INK, linewidth=0.7, linestyle=":")
        right.text(1.01, half, f"{steps} steps", transform=right.get_yaxis_transform(), fontsize=7, va="center")
    style.log_axes(right, x=None)
    right.set_ylim(0.5 * data["value"].min(), 2.0)
    style.label(right, "index", AXIS, "singular values of the cores")


def style_of(i: int) -> str:
    """Marker of a kind of heads."""
    return ("o", "s", "^", "v")[i]


def tint(i: int) -> str:
    """Colour of a kind of heads, none of a method."""
    return ("#0072B2", "#D55E00", "#009E73", "#CC79A7")[i]


# -- the condition of the core -----------------------------------------------------------------------------------------


def conditions(methods: pd.DataFrame) -> pd.DataFrame:
    """Errors of every head at every budget beside the condition of its core, those of the yardsticks too."""
    keys = ["problem", "layer", "head", "m"]
    ends = ["relative_frobenius", "relative_frobenius_lower", "relative_frobenius_upper"]
    own = methods[methods["label"] == "Nyströmformer, pinv"][[*keys, "condition"]]
    shown = methods[methods["label"].isin(["Nyströmformer, 6 steps", "Nyströmformer, pinv", *YARDSTICKS[1:]])]
    return shown[[*keys, "label", *ends]].merge(own, on=keys)


def draw_condition(fig: Canvas, data: pd.DataFrame) -> None:
    """Left: a point for every head and budget. Right: medians of the condition."""
    from nla_llm.report import style  # noqa: PLC0415

    left, right = fig.subplots(1, 2)
    finite = data[np.isfinite(data["condition"])]
    for label, part in finite.groupby("label", sort=False):
        grey, _, marker = style.YARDSTICKS.get(key(label), (style.colour(key(label)), "", "o"))
        left.plot(part["condition"], part["relative_frobenius"], marker, markersize=2.0, color=grey, label=label)
    style.log_axes(left)
    style.label(left, "condition of the core, κ₂(A)", "relative Frobenius error of P", "every head and budget")
    found = finite[finite["label"] == "Nyströmformer, pinv"]
    for i, kind in enumerate(KINDS):
        part = medians(found[found["problem"] == kind], ["m"], "condition").sort_values("m")
        bars = np.abs(np.stack([part["median"] - part["lower"], part["upper"] - part["median"]]))
        right.errorbar(
            part["m"] * 1.06 ** (i - 1.5),
            part["median"],
            bars,
            fmt=f"-{style_of(i)}",
            color=tint(i),
            elinewidth=0.8,
            label=kind,
        )
    style.log_axes(right, x=2)
    style.label(right, "landmarks m", "condition of the core, κ₂(A)", "medians")


# -- methods against budget --------------------------------------------------------------------------------------------


def budgets(methods: pd.DataFrame) -> pd.DataFrame:
    """Medians over heads of the Frobenius error of every method."""
    shown = methods[methods["label"].isin(DRAWN)]
    return medians(shown, ["problem", "label", "m"], "relative_frobenius")


def draw_methods(fig: Canvas, data: pd.DataFrame) -> None:
    """A panel for each kind of head."""
    from nla_llm.report import style  # noqa: PLC0415

    span = (data["m"].min(), data["m"].max())
    for ax, kind in zip(fig.subplots(2, 2).flat, KINDS, strict=True):
        part, above = data[data["problem"] == kind], []
        for label in DRAWN:
            found = part[part["label"] == label]
            if found["median"].min() > TOP:
                above.append(f"{label}: {found['median'].min():.2g} to {found['median'].max():.2g}")
            else:
                curve(ax, found, "m", label, span=span)
        style.log_axes(ax, x=2)
        ax.set_ylim(top=min(ax.get_ylim()[1], TOP))
        if above:
            ax.text(0.02, 0.98, "\n".join(above), transform=ax.transAxes, va="top", fontsize=7.5)
        first = ax.get_subplotspec()
        style.label(
            ax,
            "budget m" if first.is_last_row() else "",
            "relative Frobenius error of P" if first.is_first_col() else "",
            kind,
        )


# -- projections -------------------------------------------------------------------------------------------------------


def linformer(methods: pd.DataFrame, counter: pd.DataFrame) -> pd.DataFrame:
    """Left: medians over the heads of the model. Right: root mean square of the error of one vector."""
    model = methods[(methods["problem"] == "model") & methods["label"].isin([*PROJECTIONS, *YARDSTICKS])]
    left = medians(model, ["label", "m", "n"], "relative_frobenius").assign(panel="model")
    columns_of = {"median": "square", "lower": "square_lower", "upper": "square_upper", "promised": "promised"}
    roots = {name: np.sqrt(counter[column].clip(lower=0.0)) for name, column in columns_of.items()}
    names = counter["method"].map({"gaussian_projection": "Gaussian projection", "random_keys": "random keys"})
    right = counter[["m"]].assign(label=names, panel="counter-example", **roots)
    return pd.concat([left, right], ignore_index=True)


def draw_linformer(fig: Canvas, data: pd.DataFrame) -> None:
    """Projections on the heads of the model, and the vector that the published bound forgets."""
    from nla_llm.report import style  # noqa: PLC0415

    left, right = fig.subplots(1, 2)
    model = data[data["panel"] == "model"]
    span = (model["m"].min(), model["m"].max())
    for label in (*PROJECTIONS, *YARDSTICKS):
        curve(left, model[model["label"] == label], "m", label, span=span)
    m = np.geomspace(*span, 50)
    law = np.sqrt((model["n"].max() + 1) / m)
    style.theory_line(left, m, law, label="exact law")
    left.axhline(1.0, color=style.INK, linewidth=0.8, linestyle=":")
    style.log_axes(left, x=2)
    style.label(left, "directions m", "relative Frobenius error of P", "heads of the model")
    example = data[data["panel"] == "counter-example"].sort_values("m")
    for label, part in example.groupby("label", sort=False):
        curve(right, part, "m", label)
        if part["promised"].notna().any():
            style.theory_line(right, part["m"], part["promised"], label="exact law")
    style.log_axes(right, x=2)
    right.set_ylim(bottom=1e-3)
    words = r"$P = \mathbf{1}\mathbf{1}^T\!/n,\ w \perp \mathbf{1}$"
    style.label(right, "directions m", r"$|\hat{P} w - P w|\,/\,|w|$", words)


# -- Skyformer ---------------------------------------------------------------------------------------------------------


def skyformer(sky: pd.DataFrame, methods: pd.DataFrame) -> pd.DataFrame:
    """Medians over heads of its errors, of what bounds them, and of the yardsticks of softmax."""
    named = {
        "to_target": "Skyformer to its target",
        "floor": "optimal rank",
        "to_softmax": "Skyformer to softmax",
        "target_to_softmax": "target to softmax",
    }
    parts = [medians(sky, ["problem", "m"], column).assign(label=label) for column, label in named.items()]
    grey = methods[methods["label"].isin(YARDSTICKS[:2])]
    parts.append(medians(grey, ["problem", "label", "m"], "relative_frobenius"))
    return pd.concat(parts, ignore_index=True)


def draw_skyformer(fig: Canvas, data: pd.DataFrame) -> None:
    """A panel for each kind of head."""
    from nla_llm.report import style  # noqa: PLC0415

    span = (data["m"].min(), data["m"].max())
    for ax, kind in zip(fig.subplots(2, 2).flat, KINDS, strict=True):
        part = data[data["problem"] == kind]
        for label in ("Skyformer to its target", "optimal rank", "Skyformer to softmax", "uniform", "random keys"):
            curve(ax, part[part["label"] == label], "m", label, span=span)
        target = part[part["label"] == "target to softmax"]
        style.theory_line(
            ax, target["m"], target["median"], family=key("Skyformer to softmax"), label="target to softmax"
        )
        style.log_axes(ax, x=2)
        first = ax.get_subplotspec()
        style.label(
            ax,
            "sampled tokens m" if first.is_last_row() else "",
            "relative Frobenius error" if first.is_first_col() else "",
            kind,
        )
