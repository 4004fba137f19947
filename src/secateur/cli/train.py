"""`secateur train`."""

from secateur.cli.flags import TRAINING, Flags, Given, RunSettings, command
from secateur.recipes.train_config import TrainConfig
from secateur.runs.config import Task, TrainRunConfig

SHOWN = [
    name for name in TrainConfig.__dataclass_fields__ if name not in ("seed", "distill_weight", "test_every")
]


@command(
    Flags(Task),
    Flags(TrainConfig, only=SHOWN, panel=TRAINING, shown={"epochs": "30"}),
    Flags(RunSettings),
)
def train(given: Given) -> None:
    """Train a model, from scratch or on from --weights; OUT/model.safetensors can then be pruned.

    On several processes: accelerate launch --multi_gpu -m secateur.cli train …
    """
    from secateur.cli.show import interruptible, resume_command, say, typed_command, watch
    from secateur.runs.folder import is_main_process
    from secateur.runs.pipeline import train_run

    run: RunSettings = given.make(RunSettings)
    task: Task = given.make(Task)
    how = given.make(TrainConfig, epochs=given.get("epochs", 30), seed=task.seed)
    config = TrainRunConfig(task=task, train=how)
    with interruptible(run.out, resume_command()):
        result = train_run(config, run.out, mode=run.mode, command=typed_command(), watch=watch(run.silent))
    if is_main_process() and not run.quiet:
        say(f"Accuracy: {100 * result.accuracy:.2f} %, trained in {result.seconds:.0f} s")
        say(f"Weights: {run.out / 'model.safetensors'}")
