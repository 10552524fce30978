"""Figures of the study of fitted features: their data, and who draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nla_llm.study.frames import succeeded
from nla_llm.study.medians import medians

from ._fitted_features import ERRORS, FIXED, FLOOR, START, closed, last, middle, most, with_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


HIGH = 1.6  # upper end of the errors: doing nothing is at one


def by_features(records: pd.DataFrame) -> pd.DataFrame:
    """Medians over heads of the errors on unseen tokens against the number of features."""
    fits, fixed = last(most(succeeded(records, what="fit"))), succeeded(records, what="fixed")
    shown = pd.concat([fixed, fits.assign(label="fitted")])
    shown = shown[(shown["mask"] == "causal") & (shown["tokens"] == "unseen")]
    parts = [medians(shown, ["label", "m"], e).assign(error=words) for e, words in ERRORS.items()]
    return pd.concat(parts, ignore_index=True)


def draw_features(fig: Canvas, data: pd.DataFrame) -> None:
    """A panel for each error."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    span = (data["m"].min(), data["m"].max())
    for ax, words in zip(fig.subplots(1, len(ERRORS)), ERRORS.values(), strict=True):
        part = data[data["error"] == words]
        for label in (*FIXED, "fitted"):
            draw_label(ax, part[part["label"] == label].sort_values("m"), "m", label, span)
        style.log_axes(ax, x=2, y=None)
        ax.set_ylim(0.0, HIGH)
        style.label(ax, "features m", f"relative {words}")


def draw_label(ax: Axes, part: pd.DataFrame, x: str, label: str, span: tuple[float, float]) -> None:
    """Curve of a method, or a level where it has no number of features."""
    from nla_llm.report import style  # noqa: PLC0415

    xs = list(span) if part[x].isna().all() else part[x]
    y, low, high = (part[c].iloc[0] if part[x].isna().all() else part[c] for c in ("median", "lower", "upper"))
    if label in {"uniform", "random keys", FLOOR}:
        grey = "" if label == "uniform" else None
        style.yardstick(ax, xs, y, low, high, kind=label.replace(" ", "_"), label=label, marker=grey)
        return
    name = {"elu + 1": "kernel", "positive, orthogonal": "positive", START: "hyperbolic", "fitted": "trigonometric"}
    size = np.size(xs)
    y, low, high = (np.broadcast_to(v, size) for v in (y, low, high))
    style.line(ax, xs, y, low, high, family=name[label], label=label, marker="" if label == "elu + 1" else None)


def by_text(records: pd.DataFrame) -> pd.DataFrame:
    """Medians over heads of the share closed against the number of features, for each amount of text."""
    fits = last(closed(records))
    fixed = succeeded(records, what="fixed")
    grey = fixed[fixed["label"].isin(["uniform", "random keys"])]
    levels = grey[grey["m"].isna()].drop(columns="m").merge(fixed[["m"]].dropna().drop_duplicates(), how="cross")
    grey = with_shares(pd.concat([grey[grey["m"].notna()], levels]), fixed)
    labels = [f"{w:.0f} × {n:.0f} tokens" for w, n in zip(fits["windows"], fits["n"], strict=True)]
    shown = pd.concat([fits.assign(label=labels), grey])
    shown = shown[shown["mask"] == "causal"]
    return pd.concat(
        [medians(shown, ["label", "tokens", "m"], f"share_{e}").assign(error=words) for e, words in ERRORS.items()],
        ignore_index=True,
    )


def draw_text(fig: Canvas, data: pd.DataFrame) -> None:
    """A row for unseen tokens and one for those of the calibration, a column for each error."""
    from nla_llm.report import style  # noqa: PLC0415

    axes = fig.subplots(2, len(ERRORS), sharex=True, sharey="row")
    labels = [label for label in dict.fromkeys(data["label"]) if label not in {"uniform", "random keys"}]
    looks = dict(zip(labels, zip(style.SPARE_COLOURS, ("-o", "-s", "-v"), strict=False), strict=False))
    looks = {"uniform": (style.YARDSTICKS["uniform"][0], "-x"), **looks}
    for row, tokens in zip(axes, ("unseen", "calibration"), strict=True):
        for ax, words in zip(row, ERRORS.values(), strict=True):
            part = data[(data["error"] == words) & (data["tokens"] == tokens)]
            ends(ax)
            for label, (colour, look) in looks.items():
                one = part[part["label"] == label].sort_values("m")
                band(ax, one, "m", colour=colour, label=label, look=look)
            style.log_axes(ax, x=2, y=None)
            style.label(
                ax,
                "features m" if row is axes[-1] else "",
                "share of the gap closed" if ax is row[0] else "",
                f"{words}, {tokens}",
            )


def band(ax: Axes, part: pd.DataFrame, x: str, *, colour: str, label: str, look: str) -> None:
    """Medians with their intervals."""
    ax.plot(part[x], part["median"], look, markersize=3, color=colour, label=label)
    ax.fill_between(part[x], part["lower"], part["upper"], color=colour, alpha=0.15, linewidth=0)


def ends(ax: Axes) -> None:
    """Nothing closed, and all closed."""
    from nla_llm.report import style  # noqa: PLC0415

    ax.axhline(0.0, color=style.INK, linewidth=0.8, linestyle=":", label="start: Hedgehog, unfitted")
    ax.axhline(1.0, color=style.YARDSTICKS["optimal_rank"][0], linewidth=1.1, label="optimal rank")


def by_steps(records: pd.DataFrame) -> pd.DataFrame:
    """Medians over heads of the Frobenius error against the steps of the fit, for each amount of text."""
    m = middle(records)
    fits, fixed = succeeded(records, what="fit"), succeeded(records, what="fixed")
    fits = fits[(fits["m"] == m) & (fits["mask"] == "causal")]
    start = fixed[(fixed["m"] == m) & (fixed["mask"] == "causal") & (fixed["label"] == START)]
    fits = pd.concat([start.assign(windows=w) for w in sorted(fits["windows"].unique())] + [fits])
    levels = fixed[
        (fixed["m"].isna() | (fixed["m"] == m)) & (fixed["mask"] == "causal") & (fixed["tokens"] == "unseen")
    ]
    levels = levels[levels["label"].isin(["uniform", "random keys", FLOOR])].assign(tokens="", windows=np.nan)
    return pd.concat(
        [
            medians(fits.assign(label="fitted"), ["label", "tokens", "windows", "steps", "n"], "frobenius"),
            medians(levels, ["label", "tokens", "windows", "steps", "n"], "frobenius"),
        ],
        ignore_index=True,
    )


def draw_steps(fig: Canvas, data: pd.DataFrame) -> None:
    """A panel for each amount of text; what is fitted dashed, what is not seen full."""
    from nla_llm.report import style  # noqa: PLC0415

    fits = data[data["label"] == "fitted"]
    windows = sorted(fits["windows"].unique())
    span = (0.0, float(fits["steps"].max()))
    for ax, count in zip(fig.subplots(1, len(windows), sharey=True, squeeze=False)[0], windows, strict=True):
        for label in ("uniform", "random keys", FLOOR):
            level = data[data["label"] == label].iloc[0]
            style.yardstick(ax, span, level["median"], level["lower"], level["upper"],
                            kind=label.replace(" ", "_"), label=label, marker="")  # fmt: skip
        for tokens, colour, line in (("calibration", "#0072B2", "--"), ("unseen", "#D55E00", "-")):
            one = fits[(fits["windows"] == count) & (fits["tokens"] == tokens)].sort_values("steps")
            band(ax, one, "steps", colour=colour, label=f"{tokens} tokens", look=f"{line}o")
        ax.set_xscale("symlog", linthresh=5)
        ax.set_xticks(sorted(fits["steps"].unique()), [f"{s:.0f}" for s in sorted(fits["steps"].unique())])
        ax.minorticks_off()
        words = f"{count:.0f} × {fits['n'].iloc[0]:.0f} tokens"
        style.label(ax, "steps of the fit", "relative Frobenius error of P" if count == windows[0] else "", words)


def by_layer(records: pd.DataFrame) -> pd.DataFrame:
    """Medians over the heads of each layer of the Frobenius error, with the causal mask and without."""
    m = middle(records)
    fits = last(most(succeeded(records, what="fit")))
    fixed = succeeded(records, what="fixed")
    fixed = fixed[fixed["tokens"] == "unseen"]
    fits = fits.assign(label=[f"fitted, {tokens} tokens" for tokens in fits["tokens"]])
    shown = pd.concat([fixed, fits])
    shown = shown[shown["m"].isna() | (shown["m"] == m)]
    return medians(shown, ["mask", "label", "layer"], "frobenius")


def draw_layers(fig: Canvas, data: pd.DataFrame) -> None:
    """A panel with the causal mask and one without."""
    from nla_llm.report import style  # noqa: PLC0415

    looks = {
        "uniform": ("#7A7A7A", "x"), "random keys": ("#A8A8A8", "v"), FLOOR: ("#4A4A4A", "D"),
        "elu + 1": ("#0072B2", "o"), START: ("#CC79A7", "s"), "positive, orthogonal": ("#009E73", "^"),
        "fitted, calibration tokens": ("#E69F00", "P"), "fitted, unseen tokens": ("#D55E00", "o"),
    }  # fmt: skip
    layers = sorted(data["layer"].unique())
    titles = {"causal": "causal", "none": "without mask"}
    for ax, (mask, title) in zip(fig.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for i, (label, (colour, marker)) in enumerate(looks.items()):
            part = data[(data["mask"] == mask) & (data["label"] == label)].sort_values("layer")
            bars = np.abs(np.stack([part["median"] - part["lower"], part["upper"] - part["median"]]))
            ax.errorbar(part["layer"] + 0.09 * (i - 3.5), part["median"], bars, fmt=marker, color=colour,
                        markersize=3.5, elinewidth=0.8, label=label)  # fmt: skip
        ax.set_ylim(0.0, HIGH)
        ax.set_xticks(layers, [f"{layer:.0f}" for layer in layers])
        style.label(ax, "layer", "relative Frobenius error of P" if mask == "causal" else "", title)
