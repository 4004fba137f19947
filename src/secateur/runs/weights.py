"""A run that prunes single weights, of a trained model or before training: masks, training under them, report."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cost import Cost
from secateur.errors import SecateurError
from secateur.graph import Graph, analyze
from secateur.methods import Sparse, method_named, prune_weights
from secateur.methods.additivity import Additivity, check_additivity
from secateur.methods.at_init import costs_left
from secateur.methods.rd.single_weights import RDSettings
from secateur.plan.weight_plan import WeightPlan
from secateur.recipes.train import fit
from secateur.report import Report, current_versions, write_report
from secateur.report.data import LayerCurve, WeightFacts
from secateur.runs.auto import resolved
from secateur.runs.config import PruneConfig
from secateur.runs.folder import Mode, RunFolder, Watch, is_main_process
from secateur.runs.result import described, tested, training_costs, training_pair
from secateur.runs.subject import Subject, device, fresh_model, load_subject
from secateur.surgery import load, save

KEPT = ("masks.safetensors", "cut.safetensors")
"""Files of what was decided: the masks, and the model under them before any further training."""

BEFORE = "The weights were masked before training, and the model was trained once while the masks held."

NO_FASTER = (
    "Scattered zeros make the file smaller, not the model faster: dense kernels multiply by them all the same. "
    "Prune channels, or the pattern 2:4 on GPUs that have kernels for it, where speed is the aim."
)


def weights_run(
    config: PruneConfig, out: str | Path, mode: Mode, command: str, watch: Watch
) -> Report | None:
    """A run of `prune_run` that sets single weights to zero; `out` gets the masks, the sparse model and the report."""
    settings = config.to_json()
    folder = RunFolder(out, "prune", settings, mode) if is_main_process() else None
    with watch.doing(f"Loading {config.task.data} and building {config.task.model}"):
        config, subject = resolved(config, load_subject(config.task))
    dense, data = subject.model, subject.data
    graph = analyze(dense, subject.inputs)
    before = method_named(config.method).when == "before"
    if folder and not before:
        folder.begin(subject.saved_run("prune", command, settings))
    plan, small, facts = decided(config, subject, graph, folder, watch)
    if folder and before:  # choosing took no time, and a budget out of reach leaves no folder
        folder.begin(subject.saved_run("prune", command, settings))
    if folder:
        kept(plan, small, facts, folder)
    if folder and not before:
        tested("dense model", dense, data, folder, watch)
        tested("cut model", small, data, folder, watch)
    if config.finetune is not None:
        phase = "train" if before else "finetune"
        watch.tell(
            f"{'Training' if before else 'Fine-tuning'}: {config.finetune.epochs} × {len(data.train):,} images"
        )
        teacher = dense if config.finetune.distill_weight > 0 else None
        how = replace(config.finetune, seed=config.task.seed)
        with plan.holding(small):
            fit(
                small, data, how, out, teacher=teacher, resume=mode == "resume", phase=phase, progress=watch.bars
            )  # fmt: skip
        small.to(memory_format=torch.contiguous_format)
    if not folder:
        return None
    save(small, folder / "model.safetensors")
    save(dense, folder / "dense.safetensors")
    if before and config.finetune is not None:
        training_costs(dense, small, data, config.finetune, folder, watch, plan.holding)
    last = "pruned model" if before else "fine-tuned model" if config.finetune else "cut model"
    tested(last, small, data, folder, watch)
    report = _report(config, subject, graph, plan, facts, folder, last)
    write_report(folder.path, report)
    return report


def _report(
    config: PruneConfig,
    subject: Subject,
    graph: Graph,
    plan: WeightPlan,
    facts: dict[str, Any],
    folder: RunFolder,
    last: str,
) -> Report:
    sizes = [(folder / name).stat().st_size for name in ("dense.safetensors", "model.safetensors")]
    cost, left = Cost(graph), costs_left(graph, plan.masks)
    before = method_named(config.method).when == "before"
    return Report(
        model=config.task.model,
        dataset=config.task.data,
        method=described(config),
        budget=config.budget(graph).bounds
        if before
        else {"weights": round(1 - float(config.sparsity or 0), 9)},
        seed=config.task.seed,
        command=folder.command,
        macs_before=cost.macs(),
        macs_after=cost.macs(),
        params_before=cost.params(),
        params_after=cost.params(),
        accuracy_before=folder.known.get("accuracy of the dense model"),
        accuracy_cut=folder.known.get("accuracy of the cut model"),
        accuracy_after=folder.known[f"accuracy of the {last}"],
        weights_bytes_before=sizes[0],
        weights_bytes_after=sizes[1],
        training_cost=training_pair(folder),
        weights=WeightFacts(
            total=plan.weights,
            kept=plan.kept,
            layers={name: (mask.numel(), int(mask.sum())) for name, mask in plan.masks.items()},
            macs=left["macs"][1],
            params=left["params"][1],
            curves=tuple(LayerCurve(**curve) for curve in facts["curves"]),
            predicted=facts["predicted"],
            measured=facts["measured"],
        ),
        notes=[*subject.notes, *([BEFORE] if before else []), NO_FASTER],
        history=folder.metrics(),
        versions=current_versions(device()),
    )


def decided(
    config: PruneConfig, subject: Subject, graph: Graph, folder: RunFolder | None, watch: Watch
) -> tuple[WeightPlan, nn.Module, dict[str, Any]]:
    """The masks, the model under them, and what was measured: from the folder if the run is resumed."""
    paths = [folder / name for name in KEPT] if folder else []
    if folder and folder.resumed and "cut" in folder.known and all(path.exists() for path in paths):
        plan = WeightPlan.load(paths[0])
        fresh = fresh_model(
            config.task.model, len(subject.data.classes), subject.data.train.images.shape[1], config.task.seed
        )
        return plan, load(fresh, paths[1]), folder.known["cut"]
    if method_named(config.method).when == "before":
        with watch.doing("Choosing what to mask"):
            data = {"data": subject.batches(config.calibration_images)} if config.needs_data else {}
            sparse: Sparse = method_named(config.method).runs[config.unit](
                subject.model,
                subject.inputs,
                config.budget(graph),
                freeze=config.freeze,
                **config.method_options(),
                **data,
            )
        return sparse.plan, sparse.model, {"curves": [], "predicted": None, "measured": None}
    with watch.doing("Measuring what each layer can do without"):
        pruned = prune_weights(
            subject.model,
            calibration(subject, config.calibration_images),
            sparsity=float(config.sparsity or 0),
            allocation="rd" if config.method == "rd" else config.allocation,
            settings=RDSettings(compensation=config.compensation),
        )
    curves = []
    if pruned.curves is not None:
        for name, counts, values in zip(
            pruned.curves.names, pruned.curves.kept, pruned.curves.reduced(), strict=True
        ):
            curves.append({"layer": name, "kept": counts.tolist(), "distortion": values.tolist()})
    facts = {"curves": curves, "predicted": pruned.predicted, "measured": pruned.measured}
    return pruned.plan, pruned.model, facts


def kept(plan: WeightPlan, model: nn.Module, facts: dict[str, Any], folder: RunFolder) -> None:
    """Write what a resumed run need not decide again."""
    if "cut" not in folder.known:
        plan.save(folder / KEPT[0])
        save(model, folder / KEPT[1])
        folder.once("cut", lambda: facts)


def calibration(subject: Subject, images: int) -> list[Tensor]:
    """Training images, balanced over the classes and without augmentation."""
    return [x for x, _ in subject.batches(images, shuffle=True)]


def additivity_run(
    config: PruneConfig,
    *,
    draws: int,
    watch: Watch | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> Additivity:
    """Compare the sum of curves with the joint distortion over random allocations at the run's sparsity."""
    if config.sparsity is None:
        raise SecateurError("additivity is measured at a sparsity; give one, such as 0.8")
    watch = watch or Watch()
    with watch.doing(f"Loading {config.task.data} and building {config.task.model}"):
        subject = load_subject(config.task)
    with watch.doing("Measuring curves, and random allocations"):
        return check_additivity(
            subject.model,
            calibration(subject, config.calibration_images),
            sparsity=config.sparsity,
            draws=draws,
            settings=RDSettings(compensation=config.compensation),
            seed=config.task.seed,
            tick=tick,
        )
