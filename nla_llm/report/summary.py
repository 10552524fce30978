"""The page that sums up all studies of a run."""

from __future__ import annotations

from typing import Any

from . import text
from .document import Content, Result, absence, claim_fields, figure_fields, gather, provenance_rows, status_line

SHORT = 120  # letters of a provenance entry that the summary still prints


def summary_document(runs: list[Result]) -> dict[str, Any]:
    """Fields of the template for the summary."""
    entries = [_entry(run, gather(run.study, run.records, first_only=True)) for run in runs]
    return {
        "kind": "summary",
        "name": "summary",
        "title": "The linear algebra of large language models",
        "footer": "nla_llm, all studies of this run",
        "lead": _lead(entries, runs),
        "studies": entries,
        "provenance": _shared(runs),
    }


def _entry(run: Result, content: Content) -> dict[str, Any]:
    study = run.study
    shown = [(number, figure) for number, figure in enumerate(content.figures, start=1) if figure.svg]
    figure = None
    if shown:
        number, first = shown[0]
        figure = {**figure_fields(first, ""), "number": str(number)}
    return {
        "title": text.breakable(text.plain(study.title, 160) or study.name),
        "pdf": text.breakable(f"{study.name}.pdf"),
        "question": text.paragraphs(str(study.question)),
        "claims": [claim_fields(claim) for claim in content.claims],
        "missing": {"claims": absence(content, "claims")},
        "status": status_line(run.records),
        "troubles": [text.runs(text.plain(trouble, 200)) for trouble in content.troubles],
        "figure": figure,
    }


def _lead(entries: list[dict[str, Any]], runs: list[Result]) -> str:
    verdicts = [claim["verdict"] for entry in entries for claim in entry["claims"]]
    surprising = sum(claim["surprises"] for entry in entries for claim in entry["claims"])
    counts = [f"{verdicts.count(word)} {word}" for word in ("confirmed", "refuted", "open")]
    records = sum(len(run.records) for run in runs)
    parts = [_count(len(runs), "study", "studies"), _count(records, "record", "records")]
    lead = f"{', '.join(parts)}, {_count(len(verdicts), 'claim', 'claims')}: {', '.join(counts)}."
    return lead + (f" Against expectation: {surprising}." if surprising else "")


def _count(number: int, one: str, many: str) -> str:
    return f"{text.format_number(number)} {one if number == 1 else many}"


def _shared(runs: list[Result]) -> list[list[str]]:
    """Short entries of the provenance that all runs have in common."""
    tables = [dict(provenance_rows(run.provenance)) for run in runs]
    if not tables:
        return []
    return [
        [name, value]
        for name, value in tables[0].items()
        if len(value) <= SHORT and all(table.get(name) == value for table in tables)
    ]
