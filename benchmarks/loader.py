"""Is the model the bottleneck, or the loader? Time both on ResNet-20, side by side in one run.

    python benchmarks/loader.py [--device cuda] [--batch-size 128] [--steps 20]

Prints a Markdown table: the share of a training epoch that is spent in the loader, and images per second of
the loader alone and of training. Images are random; their content does not change the time.
"""

import argparse
import platform
import time

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.recipes.data import Batches, Normalisation, Split
from secateur.recipes.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    device = torch.device(options.device)

    print("| device | threads | batch | loader ms | step ms | loader share | loader img/s | training img/s |")
    print("|---|---|---|---|---|---|---|---|")
    for channels_last in (False, True):
        loader, step = measure(device, options.batch_size, options.steps, channels_last)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        share = loader / (loader + step)
        print(
            f"| {name}{', channels last' if channels_last else ''} | {torch.get_num_threads()} "
            f"| {options.batch_size} | {1e3 * loader:.2f} | {1e3 * step:.1f} | {share:.1%} "
            f"| {options.batch_size / loader:,.0f} | {options.batch_size / (loader + step):,.0f} |"
        )


def measure(device: torch.device, batch_size: int, steps: int, channels_last: bool) -> tuple[float, float]:
    """Median seconds that one batch takes in the loader, and in forward, backward and update."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.randint(0, 10, (50_000,), generator=generator))
    batches = Batches(
        split,
        batch_size=batch_size,
        normalisation=Normalisation((0.5,) * 3, (0.25,) * 3),
        augment="shift+flip",
        shuffle=True,
        drop_last=True,
        device=device,
        channels_last=channels_last,
    ).epoch(0)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model = build_model("resnet20").to(device, memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train(x: Tensor, y: Tensor) -> None:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    warm_up = 5
    loading, training = [], []
    for _ in range(warm_up + steps):
        start = now(device)
        x, y = next(batches)
        loaded = now(device)
        train(x, y)
        loading.append(loaded - start)
        training.append(now(device) - loaded)
    return median(loading[warm_up:]), median(training[warm_up:])


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


if __name__ == "__main__":
    main()
