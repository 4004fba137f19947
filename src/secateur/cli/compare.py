"""`secateur compare`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from secateur.cli import options as o
from secateur.cli.options import DATA, RUN


def compare(
    recipe: Annotated[
        Path,
        Argument(metavar="RECIPE", help="TOML file: model, data, budgets, seeds, arms.", show_default=False),
    ],
    *,
    data_dir: o.DataDir = None,
    weights: o.Weights = None,
    train_images: o.TrainImages = None,
    test_images: o.TestImages = None,
    schedule: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="tiny, short, standard or paper; the same for every arm.",
            rich_help_panel=DATA,
            show_default="the recipe's",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        Option(
            min=1, metavar="N", help="Run seeds 0 to N - 1.", rich_help_panel=RUN, show_default="the recipe's"
        ),
    ] = None,
    precision: Annotated[
        str | None,
        Option(
            metavar="NAME", help="no (float32) or bf16.", rich_help_panel=RUN, show_default="the recipe's"
        ),
    ] = None,
    jobs: Annotated[int, Option(min=1, metavar="N", help="Runs side by side.", rich_help_panel=RUN)] = 1,
    out: o.Out,
) -> None:
    """Compare methods at equal training and equal budgets; write a table of means over seeds.

    Run it again to go on after an interruption: finished runs are not repeated.
    """
    from secateur.cli.show import say
    from secateur.runs.compare import Comparison, compare

    comparison = Comparison.read(
        recipe,
        data_dir=data_dir,
        weights=weights,
        train_images=train_images,
        test_images=test_images,
        schedule=schedule,
        seeds=None if seeds is None else list(range(seeds)),
        precision=precision,
    )
    compare(comparison, out, jobs=jobs, tell=say)
    say(f"Table: {out / 'table.md'}")
