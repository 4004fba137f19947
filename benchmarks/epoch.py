"""Seconds per epoch of built-in models on images of CIFAR-10's size and number, on this machine.

    python benchmarks/epoch.py [--models resnet20 resnet56] [--images 50000] [--out docs/results/epoch.md]

Random images; their content does not change the time. Of three epochs the last counts; *start* is what the first took
more. An epoch is 128 images per step, augmentation and loss included, without the test.
"""

import argparse
import platform
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from secateur.cost.latency import device_name
from secateur.recipes.data import Dataset, Normalisation, Split
from secateur.recipes.models import build_model
from secateur.recipes.train import TrainConfig, fit

CLASSES = tuple("0123456789")
Precision = Literal["no", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("no", "bf16")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["resnet20", "resnet56"])
    parser.add_argument("--images", type=int, default=50_000, help="of an epoch")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = Dataset(
        name="noise",
        train=images(options.images),
        test=images(1),
        classes=CLASSES,
        normalisation=Normalisation((0.5,) * 3, (0.25,) * 3),
        augment="shift+flip",
    )
    rows = [
        row(model, data, precision, channels_last, compiled)
        for model in options.models
        for precision in PRECISIONS
        for channels_last, compiled in ((False, False), (True, False), (True, True))
    ]
    text = page(rows, options)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def images(count: int) -> Split:
    return Split(
        torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(len(CLASSES), (count,))
    )


def row(model: str, data: Dataset, precision: Precision, channels_last: bool, compiled: bool) -> str:
    seconds, rate, start = measure(build_model(model), data, precision, channels_last, compiled)
    settings = "float32" if precision == "no" else "bfloat16"
    settings += ", channels last" if channels_last else ", contiguous"
    settings += ", compiled" if compiled else ""
    return f"| {model} | {settings} | {seconds:.1f} | {rate:,.0f} | {start:.0f} |"


def measure(
    model: nn.Module, data: Dataset, precision: Precision, channels_last: bool, compiled: bool
) -> tuple[float, float, float]:
    """Seconds of the last of three epochs, its images per second, and the seconds that the first took more."""
    config = TrainConfig(
        epochs=3, lr=0.01, precision=precision, channels_last=channels_last, compile=compiled, test_every=3
    )
    with tempfile.TemporaryDirectory() as folder:
        first, *_, last = fit(model, data, config, folder, progress=False).history
    seconds = [len(data.train) / epoch.images_per_second for epoch in (first, last)]
    return seconds[1], last.images_per_second, seconds[0] - seconds[1]


def page(rows: list[str], options: argparse.Namespace) -> str:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    command = f"--models {' '.join(options.models)} --images {options.images} --out docs/results/epoch.md"
    return "\n".join(
        [
            "# Seconds per epoch",
            "",
            f"`python benchmarks/epoch.py {command}`",
            "",
            f"Epochs of {options.images:,} images of 32 × 32 pixels, 128 per step, augmentation and loss included,",
            "without the test; the last of three, one run. *Start* is what the first took more.",
            f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
            f"{platform.python_version()}.",
            "",
            "| model | settings | s per epoch | images/s | start, s |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
