"""Training schedules by name, the same for every method of a comparison."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.recipes.train_config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """How long and how to train, from scratch or on from weights.

    Args:
        summary: one line for lists of choices.
        train_images: of the training set, balanced over the classes; None: all.
        epochs: of the whole training, whatever the method does with them.
        tune_epochs: where trained weights are given.
        lr, tune_lr: the peak learning rates of both.
        schedule: of the learning rate.
        weight_decay, batch_size, test_every: as in `TrainConfig`.
        dense_share: share of the epochs that a method which prunes trained models trains the dense one.
        more: other settings of `TrainConfig`.
    """

    summary: str
    train_images: int | None
    epochs: int
    tune_epochs: int
    lr: float = 0.1
    tune_lr: float = 0.02
    schedule: str = "one-cycle"
    weight_decay: float = 5e-4
    batch_size: int = 128
    test_every: int = 1
    dense_share: float = 0.5
    more: Mapping[str, Any] = field(default_factory=dict)

    def make_config(self, *, epochs: int | None = None, tune: bool = False, **changes: Any) -> TrainConfig:
        """Settings for training from scratch, or for training on."""
        settings: dict[str, Any] = {
            "epochs": epochs or (self.tune_epochs if tune else self.epochs),
            "lr": self.tune_lr if tune else self.lr,
            "schedule": self.schedule,
            "weight_decay": self.weight_decay,
            "batch_size": self.batch_size,
            "test_every": self.test_every,
            **self.more,
        }
        return TrainConfig(**settings | changes)


SCHEDULES = {
    "tiny": Schedule("for trying things out: 1,000 images, 2 epochs", 1000, 2, 2, batch_size=50),
    "short": Schedule("for CPUs: 12,800 images, 10 epochs of 100 steps", 12_800, 10, 5, test_every=5),
    "cpu": Schedule(
        "for two CPU cores: all images, 24 epochs, smaller images at first, tested at the end",
        None,
        24,
        12,
        lr=0.2,
        tune_lr=0.02,
        test_every=24,
        more={"initial_size": 0.5, "alternate_flips": True, "ema": 0.998},
    ),
    "standard": Schedule("for one GPU: all images, 40 epochs", None, 40, 20),
    "paper": Schedule(
        "as papers train CIFAR networks: all images, 200 epochs",
        None,
        200,
        100,
        tune_lr=0.01,
        schedule="cosine",
    ),
    "imagenet": Schedule(
        "as papers train ImageNet networks: all images, 90 epochs",
        None,
        90,
        30,
        tune_lr=0.01,
        schedule="cosine",
        weight_decay=1e-4,
        batch_size=256,
    ),
}
"""A short schedule ranks methods; it does not reproduce a paper."""
