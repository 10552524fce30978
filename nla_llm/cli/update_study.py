"""The study behind ``nla-llm update``: what a fine-tune changed, and what of it fits into a low rank."""

from __future__ import annotations

import re
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nla_llm.cli._pair import Matrices, Pair, Plan, plan_of
from nla_llm.study import Claim, Figure, Skip, Study, Table
from nla_llm.study.frames import groups, succeeded, valued
from nla_llm.study.updates import update_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from nla_llm.study import Cell

__all__ = ["RANKS", "short_names", "truncation_table", "update_study", "whole_table"]

RANKS = (1, 4, 16, 64)
MANY_ZEROS = 0.1  # of the entries of a difference: from here on 16-bit storage is named as a likely cause
WELL_KEPT = 0.1  # relative error up to which an update is called kept
MOST_GROUPS = 8  # colours that can be told apart
REFERENCES = (
    "C. Eckart and G. Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936.",
    "L. Mirsky, Symmetric gauge functions and unitarily invariant norms, Quarterly Journal of Mathematics 11, 1960.",
    "E. J. Hu et al., LoRA: low-rank adaptation of large language models, 2021, arXiv 2106.09685.",
    (
        "A. S. Bandeira and R. van Handel, Sharp nonasymptotic bounds on the norm of random matrices with independent "
        "entries, 2016, arXiv 1408.6185."
    ),
)
_SIXTEEN = ("float16", "bfloat16")


def update_study(name: str, pair: Pair, ranks: list[int] | None = None, pattern: str | None = None) -> Study:
    """Study of the difference of two checkpoints, to be run like any other; what it leaves out it skips, with reasons.

    Parameters
    ----------
    name : str
        Name of the report.
    pair : Pair
    ranks : list of int, optional
        Ranks of the truncations; 1, 4, 16 and 64 by default.
    pattern : str, optional
        Shell pattern of the names of the tensors.

    Raises
    ------
    CheckpointError, ValueError
        If there is nothing that can be measured.
    """
    chosen = tuple(sorted(set(ranks or RANKS)))
    if chosen[0] < 1:
        raise ValueError(f"--rank must be at least 1, got {chosen[0]}")
    plan = plan_of(pair, pattern)
    asked = ",".join(map(str, chosen))
    cells = [{"tensor": tensor, "data": data, "ranks": asked} for tensor, data in plan.tensors.items()]
    cells += [{"tensor": tensor, "left_out": reason} for tensor, reason in plan.left_out.items()]
    return Study(
        name=name,
        title=f"What the update changed: {name.removeprefix('update-')}",
        question=(
            "How fast do the singular values of the update decay, matrix by matrix, "
            "and what is lost when it is truncated at rank r?"
        ),
        setup=_setup(pair, plan),
        cells=partial(_cells, cells),
        measure=partial(_measure, pair),
        figures=_figures,
        tables=_tables,
        claims=_claims,
        references=REFERENCES,
    )


def _setup(pair: Pair, plan: Plan) -> str:
    base, tuned = (path.resolve().name for path in (pair.base, pair.tuned))
    return (
        f"Base {base}, tuned {tuned}: {len(plan.tensors)} matrices that both hold with the same shape. The difference "
        "is formed in float64 from the stored values. Its singular values come from a dense decomposition; they give "
        "the error of the truncated singular value decomposition, which is the smallest of any matrix of that rank, in "
        "the Frobenius and the spectral norm (Eckart, Young, Mirsky). Doing nothing, a zero update, has error 1. The "
        "noise of storage is what rounding to the stored precision does to a matrix of these entries, as independent "
        "uniform errors would; the base is taken to be what training started from."
    )


def _cells(grid: list[dict[str, Any]], _scale: str) -> list[dict[str, Any]]:
    return grid


def _measure(pair: Pair, cell: Cell, _seed: int) -> list[dict[str, Any]]:
    """Records of one tensor."""
    if cell.get("left_out"):
        raise Skip(str(cell["left_out"]))
    name = str(cell["tensor"])
    m = Matrices.read(name, pair)
    if m.digest() != cell["data"]:
        raise RuntimeError("the checkpoints were changed during the run: start it again")
    if np.array_equal(m.base, m.tuned):
        raise Skip("equal in BASE and TUNED: there is no update")
    ranks = [int(rank) for rank in str(cell["ranks"]).split(",")]
    facts = {"rows": m.base.shape[0], "columns": m.base.shape[1], "stored_base": m.stored[0], "stored": m.stored[1]}
    return [facts | record for record in update_records(m.base, m.tuned, ranks, m.stored[1])]


# -- figures and tables ------------------------------------------------------------------------------------------------


def kind_of(tensor: str) -> str:
    """Kind of a tensor: the last word of its name, without numbers.

    Examples
    --------
    >>> kind_of("model.layers.3.self_attn.q_proj.weight"), kind_of("delta_12")
    ('q_proj', 'delta')
    """
    words = re.sub(r"\.weight$", "", tensor).split(".")
    words = [w for word in words if (w := re.sub(r"\d+", "", word).strip("_"))]
    return words[-1] if words else tensor


def _kinds(tensors: pd.Series) -> pd.Series:
    """Kind of each, the rarer ones beyond eight together."""
    kinds = tensors.map(kind_of)
    most = MOST_GROUPS if kinds.nunique() <= MOST_GROUPS else MOST_GROUPS - 1
    common = list(kinds.value_counts().index[:most])
    return kinds.where(kinds.isin(common), "others")


def _draw_spectra(fig: Canvas, data: pd.DataFrame) -> None:
    """Singular values relative to the largest, a curve for each tensor, and where the noise of storage begins."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    ax = fig.subplots()
    seen: set[str] = set()
    for (kind, _), curve in groups(data, ["kind", "tensor"]):
        label = None if kind in seen else kind
        seen.add(kind)
        scale = curve["value"].iloc[0]
        drawn = style.line(ax, curve["index"], curve["value"] / scale, family=kind, label=label, marker="")
        drawn.set_linewidth(0.9)
        span, noise = [curve["index"].min(), curve["index"].max()], curve["noise_spectral"].iloc[0]
        style.theory_line(ax, span, noise, family=kind, label="noise of storage")
    style.log_axes(ax)
    floor = max(min(data["noise_spectral"].min() / 10, 0.1), data["relative"].min() / 2, 1e-10)
    ax.set_ylim(floor, 1.5)
    style.label(ax, "index i", "singular value of the update, relative to the largest")


def _draw_truncation(fig: Canvas, data: pd.DataFrame) -> None:
    """Median error over the tensors of a kind against the rank, both norms."""
    from nla_llm.report import style  # noqa: PLC0415

    for ax, (norm, panel) in zip(fig.subplots(1, 2, sharey=True), data.groupby("norm", sort=False), strict=True):
        style.yardstick(ax, [panel["rank"].min(), panel["rank"].max()], 1.0, kind="zero_update")
        for (kind,), curve in groups(panel, ["kind"]):
            by_rank = curve.groupby("rank")["value"].agg(["median", "min", "max"]).reset_index()
            style.line(ax, by_rank["rank"], by_rank["median"], by_rank["min"], by_rank["max"], family=kind, label=kind)
        style.log_axes(ax, x=2, y=None)
        ax.set_ylim(0, 1.05)
        style.label(ax, "rank r", "" if norm == "spectral" else "relative error of the update", f"{norm} norm")


def _figures(records: pd.DataFrame) -> list[Figure]:
    """Spectra, and the error of truncation."""
    if succeeded(records, what="tensor").empty:
        return []
    caption = (
        "Singular values of the update of every matrix, relative to its largest, coloured by the kind of the matrix. "
        "Dashed: the noise that rounding to the stored precision would leave; what lies below cannot be told from it."
    )
    found = [Figure("spectrum", caption, _draw_spectra, _spectra(records), size=(6.5, 3.9))]
    errors = _errors(records)
    if errors["rank"].nunique() > 1:
        caption = (
            "Error of the update truncated at rank r, median over the matrices of a kind; bands: from the smallest to "
            "the largest. Grey: no update at all."
        )
        found.append(Figure("truncation", caption, _draw_truncation, errors, size=(6.5, 3.7), panels=(1, 2)))
    return found


def _spectra(records: pd.DataFrame) -> pd.DataFrame:
    part = succeeded(records, what="spectrum")
    noise = succeeded(records, what="tensor").set_index("tensor")["noise_spectral"]
    data = valued(part, "singular_value", ["tensor", "index"])
    data.insert(0, "kind", _kinds(part["tensor"]))
    largest = data.groupby("tensor")["value"].transform("max")
    return data.assign(relative=data["value"] / largest, noise_spectral=data["tensor"].map(noise))


def _errors(records: pd.DataFrame) -> pd.DataFrame:
    part = succeeded(records, what="truncation")
    part = part.assign(kind=_kinds(part["tensor"]), rank=part["rank"].astype(int))
    panels = [
        valued(part, f"relative_{norm.lower()}", ["kind", "tensor", "rank"]).assign(norm=norm)
        for norm in ("Frobenius", "spectral")
    ]
    return pd.concat(panels)


def whole_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each tensor: size, rank and storage of its update."""
    return pd.DataFrame([_whole_row(row) for row in succeeded(records, what="tensor").to_dict("records")])


def _whole_row(row: dict[Any, Any]) -> dict[str, str]:
    stored = row["stored"] if row["stored"] == row["stored_base"] else f"{row['stored_base']}, {row['stored']}"
    return {
        "tensor": row["tensor"],
        "shape": f"{row['rows']:.0f} × {row['columns']:.0f}",
        "stored": stored,
        "size": "n/a" if pd.isna(row["relative_update"]) else f"{row['relative_update']:.2g}",
        "stable rank": f"{row['stable_rank']:.3g}",
        "rank 50, 90, 99 %": ", ".join(f"{row[f'rank_{share}']:.0f}" for share in (50, 90, 99)),
        "zeros": f"{100 * row['zero_share']:.1f} %",
        "noise": f"{row['noise_frobenius']:.2g}",
        "above noise": f"{row['above_noise']:.0f}",
    }


def short_names(table: pd.DataFrame) -> pd.DataFrame:
    """The same for a narrow terminal: names without what all of them begin and end with.

    Examples
    --------
    >>> short_names(pd.DataFrame({"tensor": ["layers.0.q.weight", "layers.1.k.weight"]}))["tensor"].to_list()
    ['0.q', '1.k']
    """
    split = [name.split(".") for name in table["tensor"]]
    if len(split) < 2:
        return table
    front, back = _shared(split), _shared([words[::-1] for words in split])
    return table.assign(tensor=[".".join(words[front : len(words) - back]) or ".".join(words) for words in split])


def _shared(names: list[list[str]]) -> int:
    """How many words all names begin with."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*names, strict=False)))


def truncation_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each tensor: the error at every rank, Frobenius and spectral."""
    cut = succeeded(records, what="truncation")
    rows = []
    for tensor, part in cut.groupby("tensor", sort=False):
        errors = {
            f"r = {row['rank']:.0f}": f"{row['relative_frobenius']:.3g}, {row['relative_spectral']:.3g}"
            for row in part.to_dict("records")
        }
        rows.append({"tensor": tensor, **errors})
    return pd.DataFrame(rows)


def _tables(records: pd.DataFrame) -> list[Table]:
    if succeeded(records, what="tensor").empty:
        return []
    whole = (
        "The update of every matrix: size relative to the base (Frobenius), stable rank, smallest ranks that keep 50, "
        "90 and 99 % of its energy, entries that are exactly zero, noise of storage relative to the update "
        "(Frobenius), and how many singular values lie above that noise."
    )
    cut = "Relative error of the update truncated at rank r: Frobenius, spectral. A zero update has 1, 1."
    return [Table("tensors", whole, whole_table(records)), Table("truncation", cut, truncation_table(records))]


# -- findings ----------------------------------------------------------------------------------------------------------


def _claims(records: pd.DataFrame) -> list[Claim]:
    """What storage hides, and what the largest rank keeps."""
    whole, cut = succeeded(records, what="tensor"), succeeded(records, what="truncation")
    return [] if whole.empty else [*_storage_finding(whole), _rank_finding(cut)]


def _storage_finding(whole: pd.DataFrame) -> list[Claim]:
    """A warning where 16 bits have swallowed much of the update."""
    hidden = whole[whole["stored"].isin(_SIXTEEN) & (whole["zero_share"] > MANY_ZEROS)]
    if hidden.empty:
        return []
    sentence = (
        f"Storage in 16 bits hides part of the update: in {len(hidden)} of {len(whole)} matrices more than "
        f"{100 * MANY_ZEROS:.0f} % of the differences are exactly zero. Ranks and errors are those of the stored "
        "update, not of the trained one; compare checkpoints saved in float32"
    )
    worst = hidden.sort_values("zero_share")["tensor"].iloc[-1]
    low, high = (100 * f(hidden["zero_share"]) for f in (min, max))
    return [Claim(sentence, "confirmed", f"{low:.0f} to {high:.0f} % zeros, most in {worst}")]


def _rank_finding(cut: pd.DataFrame) -> Claim:
    """How many matrices the largest rank keeps."""
    last = cut[cut["rank"] == cut["rank"].max()]
    keeps = int((last["relative_spectral_upper"] <= WELL_KEPT).sum())
    what = "every matrix" if keeps == len(last) else f"{keeps} of {len(last)} matrices"
    worst = (last[f"relative_{norm}"].max() for norm in ("spectral", "frobenius"))
    return Claim(
        f"Rank {last['rank'].iloc[0]:.0f} keeps the update of {what} to {100 * WELL_KEPT:.0f} % in the spectral norm",
        "confirmed",
        "largest error {:.3g} spectral, {:.3g} Frobenius".format(*worst),
    )
