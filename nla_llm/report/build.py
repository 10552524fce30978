"""Reports as files: one PDF for each study with its data beside it, and one page that sums up all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .document import Result, gather, study_document
from .files import write_files
from .summary import summary_document
from .typst import compile_pdf

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas as pd

    from nla_llm.study.study import Study
    from nla_llm.study.summary import StudySummary

__all__ = ["Result", "build", "build_summary"]


def build(study: Study, records: pd.DataFrame, provenance: Any, output_dir: str | Path) -> Path:
    """Write ``<name>.pdf`` and, in the folder ``<name>``, the data of every figure and table as CSV.

    Parameters
    ----------
    study : Study
    records : pandas.DataFrame
        All records of the run; a column ``status`` says which cells are "ok", a column ``reason`` why the others are
        not. It may be empty: the report then says so.
    provenance : mapping, dataclass, or list of these
        Versions, machine, seeds, commit, wall time, of each run that contributed: printed small at the end.
    output_dir : path
        Folder of the reports; made if it is missing.

    Returns
    -------
    pathlib.Path
        The PDF. The same input gives the same bytes.

    Raises
    ------
    ReportError
        If the files cannot be written; those of an earlier report are then untouched.
    ValueError
        If two figures or two tables have the same name.
    """
    content = gather(study, records)
    document = study_document(study, content, records, provenance)
    files = {f"{study.name}/{figure.name}.csv": figure.csv for figure in content.figures}
    for table in content.tables:
        files[f"{study.name}/table-{table.name}.csv"] = table.data.to_csv(index=False, lineterminator="\n").encode()
    files[f"{study.name}.pdf"] = compile_pdf(document)
    write_files(Path(output_dir), files)
    return Path(output_dir) / f"{study.name}.pdf"


def build_summary(
    results: Iterable[tuple[Study, pd.DataFrame, Any] | StudySummary], output_dir: str | Path, *, name: str = "summary"
) -> Path:
    """Write ``summary.pdf``: each study's question, verdicts, first figure and counts on one page.

    With very many studies, small type is not enough and the page becomes several.

    Parameters
    ----------
    results : iterable
        For each study a `Result` (study, records, provenance), or anything with these three attributes, such as the
        entries of ``nla_llm.study.run(...).studies``.
    output_dir : path
        Folder of the reports; made if it is missing.
    name : str
        Stem of the file.

    Raises
    ------
    ReportError
        If the file cannot be written; that of an earlier run is then untouched.
    ValueError
        If a study is called as the summary is.

    Returns
    -------
    pathlib.Path
        The PDF.
    """
    runs = [_result(result) for result in results]
    if any(run.study.name == name for run in runs):
        raise ValueError(
            f"a study is named {name!r}, as the page that sums up all studies; rename the study, or pass name="
        )
    path = Path(output_dir) / f"{name}.pdf"
    write_files(Path(output_dir), {path.name: compile_pdf(summary_document(runs))})
    return path


def _result(found: tuple[Study, pd.DataFrame, Any] | StudySummary) -> Result:
    return Result(*found) if isinstance(found, tuple) else Result(found.study, found.records, found.provenance)
