"""Pruning, quantisation and both: accuracy and milliseconds in onnxruntime.

    OMP_NUM_THREADS=1 python benchmarks/int8.py --model resnet20 --weights r20.safetensors --data cifar10 \\
        --data-dir DATA [--keep-macs 0.5] [--epochs 2] [--out docs/results/int8.md]

`auto` prunes, and the pruned network is trained on for some epochs if --epochs says so. Ranges are measured on
calibration images of the training set. The four files are timed in turn, in one loop; nothing else should run.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.cost.latency import compare_pairs, device_name
from secateur.export import export_onnx, onnx_runner
from secateur.int8 import export_int8
from secateur.recipes.data import Dataset
from secateur.recipes.train import TrainConfig, evaluate, fit
from secateur.runs.config import Task
from secateur.runs.task import load_task


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--keep-macs", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning after the cut")
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--ranges", default="minmax", choices=["minmax", "entropy", "percentile"])
    parser.add_argument("--out", type=Path, help="add the table to this Markdown file")
    options = parser.parse_args()
    task = load_task(
        Task(
            model=options.model,
            weights=options.weights,
            data=options.data,
            data_dir=options.data_dir,
            image_size=options.image_size,
            test_images=options.test_images,
        )
    )
    text = page(
        measure(task.model, task.data, task.batches(options.calibration_images), options), task, options
    )
    print(text)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            print(text, file=file)


def measure(model: nn.Module, data: Dataset, batches: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Name of the file -> its facts."""
    image = next(iter(batches))[0][:1]
    calibration = [x for x, _ in batches]
    started = time.process_time()
    pruned = sc.prune(model, image, budget=sc.Budget(macs=options.keep_macs), data=batches)
    seconds = time.process_time() - started
    small = pruned.model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.epochs:
            fit(small, data, TrainConfig.finetune(options.epochs), folder / "tune", progress=False)
        found, runners = {}, {}
        for kind, network in (("dense", model.eval()), ("pruned", small.eval())):
            whole, integers = folder / f"{kind}.onnx", folder / f"{kind}-int8.onnx"
            export_onnx(network, image, whole)
            export_int8(network, image, integers, calibration, ranges=options.ranges)
            for label, path in ((kind, whole), (f"{kind}, int8", integers)):
                runners[label] = onnx_runner(path, 1)
                found[label] = {"bytes": path.stat().st_size, "accuracy": accuracy(runners[label], data)}
        for batch in (1, 8):
            x = image.expand(batch, -1, -1, -1).contiguous()
            for label, pair in compare_pairs(runners["dense"], runners, x).items():
                found[label][batch] = pair
    return {"files": found, "seconds": seconds, "macs": pruned.after["macs"] / pruned.before["macs"]}


def accuracy(run: Callable[[Tensor], Any], data: Dataset) -> float:
    """On the test images, as `evaluate` measures it."""

    class Runs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = run(x)[0]
            return output

    return evaluate(Runs(), data).accuracy


def page(measured: dict[str, Any], task: Any, options: argparse.Namespace) -> str:
    lines = []
    for label, row in measured["files"].items():
        times = " | ".join(
            f"{row[batch].after.p10_ms:.3g} | {row[batch].speed_up:.2f} ± {row[batch].spread or 0:.2f}"
            for batch in (1, 8)
        )
        lines.append(f"| {label} | {100 * row['accuracy']:.2f} | {row['bytes'] / 1e3:,.0f} | {times} |")
    also = "".join(
        f" --{name.replace('_', '-')} {getattr(options, name)}"
        for name in ("image_size", "test_images")
        if getattr(options, name)
    )
    tuned = f", fine-tuned for {options.epochs} epochs" if options.epochs else ", no training after the cut"
    return "\n".join(
        [
            f"## {options.model} on {options.data}",
            "",
            f"`python benchmarks/int8.py --model {options.model} --weights {options.weights.name} "
            f"--data {options.data} "
            f"--keep-macs {options.keep_macs:g} --epochs {options.epochs} --calibration-images "
            f"{options.calibration_images} --ranges {options.ranges}{also}`",
            "",
            f"{measured['macs']:.1%} of the MACs are left{tuned}. Accuracy on {len(task.data.test):,} test images; "
            f"ranges from {options.calibration_images} training images. {device_name(torch.device('cpu'))}, "
            f"one thread, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}, "
            f"Python {platform.python_version()}.",
            "",
            "| file | accuracy, % | kB | ms, batch 1 | × | ms, batch 8 | × |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
