"""The verbs for authors of methods: check, cost."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer


def check(
    method: Annotated[str, typer.Argument(metavar="MODULE:OBJECT", help="Where the method is: an instance or a class.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[NAME=VALUE]...", help="Options of a class.")] = None,
) -> None:
    """Run the conformance suite on a method; exit code 1 if it breaks a law.

    A registered name works in place of MODULE:OBJECT. Example: [bold]nla-llm check my_package.my_file:MyMethod m=64[/]
    """
    from nla_llm.testing import check_method  # noqa: PLC0415 - so that --help stays fast

    report = check_method(_load(method, _options(options or [])), raise_on_failure=False)
    typer.echo(str(report))
    raise typer.Exit(0 if report.passed else 1)


def cost(
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
    from nla_llm.cli.costs import draw_costs, show_costs  # noqa: PLC0415 - SymPy loads here

    methods = [_load(name, {}, budget=m) for name in names]
    show_costs(methods, n=n, d=d, causal=causal)
    if plot is not None:
        draw_costs(methods, plot, n=n, d=d, causal=causal)
        typer.echo(f"wrote {plot}")


def _options(words: list[str]) -> dict[str, Any]:
    from ast import literal_eval  # noqa: PLC0415 - so that --help stays fast

    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"options are given as name=value, as in m=64; got {word!r}")
        try:
            options[name] = literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options


def _load(where: str, options: dict[str, Any], *, budget: int = 64) -> Any:
    """The method under a registered name or at MODULE:OBJECT; a class is made with its options."""
    from nla_llm.methods import method, properties_of  # noqa: PLC0415 - so that --help stays fast
    from nla_llm.methods.registry import registered  # noqa: PLC0415

    if ":" not in where:
        name = properties_of(registered(where)).budget
        return method(where, **({name: budget} if name and name not in options else {}), **options)
    module, _, attribute = where.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"cannot import {module!r} ({error}); MODULE is a dotted name found from this folder") from error
    except AttributeError as error:
        raise ValueError(f"module {module!r} has no {attribute!r}; write MODULE:OBJECT") from error
    if isinstance(found, type):
        try:
            found = found(**options)
        except TypeError as error:
            raise ValueError(f"{where} cannot be made: {error}; give its options as name=value") from error
    if not callable(found):
        raise ValueError(f"{where} is not a method: it cannot be called with a problem")
    return found
