"""The study behind ``nla-llm update``: what a fine-tune changed, tensor by tensor, and what of it fits into a low rank."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nla_llm.problems import open_safetensors
from nla_llm.study import Claim, Figure, Skip, Study, Table
from nla_llm.study.updates import update_records

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure as Canvas

    from nla_llm.problems.checkpoint import TensorFiles
    from nla_llm.study import Cell

__all__ = ["RANKS", "Pair", "truncation_table", "update_study", "whole_table"]

RANKS = (1, 4, 16, 64)
MANY_ZEROS = 0.1  # of the entries of a difference: from here on 16-bit storage is named as a likely cause
MOST_GROUPS = 8  # colours that can be told apart
_SIXTEEN = ("float16", "bfloat16")


@dataclass(frozen=True)
class Pair:
    """Two checkpoints: safetensors files, indices of shards, or directories that hold either."""

    base: Path
    tuned: Path


@dataclass(frozen=True)
class Plan:
    """Tensors to be measured, with the hash of their contents, and those left out, with the reason."""

    tensors: dict[str, str]
    left_out: dict[str, str]


@cache
def _opened(path: Path) -> TensorFiles:
    return open_safetensors(path)


def plan_of(pair: Pair, pattern: str | None = None) -> Plan:
    """Match the tensors of a pair by name and shape.

    Raises
    ------
    CheckpointError
        If a checkpoint cannot be read, or a matched tensor holds a NaN.
    ValueError
        If nothing is left to measure; the sentence says why.
    """
    base, tuned = _opened(pair.base), _opened(pair.tuned)
    names = sorted({*base.names(), *tuned.names()})
    left_out = {name: reason for name in names if (reason := _reason(name, base, tuned, pattern))}
    matched = [name for name in names if name not in left_out]
    if not matched:
        reasons = "; ".join(f"{count} {reason}" for reason, count in _counts(left_out).items()) or "they hold none"
        raise ValueError(f"no tensor of {pair.base.name} and {pair.tuned.name} can be compared: {reasons}")
    return Plan({name: _digest(name, base, tuned) for name in matched}, left_out)


def _reason(name: str, base: TensorFiles, tuned: TensorFiles, pattern: str | None) -> str:
    """Why a tensor is left out; empty where it is not."""
    if pattern is not None and not fnmatchcase(name, pattern):
        return "not asked for by --tensors"
    for files, other in ((base, "TUNED"), (tuned, "BASE")):
        if name not in files:
            return f"only in {other}"
    shapes = base.shape(name), tuned.shape(name)
    if shapes[0] != shapes[1]:
        return "of another shape in BASE than in TUNED"
    if len(shapes[0]) != 2 or 0 in shapes[0]:
        return "not a matrix"
    floating = ("float16", "bfloat16", "float32", "float64")
    if any(files.stored_dtype(name) not in floating for files in (base, tuned)):
        return "not stored as " + ", ".join(floating)
    return ""


def _counts(left_out: dict[str, str]) -> dict[str, int]:
    return {reason: list(left_out.values()).count(reason) for reason in dict.fromkeys(left_out.values())}


def _digest(name: str, base: TensorFiles, tuned: TensorFiles) -> str:
    digest = hashlib.sha256()
    for files in (base, tuned):
        values = np.ascontiguousarray(files.tensor(name, None))
        digest.update(f"{files.stored_dtype(name)} {values.shape} ".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def update_study(
    name: str, pair: Pair, ranks: list[int] | None = None, pattern: str | None = None
) -> tuple[Study, Plan]:
    """Study of the difference of two checkpoints, to be run like any other, and what it leaves out.

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
    setup = (
        f"Base {pair.base.resolve().name}, tuned {pair.tuned.resolve().name}: {len(plan.tensors)} matrices that both hold with the same shape. The difference is formed in float64 from the "
        "stored values. Its singular values come from a dense decomposition; they give the error of the truncated singular value decomposition, which is the "
        "smallest of any matrix of that rank, in the Frobenius and the spectral norm (Eckart, Young, Mirsky). Doing nothing, a zero update, has error 1. "
        "The noise of storage is what rounding to the stored precision does to a matrix of these entries, as independent uniform errors would."
    )  # fmt: skip
    cells = [
        {"tensor": tensor, "data": data, "ranks": ",".join(map(str, chosen))} for tensor, data in plan.tensors.items()
    ]
    cells += [{"tensor": tensor, "left_out": reason} for tensor, reason in plan.left_out.items()]
    study = Study(
        name=name,
        title=f"What the update changed: {name.removeprefix('update-')}",
        question="How fast do the singular values of the update decay, matrix by matrix, and what is lost when it is truncated at rank r?",
        setup=setup,
        cells=partial(_cells, cells),
        measure=partial(_measure, pair),
        figures=_figures,
        tables=_tables,
        claims=_claims,
        references=(
            "C. Eckart and G. Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936.",
            "L. Mirsky, Symmetric gauge functions and unitarily invariant norms, Quarterly Journal of Mathematics 11, 1960.",
            "E. J. Hu et al., LoRA: low-rank adaptation of large language models, 2021, arXiv 2106.09685.",
            "A. S. Bandeira and R. van Handel, Sharp nonasymptotic bounds on the norm of random matrices with independent entries, 2016, arXiv 1408.6185.",
        ),
    )  # fmt: skip
    return study, plan


def _cells(grid: list[dict[str, Any]], _scale: str) -> list[dict[str, Any]]:
    return grid


def _measure(pair: Pair, cell: Cell, _seed: int) -> list[dict[str, Any]]:
    """Records of one tensor."""
    if cell.get("left_out"):
        raise Skip(str(cell["left_out"]))
    name = str(cell["tensor"])
    base, tuned = (_opened(path) for path in (pair.base, pair.tuned))
    before, after = base.tensor(name, None), tuned.tensor(name, None)
    if np.array_equal(before, after):
        raise Skip("equal in BASE and TUNED: there is no update")
    stored = tuned.stored_dtype(name)
    ranks = [int(rank) for rank in str(cell["ranks"]).split(",")]
    facts = {
        "rows": before.shape[0],
        "columns": before.shape[1],
        "stored_base": base.stored_dtype(name),
        "stored": stored,
    }
    return [facts | record for record in update_records(before, after, ranks, stored)]


# -- figures and tables ------------------------------------------------------------------------------------------------


def _part(records: pd.DataFrame, what: str) -> pd.DataFrame:
    ok = records[records["status"] == "ok"]
    return ok[ok["what"] == what] if "what" in ok.columns else ok.head(0)


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
    common = list(kinds.value_counts().index[: MOST_GROUPS if kinds.nunique() <= MOST_GROUPS else MOST_GROUPS - 1])
    return kinds.where(kinds.isin(common), "others")


def _draw_spectra(fig: Canvas, data: pd.DataFrame) -> None:
    """Singular values relative to the largest, a curve for each tensor, and where the noise of storage begins."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    ax = fig.subplots()
    seen: set[str] = set()
    for (kind, _), curve in data.groupby(["kind", "tensor"], sort=False):
        label = None if kind in seen else kind
        seen.add(kind)
        scale = curve["value"].iloc[0]
        drawn = style.line(ax, curve["index"], curve["value"] / scale, family=kind, label=label, marker="")
        drawn.set_linewidth(0.9)
        noise = curve["noise_spectral"].iloc[0]
        style.theory_line(
            ax, [curve["index"].min(), curve["index"].max()], [noise, noise], family=kind, label="noise of storage"
        )
    style.log_axes(ax)
    floor = max(min(data["noise_spectral"].min() / 10, 0.1), data["relative"].min() / 2, 1e-10)
    ax.set_ylim(floor, 1.5)
    style.label(ax, "index i", "singular value of the update, relative to the largest")


def _draw_truncation(fig: Canvas, data: pd.DataFrame) -> None:
    """Median error over the tensors of a kind against the rank, both norms."""
    from nla_llm.report import style  # noqa: PLC0415

    for ax, (norm, panel) in zip(fig.subplots(1, 2, sharey=True), data.groupby("norm", sort=False), strict=True):
        span = [panel["rank"].min(), panel["rank"].max()]
        style.yardstick(ax, span, [1.0, 1.0], kind="zero_update", label="zero update")
        for kind, curve in panel.groupby("kind", sort=False):
            by_rank = curve.groupby("rank")["value"].agg(["median", "min", "max"]).reset_index()
            style.line(ax, by_rank["rank"], by_rank["median"], by_rank["min"], by_rank["max"], family=kind, label=kind)
        style.log_axes(ax, x=2, y=None)
        ax.set_ylim(0, 1.05)
        style.label(ax, "rank r", "" if norm == "spectral" else "relative error of the update", f"{norm} norm")


def _figures(records: pd.DataFrame) -> list[Figure]:
    """Spectra, and the error of truncation."""
    if _part(records, "tensor").empty:
        return []
    whole = _part(records, "tensor").set_index("tensor")
    spectra = _part(records, "spectrum")
    spectra = pd.DataFrame({
        "kind": _kinds(spectra["tensor"]), "tensor": spectra["tensor"], "index": spectra["index"].astype(int), "value": spectra["singular_value"],
        "lower": spectra["singular_value_lower"], "upper": spectra["singular_value_upper"],
        "relative": spectra["singular_value"] / spectra.groupby("tensor")["singular_value"].transform("max"),
        "noise_spectral": spectra["tensor"].map(whole["noise_spectral"]),
    })  # fmt: skip
    cut = _part(records, "truncation")
    errors = pd.concat([
        pd.DataFrame({"kind": _kinds(cut["tensor"]), "tensor": cut["tensor"], "norm": norm, "rank": cut["rank"].astype(int), "value": cut[f"relative_{norm.lower()}"],
                      "lower": cut[f"relative_{norm.lower()}_lower"], "upper": cut[f"relative_{norm.lower()}_upper"]})
        for norm in ("Frobenius", "spectral")
    ])  # fmt: skip
    found = [
        Figure("spectrum", "Singular values of the update of every matrix, relative to its largest, coloured by the kind of the matrix. Dashed: the noise that rounding to the stored "
               "precision would leave; what lies below cannot be told from it.", _draw_spectra, spectra, size=(6.5, 3.9)),
    ]  # fmt: skip
    if errors["rank"].nunique() > 1:
        found.append(
            Figure(
                "truncation",
                "Error of the update truncated at rank r, median over the matrices of a kind; bands: from the smallest to the largest. Grey: no update at all.",
                _draw_truncation,
                errors,
                size=(6.5, 3.7),
                panels=(1, 2),
            )  # fmt: skip
        )
    return found


def whole_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each tensor: size, rank and storage of its update."""
    rows = [
        {
            "tensor": row["tensor"],
            "shape": f"{row['rows']:.0f} × {row['columns']:.0f}",
            "stored": row["stored"]
            if row["stored"] == row["stored_base"]
            else f"{row['stored_base']}, {row['stored']}",
            "size": "n/a" if pd.isna(row["relative_update"]) else f"{row['relative_update']:.2g}",
            "stable rank": f"{row['stable_rank']:.3g}",
            "rank for 50, 90, 99 %": ", ".join(f"{row[f'rank_{share}']:.0f}" for share in (50, 90, 99)),
            "zeros": f"{100 * row['zero_share']:.1f} %",
            "noise": f"{row['noise_frobenius']:.2g}",
            "above noise": f"{row['above_noise']:.0f}",
        }
        for row in _part(records, "tensor").to_dict("records")
    ]
    return pd.DataFrame(rows)


def truncation_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each tensor: the error at every rank, Frobenius and spectral."""
    cut = _part(records, "truncation")
    rows = []
    for tensor, part in cut.groupby("tensor", sort=False):
        errors = {
            f"r = {row['rank']:.0f}": f"{row['relative_frobenius']:.3g}, {row['relative_spectral']:.3g}"
            for row in part.to_dict("records")
        }
        rows.append({"tensor": tensor, **errors})
    return pd.DataFrame(rows)


def _tables(records: pd.DataFrame) -> list[Table]:
    if _part(records, "tensor").empty:
        return []
    return [
        Table("tensors", "The update of every matrix: size relative to the base (Frobenius), stable rank, smallest ranks that keep 50, 90 and 99 % of its energy, entries that are exactly zero, "
              "noise of storage relative to the update (Frobenius), and how many singular values lie above that noise.", whole_table(records)),
        Table("truncation", "Relative error of the update truncated at rank r: Frobenius, spectral. A zero update has 1, 1.", truncation_table(records)),
    ]  # fmt: skip


# -- findings ----------------------------------------------------------------------------------------------------------


def _claims(records: pd.DataFrame) -> list[Claim]:
    """What storage hides, and what the largest rank keeps."""
    if _part(records, "tensor").empty:
        return []
    whole, cut = _part(records, "tensor"), _part(records, "truncation")
    found = []
    hidden = whole[whole["stored"].isin(_SIXTEEN) & (whole["zero_share"] > MANY_ZEROS)]
    if len(hidden):
        found.append(Claim(
            f"Storage in 16 bits hides part of the update: in {len(hidden)} of {len(whole)} matrices more than {100 * MANY_ZEROS:.0f} % of the differences are exactly zero, so ranks and "
            "errors here are those of the stored update, not of the trained one; compare checkpoints saved in float32", "confirmed",
            f"{100 * hidden['zero_share'].min():.0f} to {100 * hidden['zero_share'].max():.0f} % zeros, worst in {hidden.loc[hidden['zero_share'].idxmax(), 'tensor']}"))  # fmt: skip
    last = cut[cut["rank"] == cut["rank"].max()]
    keeps = int((last["relative_spectral_upper"] <= 0.1).sum())
    what = "every matrix" if keeps == len(last) else f"{keeps} of {len(last)} matrices"
    found.append(Claim(f"Rank {last['rank'].iloc[0]:.0f} keeps the update of {what} to 10 % in the spectral norm", "confirmed",
                       f"largest error {last['relative_spectral'].max():.3g} spectral, {last['relative_frobenius'].max():.3g} Frobenius"))  # fmt: skip
    return found
