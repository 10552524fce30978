"""The verb update: the difference of two checkpoints, or an adapter."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nla_llm.cli.bench import REPORTS, STORE, Reports, StoreFile
from nla_llm.cli.data import Name, finish, report_name

if TYPE_CHECKING:
    from nla_llm.cli.update_study import Audit
    from nla_llm.problems.pair import Pair, Plan
    from nla_llm.study import Study, StudySummary

Norm = Literal["spectral", "frobenius"]
Dtype = Literal["float32", "float16", "bfloat16"]


def update(  # noqa: PLR0917 - options, given by name
    base: Annotated[Path | None, typer.Argument(metavar="BASE", help="Safetensors, index, or directory.")] = None,
    tuned: Annotated[Path | None, typer.Argument(metavar="TUNED", help="The same after fine-tuning.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Audit an adapter, in place of BASE and TUNED.")
    ] = None,
    rank: Annotated[list[int] | None, typer.Option(metavar="R", help="Rank (repeatable; 1, 4, 16, 64).")] = None,
    tolerance: Annotated[
        float | None, typer.Option(metavar="T", help="Relative error; the least rank that meets it.")
    ] = None,
    norm: Annotated[Norm, typer.Option(metavar="NORM", help="Of the tolerance: spectral, frobenius.")] = "frobenius",
    budget: Annotated[int | None, typer.Option(metavar="N", help="Parameters, shared out by energy.", min=1)] = None,
    inputs: Annotated[Path | None, typer.Option(metavar="FILE", help="Activations by layer; outputs are kept.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write an adapter for PEFT.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(metavar="DTYPE", help="Of the adapter: float32, float16, bfloat16.")
    ] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Write over an adapter that is there.")] = False,
    tensors: Annotated[str | None, typer.Option(metavar="PATTERN", help="Only names like '*q_proj*'.")] = None,
    name: Name = None,
    reports: Reports = REPORTS,
    store: StoreFile = STORE,
    jobs: Annotated[int, typer.Option(metavar="N", help="Workers, a matrix in each.", min=0)] = 1,
) -> None:
    """Audit a fine-tune, or an adapter: the rank it needs, what is lost, what is noise.

    Example: [bold]nla-llm update base/ tuned/ --rank 16 -o adapter/[/]
    """
    asked = Asked(tuple(sorted(set(rank or ()))), tolerance, norm, budget, inputs, output, dtype, force)
    asked.check()
    if adapter is not None:
        from nla_llm.cli.adapter_study import audit_adapter  # noqa: PLC0415 - so that --help stays fast

        given = {"BASE": base, "--budget": budget, "--inputs": inputs, "--tensors": tensors}
        if wrong := [option for option, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(wrong)} is for a pair of checkpoints, not for --adapter")
        finish(audit_adapter(report_name(name, "adapter", adapter), adapter, asked, store), reports)
    if base is None or tuned is None:
        raise ValueError("pass two checkpoints, BASE and TUNED, or one adapter, --adapter PATH")
    from nla_llm.problems.pair import Pair  # noqa: PLC0415 - so that --help stays fast

    report = report_name(name, "update", tuned)
    finish(_audit(report, Pair(base, tuned), tensors, asked, store=store, jobs=jobs), reports)


@dataclass(frozen=True)
class Asked:
    """Options that say what is wanted, for a pair and for an adapter."""

    ranks: tuple[int, ...]
    tolerance: float | None
    norm: str
    budget: int | None
    inputs: Path | None
    output: Path | None
    dtype: str
    force: bool

    def check(self) -> None:
        """Refuse what contradicts itself, before anything is read."""
        rules = {"--rank": bool(self.ranks), "--tolerance": self.tolerance, "--budget": self.budget}
        given = [option for option, value in rules.items() if value]
        if self.ranks and self.ranks[0] < 1:
            raise ValueError(f"--rank must be at least 1, got {self.ranks[0]}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"--tolerance is a relative error between 0 and 1, got {self.tolerance}")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each decide the rank; pass one of them")
        if self.output is not None and not (given and len(self.ranks) < 2):
            raise ValueError("-o writes one adapter: pass a single --rank, or --tolerance, or --budget")
        if self.inputs is not None and not self.ranks:
            raise ValueError("--inputs goes with --rank: a tolerance and a budget are about the update itself")
        if self.output is not None:
            from nla_llm.problems._writing import check_free  # noqa: PLC0415 - so that --help stays fast

            check_free(self.output, force=self.force)


def _audit(name: str, pair: Pair, pattern: str | None, asked: Asked, *, store: Path, jobs: int) -> StudySummary:
    """Measure a pair, write the adapter, and show what was found."""
    from nla_llm.cli.terminal import reading  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.cli.update_study import RANKS, Audit, Inputs, update_study, within_budget  # noqa: PLC0415
    from nla_llm.problems.pair import plan_of  # noqa: PLC0415
    from nla_llm.study import run  # noqa: PLC0415

    inputs = Inputs(asked.inputs) if asked.inputs is not None else None
    with reading("reading") as advance:
        plan = plan_of(pair, pattern, advance)
    if inputs is not None:
        inputs.check(plan)
    chosen = asked.ranks or (() if asked.tolerance or asked.budget else RANKS)
    audit = Audit(pair, pair.stamp(), chosen, (), asked.tolerance, asked.norm, inputs)

    def measured(study: Study, *, resume: bool = True) -> StudySummary:
        return run(study, store=store, jobs=jobs, timeout=None, resume=resume, arguments=sys.argv[1:]).studies[0]

    if asked.budget is not None:
        ranks = within_budget(plan, audit, asked.budget, lambda a: measured(update_study(name, a, plan)).records)
        others = {t for t, found in plan.tensors.items() if found.kind != "vector"} - set(ranks)
        audit = replace(audit, own=tuple({**dict.fromkeys(others, 0), **ranks}.items()))
    if asked.output is not None:
        audit = replace(audit, dtype=asked.dtype, parts=asked.output.with_name(f".{asked.output.name}.factors"))
        study = update_study(name, audit, plan)
        lost = [cell for cell in study.grid() if (part := audit.part(cell)) is not None and not part.exists()]
        if lost:
            measured(update_study(name, audit, plan, lost), resume=False)
    summary = measured(update_study(name, audit, plan))
    _show(summary, name)
    if asked.output is not None and not summary.failures:
        _write(audit, plan, summary, asked)
    return summary


def _write(audit: Audit, plan: Plan, summary: StudySummary, asked: Asked) -> None:
    """Put the factors of all matrices together into an adapter, and say what it does not hold."""
    from nla_llm.cli.terminal import say  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.cli.update_study import ranks_of, read_part  # noqa: PLC0415
    from nla_llm.problems.adapters import PeftModule, write_peft  # noqa: PLC0415

    assert asked.output is not None  # noqa: S101 - for the type checker
    own, found = dict(audit.own), ranks_of(summary.records)
    ranks = {name: own.get(name, rank) for name, rank in found.items()}
    parts = {str(cell["tensor"]): part for cell in summary.study.grid() if (part := audit.part(cell)) is not None}
    modules = [
        PeftModule(name, plan.tensors[name].kind, plan.tensors[name].shape, ranks[name])
        for name in parts
        if ranks[name] > 0
    ]
    base = str(audit.pair.base) if audit.pair.base.is_dir() else ""
    write_peft(
        asked.output,
        modules,
        lambda name: read_part(parts[name], ranks[name]),
        dtype=asked.dtype,
        base=base,
        force=asked.force,
    )
    if audit.parts is not None:
        shutil.rmtree(audit.parts, ignore_errors=True)
    missing = {name: found.barred for name, found in plan.tensors.items() if found.barred and not found.equal}
    missing |= {name: "the budget gives it no rank" for name in parts if ranks[name] == 0}
    for reason in dict.fromkeys(missing.values()):
        names = [name for name, why in missing.items() if why == reason]
        say(f"not in the adapter, {reason}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    say(f"wrote {asked.output}, {len(modules)} matrices in {asked.dtype}")


def _show(summary: StudySummary, name: str) -> None:
    from nla_llm.cli import update_tables as tables  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.cli.terminal import show_frame, show_skipped  # noqa: PLC0415

    records = summary.records
    if summary.counts.get("ok") and "what" in records.columns and (records["what"] == "tensor").any():
        rest = f"see the report {name}"
        short = tables.short_names
        whole = short(tables.whole_table(records)).drop(columns=["shape"])
        title = "the update: its size relative to the base, what storage did to it, noise (Frobenius, spectral)"
        show_frame(whole, title, rest)
        show_frame(short(tables.rule_table(records)), "rank by every rule", rest)
        show_frame(short(tables.truncation_table(records)), "relative error: Frobenius, spectral", rest)
        show_frame(tables.total_table(records), "all matrices together")
        left = tables.left_out_table(records)
        if not left.empty:
            show_frame(left, "changed, but no adapter holds it")
    show_skipped(summary, "tensor")
