"""What is measured on the models of a run: accuracy, latency, exported files, the cost of a training step."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cost.latency import Latency, LatencyPair, compare_pair
from secateur.cost.layers import time_layers
from secateur.cost.training import Holding, TrainingCost, compare_training
from secateur.errors import ExportError
from secateur.export import export_onnx, export_program, onnx_runner
from secateur.graph.duplicate import duplicate
from secateur.methods.latency import Clock, here
from secateur.recipes.data import Batches, Dataset
from secateur.recipes.train_config import TrainConfig
from secateur.report import TrainingPair
from secateur.runs.folder import RunFolder, Watch
from secateur.runs.task import device, evaluate_once
from secateur.surgery import save


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


def export_and_time(
    dense: nn.Module,
    small: nn.Module,
    inputs: Tensor,
    batch: int,
    folder: Path,
    *,
    exports: bool = True,
    latency: bool = True,
) -> dict[str, Any]:
    """Write `model.onnx` and `model.pt2`, and measure both models; what cannot be exported becomes a note.

    Args:
        dense, small: on the CPU, in one memory layout.
        inputs: an example input, (1, c, h, w).
        batch: images per timed pass.
        folder: where the files go.
        exports: whether to write them; without, latency is measured in PyTorch only.
        latency: whether to measure it; without, the dense model is not exported.
    Returns:
        plain JSON: sizes in bytes as [before, after], latencies as [before, after, spread]; times of layers; and notes.
    """
    found: dict[str, Any] = {"notes": []}
    images, home = timed_images(inputs, batch), device()
    if latency:
        try:
            pair = compare_pair(dense.to(home), small.to(home), images.to(home))
            layers = time_layers({"before": dense, "after": small}, images.to(home))
        finally:
            dense.cpu(), small.cpu()
        found["layers"] = {name: [asdict(row) for row in rows] for name, rows in layers.items()}
        found["latency_pytorch"] = measured_json(pair)
    if not exports:
        return found
    with tempfile.TemporaryDirectory() as temporary:
        before = Path(temporary) / "dense.safetensors"
        save(dense, before)
        found["weights_bytes"] = [before.stat().st_size, (folder / "model.safetensors").stat().st_size]
        try:
            new = export_onnx(small, images, folder / "model.onnx")
            found["onnx_bytes"] = [None, new.file_bytes]
            if latency:
                old = export_onnx(dense, images, Path(temporary) / "dense.onnx")
                pair = compare_pair(onnx_runner(old.path), onnx_runner(new.path), images)
                found["latency_onnxruntime"] = measured_json(pair)
                found["onnx_bytes"][0] = old.file_bytes
            if new.static_because:
                found["notes"].append(f"The ONNX file takes a batch of {batch} only: {new.static_because}.")
        except ExportError as error:
            found["notes"].append(f"No ONNX file: {error}")
    try:
        export_program(small, images, folder / "model.pt2")
    except ExportError as error:
        found["notes"].append(f"No exported program: {error}")
    return found


def measure_accuracy(what: str, model: nn.Module, data: Dataset, folder: RunFolder, watch: Watch) -> None:
    """Measure a model's accuracy, unless that is known, and tell it."""
    name = f"accuracy of the {what}"
    if name not in folder.known:
        with watch.doing(f"Measuring the {what} on {len(data.test):,} images"):
            folder.once(name, lambda: _accuracy(what, model, data, folder))
        watch.tell(f"Accuracy of the {what}: {100 * folder.known[name]:.2f} %")


def _accuracy(what: str, model: nn.Module, data: Dataset, folder: RunFolder) -> float:
    """Evaluate a model, and keep its answers for `tell_answers`."""
    found = evaluate_once(model, data)
    confidences = [round(value, 4) for value in found.confidences.tolist()]
    folder.once(
        f"answers of the {what}", lambda: {"answers": found.answers.tolist(), "confidences": confidences}
    )
    return found.accuracy


def measure_training(
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
            name: duplicate(model).to(device=home, memory_format=layout)  # type: ignore[call-overload]
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


def measured_json(pair: LatencyPair) -> list[Any]:
    """Both measurements and the spread, as plain JSON."""
    return [pair.before.to_json(), pair.after.to_json(), pair.spread]


def pair_of(measured: list[Any] | None) -> LatencyPair | None:
    """The same from plain JSON; older files say no spread."""
    if not measured:
        return None
    before, after, *spread = measured
    return LatencyPair(Latency(**before), Latency(**after), *spread)
