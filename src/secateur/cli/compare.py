"""`secateur compare`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from secateur.cli import options as o
from secateur.cli.options import DATA, RUN, SUBJECT


def compare(
    recipe: Annotated[
        Path | None,
        Argument(
            metavar="RECIPE",
            help="TOML file: model, data, budgets, seeds, arms. What follows takes the place of what it says.",
            show_default=False,
        ),
    ] = None,
    *,
    model: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="As for [bold]secateur prune[/].",
            rich_help_panel=SUBJECT,
            show_default="the recipe's",
        ),
    ] = None,
    weights: o.Weights = None,
    data: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="As for [bold]secateur prune[/].",
            rich_help_panel=DATA,
            show_default="the recipe's",
        ),
    ] = None,
    data_dir: o.DataDir = None,
    train_images: Annotated[int | None, o.train_images("the recipe's, else the schedule's")] = None,
    test_images: Annotated[int | None, o.test_images("the recipe's, else all")] = None,
    schedule: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="tiny, short, standard, paper or imagenet; the same for every arm.",
            rich_help_panel=DATA,
            show_default="the recipe's, else short",
        ),
    ] = None,
    tune_lr: Annotated[
        float | None,
        Option(
            metavar="X",
            help="The highest learning rate of training on from weights.",
            rich_help_panel=DATA,
            show_default="the recipe's, else the schedule's",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="An arm of the comparison: a method with its defaults, or dense. Repeat it for several.",
            rich_help_panel=RUN,
            show_default="the recipe's arms",
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        Option(
            metavar="NAME",
            help="Of the recipe's arms, this one. Repeat it for several.",
            rich_help_panel=RUN,
            show_default="all",
        ),
    ] = None,
    keep_macs: Annotated[
        list[float] | None,
        Option(
            metavar="X",
            help="A budget: this share of the MACs may stay. Repeat it for several.",
            rich_help_panel=RUN,
            show_default="the recipe's budgets",
        ),
    ] = None,
    keep_params: Annotated[
        list[float] | None,
        Option(
            metavar="X",
            help="A budget: this share of the parameters may stay. Repeat it for several.",
            rich_help_panel=RUN,
            show_default="the recipe's budgets",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            help="Run seeds 0 to N - 1.",
            rich_help_panel=RUN,
            show_default="the recipe's, else 1",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="no (float32) or bf16.",
            rich_help_panel=RUN,
            show_default="the recipe's, else no",
        ),
    ] = None,
    compile_steps: Annotated[bool, o.compile_steps(RUN)] = False,
    jobs: Annotated[int, Option(min=1, metavar="N", help="Runs side by side.", rich_help_panel=RUN)] = 1,
    list_cells: Annotated[
        bool,
        Option(
            "--list",
            help="Run nothing: print one command per run, for other devices or machines.",
            rich_help_panel=RUN,
        ),
    ] = False,
    only: Annotated[
        str | None,
        Option(
            metavar="RUN",
            help="Run this one alone, as [bold]--list[/] names it; without it, the same command gathers all.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    gather: Annotated[
        bool,
        Option(
            "--gather",
            help="Run nothing: write table and page of the runs that are finished; others may go on meanwhile.",
            rich_help_panel=RUN,
        ),
    ] = False,
    out: Annotated[
        Path,
        Option(
            metavar="DIR",
            help="Folder for the table, the page and a folder per run; it may hold runs of this comparison.",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ],
) -> None:
    """Compare methods at equal training and equal budgets; write a page and a table of means over seeds.

    Run it again to go on after an interruption: finished runs are not repeated.
    """
    import shlex
    import sys

    from secateur.cli.show import say, typed_command
    from secateur.compare import Comparison, cells, compare, run_only
    from secateur.errors import SecateurError

    if list_cells + gather + (only is not None) > 1:
        raise SecateurError("--list, --only and --gather do different things; give one of them")
    budgets = [{"macs": x} for x in keep_macs or ()] + [{"params": x} for x in keep_params or ()]
    comparison = Comparison.read(
        recipe,
        arms={name: {} if name == "dense" else {"method": name} for name in method} if method else None,
        budgets=budgets or None,
        model=model,
        weights=weights,
        data=data,
        data_dir=data_dir,
        train_images=train_images,
        test_images=test_images,
        schedule=schedule,
        tune_lr=tune_lr,
        seeds=None if seeds is None else list(range(seeds)),
        precision=precision,
        compile=compile_steps or None,
    )
    if arm:
        comparison = comparison.with_arms(arm)
    if list_cells:
        words = [word for word in sys.argv[1:] if word != "--list"]
        for cell in cells.list_cells(comparison):
            say(shlex.join(["secateur", *words, "--only", cell.name]))
    elif only is not None:
        run_only(comparison, only, out, tell=say)
    else:
        outcomes = compare(comparison, out, jobs=jobs, gather=gather, command=typed_command(), tell=say)
        say(f"Table: {out / 'table.md'}")
        say(f"Page: {out / 'index.html'}")
        if failed := sum(bool(outcome.error) for outcome in outcomes):
            say(
                f"{failed} of {len(outcomes)} runs failed; the table says why, and the same command tries them again."
            )
            raise Exit(1)
