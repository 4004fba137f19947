"""A run that prunes single weights: curves, masks, compensation, fine-tuning while the masks hold, report."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.cost import Cost
from secateur.errors import SecateurError
from secateur.graph import analyze
from secateur.methods.additivity import Additivity, check_additivity
from secateur.methods.rd import RDSettings, prune_weights
from secateur.recipes.data import Batches
from secateur.recipes.train import fit
from secateur.report import Report, current_versions, write_report
from secateur.report.data import LayerCurve, WeightFacts
from secateur.runs.auto import resolved
from secateur.runs.config import PruneConfig
from secateur.runs.folder import Mode, RunFolder, Watch, is_main_process
from secateur.runs.subject import Subject, device, fresh_model, load_subject, measure
from secateur.surgery import load, save
from secateur.surgery.weights import WeightPlan

NO_FASTER = (
    "Scattered zeros make the file smaller, not the model faster: dense kernels multiply by them all the same. "
    "Prune channels, or the pattern 2:4 on GPUs that have kernels for it, where speed is the aim."
)


def weights_run(
    config: PruneConfig, out: str | Path, *, mode: Mode = "new", command: str = "", watch: Watch | None = None
) -> Report | None:
    """Set single weights of a model to zero; `out` gets the masks, the sparse model and the report.

    Args and result are those of `prune_run`; the budget is `config.sparsity`, of the weights of convolutions and
    linear layers.
    """
    settings = config.to_json()
    watch = watch or Watch()
    folder = RunFolder(out, "prune", settings, mode) if is_main_process() else None
    with watch.doing(f"Loading {config.task.data} and building {config.task.model}"):
        config, subject = resolved(config, load_subject(config.task))
    graph = analyze(subject.model, subject.inputs)
    if folder:
        folder.begin(subject.saved_run("prune", command, settings))
    plan, small, facts = decided(config, subject, folder, watch)
    if folder:
        _accuracy("dense model", subject.model, subject, folder, watch)
        _accuracy("cut model", small, subject, folder, watch)
    if config.finetune is not None:
        watch.tell(f"Fine-tuning: {config.finetune.epochs} × {len(subject.data.train):,} images")
        teacher = subject.model if config.finetune.distill_weight > 0 else None
        how = replace(config.finetune, seed=config.task.seed)
        with plan.holding(small):
            fit(
                small, subject.data, how, out, teacher=teacher, resume=mode == "resume", phase="finetune",
                progress=watch.bars,
            )  # fmt: skip
        small.to(memory_format=torch.contiguous_format)
    if not folder:
        return None
    save(small, folder / "model.safetensors")
    last = "fine-tuned model" if config.finetune else "cut model"
    _accuracy(last, small, subject, folder, watch)
    save(subject.model, folder / "dense.safetensors")
    sizes = [(folder / name).stat().st_size for name in ("dense.safetensors", "model.safetensors")]
    cost = Cost(graph)
    report = Report(
        model=config.task.model,
        dataset=config.task.data,
        method=f"single weights, {config.allocation}, compensation {config.compensation}",
        budget={"weights": round(1 - float(config.sparsity or 0), 9)},
        seed=config.task.seed,
        command=folder.command,
        macs_before=cost.macs(),
        macs_after=cost.macs(),
        params_before=cost.params(),
        params_after=cost.params(),
        accuracy_before=folder.known["accuracy of the dense model"],
        accuracy_cut=folder.known["accuracy of the cut model"],
        accuracy_after=folder.known[f"accuracy of the {last}"],
        weights_bytes_before=sizes[0],
        weights_bytes_after=sizes[1],
        weights=WeightFacts(
            total=plan.weights,
            kept=plan.kept,
            layers={name: (mask.numel(), int(mask.sum())) for name, mask in plan.masks.items()},
            curves=tuple(LayerCurve(**curve) for curve in facts["curves"]),
            predicted=facts["predicted"],
            measured=facts["measured"],
        ),
        notes=[*subject.notes, NO_FASTER],
        history=folder.metrics(),
        versions=current_versions(device()),
    )
    write_report(folder.path, report)
    return report


def decided(
    config: PruneConfig, subject: Subject, folder: RunFolder | None, watch: Watch
) -> tuple[WeightPlan, torch.nn.Module, dict[str, Any]]:
    """The masks, the compensated model, and what was measured: from the folder if the run is resumed."""
    paths = [folder / name for name in ("masks.safetensors", "cut.safetensors")] if folder else []
    if folder and folder.resumed and "cut" in folder.known and all(path.exists() for path in paths):
        plan = WeightPlan.load(paths[0])
        fresh = fresh_model(
            config.task.model, len(subject.data.classes), subject.data.train.images.shape[1], config.task.seed
        )
        return plan, load(fresh, paths[1]), folder.known["cut"]
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
        for name, kept, values in zip(
            pruned.curves.names, pruned.curves.kept, pruned.curves.reduced(), strict=True
        ):
            curves.append({"layer": name, "kept": kept.tolist(), "distortion": values.tolist()})
    facts = {"curves": curves, "predicted": pruned.predicted, "measured": pruned.measured}
    if folder:
        save(pruned.model, folder / "cut.safetensors")
        pruned.plan.save(folder / "masks.safetensors")
        folder.once("cut", lambda: facts)
    return pruned.plan, pruned.model, facts


def calibration(subject: Subject, images: int, batch: int = 64) -> list[Tensor]:
    """Training images, balanced over the classes and without augmentation."""
    some = subject.data.subset(train_images=min(images, len(subject.data.train)))
    return [
        x for x, _ in Batches(some.train, batch_size=batch, normalisation=some.normalisation, shuffle=True)
    ]


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


def _accuracy(what: str, model: torch.nn.Module, subject: Subject, folder: RunFolder, watch: Watch) -> None:
    name = f"accuracy of the {what}"
    if name not in folder.known:
        with watch.doing(f"Measuring the {what} on {len(subject.data.test):,} images"):
            folder.once(name, lambda: measure(model, subject.data).accuracy)
        watch.tell(f"Accuracy of the {what}: {100 * folder.known[name]:.2f} %")
