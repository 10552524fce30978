"""The verb for somebody's own queries and keys: attention."""

from __future__ import annotations

import re
import sys
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from nla_llm.cli.bench import REPORTS, STORE, Jobs, Reports, StoreFile

if TYPE_CHECKING:
    from nla_llm.cli._heads import Heads
    from nla_llm.study import Study, StudySummary

Name = Annotated[str | None, typer.Option(metavar="WORD", help="Name of the report.")]


def attention(  # noqa: PLR0917 - options, given by name
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="File of tensors q, k, v, or a checkpoint directory.")
    ],
    method: Annotated[list[str] | None, typer.Option(metavar="NAME", help="NAME:option=value,...; repeatable.")] = None,
    m: Annotated[
        list[int] | None, typer.Option(metavar="M", help="Budget; repeatable; 16, 64 and 256 by default.")
    ] = None,
    n: Annotated[int | None, typer.Option(metavar="N", help="Take the first N tokens only.", min=1)] = None,
    draws: Annotated[int, typer.Option(metavar="N", help="Draws of a random method.", min=2)] = 6,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Text that a checkpoint reads.")] = None,
    tokens: Annotated[Path | None, typer.Option(metavar="FILE", help="Token ids (.npy) in place of a text.")] = None,
    layers: Annotated[str | None, typer.Option(metavar="LAYERS", help="Layers of a checkpoint, as 0,3,5-7.")] = None,
    q: Annotated[str, typer.Option(metavar="TENSOR", help="Name of the queries in a file.")] = "q",
    k: Annotated[str, typer.Option(metavar="TENSOR", help="Name of the keys.")] = "k",
    v: Annotated[str, typer.Option(metavar="TENSOR", help="Name of the values, if any.")] = "v",
    key_mask: Annotated[str | None, typer.Option(metavar="TENSOR", help="Mask of the keys, 1 = keep.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Query i sees keys up to i.")] = False,
    scale: Annotated[
        float | None, typer.Option(metavar="S", help="Factor of the logits; 1/sqrt(d) by default.")
    ] = None,
    name: Name = None,
    reports: Reports = REPORTS,
    store: StoreFile = STORE,
    jobs: Jobs = None,
) -> None:
    """Measure methods on your own queries and keys, between the yardsticks.

    Example: [bold]nla-llm attention heads.safetensors --causal --method elu_features[/]
    """
    from nla_llm.cli._heads import ModelHeads, TensorHeads, numbers  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.cli.attention_study import attention_study  # noqa: PLC0415
    from nla_llm.cli.terminal import show_frame, show_skipped  # noqa: PLC0415
    from nla_llm.study.frames import succeeded  # noqa: PLC0415
    from nla_llm.study.heads import heads_table  # noqa: PLC0415

    if source.is_dir():
        _refuse(
            source,
            "a file of tensors",
            q=q != "q",
            k=k != "k",
            v=v != "v",
            key_mask=key_mask,
            causal=causal,
            scale=scale,
        )
        if (text is None) == (tokens is None):
            raise ValueError("a checkpoint needs something to read: pass either --text FILE or --tokens FILE.npy")
        heads: Heads = ModelHeads(source, text, tokens, numbers(layers), n)
    else:
        _refuse(source, "a checkpoint directory", text=text, tokens=tokens, layers=layers)
        heads = TensorHeads(source, q, k, v, key_mask, causal, scale, n)
    study = attention_study(report_name(name, "attention", source), heads, method, m, draws)
    summary = _run(study, store, jobs)
    if summary.counts.get("ok"):
        table = heads_table(succeeded(summary.records)).drop(columns=["operations", "output"], errors="ignore")
        table = table.rename(columns={"better than uniform": "better"})
        show_frame(table, "relative errors of P, medians over heads; better: heads on which it surely beats uniform")
    show_skipped(summary, "label")
    finish(summary, reports)


def _refuse(source: Path, kind: str, **options: Any) -> None:
    """Refuse options that mean nothing for this kind of source, rather than ignore them."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, False)]
    if given:
        raise ValueError(f"{', '.join(given)} is for {kind}, which {source} is not")


def report_name(name: str | None, verb: str, source: Path) -> str:
    """Name of a report: a word that can be a file name."""
    if name is not None:
        return name
    stem = source.resolve().name.removesuffix(".safetensors").removesuffix(".json")
    return f"{verb}-{re.sub(r'[^A-Za-z0-9_-]+', '-', stem).strip('-') or 'data'}"


def _run(study: Study, store: Path, jobs: int | None) -> StudySummary:
    from nla_llm.study import run  # noqa: PLC0415 - so that --help stays fast

    return run(study, store=store, jobs=jobs, arguments=sys.argv[1:]).studies[0]


def finish(summary: StudySummary, reports: Path) -> NoReturn:
    """Verdicts, report, exit code: 1 if a cell failed."""
    from nla_llm.cli.bench import write_reports  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.cli.terminal import say, show_studies  # noqa: PLC0415

    show_studies([summary])
    say(*(f"wrote {path}" for path in write_reports([summary], reports)))
    raise typer.Exit(summary.exit_code)
