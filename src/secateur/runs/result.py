"""What came of a pruning run: exported files, times, and the report that tells it all."""

import copy
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cost import Cost
from secateur.cost.latency import Latency, compare_latency
from secateur.cost.training import Holding, TrainingCost, compare_training
from secateur.engine.decay import Rectify
from secateur.errors import ExportError
from secateur.export import export_onnx, export_program, onnx_runner
from secateur.graph import Graph, analyze
from secateur.methods import StructuredMethod, method_named
from secateur.methods.latency import Clock, here
from secateur.plan import Plan
from secateur.proof import Verification
from secateur.recipes.data import Batches, Dataset
from secateur.recipes.train_config import TrainConfig
from secateur.report import (
    FrozenGroup,
    Group,
    LatencyPair,
    Report,
    TrainingPair,
    Width,
    current_versions,
)
from secateur.runs.config import PruneConfig
from secateur.runs.folder import RunFolder, Watch
from secateur.runs.subject import Subject, device, measure
from secateur.surgery import save

_REPEATS = 50


def timed_images(inputs: Tensor, batch: int) -> Tensor:
    """What latency is measured on, (batch, c, h, w)."""
    return torch.randn(batch, *inputs.shape[1:], generator=torch.Generator().manual_seed(0))


def clock_of(dense: nn.Module, inputs: Tensor, batch: int) -> Clock:
    """Measures milliseconds on the inputs and device of the report; models come and go on the CPU."""
    home = device()
    measured = here(dense, timed_images(inputs, batch).to(home))

    def clock(model: nn.Module) -> float:
        try:
            dense.to(home)
            return measured(model.to(home))
        finally:
            dense.cpu(), model.cpu()

    return clock


def exports(dense: nn.Module, small: nn.Module, inputs: Tensor, batch: int, folder: Path) -> dict[str, Any]:
    """Write `model.onnx` and `model.pt2`, and measure both models; what cannot be exported becomes a note.

    Args:
        dense, small: on the CPU, in one memory layout.
        inputs: an example input, (1, c, h, w).
        batch: images per timed pass.
        folder: where the files go.
    Returns:
        plain JSON: sizes in bytes and latencies, each as [before, after], and notes.
    """
    found: dict[str, Any] = {"notes": []}
    images, home = timed_images(inputs, batch), device()
    try:
        pair = {"before": dense.to(home), "after": small.to(home)}
        timed = compare_latency(pair, images.to(home), repeats=_REPEATS)
    finally:
        dense.cpu(), small.cpu()
    found["latency_pytorch"] = [timed["before"].to_json(), timed["after"].to_json()]
    with tempfile.TemporaryDirectory() as temporary:
        before = Path(temporary) / "dense.safetensors"
        save(dense, before)
        found["weights_bytes"] = [before.stat().st_size, (folder / "model.safetensors").stat().st_size]
        try:
            old = export_onnx(dense, images, Path(temporary) / "dense.onnx")
            new = export_onnx(small, images, folder / "model.onnx")
            runners = {"before": onnx_runner(old.path), "after": onnx_runner(new.path)}
            timed = compare_latency(runners, images, repeats=_REPEATS)
            found["latency_onnxruntime"] = [timed["before"].to_json(), timed["after"].to_json()]
            found["onnx_bytes"] = [old.file_bytes, new.file_bytes]
            if new.static_because:
                found["notes"].append(f"The ONNX file takes a batch of {batch} only: {new.static_because}.")
        except ExportError as error:
            found["notes"].append(f"No ONNX file: {error}")
    try:
        export_program(small, images, folder / "model.pt2")
    except ExportError as error:
        found["notes"].append(f"No exported program: {error}")
    return found


def tested(what: str, model: nn.Module, data: Dataset, folder: RunFolder, watch: Watch) -> None:
    """Measure a model's accuracy, unless that is known, and tell it."""
    name = f"accuracy of the {what}"
    if name not in folder.known:
        with watch.doing(f"Measuring the {what} on {len(data.test):,} images"):
            folder.once(name, lambda: measure(model, data).accuracy)
        watch.tell(f"Accuracy of the {what}: {100 * folder.known[name]:.2f} %")


def training_costs(
    dense: nn.Module,
    small: nn.Module,
    data: Dataset,
    how: TrainConfig,
    folder: RunFolder,
    watch: Watch,
    holding: Holding | None = None,
) -> None:
    """Measure what a step of training costs the dense and the pruned model; `training_pair` reads it.

    Args:
        dense, small: on the CPU; only read.
        how: batch size and memory layout; the steps are in float32.
        holding: what a masked model trains in.
    """

    def compute() -> list[dict[str, Any]]:
        home = device()
        batches = Batches(
            data.train,
            batch_size=min(how.batch_size, len(data.train)),
            normalisation=data.normalisation,
            device=home,
            channels_last=how.channels_last,
        )
        layout = torch.channels_last if how.channels_last else torch.contiguous_format
        models = {
            name: copy.deepcopy(model).to(device=home, memory_format=layout)  # type: ignore[call-overload]
            for name, model in (("dense", dense), ("small", small))
        }
        found = compare_training(
            models, next(iter(batches)), holding={"small": holding} if holding else {}, steps=3
        )
        return [asdict(found[name]) for name in ("dense", "small")]

    if "training cost" not in folder.known:
        with watch.doing("Measuring what a step of training costs"):
            folder.once("training cost", compute)


def training_pair(folder: RunFolder) -> TrainingPair | None:
    """What `training_costs` measured in this run."""
    found = folder.known.get("training cost")
    return TrainingPair(*(TrainingCost(**one) for one in found)) if found else None


@dataclass(frozen=True)
class Counts:
    """MACs of one image, and parameters: before, after."""

    macs: tuple[int, int]
    params: tuple[int, int]


def counted(graph: Graph, small: nn.Module) -> Counts:
    """The costs of a model that came without a plan; weights that are zero do not count as parameters.

    Args:
        graph: of the original.
        small: what was made of it.
    """
    before, after = Cost(graph), Cost(analyze(small, graph.inputs))
    zeros = sum(int((p == 0).sum()) for p in small.parameters() if p.ndim > 1)
    return Counts((before.macs(), after.macs()), (before.params(), after.params() - zeros))


def compose(
    config: PruneConfig,
    subject: Subject,
    graph: Graph,
    plan: Plan | None,
    pair: tuple[nn.Module, nn.Module],
    counts: Counts,
    folder: RunFolder,
    exported: dict[str, Any],
    method: StructuredMethod | None = None,
) -> Report:
    """The report of a finished run.

    Args:
        graph: of the first model of the pair.
        plan: None if it is not known.
        pair: with the widths before and after.
        method: what pruned the model while it was trained.
    """
    whole, small = pair
    cut = folder.known["cut"]
    verification = Verification(**cut["verification"]) if cut["verification"] else None
    accuracy = {
        name: folder.known.get(f"accuracy of the {name} model") for name in ("dense", "cut", "pruned")
    }
    last = folder.known.get("accuracy of the fine-tuned model", accuracy["cut"])
    weights, onnx = exported.get("weights_bytes", (None, None)), exported.get("onnx_bytes", (None, None))
    return Report(
        model=config.task.model,
        dataset=config.task.data,
        method=described(config),
        budget=config.budget(graph).given,
        seed=config.task.seed,
        command=folder.command,
        macs_before=counts.macs[0],
        macs_after=counts.macs[1],
        params_before=counts.params[0],
        params_after=counts.params[1],
        accuracy_before=accuracy["dense"],
        accuracy_cut=accuracy["cut"],
        accuracy_after=last if accuracy["pruned"] is None else accuracy["pruned"],
        verify_max_abs_error=verification.max_abs_error if verification else None,
        verify_rel_error_float32=verification.max_rel_error_float32 if verification else None,
        verify_rel_error_float64=verification.max_rel_error if verification else None,
        latency_pytorch=pair_of(exported.get("latency_pytorch")),
        latency_onnxruntime=pair_of(exported.get("latency_onnxruntime")),
        training_cost=training_pair(folder),
        weights_bytes_before=weights[0],
        weights_bytes_after=weights[1],
        onnx_bytes_before=onnx[0],
        onnx_bytes_after=onnx[1],
        widths=_widths(graph, whole, small),
        groups=[
            Group(group.name, mask.tolist(), _numbers(cut["scores"].get(group.name)))
            for group, mask in zip(graph.groups, plan.masks(graph), strict=True)
        ]
        if plan
        else [],
        frozen=_frozen(graph, Cost(graph), whole),
        notes=[
            *subject.notes,
            *_notes(config, graph, verification),
            *_excess(config, graph, counts, exported),
            *_taken(accuracy["cut"], last, len(subject.data.test)),
            *exported["notes"],
        ],
        history=folder.metrics(),
        course=method.curves if method else (),
        decays=method.endings() if method else (),
        release_above=_release_above(config),
        versions=current_versions(device()),
    )


def _release_above(config: PruneConfig) -> dict[str, float]:
    rectify = Rectify()
    return {"rate": rectify.rate, "length": rectify.length} if config.rectify else {}


def _numbers(scores: list[float | None] | None) -> list[float] | None:
    """Scores from plain JSON, where those that are not finite are None."""
    return None if scores is None else [math.nan if score is None else score for score in scores]


def described(config: PruneConfig) -> str:
    """The method with what was set about it."""
    if config.masks and method_named(config.method).when == "after":
        allocation = "rd" if config.method == "rd" else config.allocation
        return f"single weights, {allocation}, compensation {config.compensation}"
    if config.method == "oneshot":
        return f"oneshot, {config.score}, {config.allocation}"
    masks = [f"masks of {config.unit}"] if config.masks else []
    parts = [config.method, *masks, *(f"{name} {value}" for name, value in config.options.items())]
    if config.decay > 1:
        parts.append(f"decay over {config.decay} steps" + (", rectified" if config.rectify else ""))
    return ", ".join(parts)


def pair_of(measured: list[dict[str, Any]] | None) -> LatencyPair | None:
    """Both measurements, from plain JSON."""
    return LatencyPair(*(Latency(**one) for one in measured)) if measured else None


def width_of(layer: nn.Module) -> int | None:
    """Output channels or features of a layer that has a number for them."""
    for name in ("out_channels", "out_features"):
        if isinstance(width := getattr(layer, name, None), int):
            return width
    return None


def _widths(graph: Graph, dense: nn.Module, small: nn.Module) -> list[Width]:
    makers = {m.module for group in graph.groups for m in group.members if m.role in ("out", "depthwise")}
    after = dict(small.named_modules())
    widths = []
    for name, layer in dense.named_modules():
        old, new = width_of(layer), width_of(after[name]) if name in after else None
        if name in makers and old is not None and new is not None:
            widths.append(Width(name, old, new))
    return widths


def _frozen(graph: Graph, cost: Cost, dense: nn.Module) -> list[FrozenGroup]:
    """What stays; of a layer that is frozen in part, its share of the layer's costs."""
    macs, layers = cost.layers(), dict(dense.named_modules())
    rows = []
    for item in graph.frozen:
        layer = layers[item.name]
        width = width_of(layer) or item.units
        share = item.units / width
        name = item.name if share == 1 else f"{item.name} ({item.units} of {width} channels)"
        params = sum(p.numel() for p in layer.parameters(recurse=False))
        rows.append(
            FrozenGroup(name, item.reason, round(share * params), round(share * macs.get(item.name, 0)))
        )
    return rows


def _excess(config: PruneConfig, graph: Graph, counts: Counts, exported: dict[str, Any]) -> list[str]:
    """What is kept beyond the budget: by a method of the user's own, or by the clock."""
    kept = {"macs": (counts.macs, "MACs"), "params": (counts.params, "parameters")}
    notes = []
    for name, bound in config.budget(graph).given.items():
        if name in kept and (share := kept[name][0][1] / kept[name][0][0]) > bound:
            notes.append(
                f"The budget is not met: {share:.4f} of the {kept[name][1]} stay, {bound:g} were asked for."
            )
    timed = exported.get("latency_pytorch")
    if config.latency_ms is not None and timed and (last := timed[1]["median_ms"]) > config.latency_ms:
        notes.append(
            f"When the result was timed again, a pass took {last:.3g} ms; {config.latency_ms:g} ms were asked for."
        )
    return notes


def _taken(cut: float | None, last: float | None, images: int) -> list[str]:
    """What to say where training on took more from the cut model than the choice of test images explains.

    >>> _taken(0.9066, 0.8897, 10_000)[0][:46]
    'Fine-tuning took 1.7 points from what the cut '
    >>> _taken(0.9066, 0.9020, 10_000)
    []
    """
    if cut is None or last is None or cut - last <= 2 * math.sqrt(2 * cut * (1 - cut) / images):
        return []
    return [
        f"Fine-tuning took {100 * (cut - last):.1f} points from what the cut had left; that model is in "
        f"cut.safetensors. A lower learning rate or more training images may keep them."
    ]


def _notes(config: PruneConfig, graph: Graph, verification: Verification | None) -> list[str]:
    notes = []
    when = method_named(config.method).when
    during = when == "during"
    if during and config.task.weights is None:
        notes.append("The model was trained from scratch, and pruned meanwhile.")
    elif when == "before" and config.finetune is not None:
        notes.append("The model was cut before training, drawn afresh, and trained once.")
    elif config.task.weights is None and config.train is None:
        notes.append("No weights were given: the model was pruned as initialised at random.")
    if config.finetune is None and when == "after":
        notes.append("The cut model was not fine-tuned.")
    elif config.finetune is not None and config.finetune.distill_weight:
        notes.append("The dense model taught the cut one while it was fine-tuned.")
    if verification is None:
        notes.append(
            "The method does not say which units went, so there is nothing to compare the model with."
        )
        return notes
    if verification.rewritten:
        notes.append(f"The model's own forward cannot express the new widths: {verification.form}.")
    if verification.statistics:
        shown = ", ".join(verification.statistics[:3]) + (", …" if len(verification.statistics) > 3 else "")
        notes.append(
            f"Statistics change: {len(verification.statistics)} operators take them over channels of which some are "
            f"gone ({shown}), so the reference takes them over the channels that are left."
        )
    if verification.randomised:
        notes.append(
            "The model's answers hardly depend on its input, so cut and masked model were also compared with "
            "random weights."
        )
    if graph.unused:
        shown = ", ".join(graph.unused[:3]) + (", …" if len(graph.unused) > 3 else "")
        notes.append(f"No forward pass reads these parameters, which were left alone: {shown}.")
    return notes
