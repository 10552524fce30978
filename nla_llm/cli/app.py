"""The command ``nla-llm``: its verbs, and what becomes of errors."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from nla_llm.cli import bench, data, tools, updates
from nla_llm.cli.terminal import sentence, tell

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Verbs(TyperGroup):
    """The verbs; what Ctrl-C left behind is told, where Typer would end without a word."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            tell(str(stop) or "stopped")
            raise typer.Exit(130) from stop


app = typer.Typer(
    name="nla-llm",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="A test bench for the linear algebra of large language models.\n\n"
    "Example: [bold]nla-llm run[/] measures the headline studies and writes their PDFs into reports/.",
)
app.command("list")(bench.list_)
app.command("run")(bench.run)
app.command("report")(bench.report)
app.command("attention")(data.attention)
app.command("update")(updates.update)
app.command("check")(tools.check)
app.command("cost")(tools.cost)
app.command("info")(bench.info)


def _version(show: bool) -> None:
    if show:
        from nla_llm import __version__  # noqa: PLC0415 - only where it is asked for

        typer.echo(f"nla-llm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; errors that a user can mend are told in one sentence, with exit code 2."""
    try:
        app(args=arguments, standalone_mode=True, prog_name="nla-llm")
    except KeyboardInterrupt as stop:
        tell(str(stop) or "stopped")
        sys.exit(130)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        tell(sentence(error))
        sys.exit(2)
    sys.exit(0)
