"""`secateur eval`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from secateur.cli import options as o


def evaluate(
    model: o.MaybeModel = None,
    weights: o.Weights = None,
    data: o.MaybeData = None,
    run: o.Run = None,
    data_dir: o.DataDir = None,
    image_size: o.ImageSize = None,
    normalize: o.Normalize = None,
    test_images: o.TestImages = None,
    download: o.Download = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
    threads: o.Threads = None,
) -> None:
    """Measure a model, dense or pruned, on the test images.

    Give --model, --weights and --data; or --run alone for the model that an earlier run wrote, on its data.
    """
    if run is None and (model is None or weights is None or data is None):
        raise typer.BadParameter("give --model, --weights and --data, or --run")
    if run is not None and (model or weights or data):
        raise typer.BadParameter(
            "--run takes the place of --model, --weights and --data; give one or the other"
        )
    normalisation = o.normalisation_of(normalize)
    o.set_threads(threads)
    from secateur.cli.show import say
    from secateur.runs import SavedRun, Task, load_subject
    from secateur.runs.subject import measure

    if run is not None:
        saved = SavedRun.read(run)
        model, data, weights = saved.task["model"], saved.task["data"], run / "model.safetensors"
        data_dir = data_dir or (Path(known) if (known := saved.task.get("data_dir")) else None)
        image_size = image_size or saved.task.get("image_size")
        test_images = test_images or saved.task.get("test_images")
    assert model is not None
    assert data is not None
    subject = load_subject(
        Task(
            model=model,
            data=data,
            weights=weights,
            data_dir=data_dir,
            image_size=image_size,
            normalisation=normalisation,
            test_images=test_images,
            download=download,
        )
    )
    result = measure(subject.model, subject.data)
    images = len(subject.data.test)
    if as_json:
        typer.echo(json.dumps({"accuracy": result.accuracy, "loss": result.loss, "images": images}))
        return
    say(f"Accuracy: {100 * result.accuracy:.2f} % of {images:,} images, loss {result.loss:.4f}")
    for note in subject.notes:
        say(f"Note: {note}")
