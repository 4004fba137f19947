"""The runs of a comparison: which there are, with equal training for every arm; one of them; and its latency."""

import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from secateur.compare.recipe import Arm, Comparison
from secateur.compare.results import Outcome
from secateur.compare.words import DENSE, MEASURES, plain_name
from secateur.cost.latency import Runner, compare_pair, device_name
from secateur.errors import SecateurError
from secateur.export import export_onnx, onnx_runner
from secateur.files import atomic_write
from secateur.methods import method_named
from secateur.recipes.train_config import TrainConfig
from secateur.report import LatencyPair, Report, Width
from secateur.runs.config import PruneConfig, Task, TrainRunConfig
from secateur.runs.folder import RunFolder, SavedRun
from secateur.runs.measure import measured_json, pair_of
from secateur.runs.pipeline import prune_run, train_run
from secateur.runs.task import device, fresh_model, load_into


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    arm: str
    budget: Mapping[str, float]
    seed: int
    config: PruneConfig | TrainRunConfig
    against: str = DENSE

    @property
    def folder(self) -> Path:
        """Where it goes, relative to the comparison's folder."""
        bound = " ".join(f"{name} {value:g}" for name, value in self.budget.items())
        return Path(plain_name(self.arm), plain_name(bound or "dense"), f"seed-{self.seed}")

    @property
    def name(self) -> str:
        """What `--only` calls it."""
        return self.folder.as_posix()


def list_cells(comparison: Comparison) -> list[Cell]:
    """Everything to run, seed by seed.

    Raises:
        SecateurError: a method cannot be run as its arm says.
    """
    images = comparison.task.train_images or comparison.plan.train_images
    tasks = [replace(comparison.task, seed=seed, train_images=images) for seed in comparison.seeds]
    return [
        cell
        for task in tasks
        for name, arm in comparison.arms.items()
        for cell in _list_cells_of(comparison, name, arm, task)
    ]


def _list_cells_of(comparison: Comparison, name: str, arm: Arm, task: Task) -> list[Cell]:
    plan, seed = comparison.plan, task.seed
    if arm.method is None:
        how = plan.make_config(tune=task.weights is not None, **_computing(comparison))
        return [Cell(name, {}, seed, TrainRunConfig(task=task, train=how), arm.against)]
    task, train, finetune = _share_epochs(comparison, arm, arm.method, task)
    cells = []
    for budget in comparison.budgets if arm.budgets is None else arm.budgets:
        config = PruneConfig(
            task=task,
            method=arm.method,
            options=arm.options,
            budget=budget,
            train=train,
            finetune=finetune,
            keep="last",
            exports=False,
        )
        cells.append(Cell(name, budget, seed, config, arm.against))
    return cells


def _computing(comparison: Comparison) -> dict[str, Any]:
    return {"precision": comparison.precision, "compile": comparison.compile}


def _share_epochs(
    comparison: Comparison, arm: Arm, method: str, task: Task
) -> tuple[Task, TrainConfig | None, TrainConfig | None]:
    """What is trained before and after the cut, so that every arm trains for the same number of epochs in all."""
    plan, how = comparison.plan, _computing(comparison)
    taught = how | {"distill_weight": arm.distill}
    scratch = task.weights is None
    epochs = plan.epochs if scratch else plan.tune_epochs
    when = method_named(method, arm.options).when
    if when == "before" or (arm.before and when == "after"):
        fresh = task if scratch else replace(task, weights=None)  # what others start from is no use here
        return fresh, None, plan.make_config(epochs=epochs, **taught)
    if when == "during":
        return task, plan.make_config(tune=not scratch, **taught), None
    if not scratch:
        return task, None, plan.make_config(tune=True, **taught)
    first = max(1, round(plan.dense_share * epochs))
    finetune = plan.make_config(epochs=epochs - first, tune=True, **taught) if epochs > first else None
    return task, plan.make_config(epochs=first, **how), finetune


def run_cell(cell: Cell, folder: Path) -> Outcome:
    """Run one cell, or go on with it, or read what came of it; whatever goes wrong is part of the outcome.

    Args:
        cell: of a comparison.
        folder: the comparison's.
    """
    where, trace = folder / cell.folder, folder / "errors" / f"{plain_name(cell.name)}.txt"
    who: dict[str, Any] = {
        "arm": cell.arm,
        "budget": cell.budget,
        "seed": cell.seed,
        "against": cell.against,
    }
    try:
        if not is_finished(cell, folder):
            facts = _run(cell.config, where, folder / "curves")
            _open(cell, folder).once("outcome", lambda: facts)
            trace.unlink(missing_ok=True)  # of an earlier try
        known = _open(cell, folder).known["outcome"]
        return Outcome(**who, **known | {"widths": [Width(**width) for width in known["widths"]]})
    except SecateurError as error:
        return Outcome(**who, error=str(error))
    except Exception as error:  # a bug in one method must not end a night's work
        trace.parent.mkdir(exist_ok=True)
        atomic_write(trace, traceback.format_exc())
        return Outcome(**who, error=f"{type(error).__name__}: {error}")


def is_finished(cell: Cell, folder: Path) -> bool:
    """Whether what came of a cell is known.

    Raises:
        FileError: its folder holds something else, such as a run of other settings.
    """
    return "outcome" in _open(cell, folder).known


def _open(cell: Cell, folder: Path) -> RunFolder:
    """The folder of a cell, for going on with it."""
    kind = "train" if isinstance(cell.config, TrainRunConfig) else "prune"
    return RunFolder(folder / cell.folder, kind, cell.config.to_json(), "resume")


def _run(config: PruneConfig | TrainRunConfig, where: Path, curves: Path) -> dict[str, Any]:
    """Run it; the fields of `Outcome` as plain JSON."""
    if isinstance(config, TrainRunConfig):
        result = train_run(config, where, mode="resume")
        return {
            "accuracy": result.accuracy,
            "epochs": len(result.history),
            "training_seconds": result.seconds,
            "widths": [],
        }
    report = prune_run(config, where, mode="resume", curves=curves)
    assert report is not None
    cost = report.training_cost
    return {
        "accuracy": report.accuracy_after,
        "accuracy_cut": report.accuracy_cut,
        "accuracy_dense": report.accuracy_before if config.task.weights else None,
        "kept": _kept(report),
        "masked": config.chosen.removes != "channels",
        "step_macs": cost.after.macs / cost.before.macs if cost else None,
        "step_bytes": cost.after.peak_bytes / cost.before.peak_bytes if cost else None,
        "epochs": len(report.history),
        "training_seconds": sum(line["seconds"] for line in report.history),
        "widths": [asdict(width) for width in report.widths],
    }


def time_cell(cell: Cell, folder: Path, comparison: Comparison) -> LatencyPair | None:
    """Latency of the dense network and of a finished cell's, side by side; kept in the cell's folder unless other work
    disturbed it.

    None if its weights cannot be loaded into the model they came from, as when a method of the user's own changed more
    than widths.
    """
    where = folder / cell.folder
    run, saved = _open(cell, folder), SavedRun.read(where)
    task, batch, outside = cell.config.task, comparison.latency_batch, comparison.latency_runtime != "pytorch"
    here = torch.device("cpu") if outside else device()
    library = f"onnxruntime {version('onnxruntime')}" if outside else f"torch {torch.__version__}"
    how = f"{torch.get_num_threads()} threads, {library}, {device_name(here)}"
    name = f"latency at batch {batch}, {how}"
    if name in run.known:
        return pair_of(run.known[name])
    dense, small = (fresh_model(task.model, saved.classes, saved.input_shape[0], task.seed) for _ in range(2))
    try:
        load_into(small, where / "model.safetensors")
    except SecateurError:
        return None
    images = torch.randn(batch, *saved.input_shape, generator=torch.Generator().manual_seed(0)).to(here)
    before, after = (_in_onnxruntime(m, images) if outside else m.to(here) for m in (dense, small))
    pair = compare_pair(before, after, images)
    if pair.steady:
        run.once(name, lambda: measured_json(pair))
    return pair


def _in_onnxruntime(model: nn.Module, images: Tensor) -> Runner:
    with TemporaryDirectory() as home:
        return onnx_runner(export_onnx(model, images, Path(home, "model.onnx")).path, torch.get_num_threads())


def _kept(report: Report) -> dict[str, float]:
    """Share of the dense model that is left, by measure; zeros count as gone."""
    left = {"macs": report.weights.macs, "params": report.weights.params} if report.weights else report.after
    return {measure: left[measure] / report.before[measure] for measure in MEASURES}
