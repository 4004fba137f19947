"""`secateur demo`."""

from pathlib import Path

from secateur.cli.flags import Flags, Given, RunSettings, command
from secateur.runs.config import Task


@command(
    Flags(
        RunSettings, shown={"out": "secateur-demo", "threads": "1; more do not help with images this small"}
    ),
    Flags(Task, only=["seed"]),
)
def demo(given: Given) -> None:
    """Train a small ResNet on handwritten digits, prune it to half the MACs, and show the result.

    It needs no files and no network, and takes about a minute.
    """
    from secateur.cli.show import interruptible, resume_command, summary, typed_command, watch
    from secateur.runs.demo import demo_config
    from secateur.runs.pipeline import prune_run

    run: RunSettings = given.make(
        RunSettings, out=given.get("out", Path("secateur-demo")), threads=given.get("threads", 1)
    )
    with interruptible(run.out, resume_command()):
        report = prune_run(
            demo_config(given.get("seed", 0)),
            run.out,
            mode=run.mode,
            command=typed_command(),
            watch=watch(run.silent),
        )
    if report and not run.quiet:
        summary(report, run.out)
