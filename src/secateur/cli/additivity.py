"""`secateur additivity`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from secateur.cli import options as o
from secateur.cli.options import METHOD, RUN


def additivity(
    *,
    model: o.Model,
    weights: o.Weights = None,
    data: o.Data,
    data_dir: o.DataDir = None,
    image_size: o.ImageSize = None,
    normalize: o.Normalize = None,
    sparsity: Annotated[
        float, Option(metavar="X", help="Share of the weights that go.", rich_help_panel=METHOD)
    ] = 0.8,
    draws: Annotated[
        int, Option(min=2, metavar="N", help="Random allocations.", rich_help_panel=METHOD)
    ] = 30,
    compensation: Annotated[
        str, Option(metavar="NAME", help="As for [bold]secateur prune[/].", rich_help_panel=METHOD)
    ] = "least-squares",
    calibration_images: Annotated[
        int, Option(min=1, metavar="N", help="Training images to measure on.", rich_help_panel=METHOD)
    ] = 512,
    picture: Annotated[
        Path | None,
        Option(metavar="FILE", help="Draw predicted over measured as a web page.", rich_help_panel=RUN),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.", rich_help_panel=RUN)] = False,
    seed: o.Seed = 0,
    threads: o.Threads = None,
    no_progress: o.NoProgress = False,
) -> None:
    """Check whether the distortions of single layers add up, over random allocations at one sparsity."""
    normalisation = o.normalisation_of(normalize)
    o.set_threads(threads)
    from secateur.cli.show import say, watch
    from secateur.files import atomic_write
    from secateur.report.html import one_figure
    from secateur.runs import PruneConfig, Task, additivity_run

    config = PruneConfig(
        task=Task(
            model=model,
            data=data,
            weights=weights,
            data_dir=data_dir,
            image_size=image_size,
            normalisation=normalisation,
            seed=seed,
        ),
        sparsity=sparsity,
        method="rd",
        granularity="weights",
        allocation="rd",
        compensation=compensation,
        calibration_images=calibration_images,
    )
    found = additivity_run(config, draws=draws, watch=watch(no_progress))
    if picture is not None:
        from secateur.report.figures import additivity as draw

        title = f"{model} on {data}: {100 * sparsity:g} % of the weights gone"
        atomic_write(picture, one_figure(title, draw(list(found.predicted), list(found.measured))))
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    say(f"Rank correlation of predicted and measured distortion: {found.rank_correlation:.3f}")
    say(f"Measured over predicted: {found.ratio:.3g} (median of {draws} allocations)")
