"""The command line: `secateur prune --help`.

Nothing but the standard library, Typer and Rich is imported before a command runs.
"""

import os
import sys
from typing import Annotated

import typer

from secateur.cli import check, compare, demo, export, inspect, prune, tables, train

__all__ = ["main"]

app = typer.Typer(
    name="secateur",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from secateur import __version__

        typer.echo(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def secateur(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prune any PyTorch vision network to a budget, and prove the result.

    Start with [bold]secateur demo[/]: it takes about a minute and needs no files.
    """


app.command(rich_help_panel="Prune")(demo.demo)
app.command(rich_help_panel="Prune")(prune.prune)
app.command(rich_help_panel="Prune")(compare.compare)
app.command(rich_help_panel="Also")(train.train)
app.command(rich_help_panel="Also")(inspect.inspect)
app.command("eval", rich_help_panel="Also")(check.evaluate)
app.command(rich_help_panel="Also")(export.export)
app.command(rich_help_panel="Also")(tables.methods)


def main() -> None:
    """Run the command line; a mistake of the user's ends with one message on stderr and exit code 2.

    With `SECATEUR_DEBUG=1` in the environment, it ends with the traceback instead.
    """
    from secateur.errors import SecateurError

    try:
        app()
    except SecateurError as error:
        if os.environ.get("SECATEUR_DEBUG") == "1":
            raise
        from secateur.cli.show import explain
        from secateur.runs.folder import is_main_process

        if is_main_process():
            explain(str(error))
        sys.exit(2)
