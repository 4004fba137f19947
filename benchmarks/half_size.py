"""CIFAR-10 at 16 × 16 pixels: a third of the training time, for what needs many trainings.

Use it as a data set: data = "benchmarks/half_size.py:cifar10".
"""

from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from secateur.recipes.data import Dataset, Split, load_data


def cifar10(folder: str | Path) -> Dataset:
    """CIFAR-10, each pixel the mean of four."""
    data = load_data("cifar10", folder)
    return replace(data, name="cifar10 at 16 px", train=_halved(data.train), test=_halved(data.test))


def _halved(split: Split) -> Split:
    images = split.images
    assert isinstance(images, Tensor)
    return Split(F.avg_pool2d(images.float(), 2).round().to(images.dtype), split.labels)
