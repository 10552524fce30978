"""Random features against their closed forms: variance, growth, what orthogonality buys, published figures."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import nla_llm as nl
from nla_llm.methods.registry import registered
from nla_llm.problems import gallery
from nla_llm.study import Claim, Figure, Study, Table
from nla_llm.study.frames import standard_error, succeeded
from nla_llm.study.measuring import kernel_error
from nla_llm.study.roster import ROSTER
from nla_llm.theory import random_features as rf

from . import _performer as performer

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure as Canvas

SIZES = {  # draws of a kernel; tokens, draws and numbers of features of Performer's Figure 4
    "small": (200, 128, 6, (16, 64)),
    "default": (400, 512, 15, (16, 32, 64, 128, 256)),
    "full": (4000, 4096, 15, (16, 32, 64, 128, 256)),
}
FEATURES = ("positive_features", "trigonometric_features", "hyperbolic_features")
M, DIM, TOKENS = 12, 4, 12  # of the closed forms: three blocks of directions
SCALE = 0.45  # of queries and keys there: |x + y|² stays where a variance can be measured by sampling
GROWTH = (0.25, 0.5, 1.0, 1.5, 2.0)  # |x + y|² at which the growth is measured; beyond, fourth moments explode
DIMS = (4, 16, 64)
STANDARD_ERRORS = 4.0  # standard errors within which a closed form has to be met


def cells(scale: str) -> list[dict[str, Any]]:
    """Closed forms, growth with the norm, and Performer's Figure 4."""
    draws, n, repeats, features = SIZES[scale]
    known = [label for label, entry in ROSTER.items() if closed_form(entry)]
    found: list[dict[str, Any]] = [{"what": "closed form", "label": label, "draws": draws} for label in known]
    found += [
        {"what": "growth", "method": name, "directions": kind, "d": 16, "t": t, "draws": 25 * draws}
        for name in FEATURES
        for kind in ("iid", "orthogonal")
        for t in GROWTH
    ]
    return found + performer.cells(n, repeats, features)


def closed_form(entry: Any) -> bool:
    """Whether theory knows mean and variance of the kernel of an entry of the roster."""
    if not hasattr(registered(entry.method), "theory") or entry.budget != "m":
        return False
    promise = entry.make(M).theory(small_problem())
    return promise is not None and promise.kind == "closed form" and "relative_variance" in promise.covers


def small_problem() -> nl.AttentionProblem:
    """A few short tokens."""
    return gallery.gaussian(TOKENS, DIM, scale=SCALE, rng=0)


def measure(cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """One measured number beside what was promised."""
    if cell["what"] == "closed form":
        entry = ROSTER[cell["label"]]
        measured, promised = kernel_error(small_problem(), entry.make(M), draws=cell["draws"], seed=seed)
        return {"method": entry.method, "error": measured, "promised": float(promised)}
    if cell["what"] == "growth":
        return growth(cell, seed)
    return performer.measure(cell, seed)


def growth(cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """Relative mean square error of one entry, x = y (or x = −y for trigonometric features), m = d directions."""
    d, sign = cell["d"], -1.0 if cell["method"] == "trigonometric_features" else 1.0
    x = np.zeros((1, d))
    x[0, 0] = 0.5 * cell["t"] ** 0.5
    p = nl.AttentionProblem(x, sign * x, scale=1.0)
    method = nl.method(cell["method"], m=d, directions=cell["directions"])
    measured, promised = kernel_error(p, method, draws=cell["draws"], seed=seed)
    return {"error": measured, "promised": float(promised)}


# -- figures -----------------------------------------------------------------------------------------------------------


def draw_closed(fig: Canvas, data: pd.DataFrame) -> None:
    """Measured over promised for every method, with 4 standard errors."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    ax = fig.subplots()
    places = np.arange(len(data))
    ax.axvline(1.0, color=style.INK, linewidth=0.9)
    ax.errorbar(
        data["ratio"],
        places,
        xerr=STANDARD_ERRORS * data["standard_error"],
        fmt="o",
        color=style.FAMILIES["kernel"],
        markersize=3.5,
        elinewidth=0.9,
    )
    ax.set_yticks(places, data["label"], fontsize=7.5)
    style.label(ax, "measured mean square error over the closed form, ± 4 standard errors", "")


def draw_growth(fig: Canvas, data: pd.DataFrame) -> None:
    """Left: growth of the relative variance, theory and samples. Right: what orthogonal and simplex blocks buy."""
    from nla_llm.report import style  # noqa: PLC0415

    left, right = fig.subplots(1, 2)
    for name, curve in data[data["panel"] == "growth"].groupby("curve", sort=False):
        style.theory_line(left, curve["t"], curve["theory"], family=curve["method"].iloc[0], label=name)
    measured = data[data["panel"] == "measured"]
    for (method, kind), part in measured.groupby(["method", "directions"], sort=False):
        bars = np.abs(np.stack([part["value"] - part["lower"], part["upper"] - part["value"]]))
        left.errorbar(
            part["t"],
            part["value"],
            bars,
            fmt="s" if kind == "orthogonal" else "o",
            color=style.colour(method),
            markersize=3,
            elinewidth=0.8,
        )
    for (curve, d), part in data[data["panel"] == "gain"].groupby(["curve", "d"], sort=False):
        shade = style.SPARE_COLOURS[DIMS.index(int(d))]
        right.plot(
            part["t"],
            part["theory"],
            "--" if curve == "simplex" else "-",
            color=shade,
            linewidth=1.1,
            label=f"{curve}, d = {d:.0f}",
        )
    style.log_axes(left)
    style.log_axes(right, y=None)
    style.label(
        left, "t = |x + y|² (|x − y|² for trigonometric)", "relative variance of one entry, m = d = 16", "growth"
    )
    style.label(right, "t = |x + y|²", "variance over that of independent directions", "gain of blocks, m = d")


def draw_angles(fig: Canvas, data: pd.DataFrame) -> None:
    """Performer's Figure 2: trigonometric over positive mean square error against the angle, by closed form."""
    from nla_llm.report import style  # noqa: PLC0415

    ax = fig.subplots()
    for i, (norm, curve) in enumerate(data.groupby("norm")):
        ax.plot(curve["angle"] / np.pi, curve["ratio"], color=style.SPARE_COLOURS[i], label=f"|x| = |y| = {norm:g}")
    ax.axhline(1.0, color=style.INK, linewidth=0.9)
    ax.axvline(0.5, color=style.INK, linewidth=0.6, linestyle=":")
    style.log_axes(ax, x=None)
    ax.set_ylim(1e-4, 1e6)
    style.label(ax, "angle between x and y, in units of π", "error of trigonometric over positive")


def figures(records: pd.DataFrame) -> list[Figure]:
    """The four figures."""
    ok = succeeded(records)
    n = int(ok["n"].dropna().iloc[0])
    wide: dict[str, Any] = {"size": (6.5, 3.5), "panels": (1, 2)}
    closed = ratios(ok)
    captions = {
        "closed": "Mean square error of the kernel before normalisation over its closed form, for every method that "
        f"has one ({TOKENS} tokens of dimension {DIM}, m = {M}).",
        "growth": "Left: relative variance of one entry against its norm, closed forms dashed, samples as markers with "
        "95 % intervals (squares: orthogonal) as far as a variance can be sampled. Right: what orthogonal (full) and "
        "simplex (dashed) blocks save, by closed form: the gain vanishes as t grows.",
        "angles": "Mean square error of trigonometric features over that of positive ones per direction, by closed "
        "form: Figure 2 of Choromanski et al. 2021. Below the line trigonometric features are better; at a right "
        "angle they always are, by more than two.",
        "figure-4": f"Figure 4 of Choromanski et al. 2021, n = {n}, d = 16: error of the output, medians over draws "
        "with their intervals, for three normalisations of queries and keys, between doing nothing and the best.",
    }
    return [
        Figure("closed", captions["closed"], draw_closed, closed, size=(6.5, 0.6 + 0.15 * len(closed))),
        Figure("growth", captions["growth"], draw_growth, growth_data(ok), **wide),
        Figure("angles", captions["angles"], draw_angles, angle_data(), size=(6.5, 3.0)),
        Figure("figure-4", captions["figure-4"], performer.draw, performer.data(ok), size=(6.5, 3.4), panels=(1, 3)),
    ]


def ratios(ok: pd.DataFrame) -> pd.DataFrame:
    """Measured over promised, with the standard error."""
    closed = ok[ok["what"] == "closed form"]
    return closed.assign(
        ratio=closed["error"] / closed["promised"],
        standard_error=standard_error(closed, "error", closed["draws"]) / closed["promised"],
    )[["label", "method", "ratio", "standard_error", "error", "error_lower", "error_upper", "promised"]]


def growth_data(ok: pd.DataFrame) -> pd.DataFrame:
    """Closed forms over a wide range of norms, samples where they mean something, and ratios of blocks."""
    t, d, parts = np.geomspace(0.1, 100, 61), 16, []
    for name in FEATURES:
        short = name.removesuffix("_features")
        curve = rf.relative_variance(short, t, m=d, d=d, directions="iid")
        parts.append(pd.DataFrame({"panel": "growth", "curve": short, "method": name, "t": t, "theory": curve}))
    optimal = np.exp(rf.log_optimal_positive_variance(t, d, m=d))
    parts.append(
        pd.DataFrame(
            {"panel": "growth", "curve": "GERF, optimal", "method": "gerf_features", "t": t, "theory": optimal}
        )
    )
    sampled = ok[ok["what"] == "growth"]
    values = {"value": sampled["error"], "lower": sampled["error_lower"], "upper": sampled["error_upper"]}
    parts.append(sampled[["method", "directions", "t"]].assign(panel="measured", **values))
    for kind in ("orthogonal", "simplex"):
        for size in DIMS:
            logs = [rf.log_relative_variance("positive", t, m=size, d=size, directions=k) for k in (kind, "iid")]
            parts.append(
                pd.DataFrame({"panel": "gain", "curve": kind, "d": size, "t": t, "theory": np.exp(logs[0] - logs[1])})
            )
    return pd.concat(parts, ignore_index=True)


def angle_data() -> pd.DataFrame:
    """The closed form of Performer's Figure 2."""
    angle = np.linspace(0.02, np.pi - 0.02, 200)
    parts = [
        pd.DataFrame({"norm": norm, "angle": angle, "ratio": rf.trigonometric_to_positive(norm, angle)})
        for norm in (0.25, 0.5, 1.0, 2.0)
    ]
    return pd.concat(parts, ignore_index=True)


def tables(_: pd.DataFrame) -> list[Table]:
    """Growth by closed form: how many directions a relative variance of one costs."""
    rows = []
    for t in (1.0, 4.0, 16.0, 64.0):
        row: dict[str, Any] = {"t": t}
        for short in ("trigonometric", "positive", "hyperbolic"):
            row[short] = float(rf.log_relative_variance(short, t, m=1) / np.log(10))
        row["GERF, optimal"] = float(rf.log_optimal_positive_variance(t, 64) / np.log(10))
        rows.append(row)
    caption = (
        "Decimal logarithm of the number of directions that bring the relative variance of one entry to one, by "
        "closed form, d = 64; t is |x + y|², for trigonometric features |x − y|². For standard normal queries and "
        "keys of that dimension t is 16 in the mean."
    )
    return [Table("directions", caption, pd.DataFrame(rows))]


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[Callable[[], Any]]:
    """What the records say."""
    ok = succeeded(records)
    return [partial(closed_form_claim, ok), gain_claim, right_angle_claim, *performer.claims(ok)]


def closed_form_claim(ok: pd.DataFrame) -> Claim:
    """Measured over promised, in standard errors."""
    found = ratios(ok)
    worst = float(((found["ratio"] - 1).abs() / found["standard_error"]).max())
    return Claim.decide(
        "The mean square error of the kernel equals its closed form within 4 standard errors, for every method that "
        "has one",
        worst,
        worst,
        STANDARD_ERRORS,
        "<",
        number=f"largest deviation {worst:.2g} standard errors over {len(found)} methods",
    )


def gain_claim() -> Claim:
    """Orthogonality's gain at a large norm, by closed form."""
    ratio = float(
        np.exp(
            rf.log_relative_variance("positive", 16.0, m=64, d=64, directions="orthogonal")
            - rf.log_relative_variance("positive", 16.0, m=64)
        )
    )
    return Claim.decide(
        "Orthogonal directions lower the variance of positive features noticeably (by 5 % or more) at t = 16, the "
        "mean for standard normal inputs of dimension 64",
        ratio,
        ratio,
        0.95,
        "<",
        number=f"variance over that of independent directions {ratio:.4f}, by closed form",
        expected="refuted",
        source="read into Choromanski et al. 2021, arXiv 2009.14794, Theorem 2",
    )


def right_angle_claim() -> Claim:
    """Positive features against trigonometric ones where the kernel is one."""
    ratio = float(rf.trigonometric_to_positive(1.0, np.pi / 2))
    return Claim.decide(
        "Positive features have a smaller error than trigonometric ones for orthogonal x and y, per direction",
        ratio,
        ratio,
        1.0,
        ">",
        number=f"trigonometric over positive {ratio:.3f} at |x| = |y| = 1, and below one half for every norm",
        expected="refuted",
        source="read into Choromanski et al. 2021, arXiv 2009.14794, section 4",
    )


study = Study(
    name="random_features",
    title="Random features: what theory promised and what they do",
    question="Do the variances of random features equal their closed forms, how do they grow with the norms of queries "
    "and keys, what do orthogonal directions buy, and do the figures that made them known reproduce?",
    setup=(
        "The kernel before normalisation is measured over many draws of the directions where its fourth moments "
        "allow it, and compared with closed forms; beyond, the closed forms stand alone (they are checked by "
        "quadrature in the tests). The published figures are drawn again with the yardsticks that they lack: the "
        "mean of v, random keys, and the best matrix of that rank."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
    references=(
        "K. Choromanski et al., Rethinking attention with Performers, 2021, arXiv 2009.14794.",
        "V. Likhosherstov et al., Chefs' random tables, 2022, arXiv 2205.15317.",
        "I. Reid et al., Simplex random features, 2023, arXiv 2301.13856.",
    ),
    headline="default",
)
