"""`secateur prune`."""

from typing import Annotated, Any

from typer import Option

from secateur.cli import options as o
from secateur.cli.options import BUDGET, FINE_TUNING, METHOD, RUN


def prune(
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
    keep_macs: Annotated[
        float | None,
        Option(
            metavar="X",
            help="Share of the multiply-adds that stay, such as 0.5.",
            rich_help_panel=BUDGET,
            show_default=False,
        ),
    ] = None,
    keep_params: Annotated[
        float | None,
        Option(
            metavar="X", help="Share of the parameters that stay.", rich_help_panel=BUDGET, show_default=False
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        Option(
            metavar="X",
            help="Share of the channels, or of the weights, that go.",
            rich_help_panel=BUDGET,
            show_default=False,
        ),
    ] = None,
    latency_ms: Annotated[
        float | None,
        Option(
            metavar="MS",
            help="Milliseconds that a pass over --latency-batch images may take, measured in PyTorch on this machine.",
            rich_help_panel=BUDGET,
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="How and when units go: a name, or module:function of your own. auto takes what does best with "
            "what there is, and the report says why.",
            rich_help_panel=METHOD,
            show_default="auto; with --score or --allocation: oneshot",
        ),
    ] = None,
    score: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="Which units matter. [bold]secateur methods[/] lists all scores, allocations and methods.",
            rich_help_panel=METHOD,
            show_default="l2",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="How much goes from each group of layers.",
            rich_help_panel=METHOD,
            show_default="global",
        ),
    ] = None,
    granularity: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="What one unit is: channels, weights or filters.",
            rich_help_panel=METHOD,
            show_default="the method's",
        ),
    ] = None,
    compensation: Annotated[
        str,
        Option(
            metavar="NAME",
            help="What the remaining weights do without training, for method rd and for weights of trained models: "
            "none, batch-norm or least-squares.",
            rich_help_panel=METHOD,
        ),
    ] = "least-squares",
    min_keep: Annotated[
        int, Option(min=1, metavar="N", help="Units that every group keeps at least.", rich_help_panel=METHOD)
    ] = 1,
    round_to: Annotated[
        int,
        Option(
            min=1,
            metavar="N",
            help="Keep multiples of this many units in each group.",
            rich_help_panel=METHOD,
        ),
    ] = 1,
    freeze: o.Freeze = None,
    attention: o.Attention = "heads",
    calibration_images: Annotated[
        int,
        Option(
            min=1,
            metavar="N",
            help="Training images for scores that need gradients and for method rd.",
            rich_help_panel=METHOD,
        ),
    ] = 512,
    option: Annotated[
        list[str] | None,
        Option(
            "--option",
            metavar="NAME=VALUE",
            help="Of the method, such as bypass=shared; may be repeated. `secateur methods NAME` lists them.",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    decay: Annotated[
        int,
        Option(
            min=1,
            metavar="N",
            help="Fade units over N steps; 1 cuts them at once. For lapp, gradual, depgraph, oto and gate-decorator.",
            rich_help_panel=METHOD,
        ),
    ] = 1,
    rectify: Annotated[
        bool,
        Option("--rectify", help="Let fading units go that resist; not for lapp.", rich_help_panel=METHOD),
    ] = False,
    epochs: Annotated[
        int,
        Option(
            min=0,
            metavar="N",
            help="Epochs of fine-tuning, 0: none; of the whole training, if the method prunes before or during it.",
            rich_help_panel=FINE_TUNING,
        ),
    ] = 0,
    lr: Annotated[
        float | None,
        Option(
            metavar="X",
            help="Highest learning rate.",
            rich_help_panel=FINE_TUNING,
            show_default="0.01; from scratch 0.1",
        ),
    ] = None,
    batch_size: Annotated[int, o.batch_size(FINE_TUNING)] = 128,
    optimizer: Annotated[str, o.optimizer(FINE_TUNING)] = "sgd",
    weight_decay: Annotated[float, o.weight_decay(FINE_TUNING)] = 5e-4,
    schedule: Annotated[str, o.schedule(FINE_TUNING)] = "cosine",
    label_smoothing: Annotated[float, o.label_smoothing(FINE_TUNING)] = 0.0,
    distill: Annotated[
        float,
        Option(
            metavar="X",
            help="Share of the loss that is distance to the dense model, 0 to 1; where a trained model is pruned.",
            rich_help_panel=FINE_TUNING,
        ),
    ] = 0.0,
    precision: Annotated[str, o.precision(FINE_TUNING)] = "no",
    compile_steps: Annotated[bool, o.compile_steps(FINE_TUNING)] = False,
    checkpoint_every: Annotated[int, o.checkpoint_every(FINE_TUNING)] = 500,
    out: o.Out,
    seed: o.Seed = 0,
    threads: o.Threads = None,
    latency_batch: Annotated[
        int,
        Option(min=1, metavar="N", help="Images per pass where latency is measured.", rich_help_panel=RUN),
    ] = 1,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    no_progress: o.NoProgress = False,
) -> None:
    """Prune a model to a budget, fine-tune it, prove the cut, export it, and write a report.

    Example:

      secateur prune --model resnet20 --weights r20.safetensors \\
        --data cifar10 --data-dir ~/cifar10 \\
        --keep-macs 0.5 --epochs 5 --out runs/r20
    """
    mode = o.mode_of(resume, overwrite)
    normalisation = o.normalisation_of(normalize)
    o.set_threads(threads)
    from secateur.cli.show import interruptible, resume_command, summary, typed_command, watch
    from secateur.methods import AUTO, method_named
    from secateur.recipes.train_config import TrainConfig
    from secateur.runs import PruneConfig, Task, prune_run

    method = method or (AUTO if score is allocation is None else "oneshot")
    when = "after" if method == AUTO else method_named(method).when
    during = when == "during"
    training = None
    if epochs:
        scratch = when != "after" and weights is None
        settings: dict[str, Any] = {
            "epochs": epochs,
            "lr": lr if lr is not None else 0.1 if scratch else 0.01,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "label_smoothing": label_smoothing,
            "distill_weight": distill,
            "precision": precision,
            "compile": compile_steps,
            "checkpoint_every": checkpoint_every,
            "seed": seed,
        }
        if schedule == "one-cycle":
            settings["warmup_epochs"] = 0.0
        training = TrainConfig(**settings) if scratch else TrainConfig.finetune(**settings)
    config = PruneConfig(
        task=Task(
            model=model,
            data=data,
            weights=weights,
            data_dir=data_dir,
            image_size=image_size,
            normalisation=normalisation,
            train_images=train_images,
            test_images=test_images,
            download=download,
            seed=seed,
        ),
        keep_macs=keep_macs,
        keep_params=keep_params,
        sparsity=sparsity,
        latency_ms=latency_ms,
        method=method,
        score=score or "l2",
        allocation=allocation or "global",
        granularity=granularity,
        compensation=compensation,
        freeze=tuple(freeze or ()),
        attention=attention,
        min_keep=min_keep,
        round_to=round_to,
        calibration_images=calibration_images,
        options=o.options_of(option),
        decay=decay,
        rectify=rectify,
        train=training if during else None,
        finetune=None if during else training,
        latency_batch=latency_batch,
    )
    with interruptible(out, resume_command()):
        report = prune_run(config, out, mode=mode, command=typed_command(), watch=watch(no_progress))
    if report:
        summary(report, out)
