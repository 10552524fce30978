"""Tables and findings of ``nla-llm update``."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import numpy as np
import pandas as pd

from nla_llm.cli.update_figures import truncations
from nla_llm.measures import RankRange
from nla_llm.study import Claim, Table
from nla_llm.study.frames import groups, succeeded

__all__ = [
    "claims_of",
    "rule_table",
    "short_names",
    "tables_of",
    "total_table",
    "truncation_table",
    "whole_table",
]

WELL_KEPT = 0.1  # relative error up to which an update is called kept
MANY_UNCHANGED = 0.1  # of the entries: from here on storage is named as a likely cause
_SIXTEEN = ("float16", "bfloat16")


# -- tables ------------------------------------------------------------------------------------------------------------


def tables_of(records: pd.DataFrame) -> list[Table]:
    """In total, tensor by tensor, and what the adapter leaves out."""
    found = []
    if not succeeded(records, what="tensor").empty:
        captions = {
            "total": (
                "All matrices together, at every rank: parameters of the two factors, and the relative error of the "
                "update and of the weights, Frobenius (of all entries) and spectral (of the block-diagonal matrix, "
                "whose "
                "norm is the largest of all); brackets where they are wider than what is printed."
            ),
            "tensors": (
                "The update of every matrix: size relative to the base (Frobenius), stable rank, entries that "
                "storage left "
                "as they were, how much of the trained update survives in the stored one, and noise of storage "
                "relative to "
                "the update (Frobenius, spectral), all by the model of the first page."
            ),
            "ranks": (
                "The rank by every rule: share of the energy; relative error; stable rank, rounded up; singular values "
                "above the threshold of Gavish and Donoho (GD), for the noise of storage and for that which the "
                "median singular "
                "value tells; singular values above the norm of the noise of storage. A rule that the known values "
                "do not "
                "settle gives a range."
            ),
            "truncation": (
                "Relative error of the update at rank r: Frobenius, spectral; then that of the weights. A zero "
                "update has "
                "1, 1."
            ),
            "directions": (
                "Amplification ‖ΔW‖_F/‖UᵀWV‖_F along the singular vectors of the update up to its rank, beside that "
                "along random ones; intruders among the ten leading left singular vectors of the tuned matrix: those "
                "whose cosines with all of the base are below 0.6, a range where not all of the base were computed; "
                "condition number of the update at its rank."
            ),
        }
        makers = (total_table, whole_table, rule_table, truncation_table, direction_table)
        found = [
            Table(name, caption, make(records), leads=name == "total")
            for (name, caption), make in zip(captions.items(), makers, strict=True)
        ]
    left = left_out_table(records)
    if not left.empty:
        caption = (
            "What an adapter does not hold though it has changed, and the size of its change relative to the base: the "
            "tuned model has it, base and adapter together do not."
        )
        found.append(Table("left-out", caption, left))
    return found


def total_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each rank: the errors of all matrices together."""
    whole = succeeded(records, what="tensor").set_index("tensor")
    parameters = (whole["rows"] + whole["columns"]).to_dict()
    norms = {norm: _joint(whole, f"update_{norm}", norm) for norm in ("frobenius", "spectral")}
    base = float(np.sqrt(np.sum(whole["weight_frobenius"] ** 2)))
    rows = []
    for _, part in truncations(records).groupby("slot", sort=True):
        ranks = sorted({int(rank) for rank in part["rank"]})
        row = {"rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"}
        row["parameters"] = (
            f"{sum(int(r) * parameters[t] for r, t in zip(part['rank'], part['tensor'], strict=True)):.0f}"
        )
        for norm in ("frobenius", "spectral"):
            error = _joint(part, norm, norm)
            low, high = (_quotient(e, n) for e, n in ((error[1], norms[norm][2]), (error[2], norms[norm][1])))
            row[f"of ΔW, {norm.capitalize() if norm == 'frobenius' else norm}"] = _bracket(
                _quotient(error[0], norms[norm][0]), low, high
            )
        error = _joint(part, "frobenius", "frobenius")
        row["of W, Frobenius"] = f"{_quotient(error[0], base):.3g}" if base else "n/a"
        rows.append(row)
    return pd.DataFrame(rows)


def _joint(part: pd.DataFrame, column: str, norm: str) -> list[float]:
    """Value and ends of a norm of the block-diagonal matrix of all."""
    columns = [part[name].astype(float) for name in (column, f"{column}_lower", f"{column}_upper")]
    return [float(np.sqrt(np.sum(c**2)) if norm == "frobenius" else np.max(c)) for c in columns]


def _quotient(a: float, b: float) -> float:
    return a / b if b else float("nan")


def _bracket(value: float, low: float, high: float) -> str:
    short = [f"{x:.3g}" for x in (value, low, high)]
    return short[0] if len(set(short)) == 1 else f"{short[0]} [{short[1]}, {short[2]}]"


def whole_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each tensor: size and storage of its update."""
    return pd.DataFrame([_whole_row(row) for row in succeeded(records, what="tensor").to_dict("records")])


def _whole_row(row: dict[Any, Any]) -> dict[str, str]:
    stored = row["stored"] if row["stored"] == row["stored_base"] else f"{row['stored_base']}, {row['stored']}"
    return {
        "tensor": row["tensor"],
        "shape": f"{row['rows']:.0f} × {row['columns']:.0f}",
        "stored": stored,
        "size": "n/a" if pd.isna(row["relative_update"]) else f"{row['relative_update']:.2g}",
        "stable rank": f"{row['stable_rank']:.3g}",
        "unchanged": f"{100 * row['unchanged']:.1f} %",
        "survives": f"{100 * row['survives']:.0f} %",
        "noise": f"{row['noise_frobenius']:.2g}, {row['noise_spectral']:.2g}",
    }


def rule_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each tensor: the rank by every rule."""
    rows = []
    for tensor, part in succeeded(records, what="rule").groupby("tensor", sort=False):
        ranks = {row["rule"]: str(RankRange(int(row["low"]), int(row["high"]))) for row in part.to_dict("records")}
        rows.append({"tensor": tensor, **ranks})
    return pd.DataFrame(rows)


def truncation_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each tensor: the error at every rank, Frobenius and spectral, of the update and of the weights."""
    cut = truncations(records)
    same = cut.groupby("slot")["rank"].nunique().max() == 1
    rows = []
    for tensor, part in cut.groupby("tensor", sort=False):
        row: dict[str, str] = {"tensor": str(tensor)}
        for one in part.to_dict("records"):
            head = f"r = {one['rank']:.0f}" if same else "error"
            if not same:
                row["rank"] = f"{one['rank']:.0f}"
            row[head] = f"{one['relative_frobenius']:.3g}, {one['relative_spectral']:.3g}"
        last = part.iloc[-1]
        if not pd.isna(last["weight_frobenius"]):
            row["of W"] = f"{last['weight_frobenius']:.2g}, {last['weight_spectral']:.2g}"
        rows.append(row)
    return pd.DataFrame(rows)


def direction_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each tensor: amplification, intruders, conditioning."""
    return pd.DataFrame([_direction_row(row) for row in succeeded(records, what="tensor").to_dict("records")])


def _direction_row(row: dict[Any, Any]) -> dict[str, str]:
    intruders = RankRange(int(row["intruders_low"]), int(row["intruders_high"]))
    found = {
        "tensor": row["tensor"],
        "rank": f"{row['rank']:.0f}",
        "amplification": _short(row["amplification"]),
        "random": _short(row["amplification_random"]),
        "intruders": f"{intruders} of {row['directions']:.0f}",
        "condition": _short(row["condition"]),
    }
    if not pd.isna(row.get("output_error")):
        found["output error, plain"] = f"{row['output_error']:.3g}, {row['output_error_plain']:.3g}"
    return found


def _short(value: Any) -> str:
    return "n/a" if pd.isna(value) else f"{value:.3g}"


def left_out_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each reason: what an adapter does not hold, and by how much it has changed."""
    changed = records[
        (records["status"] == "ok") & records.get("what", pd.Series(dtype=str)).isin(["vector", "tensor"])
    ]
    if changed.empty or "barred" not in changed.columns:
        return pd.DataFrame()
    changed = changed[changed["barred"].fillna("") != ""]
    rows = []
    for (reason,), part in groups(changed, ["barred"]):
        size = part["relative_update"].astype(float)
        worst = part["tensor"].iloc[int(np.nanargmax(size))] if size.notna().any() else part["tensor"].iloc[0]
        rows.append({"why": reason, "tensors": len(part), "largest change": _short(size.max()), "of": worst})
    return pd.DataFrame(rows)


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


# -- findings ----------------------------------------------------------------------------------------------------------


def claims_of(records: pd.DataFrame) -> list[Claim]:
    """What storage hides, what the rank keeps, and whether a tolerance is met."""
    whole = succeeded(records, what="tensor")
    if whole.empty:
        return []
    found = [*_storage_finding(whole), *_noise_finding(whole), _rank_finding(truncations(records))]
    return [*found, *_tolerance_finding(whole)]


def _storage_finding(whole: pd.DataFrame) -> list[Claim]:
    """A warning where 16 bits have swallowed much of the update."""
    hidden = whole[whole["stored"].isin(_SIXTEEN) & (whole["unchanged"] > MANY_UNCHANGED)]
    if hidden.empty:
        return []
    sentence = (
        f"Storage in 16 bits hides part of the update: in {len(hidden)} of {len(whole)} matrices more than "
        f"{100 * MANY_UNCHANGED:.0f} % of the entries did not change. Ranks and errors are those of the stored "
        "update, not of the trained one; compare checkpoints saved in float32"
    )
    worst = hidden.sort_values("unchanged")["tensor"].iloc[-1]
    low, high = (100 * f(hidden["unchanged"]) for f in (min, max))
    survives = 100 * hidden["survives"].min()
    number = f"{low:.0f} to {high:.0f} % unchanged, most in {worst}; at least {survives:.0f} % of the update survives"
    return [Claim(sentence, "confirmed", number)]


def _noise_finding(whole: pd.DataFrame) -> list[Claim]:
    """Matrices whose rank stores noise."""
    worth = pd.to_numeric(whole["worth"])
    beyond = whole[whole["rank"] > worth]
    if beyond.empty:
        return []
    sentence = (
        f"In {len(beyond)} of {len(whole)} matrices the rank is above the one from which on only noise of "
        "storage is kept, "
        "by the threshold of Gavish and Donoho"
    )
    number = f"that rank is {worth.min():.0f} to {worth.max():.0f}, in the median {worth.median():.0f}"
    return [Claim(sentence, "confirmed", number)]


def _rank_finding(cut: pd.DataFrame) -> Claim:
    """How many matrices the largest rank keeps."""
    last = cut[cut["slot"] == cut["slot"].max()]
    keeps = int((last["relative_spectral_upper"] <= WELL_KEPT).sum())
    what = "every matrix" if keeps == len(last) else f"{keeps} of {len(last)} matrices"
    worst = (last[f"relative_{norm}"].max() for norm in ("spectral", "frobenius"))
    low, high = int(last["rank"].min()), int(last["rank"].max())
    return Claim(
        f"Rank {low if low == high else f'{low} to {high}'} keeps the update of {what} to "
        f"{100 * WELL_KEPT:.0f} % in the "
        "spectral norm",
        "confirmed",
        "largest error {:.3g} spectral, {:.3g} Frobenius".format(*worst),
    )


def _tolerance_finding(whole: pd.DataFrame) -> list[Claim]:
    """Whether the tolerance is met everywhere."""
    asked = whole[whole["met"].notna()]
    if asked.empty:
        return []
    met = asked["met"].astype(bool)
    short = ", ".join(asked["tensor"][~met].head(3))
    number = f"{met.sum()} of {len(asked)}" + (f"; not {short}, within the ranks that are searched" if short else "")
    sentence = "The tolerance is certainly met by the factors of every matrix"
    return [Claim(sentence, "confirmed" if met.all() else "refuted", number)]
