"""`secateur prune`."""

import json
from inspect import Parameter
from pathlib import Path

import typer

from secateur.cli.flags import FREEZE, RUN, Flags, Given, RunSettings, argument, command, flag, parse_options
from secateur.errors import SecateurError
from secateur.measures import MEASURES, Measure
from secateur.recipes.train_config import TrainConfig
from secateur.runs.config import BUDGET, METHOD, PruneConfig, Task
from secateur.settings import options_of

FINE_TUNING = "Fine-tuning"
BUDGETS = {
    "sparsity" if name == "units" else name if measure.timed else f"keep_{name}": name
    for name, measure in MEASURES.items()
}
"""Flag -> measure that it bounds; sparsity is the share that goes, all others are what may stay."""

TUNED = (
    "epochs lr batch_size optimizer weight_decay schedule label_smoothing distill_weight precision compile "
    "checkpoint_every"
).split()


def _bound(name: str, measure: Measure) -> Parameter:
    """The flag that bounds a measure."""
    if measure.timed:
        said = f"Bound of the {measure.label}: {measure.help}."
        return flag(name, float, said, panel=BUDGET, metavar="MS")
    said = f"Share of the {measure.label} that stays, such as 0.5: {measure.help}."
    if name == "sparsity":
        said = "Share of the channels, or of the weights, that go."
    return flag(name, float, said, panel=BUDGET, metavar="X")


@command(
    argument(
        "recipe", Path, "RECIPE", "TOML file with the names of flags; flags take the place of what it says."
    ),
    Flags(Task),
    *(_bound(name, MEASURES[measure]) for name, measure in BUDGETS.items()),
    Flags(PruneConfig, only=["method", "calibration_images"], shown={"method": "auto"}),
    flag(
        "option",
        list[str],
        "Of the method, such as bypass=shared; may be repeated. [bold]secateur methods NAME[/] lists them.",
        panel=METHOD,
        metavar="NAME=VALUE",
    ),
    FREEZE,
    Flags(
        TrainConfig,
        only=TUNED,
        panel=FINE_TUNING,
        shown={"epochs": "0, no training", "lr": "0.01; from scratch 0.1"},
    ),
    Flags(RunSettings),
    Flags(PruneConfig, only=["keep", "latency_batch"]),
    flag("json", bool, "Print the report as one JSON object, and all else on standard error.", panel=RUN),
    flag("no_exports", bool, "Write no ONNX and torch.export files, and measure no latency.", panel=RUN),
    flag("no_latency", bool, "Measure no latency.", panel=RUN),
)
def prune(given: Given) -> None:
    """Prune a model to a budget, fine-tune it, prove the cut, export it, and write a report.

    Epochs are of fine-tuning; or of the whole training, if the method prunes before or during it.

    Example:

      secateur prune --model resnet20 --weights r20.safetensors \\
        --data cifar10 --data-dir ~/cifar10 \\
        --keep-macs 0.5 --epochs 5 --out runs/r20
    """
    from secateur.cli.show import interruptible, resume_command, summary, typed_command, watch
    from secateur.runs.pipeline import prune_run

    config, run = config_of(given)
    with interruptible(run.out, resume_command()):
        report = prune_run(config, run.out, mode=run.mode, command=typed_command(), watch=watch(run.silent))
    if report and "json" in given:
        typer.echo(json.dumps(report.to_json()))
    elif report and not run.quiet:
        summary(report, run.out)


def config_of(given: Given) -> tuple[PruneConfig, RunSettings]:
    """The configuration of a run, from flags and recipe."""
    able = {
        *options_of(Task), *options_of(PruneConfig), *TUNED, *options_of(RunSettings), *BUDGETS, "freeze"
    }  # fmt: skip
    given = given.with_recipe(given.pop("recipe", None), able - {"task", "train", "finetune"})
    run: RunSettings = given.make(RunSettings)
    task: Task = given.make(Task)
    options = dict(given.get("options", {})) | parse_options(given.pop("option", ()))
    if "freeze" in given:
        options["freeze"] = given["freeze"]
    budget = dict(given.get("budget", {}))
    for name, measure in BUDGETS.items():
        if name in given:
            value = given[name]
            budget[measure] = round(1 - value, 9) if name == "sparsity" else value
    from secateur.methods import Auto, method_named

    given.setdefault("method", Auto.name)
    when = method_named(given["method"], options).when
    training = _training(given, scratch=task.weights is None, seed=task.seed)
    config: PruneConfig = given.make(
        PruneConfig,
        task=task,
        options=options,
        budget=budget,
        exports=False if "no_exports" in given else None,
        latency=False if "no_latency" in given else None,
        **{"train" if when == "during" else "finetune": training},
    )
    return config, run


def _training(given: Given, scratch: bool, seed: int) -> TrainConfig | None:
    """How the pruned model is trained; None: not at all."""
    chosen = {name: given[name] for name in TUNED if name in given}
    epochs = chosen.pop("epochs", 0)
    if epochs == 0:
        return None
    if not isinstance(epochs, int) or epochs < 0:
        raise SecateurError(f"epochs is {epochs!r}; expected a whole number, at least 0")
    if chosen.get("schedule") == "one-cycle":
        chosen["warmup_epochs"] = 0.0
    make = TrainConfig if scratch else TrainConfig.finetune
    return make(epochs=epochs, seed=seed, **chosen)
