"""The verbs for authors of methods: check, cost."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer


def check(
    method: Annotated[
        str, typer.Argument(metavar="MODULE:OBJECT", help="Where the method is: an instance or a class.")
    ],
    options: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Options of a class.")] = None,
) -> None:
    """Run the conformance suite on a method; exit code 1 if it breaks a law.

    A registered name works in place of MODULE:OBJECT. Example: [bold]nla-llm check my_package.my_file:MyMethod m=64[/]
    """
    from nla_llm.cli._methods import make, parse, parse_options  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.testing import check_method  # noqa: PLC0415

    where, own = parse(method)
    report = check_method(make(where, own | parse_options(options or []), budget=64), raise_on_failure=False)
    typer.echo(str(report))
    raise typer.Exit(0 if report.passed else 1)


def cost(  # noqa: PLR0917 - options, given by name
    names: Annotated[list[str], typer.Argument(metavar="METHOD...", help="Registered names, or MODULE:OBJECT.")],
    n: Annotated[int, typer.Option(help="Sequence length at which the formulas are evaluated.")] = 4096,
    d: Annotated[int, typer.Option(help="Dimension of a head, of values too.")] = 64,
    m: Annotated[int, typer.Option(help="Budget of the methods that have one.")] = 256,
    causal: Annotated[bool, typer.Option("--causal", help="Of the causal form.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Also draw operations against n.")] = None,
) -> None:
    """Show what methods cost as formulas, by class of operation, and where they beat exact attention.

    Example: [bold]nla-llm cost elu_features positive_features --n 16384 --m 256[/]
    """
    from nla_llm.cli._methods import make, parse  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.cli.costs import check_plot, draw_costs, show_costs  # noqa: PLC0415 - SymPy loads here

    if plot is not None:
        check_plot(plot)
    methods = {name: make(*parse(name), budget=m) for name in names}
    show_costs(methods, n=n, d=d, causal=causal)
    if plot is not None:
        draw_costs(methods, plot, n=n, d=d, causal=causal)
        typer.echo(f"wrote {plot}")
