"""The study behind ``nla-llm update --adapter``: the spectra of an adapter, and what a smaller one loses."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path  # noqa: TC003 - pickled with the job
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd

from nla_llm.cli.update_figures import kinds_of
from nla_llm.cli.update_tables import short_names
from nla_llm.linalg.factors import factored_svd
from nla_llm.problems.adapters import Adapter, open_adapter, write_smaller
from nla_llm.study import Claim, Figure, Study, Table, run
from nla_llm.study.adapters import MANY_AT_THE_TOP, module_records, recompressed
from nla_llm.study.frames import groups, succeeded, valued

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

    from nla_llm.cli.updates import Asked
    from nla_llm.study import Cell, StudySummary

__all__ = ["audit_adapter"]

REFERENCES = (
    "E. J. Hu et al., LoRA: low-rank adaptation of large language models, 2021, arXiv 2106.09685.",
    "G. H. Golub and C. F. Van Loan, Matrix Computations, 4th edition, 2013, section 5.4.",
)


@final
@dataclass(frozen=True)
class _Job:
    """An adapter and what is asked of it, as a worker needs to know it."""

    path: Path
    ranks: tuple[int, ...]
    tolerance: float | None
    norm: str

    def measure(self, _cell: Cell, _seed: int) -> list[dict[str, Any]]:
        """Records of all modules, and of the tensors that belong to none."""
        adapter = open_adapter(self.path)
        records = [
            {"module": name} | record
            for name in adapter.modules
            for record in module_records(adapter, name, self.ranks, self.tolerance, self.norm)
        ]
        left = [{"what": "left out", "module": name, "why": why} for name, why in adapter.left_out.items()]
        return records + left


def audit_adapter(name: str, path: Path, asked: Asked, store: Path) -> StudySummary:
    """Measure an adapter, write a smaller one where one is asked for, and show what was found."""
    from nla_llm.cli.terminal import say, show_frame  # noqa: PLC0415 - rich loads only where something is shown

    adapter = open_adapter(path)
    ranks = asked.ranks or (() if asked.tolerance else (1, 4, 16, 64))
    job = _Job(path.resolve(), ranks, asked.tolerance, asked.norm)
    digest = hashlib.sha256(adapter.file.read_bytes() + repr(sorted(adapter.config.items())).encode()).hexdigest()[:16]
    cell: dict[str, Any] = {"adapter": path.resolve().name, "data": digest, "ranks": ",".join(map(str, ranks))}
    if asked.tolerance:
        cell |= {"tolerance": asked.tolerance, "norm": asked.norm}
    study = Study(
        name=name,
        title=f"What the adapter holds: {name.removeprefix('adapter-')}",
        question="What is the spectrum of every product, is its rank used, and what would a smaller one lose?",
        setup=_setup(adapter),
        cells=partial(_cells, [cell]),
        measure=job.measure,
        figures=_figures,
        tables=_tables,
        claims=_claims,
        references=REFERENCES,
    )
    summary = run(study, store=store, jobs=0, timeout=None, progress=False, arguments=sys.argv[1:]).studies[0]
    records = summary.records
    if summary.counts.get("ok"):
        show_frame(short_names(_module_table(records)), "spectra of the products", f"see the report {name}")
        if not (total := _total_table(records)).empty:
            show_frame(total, "all modules together, in fewer columns")
        left = succeeded(records, what="left out").reindex(columns=["module", "why"])
        for (why,), part in groups(left, ["why"]):
            names = list(part["module"])
            say(f"left as it is, {why}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    if asked.output is not None:
        _write(adapter, asked)
    return summary


def _cells(grid: list[dict[str, Any]], _scale: str) -> list[dict[str, Any]]:
    return grid


def _setup(adapter: Adapter) -> str:
    layouts = ", ".join(dict.fromkeys(module.layout for module in adapter.modules.values()))
    return (
        f"{len(adapter.modules)} products of two factors in the layout of {layouts}, each multiplied by its "
        "scale alpha/r "
        "where the file or its configuration tells it, else as it stands. The singular values come from QR of both "
        "factors and a decomposition as small as the rank; the product is never formed. Errors are those of "
        "the smaller "
        "factors rounded to the dtype that the adapter is stored in."
    )


def _write(adapter: Adapter, asked: Asked) -> None:
    """Write the smaller adapter; the factors of one module in memory at a time."""
    from nla_llm.cli.terminal import say  # noqa: PLC0415 - rich loads only where something is shown

    assert asked.output is not None  # noqa: S101 - for the type checker

    def factors(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        left, right = adapter.factors(name)
        svd = factored_svd(adapter.modules[name].scale * left, right)
        rank = asked.ranks[0] if asked.ranks else None
        cut = recompressed(svd, rank=rank, tolerance=asked.tolerance, norm=asked.norm, dtype=adapter.stored_dtype(name))
        return cut.left, cut.right

    ranks = {name: factors(name)[0].shape[1] for name in adapter.modules}
    write_smaller(adapter, asked.output, ranks, factors, force=asked.force)
    before = sum(adapter.factors(name)[0].shape[1] for name in adapter.modules)
    say(f"wrote {asked.output}, {len(ranks)} modules, ranks {sum(ranks.values())} in all where there were {before}")


# -- figures, tables, findings -----------------------------------------------------------------------------------------


def _draw(fig: Canvas, data: pd.DataFrame) -> None:
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    ax, seen = fig.subplots(), set[str]()
    for (kind, _), curve in groups(data, ["kind", "module"]):
        drawn = style.line(ax, curve["index"], curve["relative"], family=kind, label=None if kind in seen else kind)
        drawn.set_linewidth(0.8)
        seen.add(kind)
    style.log_axes(ax, x=None)
    ax.set_ylim(max(data["relative"].min() / 2, 1e-10), 1.5)
    style.label(ax, "index i", "singular value, relative to the largest")


def _draw_size(fig: Canvas, data: pd.DataFrame) -> None:
    from nla_llm.report import style  # noqa: PLC0415

    ax = fig.subplots()
    for (kind,), part in groups(data, ["kind"]):
        ax.plot(part["place"], part["value"], "o", color=style.colour(kind), markersize=3, label=kind)
    style.log_axes(ax, x=None)
    style.label(ax, "module", "spectral norm of the product")


def _figures(records: pd.DataFrame) -> list[Figure]:
    part = succeeded(records, what="spectrum")
    if part.empty:
        return []
    data = valued(part, "singular_value", ["module", "index"])
    data.insert(0, "kind", kinds_of(data["module"]))
    largest = data.groupby("module")["value"].transform("max")
    data = data.assign(relative=data["value"] / largest.where(largest > 0, 1.0))
    top = data[data["index"] == 1].assign(place=lambda d: np.arange(1, len(d) + 1))
    size = Figure(
        "size", "Spectral norm of every product, in the order of the names, by kind.", _draw_size, top, size=(6.5, 3.4)
    )
    if data["index"].max() == 1:
        return [size]
    caption = "Singular values of every product relative to its largest, coloured by the kind of the module."
    return [Figure("spectrum", caption, _draw, data, size=(6.5, 3.7)), size]


def _module_table(records: pd.DataFrame) -> pd.DataFrame:
    rows = [
        {
            "tensor": row["module"],
            "shape": f"{row['rows']:.0f} × {row['columns']:.0f}",
            "rank": int(row["rank"]),
            "norm": f"{row['spectral']:.3g}",
            "stable rank": "n/a" if pd.isna(row["stable_rank"]) else f"{row['stable_rank']:.3g}",
            "rank 90, 99 %": f"{row['rank_90']:.0f}, {row['rank_99']:.0f}",
            "condition": "n/a" if pd.isna(row["condition"]) else f"{row['condition']:.3g}",
            "at ±max": f"{100 * row['clamped']:.2g} %",
        }
        for row in succeeded(records, what="module").to_dict("records")
    ]
    return pd.DataFrame(rows)


def _total_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each rank: errors of all modules together."""
    cut = succeeded(records, what="truncation")
    whole = succeeded(records, what="module").set_index("module")
    if cut.empty:
        return pd.DataFrame()
    cut = cut.assign(slot=cut.groupby("module", sort=False).cumcount())
    rows = []
    for _, part in cut.groupby("slot", sort=True):
        own = whole.loc[part["module"]]
        ranks = sorted(part["rank"].astype(int))
        rows.append(
            {
                "rank": str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}",
                "modules": len(part),
                "Frobenius": f"{np.sqrt((part['frobenius'] ** 2).sum() / (own['frobenius'] ** 2).sum()):.3g}",
                "spectral": f"{part['spectral'].max() / own['spectral'].max():.3g}",
                "worst Frobenius": f"{part['relative_frobenius'].max():.3g}",
                "worst spectral": f"{part['relative_spectral'].max():.3g}",
            }
        )
    return pd.DataFrame(rows)


def _tables(records: pd.DataFrame) -> list[Table]:
    if succeeded(records, what="module").empty:
        return []
    modules = (
        "Every product: its rank as stored, spectral norm, stable rank, ranks that keep 90 and 99 % of its "
        "energy, condition "
        "number, and the share of the entries of its factors that are exactly plus or minus the largest."
    )
    found = [Table("modules", modules, _module_table(records))]
    if not (total := _total_table(records)).empty:
        caption = "Relative errors of all modules in fewer columns: together, and of the worst. Nothing at all has 1."
        found.insert(0, Table("total", caption, total, leads=True))
    return found


def _claims(records: pd.DataFrame) -> list[Claim]:
    whole = succeeded(records, what="module")
    if whole.empty:
        return []
    clamped = whole[(whole["clamped"] > MANY_AT_THE_TOP) & (whole["clamped"] * (whole["rows"] + whole["columns"]) > 4)]
    dead = int((whole["spectral"] == 0).sum())
    fewer = int((whole["rank_99"] < whole["rank"]).sum())
    found = [
        Claim(
            f"{fewer} of {len(whole)} modules keep 99 % of their energy in fewer columns than they have",
            "confirmed",
            f"{whole['rank_99'].sum():.0f} columns in all, of {whole['rank'].sum():.0f}",
        )
    ]
    if len(clamped):
        sentence = (
            f"The factors were clamped: in {len(clamped)} of {len(whole)} modules many entries are exactly plus "
            "or minus "
            "the largest, as extraction with a quantile leaves them; what was cut off is lost"
        )
        share = f"{100 * clamped['clamped'].median():.2g} % of the entries in the median"
        found.append(Claim(sentence, "confirmed", share))
    if dead:
        found.append(
            Claim(f"{dead} of {len(whole)} products are zero: the adapter does nothing there", "confirmed", "")
        )
    return found
