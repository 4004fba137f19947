"""A pruning run: train if asked, cut, fine-tune if asked, verify, export, measure, report."""

import copy
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.cost import Budget
from secateur.errors import SecateurError
from secateur.graph import Graph, analyze
from secateur.methods import Pruned, StructuredMethod, budget_in_macs, method_named, prune
from secateur.plan import Plan
from secateur.recipes.data import Dataset
from secateur.recipes.train import TrainConfig, fit, training_steps
from secateur.report import Report, write_report
from secateur.runs.auto import resolved
from secateur.runs.config import PruneConfig
from secateur.runs.folder import Mode, RunFolder, Watch, is_main_process
from secateur.runs.result import Counts, clock_of, compose, counted, exports, tested, training_costs
from secateur.runs.subject import Subject, load_subject
from secateur.runs.weights import weights_run
from secateur.surgery import load, save


def prune_run(
    config: PruneConfig,
    out: str | Path,
    *,
    mode: Mode = "new",
    command: str = "",
    watch: Watch | None = None,
    curves: Path | None = None,
) -> Report | None:
    """Prune a model to a budget; `out` gets the plan, the small model, its exports, and the report.

    Where single weights go, it gets masks instead of the plan, and the model without its zeros.

    A run that was killed goes on where it stood: what `progress.json` and the checkpoints hold is not done
    again, and on the CPU the resulting model equals that of an uninterrupted run bit for bit. Several
    processes launched together share the training, and the first of them does the rest.

    Args:
        config: what and how; the task's seed takes the place of those in `train` and `finetune`.
        out: the run's folder; it is made if need be.
        mode: what to do if it holds a run.
        command: as it was typed, for the record.
        watch: is told what goes on.
        curves: folder for the distortion curves that method "rd" measures, which serve every budget; None: they are
            not kept.
    Returns:
        what the report says; None on every process but the first.
    Raises:
        SecateurError: whatever is wrong with names, data, weights, folder, budget or numbers; nothing has
            been written then.
    """
    watch = watch or Watch()
    if config.masks:
        return weights_run(config, out, mode, command, watch)
    settings = config.to_json()
    folder = RunFolder(out, "prune", settings, mode) if is_main_process() else None
    with watch.doing(f"Loading {config.task.data} and building {config.task.model}"):
        config, subject = resolved(config, load_subject(config.task))
    when = method_named(config.method).when
    if when == "during":
        return _during(config, subject, settings, folder, out, mode, command, watch)
    dense, data = subject.model, subject.data
    with watch.doing("Choosing what to remove"):
        graph = analyze(dense, subject.inputs, freeze=config.freeze, attention=config.attention)
        config.budget(graph)
        decision = None
        measures = config.method == "rd" or method_named(config.method).own
        if config.train is None or not measures:  # if the weights are yet to be trained, a rehearsal
            decision = _decide(config, subject, graph, folder, curves)
    if folder:
        folder.begin(subject.saved_run("prune", command, settings))

    if config.train is not None:
        watch.tell(f"Training: {config.train.epochs} × {len(data.train):,} images")
        _fit(dense, data, replace(config.train, seed=config.task.seed), out, "train", mode, watch)
        with watch.doing("Choosing what to remove"):
            decision = _decide(config, subject, graph, folder, curves)
    assert decision is not None
    small = decision.model
    if folder:
        if config.train is not None:
            save(dense, folder / "dense.safetensors")
        if not (folder.resumed and "cut" in folder.known):
            save(small, folder / "cut.safetensors")
        folder.once("cut", lambda: decision.facts)
        if decision.plan is not None:
            decision.plan.save(folder / "plan.json")
        if when == "after":
            tested("dense model", dense, data, folder, watch)
            tested("cut model", small, data, folder, watch)

    if config.finetune is not None:
        doing = "Training" if when == "before" else "Fine-tuning"
        watch.tell(f"{doing}: {config.finetune.epochs} × {len(data.train):,} images")
        how = replace(config.finetune, seed=config.task.seed)
        teacher = dense if how.distill_weight > 0 else None
        phase, seen = (
            ("train", 0) if when == "before" else ("finetune", config.train.epochs if config.train else 0)
        )
        _fit(small, data, how, out, phase, mode, watch, teacher, first_epoch=seen)
    if not folder:
        return None
    save(small, folder / "model.safetensors")
    if when == "before" and config.finetune is not None:
        training_costs(dense, small, data, config.finetune, folder, watch)
    last = "pruned" if when == "before" else "fine-tuned" if config.finetune else "cut"
    tested(f"{last} model", small, data, folder, watch)
    exported = _exported(config, dense, small, subject, folder, watch)
    if decision.plan is None:
        counts = counted(decision.graph, small)
    else:
        counts = Counts(tuple(decision.facts["macs"]), tuple(decision.facts["params"]))
    report = compose(config, subject, decision.graph, decision.plan, (dense, small), counts, folder, exported)
    write_report(folder.path, report)
    return report


def _during(
    config: PruneConfig,
    subject: Subject,
    settings: dict[str, Any],
    folder: RunFolder | None,
    out: str | Path,
    mode: Mode,
    command: str,
    watch: Watch,
) -> Report | None:
    """A run of a method that prunes while the model is trained."""
    model, data = subject.model, subject.data
    dense = copy.deepcopy(model)
    assert config.train is not None
    how = replace(config.train, seed=config.task.seed)
    with watch.doing("Looking at what may go"):
        graph = analyze(model, subject.inputs, freeze=config.freeze)
        method: StructuredMethod = method_named(config.method).run(
            model,
            subject.inputs,
            budget=_in_closed_form(config, subject, graph),
            steps=training_steps(data, how),
            freeze=config.freeze,
            **config.method_options(),
        )
    if folder:
        folder.begin(subject.saved_run("prune", command, settings))
        if config.task.weights is not None:
            tested("dense model", dense, data, folder, watch)
    watch.tell(f"Training and pruning: {how.epochs} × {len(data.train):,} images")
    fit(model, data, how, out, method=method, resume=mode == "resume", progress=watch.bars)
    model.to(memory_format=torch.contiguous_format)
    with watch.doing("Verifying"):
        pruned = method.finish()
    if not folder:
        return None
    assert isinstance(pruned.plan, Plan)
    pruned.plan.save(folder / "plan.json")
    save(model, folder / "model.safetensors")
    folder.once("cut", lambda: _facts(pruned))
    tested("pruned model", model, data, folder, watch)
    exported = _exported(config, dense, model, subject, folder, watch)
    pair = (method.original, model)
    counts = Counts(*pairs_of(pruned))
    report = compose(config, subject, pruned.graph, pruned.plan, pair, counts, folder, exported, method)
    write_report(folder.path, report)
    return report


def _exported(
    config: PruneConfig, dense: nn.Module, small: nn.Module, subject: Subject, folder: RunFolder, watch: Watch
) -> dict[str, Any]:
    if not config.exports:
        return {"notes": []}
    with watch.doing("Exporting and timing"):
        found: dict[str, Any] = folder.once(
            "exports", lambda: exports(dense, small, subject.inputs, config.latency_batch, folder.path)
        )
    return found


@dataclass(frozen=True)
class Decision:
    """What goes from which graph, the model without it, and in plain JSON what is known about why.

    There is no plan where a method of the user's own returned nothing but a model.
    """

    plan: Plan | None
    graph: Graph
    model: nn.Module
    facts: dict[str, Any]


def _decide(
    config: PruneConfig, subject: Subject, graph: Graph, folder: RunFolder | None, curves: Path | None
) -> Decision:
    method = method_named(config.method)
    # what comes before training is cheap, and drawn from the seed
    kept = method.when == "after" and folder and folder.resumed and "cut" in folder.known
    if kept and folder and (folder / "cut.safetensors").exists() and (folder / "plan.json").exists():
        plan = Plan.load(folder / "plan.json")
        plan.check(graph)
        small = load(copy.deepcopy(subject.model), folder / "cut.safetensors")
        return Decision(plan, graph, small, folder.known["cut"])
    given: dict[str, Any] = {}
    if config.needs_data:
        given["data"] = subject.batches(config.calibration_images)
    if method.own:
        return _by_own(config, subject, graph, given)
    if curves is not None and method.takes("curves"):
        curves.mkdir(parents=True, exist_ok=True)
        given["curves"] = curves
    pruned = prune(
        subject.model,
        subject.inputs,
        budget=config.budget(graph),
        method=config.method,
        clock=clock_of(subject.model, subject.inputs, config.latency_batch),
        freeze=config.freeze,
        **config.method_options(),
        **given,
    )
    assert isinstance(pruned.plan, Plan)
    return Decision(pruned.plan, pruned.graph, pruned.model, _facts(pruned))


def _in_closed_form(config: PruneConfig, subject: Subject, graph: Graph) -> Budget:
    """The budget for methods that cannot try several cuts: milliseconds as the MACs of a model that takes them."""
    budget = config.budget(graph)
    if budget.latency_ms is None:
        return budget
    clock = clock_of(subject.model, subject.inputs, config.latency_batch)
    return budget_in_macs(
        subject.model, subject.inputs, budget, clock=clock, freeze=config.freeze, min_keep=config.min_keep
    )


def _by_own(config: PruneConfig, subject: Subject, graph: Graph, options: dict[str, Any]) -> Decision:
    """What a function of the user's own makes of a copy of the model."""
    method = method_named(config.method)
    if method.takes("freeze"):
        options["freeze"] = config.freeze
    elif config.freeze:
        raise SecateurError(f"method {config.method} takes no freeze")
    model = copy.deepcopy(subject.model)
    budget = _in_closed_form(config, subject, graph)
    result = method.run(model, subject.inputs, budget, **config.method_options(), **options)
    if isinstance(result, Pruned):
        assert isinstance(result.plan, Plan)
        return Decision(result.plan, result.graph, result.model, _facts(result))
    if not isinstance(result, nn.Module):
        raise SecateurError(
            f"method {config.method}: got {type(result).__name__}, expected the smaller model, a torch.nn.Module, or "
            f"a secateur Pruned. Return one of them."
        )
    return Decision(None, graph, result, {"scores": {}, "verification": None})


def _facts(pruned: Pruned) -> dict[str, Any]:
    """What is known about the cut, as plain JSON."""
    scores = {
        group.name: [value if math.isfinite(value) else None for value in score.tolist()]
        for group, score in zip(pruned.graph.groups, pruned.scores, strict=True)
    }
    assert pruned.proof is not None
    macs, params = pairs_of(pruned)
    return {
        "scores": scores,
        "verification": asdict(pruned.proof),
        "macs": list(macs),
        "params": list(params),
    }


def pairs_of(pruned: Pruned) -> tuple[tuple[int, int], tuple[int, int]]:
    """MACs and parameters, before and after."""
    macs, params = ((int(pruned.before[m]), int(pruned.after[m])) for m in ("macs", "params"))
    return macs, params


def _fit(
    model: nn.Module,
    data: Dataset,
    how: TrainConfig,
    out: str | Path,
    phase: str,
    mode: Mode,
    watch: Watch,
    teacher: nn.Module | None = None,
    first_epoch: int = 0,
) -> None:
    fit(
        model,
        data,
        how,
        out,
        teacher=teacher,
        resume=mode == "resume",
        phase=phase,
        first_epoch=first_epoch,
        progress=watch.bars,
    )
    for trained in (model, teacher):
        if trained is not None:  # models of one layout can be compared by the clock
            trained.to(memory_format=torch.contiguous_format)
