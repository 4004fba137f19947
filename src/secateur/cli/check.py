"""`secateur eval`."""

import json
from pathlib import Path

import typer

from secateur.cli.flags import RUN, Flags, Given, command, flag
from secateur.errors import SecateurError
from secateur.runs.config import MODEL, Task

EARLIER = flag(
    "run", Path, "Folder of an earlier run; takes the place of --model.", panel=MODEL, metavar="DIR"
)


@command(
    EARLIER,
    Flags(Task, only="model weights data data_dir image_size normalisation test_images download".split()),
    flag("json", bool, "Print JSON."),
    flag("threads", int, "CPU threads.", panel=RUN, shown="as many as PyTorch likes", metavar="N"),
)
def evaluate(given: Given) -> None:
    """Measure a model, dense or pruned, on the test images.

    Give --model, --weights and --data; or --run alone for the model that an earlier run wrote, on its data.
    """
    named = [name for name in ("model", "weights", "data") if name in given]
    if "run" not in given and len(named) < 3:
        raise SecateurError("give --model, --weights and --data, or --run")
    if "run" in given and named:
        raise SecateurError("--run takes the place of --model, --weights and --data; give one or the other")
    import torch

    from secateur.cli.show import say
    from secateur.runs.folder import SavedRun
    from secateur.runs.task import evaluate_once, load_task

    if "threads" in given:
        torch.set_num_threads(given["threads"])
    if "run" in given:
        saved, run = SavedRun.read(given["run"]).task, given.pop("run")
        kept = {name: saved[name] for name in ("data_dir", "image_size", "test_images") if saved.get(name)}
        given = Given(
            {
                **kept,
                **given,
                "model": saved["model"],
                "data": saved["data"],
                "weights": run / "model.safetensors",
            }
        )
    task = load_task(given.make(Task))
    result, images = evaluate_once(task.model, task.data), len(task.data.test)
    if "json" in given:
        typer.echo(json.dumps({"accuracy": result.accuracy, "loss": result.loss, "images": images}))
        return
    say(f"Accuracy: {100 * result.accuracy:.2f} % of {images:,} images, loss {result.loss:.4f}")
    for note in task.notes:
        say(f"Note: {note}")
