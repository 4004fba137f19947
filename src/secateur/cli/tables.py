"""`secateur methods`."""


def methods() -> None:
    """List methods, scores, allocations, built-in models and data sets."""
    from rich.table import Table

    from secateur.allocate import ALLOCATIONS
    from secateur.cli.show import print_table
    from secateur.methods import METHODS
    from secateur.methods.rd import COMPENSATIONS, WEIGHT_CHOICES
    from secateur.recipes.data import list_data
    from secateur.recipes.models import list_models
    from secateur.runs.config import GRANULARITIES
    from secateur.scores import SCORES

    rows = Table.grid(padding=(0, 2))
    for title, entries in (
        ("--method", {name: entry.summary for name, entry in METHODS.items()}),
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
