"""Is the model the bottleneck, or the loader? Both timed side by side in one run, from memory and from files.

    python benchmarks/loader.py [--device cuda] [--batch-size 128] [--steps 20] [--out docs/results/loader.md]

ResNet-20 on images of 32 pixels in memory, and ResNet-18 on JPEG files of 500 × 375 pixels that are cropped to 224.
Images are random (files: smooth, about as large as ImageNet's); their content does not change the time.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secateur.cost.latency import device_name
from secateur.recipes.data import Batches, Normalisation, Split, load_data
from secateur.recipes.models import build_model

WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    for channels_last in (False, True):
        batches = from_memory(device, options.batch_size, channels_last)
        layout = "channels last" if channels_last else "contiguous"
        rows.append(
            (
                f"memory, {layout}",
                options.batch_size,
                *measure(batches, build_model("resnet20"), options.steps),
            )
        )
    with tempfile.TemporaryDirectory() as folder:
        small = max(1, options.batch_size // 8)
        write_images(Path(folder), small * 8)
        batches = from_files(Path(folder), device, small)
        rows.append(
            (
                "files, 224 pixels",
                small,
                *measure(batches, build_model("torchvision/resnet18"), options.steps),
            )
        )
    text = render(rows, device)
    print(text)
    if options.out:
        options.out.write_text(text)


def from_memory(device: torch.device, batch_size: int, channels_last: bool) -> Batches:
    """Augmented images of CIFAR's size."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batches(
        Split(images, torch.randint(0, 10, (50_000,), generator=generator)),
        batch_size=batch_size,
        normalisation=Normalisation((0.5,) * 3, (0.25,) * 3),
        augment="shift+flip",
        shuffle=True,
        drop_last=True,
        device=device,
        channels_last=channels_last,
    )


def write_images(folder: Path, count: int) -> None:
    """JPEG files of two classes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        home = folder / "train" / f"class{number % 2}"
        home.mkdir(parents=True, exist_ok=True)
        rough = generator.integers(0, 256, (94, 125, 3), dtype=np.uint8)
        smooth = Image.fromarray(rough).resize((500, 375), Image.Resampling.BICUBIC)
        smooth.save(home / f"{number}.jpg", quality=90)


def from_files(folder: Path, device: torch.device, batch_size: int) -> Batches:
    """Random crops out of files."""
    data = load_data("imagefolder", folder)
    return Batches(
        data.train,
        batch_size=batch_size,
        normalisation=data.normalisation,
        augment=data.augment,
        shuffle=True,
        drop_last=True,
        device=device,
        channels_last=True,
    )


def measure(batches: Batches, model: nn.Module, steps: int) -> tuple[float, float, float]:
    """Seconds per batch: of the loader on its own, that a training step waits for it, and of the step."""
    memory_format = batches.memory_format
    model = model.to(batches.device, memory_format=memory_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(x: Tensor, y: Tensor) -> None:
        cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    source = endless(batches)
    for _ in range(WARM_UP):
        next(source)
    start = now(batches.device)
    for _ in range(steps):
        next(source)
    alone = (now(batches.device) - start) / steps
    waiting, training = [], []
    for _ in range(WARM_UP + steps):
        start = now(batches.device)
        x, y = next(source)
        loaded = now(batches.device)
        train(x, y)
        waiting.append(loaded - start)
        training.append(now(batches.device) - loaded)
    return alone, median(waiting[WARM_UP:]), median(training[WARM_UP:])


def endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def render(rows: list[tuple[str, int, float, float, float]], device: torch.device) -> str:
    lines = [
        "# The loader's share of training",
        "",
        "`python benchmarks/loader.py --out docs/results/loader.md`",
        "",
        "One training step (forward, backward, SGD) beside one augmented batch: ResNet-20 on images of 32 pixels in "
        "memory, ResNet-18",
        "on random crops of 224 pixels out of JPEG files of 500 × 375. Files are read in threads, a few batches ahead, "
        "on the processors",
        "that train; *waits* is what a step waits for its batch. Medians, "
        f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}.",
        "",
        "| images from | batch | step, ms | waits, ms | share | loader alone, images/s | training, images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, batch, alone, waits, step in rows:
        lines.append(
            f"| {name} | {batch} | {1e3 * step:.0f} | {1e3 * waits:.1f} | {waits / (waits + step):.1%} "
            f"| {batch / alone:,.0f} | {batch / (waits + step):,.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
