"""Randomised low-rank approximation: what is lost against the full decomposition, and what was promised?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nla_llm.backend import parallel
from nla_llm.study import Claim, Figure, Study, Table
from nla_llm.study.frames import succeeded

from . import _randomised_svd as bench

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

SIZES: dict[str, tuple[int, tuple[int, ...], int, int, tuple[int, ...]]] = {
    # order of the made-up matrices, ranks, draws of an engine, draws of Ψ, steps
    "small": (96, (4, 8), 4, 100, (1, 2)),
    "default": (256, (4, 8, 16, 32), 10, 400, (1, 2, 3, 4, 6)),
    "full": (768, (4, 8, 16, 32, 64), 30, 2000, (1, 2, 3, 4, 6, 8)),
}
SHOWN = ("power law", "rank + noise", bench.UPDATE)
WAYS = {
    "subspace iteration": "randomised_svd",
    "Krylov, wide block": "krylov_svd",
    "Krylov, narrow block": "interpolative",
}
LABELS = {"frobenius": "Frobenius", "spectral": "spectral"}
HALKO = "Halko, Martinsson and Tropp 2011, arXiv 0909.4061"


def cells(scale: str) -> list[dict[str, Any]]:
    """All engines at all ranks, ways to spend products at one rank, one pass for fixed Q."""
    n, ranks, draws, many, steps = SIZES[scale]
    middle = ranks[len(ranks) // 2]
    places = [{"matrix": name, "n": n} for name in bench.MATRICES]
    found = [
        {"what": "error", "engine": engine, "rank": r, "draws": draws, **place}
        for engine in bench.ENGINES
        for r in ranks
        for place in places
    ]
    found += [
        {"what": "convergence", "way": way, "rank": middle, "steps": s, "draws": draws, **place}
        for way in WAYS
        for s in steps
        for place in places
    ]
    rows = sorted({middle + 6, middle + middle // 2 + 2, 2 * middle + 1, 3 * middle + 1, 4 * middle + 1})
    return found + [
        {"what": "factor", "rank": middle, "rows": m, "draws": many, **place} for m in rows for place in places
    ]


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Records of one cell."""
    how = {"error": bench.errors, "convergence": bench.convergence, "factor": bench.factor}[cell["what"]]
    return parallel(lambda _: [how(cell, seed)], [0])[0]  # on one core, so that its seconds are those of the work


# -- figures -----------------------------------------------------------------------------------------------------------


def draw_errors(fig: Canvas, data: pd.DataFrame) -> None:
    """Ratio to the optimum against the rank: a row of panels for each norm."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    axes = fig.subplots(2, len(SHOWN), sharex=True)
    for (norm, row), name in ((pair, name) for pair in zip(bench.NORMS, axes, strict=True) for name in SHOWN):
        ax = row[SHOWN.index(name)]
        part = data[(data["matrix"] == name) & (data["norm"] == norm)]
        for engine, curve in part.groupby("engine", sort=False):
            marker = "os^Dv*Px"[list(bench.ENGINES).index(engine)]
            band = (curve[c] for c in ("rank", "value", "lower", "upper"))
            style.line(ax, *band, family=engine, label=engine, marker=marker)
        span = [part["rank"].min(), part["rank"].max()]
        style.yardstick(ax, span, 1.0, kind="optimal_rank", label="truncated SVD", marker="")
        zero = part.groupby("rank")["zero"].first()
        style.yardstick(ax, zero.index, zero, kind="uniform", label="zero update", marker="")
        style.log_axes(ax, x=2, y=None)
        ax.set_ylim(0.97, min(float(part["upper"].max()) * 1.03, 3.0))
        last = norm == "spectral"
        style.label(ax, "rank r" if last else "", f"{LABELS[norm]} error / optimum" if name == SHOWN[0] else "",
                    None if last else name)  # fmt: skip


def draw_convergence(fig: Canvas, data: pd.DataFrame) -> None:
    """Excess over the optimum against the columns that the matrix was multiplied by."""
    from nla_llm.report import style  # noqa: PLC0415

    axes = fig.subplots(2, len(SHOWN), sharex="col")
    for i, (norm, row) in enumerate(zip(bench.NORMS, axes, strict=True)):
        for ax, name in zip(row, SHOWN, strict=True):
            for way, curve in data[(data["matrix"] == name) & (data["norm"] == norm)].groupby("way", sort=False):
                excess = [np.maximum(curve[c] - 1, 1e-8) for c in ("value", "lower", "upper")]
                style.line(ax, curve["columns"], *excess, family=WAYS[way], label=way)
            style.log_axes(ax, x=2)
            ax.set_ylim(1e-7, 2)
            ax.axhline(1e-3, color="0.6", linewidth=0.8, linestyle=":")
            style.label(ax, "columns multiplied" if i else "", f"{LABELS[norm]} excess" if name == SHOWN[0] else "",
                        None if i else name)  # fmt: skip


def draw_promises(fig: Canvas, data: pd.DataFrame) -> None:
    """Measured mean over its bound."""
    from nla_llm.report import style  # noqa: PLC0415

    for ax, norm in zip(fig.subplots(1, 2, sharey=True), bench.NORMS, strict=True):
        part = data[data["norm"] == norm]
        for engine, curve in part.groupby("engine", sort=False):
            best = curve.groupby("rank")[["value", "lower", "upper"]].agg(["min", "max"])
            family = engine
            middle = np.sqrt(best["value"]["min"] * best["value"]["max"])
            style.line(ax, best.index, middle, best["value"]["min"], best["value"]["max"], family=family, label=engine)
        style.yardstick(
            ax, [part["rank"].min(), part["rank"].max()], 1.0, kind="optimal_rank", label="the bound", marker=""
        )
        style.log_axes(ax, x=2)
        style.label(ax, "rank r", "measured / promised", LABELS[norm])


def draw_factor(fig: Canvas, data: pd.DataFrame) -> None:
    """One pass for a fixed Q: measured and exact."""
    from nla_llm.report import style  # noqa: PLC0415

    ax = fig.subplots()
    exact = data.groupby("rows")["exact"].first()
    for i, (name, part) in enumerate(data.groupby("matrix", sort=False)):
        x = part["rows"] * (1 + 0.01 * (i - 2))
        bars = [part["value"] - part["lower"], part["upper"] - part["value"]]
        ax.errorbar(x, part["value"], bars, fmt="os^Dv*"[i], color=style.colour(name), markersize=3.5, label=name)
    style.theory_line(ax, exact.index, exact, label="1 + k/(rows − k − 1)")
    style.label(ax, "rows of Ψ", "squared error / that of QQᵀA")


def figures(records: pd.DataFrame) -> list[partial[Figure]]:
    """Errors, convergence, promises, one pass."""
    return [
        partial(errors_figure, records),
        partial(convergence_figure, records),
        partial(promises_figure, records),
        partial(factor_figure, records),
    ]


def errors_figure(records: pd.DataFrame) -> Figure:
    """Errors over the optimum, in both norms."""
    data = by_norm(succeeded(records, what="error"), "ratio", ["engine", "matrix", "rank"])
    caption = (
        "Error over that of the truncated SVD of the same rank, means over draws with 95 % intervals, Frobenius "
        "norm above and "
        "spectral norm below; dark the optimum, grey no update at all where it lies in the panel. Krylov lies on "
        "the optimum."
    )
    return Figure("errors", caption, draw_errors, data, size=(6.5, 4.6), panels=(2, 3))


def convergence_figure(records: pd.DataFrame) -> Figure:
    """Ways to spend products."""
    data = by_norm(succeeded(records, what="convergence"), "ratio", ["way", "matrix", "rank", "columns"])
    caption = (
        f"Excess of the error over the optimum at rank {int(data['rank'].iloc[0])} against the number of columns "
        f"that the matrix "
        "or its transpose was multiplied by: powers of r + 10 columns, Krylov spaces from as many, and from 8. "
        "Dotted: one "
        "part in a thousand."
    )
    return Figure("convergence", caption, draw_convergence, data, size=(6.5, 4.2), panels=(2, 3))


def promises_figure(records: pd.DataFrame) -> Figure:
    """Means over their bounds."""
    data = by_norm(succeeded(records, what="error"), "promised", ["engine", "matrix", "rank"]).dropna(subset=["value"])
    caption = (
        "Measured mean error over its bound: the root of the mean square in the Frobenius norm, the mean in the "
        "spectral norm. "
        "Bands reach from the smallest to the largest of the six matrices."
    )
    return Figure("promises", caption, draw_promises, data, size=(6.5, 3.2), panels=(1, 2))


def factor_figure(records: pd.DataFrame) -> Figure:
    """The equality of one pass."""
    data = factors(records)
    caption = (
        f"One pass with a fixed basis Q of {int(data['rank'].iloc[0])} columns: its squared error over that of "
        f"two passes, means "
        "over draws of Ψ with 99.99 % intervals, on six matrices, and the exact value."
    )
    return Figure("factor", caption, draw_factor, data[["matrix", "rank", "rows", "value", "lower", "upper", "exact"]])


def by_norm(records: pd.DataFrame, stem: str, keep: list[str]) -> pd.DataFrame:
    """One row for each record and norm."""
    parts = []
    for norm in bench.NORMS:
        names = {f"{stem}_{norm}{end}": f"value{end}" for end in ("", "_lower", "_upper")}
        names |= {f"zero_{norm}": "zero"}
        part = records.reindex(columns=[*keep, *names]).rename(columns=names)
        part = part.rename(columns={"value_lower": "lower", "value_upper": "upper"})
        parts.append(part.assign(norm=norm))
    return pd.concat(parts, ignore_index=True).sort_values([k for k in keep if k in {"rank", "columns"}], kind="stable")


def factors(records: pd.DataFrame) -> pd.DataFrame:
    """Records of one pass, by rows."""
    names = {f"factor{end}": name for end, name in (("", "value"), ("_lower", "lower"), ("_upper", "upper"))}
    return succeeded(records, what="factor").rename(columns=names).sort_values("rows", kind="stable")


def tables(records: pd.DataFrame) -> list[partial[Table]]:
    """All engines at the middle rank."""
    return [partial(engines_table, records, name) for name in SHOWN]


def engines_table(records: pd.DataFrame, name: str) -> Table:
    """Errors in both norms, products, columns, milliseconds."""
    found = succeeded(records, what="error", matrix=name)
    ranks = sorted(found["rank"].unique())
    rank = ranks[len(ranks) // 2]
    part = found[found["rank"] == rank].set_index("engine").reindex(list(bench.ENGINES)).reset_index()
    data = pd.DataFrame({"engine": part["engine"]})
    for norm in bench.NORMS:
        for end in ("", "_lower", "_upper"):
            data[f"{norm}{end}"] = part[f"ratio_{norm}{end}"]
    data["passes"], data["columns"] = part["products"].round(1), part["columns"].round(0)
    data["ms"] = part["milliseconds"].round(2)
    caption = (
        f"{name}, rank {rank:.0f}: error over the optimum with 95 % intervals over draws; products with the "
        f"matrix, their "
        "columns in all, milliseconds of one core in float64. An engine that forms the matrix takes no products."
    )
    return Table(f"engines_{name.replace(' + ', '_').replace(' ', '_')}", caption, data)


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[partial[Claim]]:
    """What the records say."""
    found = succeeded(records, what="error")
    return [
        partial(bounds_hold, found),
        partial(one_pass_is_exact, records),
        partial(krylov_is_optimal, found),
        partial(frobenius_hides, found),
        partial(krylov_before_powers, records),
    ]


def bounds_hold(found: pd.DataFrame) -> Claim:
    """No mean whose whole interval lies above its bound."""
    data = by_norm(found, "promised", ["engine", "matrix", "rank"]).dropna(subset=["value"])
    worst = data.loc[data["lower"].idxmax()]
    sentence = "No mean error is surely above its bound, in either norm, for any engine, matrix and rank"
    number = f"largest ratio {worst['value']:.3g} ({worst['engine']}, {worst['matrix']}, {worst['norm']})"
    return Claim.decide(sentence, float(worst["lower"]), float(worst["lower"]), 1.0, "<=", number=number, source=HALKO)


def one_pass_is_exact(records: pd.DataFrame) -> Claim:
    """The equality, cell by cell."""
    data = factors(records)
    outside = int(((data["exact"] < data["lower"]) | (data["exact"] > data["upper"])).sum())
    gap = float((data["value"] / data["exact"] - 1).abs().max())
    sentence = (
        "Given Q, one pass multiplies the mean squared error by exactly 1 + k/(rows − k − 1), whatever the matrix"
    )
    number = f"{outside} of {len(data)} intervals miss it; largest deviation {100 * gap:.1f} %"
    source = "Tropp, Yurtsever, Udell and Cevher 2017, arXiv 1609.00048"
    return Claim.decide(sentence, outside, outside, 0, "<=", number=number, source=source)


def krylov_is_optimal(found: pd.DataFrame) -> Claim:
    """Within one part in a thousand, in both norms."""
    data = by_norm(found[found["engine"] == "Krylov"], "ratio", ["engine", "matrix", "rank"])
    worst = data.loc[data["upper"].idxmax()]
    sentence = (
        "A block Krylov space grown by its residuals is within 1.001 of the optimum in both norms on every matrix"
    )
    number = f"largest mean ratio {worst['value']:.6f} ({worst['matrix']}, {worst['norm']})"
    return Claim.decide(sentence, float(worst["lower"]), float(worst["upper"]), 1.001, "<=", number=number)


def frobenius_hides(found: pd.DataFrame) -> Claim:
    """The spectral error of the plain randomised SVD beside its Frobenius error."""
    part = found[(found["engine"] == "randomised, q = 0") & (found["matrix"] == "power law")]
    row = part.loc[part["rank"].idxmax()]
    excess = {n: [row[f"ratio_{n}{end}"] - 1 for end in ("_lower", "_upper")] for n in bench.NORMS}
    low, high = excess["spectral"][0] / excess["frobenius"][1], excess["spectral"][1] / excess["frobenius"][0]
    sentence = (
        f"The Frobenius norm hides the error of the randomised SVD without power steps: on the power law at rank "
        f"{row['rank']:.0f} the spectral excess over the optimum is more than three times the Frobenius excess"
    )
    number = f"{100 * excess['frobenius'][0]:.1f} % to {100 * excess['frobenius'][1]:.1f} % Frobenius, "
    number += f"{100 * excess['spectral'][0]:.0f} % to {100 * excess['spectral'][1]:.0f} % spectral"
    return Claim.decide(sentence, float(low), float(high), 3.0, ">", number=number)


def krylov_before_powers(records: pd.DataFrame) -> Claim:
    """Krylov spaces of a narrow block against powers of a wide one, for no more columns multiplied."""
    data = succeeded(records, what="convergence").sort_values("columns")
    low, high = 0.0, 0.0
    for name in SHOWN:
        part = data[data["matrix"] == name].set_index("way")
        powers = part.loc["subspace iteration"].iloc[-1]
        narrow = part.loc["Krylov, narrow block"]
        krylov = narrow[narrow["columns"] <= powers["columns"]].iloc[-1]
        excess = [[max(float(row[f"ratio_spectral{end}"]) - 1, 1e-12) for end in ("_lower", "_upper")]
                  for row in (krylov, powers)]  # fmt: skip
        low, high = max(low, excess[0][0] / excess[1][1]), max(high, excess[0][1] / excess[1][0])
    sentence = (
        "For no more columns multiplied, a Krylov space from 8 columns has less spectral excess than powers of r "
        "+ 10 columns"
    )
    number = f"ratio of the excesses {low:.2g} to {high:.2g} on the matrix where it is largest"
    return Claim.decide(
        sentence, low, high, 1.0, "<", number=number, source="Meyer, Musco and Musco 2024, arXiv 2305.02535"
    )


study = Study(
    name="randomised_svd",
    title="Randomised low-rank approximation in both norms",
    question="How far from the best approximation of their rank are engines that never decompose the whole matrix, in "
    "the Frobenius and in the spectral norm, and what do theorems promise?",
    setup=(
        "Matrices with a power-law spectrum i^(−½), with exponential decay, of rank 8 plus Gaussian noise, and "
        "three of the "
        "embedded language model, its embedding, the output map W_down of a feed-forward layer and what "
        "fine-tuning adds "
        "to that, are replaced by products of rank r. Errors are measured densely in float64 and divided by the "
        "optimum of "
        "Eckart, Young and Mirsky; every random engine is drawn anew several times. Yardsticks are the truncated "
        "decomposition, whose ratio is one, and no update at all."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
    references=(
        "N. Halko, P.-G. Martinsson and J. A. Tropp, Finding structure with randomness, SIAM Review 53, 2011, arXiv "
        "0909.4061.",
        "J. A. Tropp, A. Yurtsever, M. Udell and V. Cevher, Practical sketching algorithms for low-rank matrix "
        "approximation, SIAM J. Matrix Anal. Appl. 38, 2017, arXiv 1609.00048.",
        "C. Musco and C. Musco, Randomized block Krylov methods for stronger and faster approximate singular value "
        "decomposition, NeurIPS 2015, arXiv 1504.05477.",
        "R. Meyer, C. Musco and C. Musco, On the unreasonable effectiveness of single vector Krylov methods for "
        "low-rank "
        "approximation, SODA 2024, arXiv 2305.02535.",
        "M. Gu and S. C. Eisenstat, Efficient algorithms for computing a strong rank-revealing QR factorization, "
        "SIAM J. "
        "Sci. Comput. 17, 1996.",
    ),
)
