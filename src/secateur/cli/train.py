"""`secateur train`."""

from typing import Annotated

from typer import Option

from secateur.cli import options as o
from secateur.cli.options import TRAINING


def train(
    *,
    model: o.Model,
    weights: o.Weights = None,
    data: o.Data,
    data_dir: o.DataDir = None,
    image_size: o.ImageSize = None,
    normalize: o.Normalize = None,
    train_images: o.TrainImages = None,
    test_images: o.TestImages = None,
    download: o.Download = False,
    epochs: Annotated[
        int, Option(min=1, metavar="N", help="Passes over the images.", rich_help_panel=TRAINING)
    ] = 30,
    lr: Annotated[float, o.learning_rate(TRAINING)] = 0.1,
    batch_size: Annotated[int, o.batch_size(TRAINING)] = 128,
    optimizer: Annotated[str, o.optimizer(TRAINING)] = "sgd",
    weight_decay: Annotated[float, o.weight_decay(TRAINING)] = 5e-4,
    schedule: Annotated[str, o.schedule(TRAINING)] = "cosine",
    warmup_epochs: Annotated[
        float, Option(min=0, metavar="X", help="Linear rise at the start.", rich_help_panel=TRAINING)
    ] = 0.0,
    label_smoothing: Annotated[float, o.label_smoothing(TRAINING)] = 0.0,
    ema: Annotated[
        float | None,
        Option(
            metavar="X",
            help="Decay of a moving average of the weights, such as 0.999, which then is the result.",
            rich_help_panel=TRAINING,
            show_default="off",
        ),
    ] = None,
    clip_norm: Annotated[
        float | None,
        Option(
            metavar="X",
            help="Largest norm of the gradient.",
            rich_help_panel=TRAINING,
            show_default="unbounded",
        ),
    ] = None,
    precision: Annotated[str, o.precision(TRAINING)] = "no",
    compile_steps: Annotated[bool, o.compile_steps(TRAINING)] = False,
    checkpoint_every: Annotated[int, o.checkpoint_every(TRAINING)] = 500,
    out: o.Out,
    seed: o.Seed = 0,
    threads: o.Threads = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Train a model, from scratch or on from --weights; OUT/model.safetensors can then be pruned.

    On several processes: accelerate launch --multi_gpu -m secateur.cli train …
    """
    mode = o.mode_of(resume, overwrite)
    normalisation = o.normalisation_of(normalize)
    o.set_threads(threads)
    from secateur.cli.show import interruptible, resume_command, say, typed_command, watch
    from secateur.recipes.train_config import TrainConfig
    from secateur.runs import Task, TrainRunConfig, train_run
    from secateur.runs.folder import is_main_process

    config = TrainRunConfig(
        task=Task(
            model=model,
            weights=weights,
            data=data,
            data_dir=data_dir,
            image_size=image_size,
            normalisation=normalisation,
            train_images=train_images,
            test_images=test_images,
            download=download,
            seed=seed,
        ),
        train=TrainConfig(
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            optimizer=optimizer,  # type: ignore[arg-type]  # checked by TrainConfig
            weight_decay=weight_decay,
            schedule=schedule,  # type: ignore[arg-type]
            warmup_epochs=warmup_epochs,
            label_smoothing=label_smoothing,
            ema=ema,
            clip_norm=clip_norm,
            precision=precision,  # type: ignore[arg-type]
            compile=compile_steps,
            checkpoint_every=checkpoint_every,
            seed=seed,
        ),
    )
    with interruptible(out, resume_command()):
        result = train_run(config, out, mode=mode, command=typed_command(), watch=watch(no_progress))
    if is_main_process():
        say(f"Accuracy: {100 * result.accuracy:.2f} %, trained in {result.seconds:.0f} s")
        say(f"Weights: {out / 'model.safetensors'}")
