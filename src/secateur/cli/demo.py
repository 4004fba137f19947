"""`secateur demo`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from secateur.cli import options as o
from secateur.cli.options import RUN


def demo(
    out: Annotated[
        Path, Option(metavar="DIR", help="Folder for everything the run writes.", rich_help_panel=RUN)
    ] = Path("secateur-demo"),
    seed: o.Seed = 0,
    threads: Annotated[
        int,
        Option(
            min=1,
            metavar="N",
            help="CPU threads. More do not help with images this small.",
            rich_help_panel=RUN,
        ),
    ] = 1,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Train a small ResNet on handwritten digits, prune it to half the MACs, and show the result.

    It needs no files and no network, and takes about a minute.
    """
    mode = o.mode_of(resume, overwrite)
    o.set_threads(threads)
    from secateur.cli.show import interruptible, resume_command, summary, typed_command, watch
    from secateur.runs import demo_config, prune_run

    with interruptible(out, resume_command()):
        report = prune_run(
            demo_config(seed), out, mode=mode, command=typed_command(), watch=watch(no_progress)
        )
    if report:
        summary(report, out)
