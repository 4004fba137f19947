"""A run from its configuration to its report: load, train if asked, choose, train if asked, measure, report.

What a method says of itself decides which training comes when: one that prunes during training trains under its
session, masks hold while a masked model trains, all else trains plainly.
"""

import contextlib
import math
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.cost import Budget
from secateur.cost.multiples import AUTO, hardware_of
from secateur.engine.method import Context, Method
from secateur.engine.pruned import Pruned
from secateur.engine.training_method import TrainingMethod
from secateur.files import explained
from secateur.graph import Graph
from secateur.graph.duplicate import duplicate
from secateur.methods import Auto, OneShot, Own, budget_in_macs, choose, prune
from secateur.plan import Plan, WeightPlan
from secateur.proof import Verification
from secateur.recipes.train import FitResult, fit, training_steps
from secateur.recipes.train_config import TrainConfig
from secateur.report import Report, write_report
from secateur.runs.config import PruneConfig, TrainRunConfig
from secateur.runs.folder import Mode, RunFolder, Watch, is_main_process
from secateur.runs.measure import clock_of, export_and_time, measure_accuracy, measure_training
from secateur.runs.summary import is_worse, summarise
from secateur.runs.task import load_task, seeded
from secateur.surgery import load, save

PLANS = {Plan: "plan.json", WeightPlan: "masks.safetensors"}
"""File of each kind of plan."""


def train_run(
    config: TrainRunConfig,
    out: str | Path,
    *,
    mode: Mode = "new",
    command: str = "",
    watch: Watch | None = None,
) -> FitResult:
    """Train a model, from scratch or on from the task's weights; `out` gets its weights, metrics and checkpoint.

    Several processes launched together share the work, and the first of them writes.

    Args:
        config: what and how.
        out: the run's folder; it is made if need be.
        mode: what to do if it holds a run.
        command: as it was typed, for the record.
        watch: is told what goes on.
    Raises:
        SecateurError: whatever is wrong with names, data, folder or numbers; before that nothing is written.
    """
    run = Run(config, out, "train", mode, command, watch)
    run.begin()
    result = run.fit(run.task.model, config.train, "train", "Training")
    if run.folder:
        save(run.task.model, run.folder / "model.safetensors")
    return result


def prune_run(
    config: PruneConfig,
    out: str | Path,
    *,
    mode: Mode = "new",
    command: str = "",
    watch: Watch | None = None,
    curves: Path | None = None,
) -> Report | None:
    """Prune a model to a budget; `out` gets the plan, the pruned model, its exports, and the report.

    A run that was killed goes on where it stood: what `progress.json` and the checkpoints hold is not done
    again, and on the CPU the resulting model equals that of an uninterrupted run bit for bit. Several
    processes launched together share the training, and the first of them does the rest.

    Args:
        config: what and how; the task's seed takes the place of those in `train` and `finetune`.
        out: the run's folder; it is made if need be.
        mode: what to do if it holds a run.
        command: as it was typed, for the record.
        watch: is told what goes on.
        curves: folder for measurements that serve every budget, such as distortion curves; None: they are not kept.
    Returns:
        what the report says; None on every process but the first.
    Raises:
        SecateurError: whatever is wrong with names, data, weights, folder, budget or numbers; nothing has
            been written then.
    """
    run = Run(config, out, "prune", mode, command, watch)
    config = run.resolve_auto(config)
    method, dense = run.at_hand(config.chosen), run.task.model
    graph = method.analyze(dense, run.task.inputs)
    config.check_reach(graph)
    if isinstance(method, TrainingMethod):
        pruned, last = _prune_during(run, config, method)
    else:
        pruned, last = _prune_at_once(run, config, method, graph, curves)
    if not run.folder:
        return None
    report = summarise(config, run.task, pruned, run.folder, last, _finish(run, config, pruned, last))
    write_report(run.folder.path, report)
    return report


class Run:
    """What all steps of a run need: the task, loaded; the folder; and whoever watches.

    Attributes:
        task: loaded.
        folder: None on every process but the first.
        watch: is told what goes on.
        hardware: that widths are chosen for, if the method leaves that open.
    """

    def __init__(
        self,
        config: PruneConfig | TrainRunConfig,
        out: str | Path,
        kind: str,
        mode: Mode,
        command: str,
        watch: Watch | None,
    ) -> None:
        self.out, self.kind, self.mode, self.command = out, kind, mode, command
        self.watch = watch or Watch()
        self.settings, self.seed = config.to_json(), config.task.seed
        self.folder = RunFolder(out, kind, self.settings, mode) if is_main_process() else None
        self.hardware: int | str | None = None
        with self.watch.doing(f"Loading {config.task.data} and building {config.task.model}"):
            self.task = load_task(config.task)

    def resolve_auto(self, config: PruneConfig) -> PruneConfig:
        """The configuration with a method in place of `auto`; why is a note of the task."""
        auto = config.chosen
        if not isinstance(auto, Auto):
            return config
        choice = choose(
            auto,
            bounds=config.budget,
            trained=config.task.weights is not None or config.train is not None,
            data=True,
            training=config.finetune is not None,
        )
        self.task = replace(self.task, notes=(*self.task.notes, choice.why))
        record = choice.method.record()
        return replace(config, method=record.pop("method"), options=record | {"seed": config.task.seed})

    def at_hand(self, method: Method) -> Method:
        """The method with widths for the hardware at hand, where it leaves that open; in a resumed run for the hardware
        that it began on.
        """
        if getattr(method, "round_to", None) != AUTO:
            return method
        self.hardware = hardware_of(self.task.model)
        if self.folder and self.folder.resumed:
            self.hardware = self.folder.known.get("hardware", 1)  # runs of older versions took any width
        return type(method).of({**vars(method), "round_to": self.hardware})

    def begin(self) -> None:
        """Make the folder ready; from here on it is written to."""
        if self.folder:
            self.folder.begin(self.task.saved_run(self.kind, self.command, self.settings))
            if self.hardware is not None:
                self.folder.once("hardware", lambda: self.hardware)

    def fit(
        self,
        model: nn.Module,
        how: TrainConfig,
        phase: str,
        doing: str,
        *,
        teacher: nn.Module | None = None,
        first_epoch: int = 0,
        within: AbstractContextManager[Any] | None = None,
        **more: Any,
    ) -> FitResult:
        """Train in place, going on from a checkpoint if the run is resumed."""
        self.watch.tell(f"{doing}: {how.epochs} × {len(self.task.data.train):,} images")
        with within or contextlib.nullcontext():
            result = fit(
                model,
                self.task.data,
                replace(how, seed=self.seed),
                self.out,
                teacher=teacher,
                resume=self.mode == "resume",
                phase=phase,
                first_epoch=first_epoch,
                progress=self.watch.bars,
                **more,
            )
        for trained in (model, teacher):
            if trained is not None:  # models of one layout can be compared by the clock
                trained.to(memory_format=torch.contiguous_format)
        return result


def _prune_at_once(
    run: Run, config: PruneConfig, method: Method, graph: Graph, curves: Path | None
) -> tuple[Pruned, str]:
    """Choose before or after the dense model is trained, then train what is left; and what the last model is called."""
    dense, folder, watch = run.task.model, run.folder, run.watch
    before, masks = method.when == "before", method.removes != "channels"

    def choose_now() -> Pruned:
        with watch.doing("Choosing what to mask" if masks else "Choosing what to remove"), seeded(run.seed):
            return _choose(run, config, method, graph, curves)

    if config.train is not None:
        if not (method.needs_data or isinstance(method, Own)):  # what fails, fails before anything is written
            choose_now()
        run.begin()
        run.fit(dense, config.train, "train", "Training")
        pruned = choose_now()
    elif masks and not before:  # takes long, so the folder is made ready first
        run.begin()
        pruned = choose_now()
    else:
        pruned = choose_now()
        run.begin()
    small = pruned.model
    if folder:
        if config.train is not None or masks:
            save(dense, folder / "dense.safetensors")
        _keep_choice(folder, pruned)
        if not before:
            measure_accuracy("dense model", dense, run.task.data, folder, watch)
            measure_accuracy("cut model", small, run.task.data, folder, watch)
    if config.finetune is not None:
        run.fit(
            small,
            config.finetune,
            "train" if before else "finetune",
            "Training" if before else "Fine-tuning",
            teacher=dense if config.finetune.distill_weight > 0 else None,
            first_epoch=config.train.epochs if config.train else 0,
            within=pruned.plan.holding(small) if isinstance(pruned.plan, WeightPlan) else None,
        )
    if before or config.finetune is None:
        return pruned, "pruned model" if before else "cut model"
    return _better(run, config, pruned)


def _better(run: Run, config: PruneConfig, pruned: Pruned) -> tuple[Pruned, str]:
    """The fine-tuned model, or the cut one if fine-tuning made it worse."""
    folder, images = run.folder, len(run.task.data.test)
    if folder:
        measure_accuracy("fine-tuned model", pruned.model, run.task.data, folder, run.watch)
        cut, tuned = (folder.known[f"accuracy of the {name} model"] for name in ("cut", "fine-tuned"))
        if config.keep == "better" and is_worse(cut, tuned, images):
            save(pruned.model, folder / "finetuned.safetensors")
            model = load(duplicate(run.task.model), folder / "cut.safetensors")
            return replace(pruned, model=model), "cut model"
    return pruned, "fine-tuned model"


def _prune_during(run: Run, config: PruneConfig, method: TrainingMethod) -> tuple[Pruned, str]:
    """Train under the method."""
    model, how = run.task.model, config.train
    assert how is not None
    original = duplicate(model)
    with run.watch.doing("Looking at what may go"):
        budget = _in_closed_form(run, config, method)
        with seeded(run.seed):
            session = method.start(
                model, run.task.inputs, budget=budget, steps=training_steps(run.task.data, how)
            )
    run.begin()
    if run.folder and config.task.weights is not None:
        measure_accuracy("dense model", original, run.task.data, run.folder, run.watch)
    run.fit(model, how, "train", "Training and pruning", session=session)
    with run.watch.doing("Verifying"):
        pruned = session.finish()
    run.task = replace(run.task, model=original)
    if run.folder:
        _keep_choice(run.folder, pruned, cut=False)
    return pruned, "pruned model"


def _choose(run: Run, config: PruneConfig, method: Method, graph: Graph, curves: Path | None) -> Pruned:
    """Let the method choose; or, if the run is resumed, read what it chose."""
    model, folder = run.task.model, run.folder
    drawn = method.when == "before" and method.removes == "channels"  # cheap, and follows from the seed
    resumed = folder and folder.resumed and not drawn and "cut" in folder.known
    if resumed and folder and (kept := _kept_choice(run, method, graph, folder)) is not None:
        return kept
    data = run.task.batches(
        config.calibration_images, shuffle=method.removes != "channels" and method.when == "after"
    )
    if curves is not None:
        curves.mkdir(parents=True, exist_ok=True)
    if isinstance(method, Own):
        return method.prune(
            model, run.task.inputs, _in_closed_form(run, config, method), Context(data, cache=curves)
        )
    return prune(
        model,
        run.task.inputs,
        budget=config.bounds(),
        method=method,
        data=data if method.needs_data else None,
        clock=clock_of(model, run.task.inputs, config.latency_batch),
        cache=curves,
        progress=run.watch.progress,
        graph=graph,
    )


def _in_closed_form(run: Run, config: PruneConfig, method: Method) -> Budget:
    """The budget for methods that cannot try several cuts: milliseconds as the MACs of a model that takes them."""
    budget = config.bounds()
    if "latency_ms" not in config.budget:
        return budget
    model, inputs = run.task.model, run.task.inputs
    evenly = OneShot(
        allocation="uniform",
        freeze=method.freeze,
        scope=method.scope,
        min_keep=getattr(method, "min_keep", 1),
        round_to=getattr(method, "round_to", 1),
    )
    return budget_in_macs(model, inputs, budget, evenly, clock=clock_of(model, inputs, config.latency_batch))


def _keep_choice(folder: RunFolder, pruned: Pruned, *, cut: bool = True) -> None:
    """Write what was chosen, so that a resumed run need not choose again."""
    known = folder.resumed and "cut" in folder.known
    if pruned.plan is not None:
        pruned.plan.save(folder / PLANS[type(pruned.plan)])
    if cut and not known:
        save(pruned.model, folder / "cut.safetensors")
    scores = [
        [value if math.isfinite(value) else None for value in score.tolist()] for score in pruned.scores
    ]
    facts = {
        "scores": scores,
        "proof": asdict(pruned.proof) if pruned.proof else None,
        "before": dict(pruned.before),
        "after": dict(pruned.after),
        "facts": dict(pruned.facts),
    }
    folder.once("cut", lambda: facts)


def _kept_choice(run: Run, method: Method, graph: Graph, folder: RunFolder) -> Pruned | None:
    """What the run chose before it was interrupted; None if a file of it is missing."""
    weights = method.removes != "channels"
    path = folder / PLANS[WeightPlan if weights else Plan]
    if not path.exists() or not (folder / "cut.safetensors").exists():
        return None
    known, model = folder.known["cut"], run.task.model
    plan: Plan | WeightPlan
    if weights:
        plan = WeightPlan.load(path)
        plan.check(model)
    else:
        plan = Plan.load(path)
        plan.check(graph)
    return Pruned(
        load(duplicate(model), folder / "cut.safetensors"),
        plan,
        graph,
        [torch.tensor([float("nan") if v is None else v for v in score]) for score in known["scores"]],
        Verification(**known["proof"]) if known["proof"] else None,
        known["before"],
        known["after"],
        facts=known["facts"],
    )


def _finish(run: Run, config: PruneConfig, pruned: Pruned, last: str) -> dict[str, Any]:
    """Write the pruned model, and measure all that the report tells; what came of the exports."""
    folder, task = run.folder, run.task
    assert folder is not None
    dense, small, plan = task.model, pruned.model, pruned.plan
    with explained(folder.path):
        save(small, folder / "model.safetensors")
    if config.chosen.when == "before" and config.finetune is not None:
        holding = plan.holding if isinstance(plan, WeightPlan) else None
        measure_training(dense, small, task.data, config.finetune, folder, run.watch, holding)
    measure_accuracy(last, small, task.data, folder, run.watch)
    if isinstance(plan, WeightPlan):
        sizes = [(folder / name).stat().st_size for name in ("dense.safetensors", "model.safetensors")]
        return {"weights_bytes": sizes, "notes": []}
    timed = config.exports if config.latency is None else config.latency
    if not (config.exports or timed):
        return {"notes": []}
    doing = " and ".join(
        word for word, wanted in (("exporting", config.exports), ("timing", timed)) if wanted
    )
    with run.watch.doing(doing.capitalize()):
        found: dict[str, Any] = folder.once(
            "exports",
            lambda: export_and_time(
                dense,
                small,
                task.inputs,
                config.latency_batch,
                folder.path,
                exports=config.exports,
                latency=timed,
            ),
        )
    return found
