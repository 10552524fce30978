"""Drawings of the study of LoRA's conditioning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Canvas

BAND = ("median", "lower", "upper")
RULES = {
    "gradient_descent": "gradient descent",
    "momentum": "momentum",
    "adam": "Adam",
    "lora_plus": "LoRA+",
    "scaled_gd": "scaled gradient descent",
    "alternating": "alternating least squares",
}
SHORT = {  # in tables
    "gradient_descent": "GD",
    "momentum": "momentum",
    "adam": "Adam",
    "lora_plus": "LoRA+",
    "scaled_gd": "scaled GD",
    "alternating": "ALS",
}
STARTS = {
    "gaussian": "zero B, Gaussian A",
    "pissa": "PiSSA",
    "milora": "MiLoRA",
    "olora": "OLoRA",
    "lora_ga": "LoRA-GA",
    "lora_one": "LoRA-One",
    "eva": "EVA",
    "corda": "CorDA",
}
LEAST = 1e-16  # where an error of exactly zero is drawn


def _curve(ax: Any, part: pd.DataFrame, x: str, name: str, label: str) -> None:
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    part = part[part[x] > 0]
    values = (np.maximum(part[c], LEAST) for c in BAND)
    style.line(ax, part[x], *values, family=name, label=label, marker="o" if len(part) == 1 else "")


def _title(target: str) -> str:
    return "spectrum i^(−1/2)" if target == "power law" else f"κ = {target}"


def race(fig: Canvas, data: pd.DataFrame) -> None:
    """Error against the step, a panel for each update."""
    from nla_llm.report import style  # noqa: PLC0415

    targets = list(dict.fromkeys(data["target"]))
    columns = min(3, len(targets))
    rows = -(-len(targets) // columns)
    grid = fig.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for spare in grid[len(targets) :]:
        spare.set_visible(False)
    for i, (ax, target) in enumerate(zip(grid, targets, strict=False)):
        part = data[data["target"] == target]
        for rule, label in RULES.items():
            _curve(ax, part[part["optimiser"] == rule], "step", rule, label)
        floor = float(part["floor"].iloc[0])
        if floor > LEAST:
            span = [1, part["step"].max()]
            style.yardstick(ax, span, floor, kind="optimal_rank", label="truncated decomposition", marker="")
        style.log_axes(ax)
        style.label(ax, "step", "relative error" if i % columns == 0 else "", _title(target))


def condition(fig: Canvas, data: pd.DataFrame) -> None:
    """Steps to a tolerance, and one minus the factor per step, against the condition."""
    from nla_llm.report import style  # noqa: PLC0415

    left, right = fig.subplots(1, 2)
    steps = data[data["panel"] == "steps"]
    most = float(steps["steps"].max())
    for rule, label in RULES.items():
        part = steps[steps["optimiser"] == rule]
        known = part[np.isfinite(part["upper"])]
        if len(known):
            style.line(left, known["condition"], *(known[c] for c in BAND), family=rule, label=label)
        lost = part[~np.isfinite(part["upper"])]
        mark = {"marker": "x", "linestyle": "", "color": style.colour(rule), "label": None if len(known) else label}
        height = most * 1.6 ** (1 + list(RULES).index(rule))  # side by side above the steps that were given
        left.plot(lost["condition"], np.full(len(lost), height), **mark)
    left.axhline(most, color=style.INK, linewidth=0.6, linestyle=":")
    for name, part in data[data["panel"] == "factor"].groupby("optimiser", sort=False):
        rule, _, rate = str(name).partition(", ")
        look = {"variant": "iid" if rate.endswith("0.2") else "orthogonal"}
        text = f"{RULES[rule]}, {rate or 'best rate'}"
        style.line(right, part["condition"], *(part[c] for c in BAND), family=rule, label=text, **look)
        style.theory_line(right, part["condition"], part["theory"], family=rule, label="closed form")
    style.log_axes(left)
    style.log_axes(right)
    style.label(left, "condition number κ of the update", "steps to a relative error of 10⁻⁶", "from a random start")
    style.label(right, "condition number κ of the update", "1 − factor per step", "near the optimum")


def bound(fig: Canvas, data: pd.DataFrame) -> None:
    """Errors near the optimum against the step, and the published bound."""
    from nla_llm.report import style  # noqa: PLC0415

    axes = fig.subplots(1, 3, sharey=True)
    targets = sorted(set(data["target"]), key=float)
    panels = (("scaled_gd", 0.5), ("scaled_gd", 0.2), ("gradient_descent", None))
    for ax, (rule, rate) in zip(axes, panels, strict=True):
        part = data[(data["optimiser"] == rule) & (data["rate"].isna() if rate is None else data["rate"] == rate)]
        for (target, seed), line in part.groupby(["target", "seed"], sort=False):
            shade = style.SPARE_COLOURS[targets.index(target)]
            ax.plot(line["step"], np.maximum(line["error"], 1e-13), color=shade, linewidth=0.9,
                    label=f"κ = {target}" if seed == 0 else None)  # fmt: skip
        if rate is not None:
            first = part[(part["target"] == targets[0]) & (part["seed"] == 0)]
            style.theory_line(ax, first["step"], first["bound"], label="bound of the theorem")
        style.log_axes(ax, x=None)
        title = f"scaled, η = {rate:g}" if rate is not None else "gradient descent"
        style.label(ax, "step", "error over σ_r" if ax is axes[0] else "", title)
    axes[0].set_ylim(bottom=1e-12)


def pair(fig: Canvas, data: pd.DataFrame) -> None:
    """Condition numbers of A, B and BA, and angles to the optimal spaces, against the step."""
    from nla_llm.report import style  # noqa: PLC0415

    grid = fig.subplots(2, 3, sharex=True)
    titles = {
        "kappa_A": "κ₂(A)", "kappa_B": "κ₂(B)", "kappa_product": "κ₂(BA)",
        "angle_left": "angle of column spaces", "angle_right": "angle of row spaces",
    }  # fmt: skip
    for ax, (name, title) in zip(grid.ravel(), titles.items(), strict=False):
        part = data[data["quantity"] == name]
        for rule, label in RULES.items():
            _curve(ax, part[part["optimiser"] == rule], "step", rule, label)
        style.log_axes(ax)
        style.label(ax, "step", "radians" if name.startswith("angle") else "", title)
    grid[1, 2].set_visible(False)


def starts(fig: Canvas, data: pd.DataFrame) -> None:
    """Error on the inputs against the step, a panel for each place of the update."""
    from nla_llm.report import style  # noqa: PLC0415

    places = list(dict.fromkeys(data["where"]))
    axes = fig.subplots(1, len(places), sharey=True)
    for ax, where in zip(axes, places, strict=True):
        part = data[data["where"] == where]
        for name, label in STARTS.items():
            _curve(ax, part[part["initialisation"] == name], "step", name, label)
        floor, span = float(part["floor"].iloc[0]), [1, part["step"].max()]
        style.yardstick(ax, span, floor, kind="optimal_rank", label="truncated decomposition", marker="")
        style.log_axes(ax)
        style.label(ax, "step", "relative error of outputs" if ax is axes[0] else "", f"update in {where} spaces")


def streams(fig: Canvas, data: pd.DataFrame) -> None:
    """Error at the end of noisy training against the condition."""
    from nla_llm.report import style  # noqa: PLC0415

    ax = fig.subplots()
    for rule, label in RULES.items():
        part = data[data["optimiser"] == rule]
        if len(part):
            style.line(ax, part["target"].astype(float), *(part[c] for c in BAND), family=rule, label=label)
    style.log_axes(ax)
    style.label(ax, "condition number κ of the update", "relative error in the last quarter")
