"""The verbs of the bench: list, run, report, info."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.table import Table

    from nla_llm.methods import Properties
    from nla_llm.study import StudySummary

Studies = Annotated[
    list[str] | None,
    typer.Argument(metavar="STUDY", help="Names of studies, or files my_study.py.", show_default=False),
]
Reports = Annotated[Path, typer.Option("--reports", metavar="DIR", help="Folder for PDFs and data.")]
Jobs = Annotated[int | None, typer.Option(metavar="N", help="Worker processes; one per core by default.")]
StoreFile = Annotated[
    Path,
    typer.Option("--store", metavar="FILE", show_default=False, help="Results; results/nla_llm.sqlite by default."),
]
Scale = Annotated[
    Literal["small", "default", "full"] | None,
    typer.Option(
        "--scale", metavar="SCALE", help="small, default or full; a plain run takes that of each headline study."
    ),
]
Everything = Annotated[bool, typer.Option("--all", help="All studies, not only the headline ones.")]

STORE, REPORTS = Path("results/nla_llm.sqlite"), Path("reports")


def list_() -> None:
    """Show methods and studies.

    Example: [bold]nla-llm list[/]
    """
    from nla_llm.cli.terminal import say  # noqa: PLC0415 - so that --help stays fast

    say(_attention_methods(), "", _update_methods(), "", _studies(), "", f"Theory: {_THEORY}")


_THEORY = (
    "what is promised with the default options, an equality (closed form), an upper bound or a floor below which no "
    "such method comes; tested unless it says otherwise."
)
_LOOK: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "pad_edge": False, "padding": 0}


def _attention_methods() -> Table:
    """Options, target, structures and theory of each; in whole words at a width of 80."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - so that --help stays fast
    from rich.table import Column, Table  # noqa: PLC0415

    columns = (
        Column("method", no_wrap=True), Column("options", min_width=14), "target", "causal",
        Column("masks", max_width=7), Column("theory", max_width=7),
    )  # fmt: skip
    table = Table(*columns, title="methods for attention", box=SIMPLE_HEAD, **_LOOK)
    for name, cls, p in _registered("attention"):
        shown = ", ".join(s.removesuffix("_mask") for s in ("key_mask", "window", "bias") if s in p.supports)
        causal = "yes" if "causal" in p.supports else ""
        table.add_row(name, _options(cls), _target(p), causal, shown, _theory_status(cls))
    return table


def _update_methods() -> Table:
    """Options and theory of each."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - so that --help stays fast
    from rich.table import Column, Table  # noqa: PLC0415

    columns = (Column("method", no_wrap=True), "options", "target", "theory")
    table = Table(*columns, title="methods for weight updates", box=SIMPLE_HEAD, **_LOOK)
    for name, cls, p in _registered("update"):
        table.add_row(name, _options(cls), _target(p), _theory_status(cls))
    return table


def _studies() -> Table:
    """The question of each, and at which scale a plain run answers it."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - so that --help stays fast
    from rich.table import Column, Table  # noqa: PLC0415

    from nla_llm.study import catalogue  # noqa: PLC0415

    columns = (Column("study", no_wrap=True), "question", Column("scale", no_wrap=True))
    table = Table(*columns, title="studies, with the scale of the headline ones, which `nla-llm run` runs",
                  box=SIMPLE_HEAD, **_LOOK)  # fmt: skip
    headline = catalogue.headline()
    for name in catalogue.names():
        study = catalogue.load(name)
        table.add_row(name, study.question, study.headline if name in headline else "")
    return table


def _registered(problem: str) -> Iterator[tuple[str, type, Properties]]:
    """Name, class and properties of the methods for a kind of problem."""
    from nla_llm.methods import methods, properties_of, registered  # noqa: PLC0415 - so that --help stays fast

    found = ((name, registered(name)) for name in methods())
    return ((name, cls, properties_of(cls)) for name, cls in found if properties_of(cls).problem == problem)


def _options(cls: Any) -> str:
    return ", ".join(f.name for f in fields(cls) if not f.name.startswith("_")) if is_dataclass(cls) else ""


def _target(p: Properties) -> str:
    return f"{p.target} (yardstick)" if p.yardstick else p.target


def _theory_status(cls: Any) -> str:
    """Kind of what is promised of a method with the default options, on a problem of any size."""
    if not hasattr(cls, "theory"):
        return ""
    from dataclasses import MISSING, fields, is_dataclass  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415 - so that --help stays fast

    from nla_llm.methods import properties_of  # noqa: PLC0415
    from nla_llm.problems import AttentionProblem, UpdateProblem  # noqa: PLC0415

    p, x = properties_of(cls), np.random.default_rng(0).standard_normal((4, 2))
    problem = AttentionProblem(x, x, x) if p.problem == "attention" else UpdateProblem(x, base=x, inputs=x)
    options, given = {} if p.budget is None else {p.budget: 2}, fields(cls) if is_dataclass(cls) else ()
    if any(f.name not in options and f.default is MISSING and f.default_factory is MISSING for f in given):
        return "for some options"  # there are no default ones
    promise = cls(**options).theory(problem)
    if promise is None:
        return "for some options"
    return f"{promise.kind}, not verified" if promise.status == "NV" else str(promise.kind)


def run(  # noqa: PLR0917 - options, given by name
    studies: Studies = None,
    everything: Everything = False,
    scale: Scale = None,
    reports: Reports = REPORTS,
    store: StoreFile = STORE,
    jobs: Jobs = None,
    dask: Annotated[str | None, typer.Option(metavar="ADDR", help="Run on the Dask cluster of this scheduler.")] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Longest time for one cell.")] = 600.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute anew, also what the store has.")] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write all records, as .csv or .parquet.")
    ] = None,
) -> None:
    """Run studies, write their PDFs, and judge their claims.

    What the store has is not computed again. Exit code: 0 all well, 1 cells failed, 3 a claim is contradicted.

    Example: [bold]nla-llm run attention_error --scale small[/]
    """
    from nla_llm.cli.terminal import say, show_studies  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.study import Store, catalogue  # noqa: PLC0415
    from nla_llm.study import run as run_studies  # noqa: PLC0415

    if export is not None and export.suffix not in {".csv", ".parquet"}:
        raise ValueError(f"--export writes .csv or .parquet, got {export.name}")
    chosen = studies or (catalogue.names() if everything else None)
    summary = run_studies(
        chosen,
        scale=scale,
        store=store,
        jobs=jobs,
        dask=dask,
        timeout=timeout,
        resume=not fresh,
        arguments=sys.argv[1:],
    )
    show_studies(summary.studies)
    say(*(f"wrote {path}" for path in write_reports(summary.studies, reports)))
    if export is not None:
        with Store(summary.store, create=False) as kept:
            rows = (kept.export_csv if export.suffix == ".csv" else kept.export_parquet)(export)
        say(f"wrote {export}, {rows} rows")
    raise typer.Exit(summary.exit_code)


def report(
    studies: Studies = None,
    everything: Everything = False,
    scale: Scale = None,
    reports: Reports = REPORTS,
    store: StoreFile = STORE,
) -> None:
    """Write the PDFs again from what the store has, computing nothing.

    Example: [bold]nla-llm report cost_crossover[/]
    """
    from nla_llm.cli.terminal import say, show_studies  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.study import Store, catalogue, summarise  # noqa: PLC0415

    chosen = studies or (catalogue.names() if everything else catalogue.headline())
    with Store(store, create=False) as kept:
        named = bool(studies) or everything
        loaded = [catalogue.load(name) for name in chosen]
        scales = [scale or ("" if named else study.headline) or "default" for study in loaded]
        summaries = [summarise(study, kept, scale=own) for study, own in zip(loaded, scales, strict=True)]
    full = [summary for summary in summaries if summary.counts]
    empty = [summary.study.name for summary in summaries if not summary.counts]
    if not full:  # a report of nothing would take the place of a good one
        same = len(set(scales)) == 1  # else each headline study has its own, which a plain run takes
        at = f" --scale {scales[0]}" if same else ""
        names = " ".join(map(str, chosen)) if named else ""
        raise ValueError(
            f"the store '{store}' has no results of {', '.join(empty)}{at and f' at{at}'} from the code as it is now; "
            f"compute them with: nla-llm run{names and f' {names}'}{at}"
        )
    show_studies(summaries)
    say(*(f"wrote {path}" for path in write_reports(full, reports)))
    say(*(f"left the report of {name} as it is: the store has no results of it" for name in empty))


def info() -> None:
    """Show versions, BLAS, processor and the commit: what a report records of a run.

    Example: [bold]nla-llm info[/]
    """
    from rich.table import Table  # noqa: PLC0415 - so that --help stays fast

    from nla_llm.cli.terminal import say  # noqa: PLC0415
    from nla_llm.study import collect  # noqa: PLC0415

    table = Table.grid(padding=(0, 2))
    for name, value in collect().items():
        table.add_row(name.replace("_", " "), _plain(value))
    say(table)


def _plain(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    return str(value)


def write_reports(summaries: Iterable[StudySummary], reports: Path) -> list[Path]:
    """Write a PDF for each study, and the page that sums up several; the paths."""
    from nla_llm.report import Result, build, build_summary  # noqa: PLC0415 - matplotlib and Typst load here

    results = [Result(s.study, s.records, _provenance(s)) for s in summaries]
    paths = [build.build(r.study, r.records, r.provenance, reports) for r in results]
    return [*paths, build_summary(results, reports)] if len(results) > 1 else paths


def _provenance(summary: StudySummary) -> dict[str, Any]:
    """Provenance of the latest run that contributed, with the number of the others."""
    latest = dict(summary.provenance[-1]) if summary.provenance else {}
    earlier = len(summary.provenance) - 1
    return latest | ({"earlier_runs_that_contributed": earlier} if earlier > 0 else {})
