"""The report of one study as plain data: what the template sets, field by field."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from nla_llm.study.cells import STATUSES
from nla_llm.study.content import pieces
from nla_llm.study.frames import succeeded

from . import figures as drawing
from . import tables, text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd

    from nla_llm.study.claims import Claim
    from nla_llm.study.content import Figure, Table
    from nla_llm.study.study import Study

_log = logging.getLogger(__name__)

MAX_FAILURES = 40  # kinds of failure that are listed; the rest is counted


class Result(NamedTuple):
    """A study with the records and the provenance of its run."""

    study: Study
    records: pd.DataFrame
    provenance: Any = None


@dataclass
class Content:
    """What a study has to show for its records; what could not be made is a sentence in ``troubles``."""

    figures: list[drawing.Drawn] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)


def gather(study: Study, records: pd.DataFrame, *, first_only: bool = False) -> Content:
    """Ask the study for its figures, tables and claims, and draw; an error of the study becomes a sentence.

    With ``first_only`` the first figure that can be drawn is the only one.

    Raises
    ------
    ValueError
        If two figures or two tables have the same name: one file would replace the other.
    """
    content = Content()
    if records.empty:
        content.troubles.append("There are no records: the study has not been run, or its grid is empty.")
    elif succeeded(records).empty:
        content.troubles.append("No cell gave a result; the reasons stand under “Cells without a result”.")
    figures: Sequence[Figure] = _ask(study.figures, records, "figures", content)
    content.tables = list(_ask(study.tables, records, "tables", content))
    content.claims = list(_ask(study.claims, records, "claims", content))
    for kind, items in (("figure", figures), ("table", content.tables)):
        _check_names(study.name, kind, [item.name.lower() for item in items])
    content.figures = drawing.draw(figures, _families(records), first_only=first_only)
    return content


def _ask(function: Callable[[pd.DataFrame], Any], records: pd.DataFrame, what: str, content: Content) -> list[Any]:
    found, failed = pieces(function, records)
    for name, error in failed:
        _log.warning("the study could not make its %s", f"{what}, {name}" if name else what, exc_info=error)
        content.missing.add(what)
        content.troubles.append(
            f"{f'Of the {what}, “{name}” is' if name else f'The {what} are'} missing: {type(error).__name__}: {error}"
        )
    return found


def _check_names(study: str, kind: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"study {study!r} has more than one {kind} named {twice}; give each a name of its own")


def _families(records: pd.DataFrame) -> list[str]:
    """Methods in the records, sorted: a method without a colour of its own gets the same one in every figure."""
    return sorted({str(name) for name in records["method"].dropna()}) if "method" in records.columns else []


def study_document(study: Study, content: Content, records: pd.DataFrame, provenance: Any) -> dict[str, Any]:
    """Fields of the template for the report of one study."""
    return {
        "kind": "study",
        "name": text.plain(study.name, 40),
        "title": text.breakable(text.plain(study.title) or study.name),
        "running": text.breakable(text.plain(study.title, 70)),
        "footer": f"nla_llm, study {text.plain(study.name, 60)}",
        "question": text.paragraphs(str(study.question)),
        "setup": text.paragraphs(str(study.setup)),
        "status": status_line(records),
        "troubles": [text.runs(text.plain(trouble)) for trouble in content.troubles],
        "claims": [claim_fields(claim) for claim in content.claims],
        "missing": {what: absence(content, what) for what in ("claims", "figures")},
        "figures": [figure_fields(figure, f"{study.name}/{figure.name}.csv") for figure in content.figures],
        "tables": [_table_fields(table, f"{study.name}/table-{table.name}.csv") for table in content.tables],
        "failures": failures(records),
        "references": [text.runs(str(reference)) for reference in study.references],
        "provenance": provenance_rows(provenance),
    }


def absence(content: Content, what: str) -> str:
    """Sentence for a part that is empty."""
    return f"The {what} could not be made; see above." if what in content.missing else f"The study has no {what}."


def figure_fields(figure: drawing.Drawn, csv: str) -> dict[str, Any]:
    """Fields of a figure."""
    return {
        "svg": figure.svg,
        "trouble": text.runs(text.plain(figure.trouble)),
        "width": figure.width,
        "caption": text.runs(" ".join(figure.caption.split())),
        "alt": text.plain(figure.caption),
        "aspect": figure.aspect,
        "bars": "" if figure.has_intervals or figure.trouble else "These data carry no intervals.",
        "csv": text.breakable(csv),
    }


def claim_fields(claim: Claim) -> dict[str, Any]:
    """Fields of a claim; a verdict that its study did not expect is said to be so."""
    verdict = str(getattr(claim.verdict, "value", claim.verdict))
    surprises = verdict not in (claim.expected, "open")
    remark = "against expectation" if surprises else "as expected" if verdict == "refuted" else ""
    number = tables.cell(claim.number)["runs"] if claim.number not in (None, "") else []
    return {
        "sentence": text.runs(claim.sentence),
        "verdict": verdict,
        "number": number,
        "source": text.runs(claim.source or ""),
        "surprises": surprises,
        "remark": remark,
    }


def _table_fields(table: Table, csv: str) -> dict[str, Any]:
    caption = text.runs(" ".join(table.caption.split()))
    return {"caption": caption, "body": tables.typeset(table.data), "csv": text.breakable(csv), "leads": table.leads}


def status_line(records: pd.DataFrame) -> dict[str, Any]:
    """How many cells there are, and how many in each status that occurs."""
    if "status" not in records.columns:
        return {"total": f"{len(records)} records", "parts": []}
    counts = records["status"].astype(str).value_counts()
    known = [status for status in STATUSES if status in counts.index]
    others = sorted(set(counts.index) - set(STATUSES))
    total = f"{len(records)} record{'' if len(records) == 1 else 's'}"
    return {"total": total, "parts": [f"{counts[status]} {status}" for status in (*known, *others)]}


def failures(records: pd.DataFrame) -> list[dict[str, Any]]:
    """Cells without a result, those with the same status and reason together, the most frequent first."""
    if "status" not in records.columns:
        return []
    bad = records[records["status"] != "ok"]
    reasons = bad["reason"] if "reason" in bad.columns else bad["status"].map(lambda _: "no reason was recorded")
    kinds: dict[tuple[str, str], int] = {}
    for status, reason in zip(bad["status"], reasons, strict=True):
        kind = (str(status), text.plain(reason))
        kinds[kind] = kinds.get(kind, 0) + 1
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    rows = [_failure(status, count, reason) for (status, reason), count in ordered[:MAX_FAILURES]]
    if len(ordered) > MAX_FAILURES:
        rest = ordered[MAX_FAILURES:]
        rows.append(_failure("…", sum(count for _, count in rest), f"{len(rest)} further reasons"))
    return rows


def _failure(status: str, count: int, reason: str) -> dict[str, Any]:
    return {"status": status, "cells": str(count), "reason": text.runs(reason)}


def provenance_rows(provenance: Any) -> list[list[str]]:
    """Names and values of a provenance, or of those of several runs: what differs between runs is told for each.

    Examples
    --------
    >>> provenance_rows([{"cpu": "A", "cores": 2}, {"cpu": "A", "cores": 4}])
    [['runs', '2'], ['cpu', 'A'], ['cores', '2; 4']]

    Raises
    ------
    TypeError
        If it is neither None, a mapping, a dataclass, nor a list or tuple of these.
    """
    if provenance is None:
        return []
    runs = [_entries(run) for run in (provenance if isinstance(provenance, list | tuple) else [provenance])]
    names = dict.fromkeys(name for run in runs for name in run)
    values = {name: dict.fromkeys(run[name] for run in runs if name in run) for name in names}
    rows = [["runs", str(len(runs))]] if len(runs) > 1 else []
    return rows + [[_name(name), text.breakable(text.plain("; ".join(values[name]), 600))] for name in names]


def _entries(provenance: Any) -> dict[str, str]:
    if is_dataclass(provenance) and not isinstance(provenance, type):
        provenance = asdict(provenance)
    if not isinstance(provenance, Mapping):
        raise TypeError(
            f"provenance must be a mapping or a dataclass, got {type(provenance).__name__}; pass {{}} for none"
        )
    return {str(name): _flat(value) for name, value in provenance.items()}


def _name(name: Any) -> str:
    words = str(name)
    return words if words == "nla_llm" else words.replace("_", " ")


def _flat(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return text.format_number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{_name(name)} {_flat(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return "; ".join(_flat(entry) for entry in value) or "none"
    return str(value)
