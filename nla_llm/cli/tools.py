"""The verbs for authors of methods: check, cost."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer


def check(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="A registered name, or MODULE:OBJECT, an instance or a class.")
    ],
    options: Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE", help="Options of a class.")] = None,
) -> None:
    """Run the conformance suite on a method; exit code 1 if it breaks a law.

    Example: [bold]nla-llm check my_package.my_file:MyMethod m=64[/]
    """
    from nla_llm.cli._methods import make, parse, parse_options  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.testing import check_method  # noqa: PLC0415

    where, own = parse(method)
    report = check_method(make(where, own | parse_options(options or []), budget=64), raise_on_failure=False)
    typer.echo(str(report))
    raise typer.Exit(0 if report.passed else 1)


def cost(  # noqa: PLR0917 - options, given by name
    names: Annotated[list[str], typer.Argument(metavar="METHOD", help="Registered names, or MODULE:OBJECT.")],
    n: Annotated[int, typer.Option(metavar="N", help="Number of tokens.")] = 4096,
    d: Annotated[int, typer.Option(metavar="D", help="Dimension of a head, of its values too.")] = 64,
    m: Annotated[int, typer.Option(metavar="M", help="Budget of the methods that have one.")] = 256,
    causal: Annotated[bool, typer.Option("--causal", help="The causal form of the methods.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Also draw the operations against n.")] = None,
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
