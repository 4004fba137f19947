"""The command line: `secateur prune --help`.

Nothing but the standard library, Typer and Rich is imported before a command runs.
"""

import os
import sys
import traceback
from typing import Annotated

import typer

from secateur.cli import check, compare, demo, doctor, export, inspect, prune, tables, train

__all__ = ["main"]

FAULT = 70
"""Exit code of an exception that nothing foresaw, as in sysexits.h."""

EXIT_CODES = (
    "Exit codes: 0 done, 1 some runs of a comparison failed, 2 something to correct, 70 a fault of Secateur, "
    "130 interrupted."
)

app = typer.Typer(
    name="secateur",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from secateur import __version__

        typer.echo(f"secateur {__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
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
app.command(rich_help_panel="Also")(doctor.doctor)


def main() -> None:
    """Run the command line; a mistake of the user's ends with one message on stderr and exit code 2.

    Any other exception is a fault of ours: the message says so, and the exit code is 70. With `SECATEUR_DEBUG=1` in the
    environment, both end with the traceback instead.
    """
    from secateur.errors import SecateurError

    try:
        app()
    except Exception as error:
        if os.environ.get("SECATEUR_DEBUG") == "1":
            raise
        from secateur.cli.show import explain
        from secateur.runs.folder import is_main_process

        ours = not isinstance(error, SecateurError)
        if is_main_process():
            explain(unforeseen(error) if ours else str(error))
        sys.exit(FAULT if ours else 2)


def unforeseen(error: Exception) -> str:
    """What to say of an exception that nothing foresaw."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno}). This is a fault of Secateur, or of "
        f"code it was given. To report it, run the command again with SECATEUR_DEBUG=1 in the environment, and send "
        f"the traceback with the command."
    )
