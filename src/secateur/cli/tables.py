"""`secateur methods`."""

import inspect
import json
from typing import Any, get_type_hints

from secateur.cli.flags import Given, argument, command


@command(argument("name", str, "METHOD", "Tell about one method and its options."))
def methods(given: Given) -> None:
    """List methods, scores, allocations, built-in models and data sets; or one method's options."""
    if "name" in given:
        _tell(given["name"])
    else:
        _list()


def _list() -> None:
    from rich.table import Table

    from secateur.allocate import ALLOCATIONS
    from secateur.allocate.sparsity import WEIGHT_ALLOCATIONS
    from secateur.cli.show import print_table
    from secateur.methods import METHODS
    from secateur.recipes.data import list_data
    from secateur.recipes.models import list_models
    from secateur.scores import SCORES
    from secateur.scores.at_init import WEIGHT_SCORES

    rows = Table.grid(padding=(0, 2))
    for title, entries in (
        ("--method, for trained models", _of(METHODS, "after")),
        ("--method, while the model trains", _of(METHODS, "during")),
        ("--method, before training", _of(METHODS, "before")),
        ("--option score=…", {name: entry.summary for name, entry in SCORES.items()}),
        ("--option allocation=…", {name: entry.summary for name, entry in ALLOCATIONS.items()}),
        ("--method weights --option allocation=…", {n: e.summary for n, e in WEIGHT_ALLOCATIONS.items()}),
        ("--method at-init --option score=…", {name: entry.summary for name, entry in WEIGHT_SCORES.items()}),
    ):
        rows.add_row(f"[bold]{title}[/]")
        for name, summary in entries.items():
            rows.add_row(f"  {name}", summary)
    rows.add_row("[bold]--model[/]", ", ".join(list_models()))
    rows.add_row("[bold]--data[/]", ", ".join(list_data()))
    print_table(rows)


def _of(methods: dict[str, Any], when: str) -> dict[str, str]:
    return {name: method.summary for name, method in methods.items() if method.when == when}


def _tell(name: str) -> None:
    from secateur.cli.show import print_table, say, table
    from secateur.errors import SecateurError, unknown
    from secateur.imports import imported
    from secateur.methods import METHODS
    from secateur.settings import defaults_of, expected, options_of

    if ":" not in name and name not in METHODS:
        raise SecateurError(unknown("method", name, METHODS))
    method = METHODS[name] if name in METHODS else imported("method", name)
    say(inspect.getdoc(method) or "")
    if not isinstance(method, type):
        return
    rows = table("Options (--option NAME=VALUE)", ("name", "default", "what it is", "may be"))
    hints, defaults = get_type_hints(method), defaults_of(method)
    for option, about in options_of(method).items():
        default = _said(defaults[option]) if option in defaults else "(must be given)"
        rows.add_row(option, default, about.help, expected(hints[option], about))
    print_table(rows)


def _said(default: object) -> str:
    """A default as `--option` takes it.

    >>> _said(True), _said("full"), _said(())
    ('true', 'full', '[]')
    """
    from secateur.settings import plain

    return default if isinstance(default, str) else json.dumps(plain(default), default=str)
