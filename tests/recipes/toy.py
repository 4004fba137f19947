"""A training that takes a moment: a toy network, toy images, settings, and what tests do to them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.recipes.data import Dataset, Normalisation, Split
from secateur.recipes.train import Epoch, TrainConfig


def toy_data() -> Dataset:
    """Three classes by the brightest channel; 71 images, so that the last batch of 16 has 7."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = torch.arange(count) % 3
        images = torch.randint(0, 160, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        images[torch.arange(count), labels] += 60
        return Split(images, labels)

    return Dataset(
        "toy", split(71), split(30), ("r", "g", "b"), Normalisation((0.4,) * 3, (0.25,) * 3), "shift+flip"
    )


def toy_model(dropout: float = 0.2, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(32, 3),
    )


CONFIG = TrainConfig(epochs=3, batch_size=16, lr=0.05, checkpoint_every=4)  # 5 steps per epoch

CONFIGS = {
    "sgd": CONFIG,
    "adamw, average": replace(CONFIG, optimizer="adamw", lr=0.01, ema=0.9, channels_last=False),
    "clip, one-cycle": replace(CONFIG, clip_norm=0.5, schedule="one-cycle", label_smoothing=0.1),
}


def before_step(model: nn.Module, step: int, act: Callable[[], None]) -> None:
    """Run `act` when the model is about to be trained on step `step` (from 0, counted from now)."""
    count = 0

    def hook(module: nn.Module, _: Any) -> None:
        nonlocal count
        if module.training:
            if count == step:
                act()
            count += 1

    model.register_forward_pre_hook(hook)


class Killed(Exception):
    pass


def kill() -> None:
    raise Killed


def timeless(history: tuple[Epoch, ...]) -> list[Epoch]:
    return [replace(epoch, seconds=0, images_per_second=0) for epoch in history]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def scalars(folder: Path, name: str) -> list[Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "train"))
    events.Reload()
    return events.Scalars(name)
