"""`secateur methods`."""

import inspect
import json
from functools import partial
from typing import Annotated

from typer import Argument


def methods(
    name: Annotated[
        str | None,
        Argument(metavar="METHOD", help="Tell about one method and its options.", show_default=False),
    ] = None,
) -> None:
    """List methods, scores, allocations, built-in models and data sets; or one method's options."""
    from rich.table import Table

    from secateur.allocate import ALLOCATIONS
    from secateur.cli.show import print_table, say
    from secateur.methods import AUTO, METHODS, choose, method_named
    from secateur.methods.rd.single_weights import COMPENSATIONS, WEIGHT_CHOICES
    from secateur.recipes.data import list_data
    from secateur.recipes.models import list_models
    from secateur.runs.config import GRANULARITIES
    from secateur.scores import SCORES

    if name is not None:
        if name == AUTO:
            say(inspect.getdoc(choose) or "")
            return
        entry = method_named(name)
        for number, (granularity, run) in enumerate(entry.runs.items()):
            if number:
                say(f"\n--granularity {granularity}:\n")
            say(inspect.getdoc(run.func if isinstance(run, partial) else run) or "")
            if entry.when == "after" and granularity != "channels":
                continue  # it has no options on the command line
            options = entry.options(granularity)
            settings = "\n".join(
                f"    {option} = {_said(default)}"
                for option, default in options.items()
                if option != "removal"
            )
            say(f"\nOptions, with their defaults:\n{settings}")
        return
    rows = Table.grid(padding=(0, 2))
    for title, entries in (
        (
            "--method",
            {AUTO: "what does best with what there is: weights, data, budget"}
            | {name: entry.summary for name, entry in METHODS.items()},
        ),
        ("--score", {name: entry.summary for name, entry in SCORES.items()}),
        ("--allocation", {name: entry.summary for name, entry in ALLOCATIONS.items()}),
        ("--granularity", GRANULARITIES),
        ("--granularity weights --allocation", WEIGHT_CHOICES),
        ("--compensation", COMPENSATIONS),
    ):
        rows.add_row(f"[bold]{title}[/]")
        for name, summary in entries.items():
            rows.add_row(f"  {name}", summary)
    rows.add_row("[bold]--model[/]", ", ".join(list_models()))
    rows.add_row("[bold]--data[/]", ", ".join(list_data()))
    print_table(rows)


def _said(default: object) -> str:
    """A default as `--option` takes it.

    >>> _said(True), _said("full"), _said(inspect.Parameter.empty)
    ('true', 'full', '(must be given)')
    """
    if default is inspect.Parameter.empty:
        return "(must be given)"
    return default if isinstance(default, str) else json.dumps(default, default=str)
