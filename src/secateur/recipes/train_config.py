"""How to train, as data; and the learning rate of each step, in closed form."""

import math
from typing import Any, ClassVar, Literal, Self

from secateur.errors import SecateurError, TrainingError
from secateur.settings import option, settings


@settings
class TrainConfig:
    """How to train. The defaults train a CIFAR network from scratch; `finetune` is for a cut one.

    Initial weights are the model's own. With `ema`, early on the decay is (1 + step) / (10 + step), so that the start
    is forgotten.

    Source: one-cycle is Smith & Topin 2017, arXiv:1708.07120; distillation Hinton et al. 2015, arXiv:1503.02531;
        alternating flips Jordan 2024, arXiv:2404.00498.
    Raises:
        TrainingError: a value is out of range.

    >>> TrainConfig(epochs=3, lr=-1)
    Traceback (most recent call last):
    secateur.errors.TrainingError: TrainConfig: lr is -1; expected a number above 0
    """

    error: ClassVar[type[SecateurError]] = TrainingError

    epochs: int = option("passes over the training images", least=1)
    batch_size: int = option("images per step, over all processes together", default=128, least=1)
    optimizer: Literal["sgd", "adamw"] = option("SGD with momentum, or AdamW", default="sgd")
    lr: float = option("peak learning rate", default=0.1, above=0)
    momentum: float = option("of SGD", default=0.9, least=0, below=1)
    nesterov: bool = option("look ahead along the momentum", default=True)
    weight_decay: float = option(
        "weight decay, on weights of convolutions and linear layers", default=5e-4, least=0
    )
    decay_all: bool = option("weight decay on biases and the parameters of norms as well", default=False)
    schedule: Literal["cosine", "steps", "one-cycle", "constant"] = option(
        "of the learning rate", default="cosine"
    )
    warmup_epochs: float = option("linear rise at the start, not with one-cycle", default=0.0, least=0)
    milestones: tuple[float, ...] = option(
        "of the schedule steps, as fractions of the epochs", default=(0.5, 0.75), above=0, below=1
    )
    step_factor: float = option("of the learning rate at each milestone", default=0.1, above=0)
    label_smoothing: float = option(
        "share of the target spread evenly over all classes", default=0.0, least=0, below=1
    )
    distill_weight: float = option(
        "share of the loss that is distance to a teacher", default=0.0, least=0, most=1, flag="--distill"
    )
    distill_temperature: float = option("softens both distributions", default=4.0, above=0)
    precision: Literal["no", "bf16"] = option("float32, or bfloat16 where torch deems it safe", default="no")
    compile: bool = option(
        "run the steps in which no method prunes through torch.compile; benchmarks/epoch.py tells if it pays",
        default=False,
    )
    channels_last: bool = option(
        "lay images and weights out as n h w c, which is faster on most devices", default=True
    )
    ema: float | None = option(
        "decay of a moving average of the weights, such as 0.999, which then is the result",
        default=None,
        least=0,
        below=1,
    )
    clip_norm: float | None = option("largest norm of the gradient", default=None, above=0)
    initial_size: float = option(
        "progressive resizing: side of the images at first, as a share, or the least that the model takes; it is whole "
        "from half of the steps on",
        default=1.0,
        above=0,
        most=1,
    )
    alternate_flips: bool = option(
        "where images are mirrored, mirror each in every second epoch, and not by chance", default=False
    )
    seed: int = option("of order, augmentation and dropout", default=0, least=0)
    test_every: int = option(
        "epochs between looks at the test images; the last is always tested", default=1, least=1
    )
    checkpoint_every: int = option("steps between checkpoints", default=500, least=1)

    def check(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise TrainingError("TrainConfig: nesterov is True; expected False where momentum is 0")
        if self.warmup_epochs >= self.epochs:
            raise TrainingError(
                f"TrainConfig: warmup_epochs is {self.warmup_epochs}; expected 0 <= warmup_epochs < epochs "
                f"({self.epochs})"
            )
        if self.schedule == "one-cycle" and self.warmup_epochs:
            raise TrainingError(
                f"TrainConfig: warmup_epochs is {self.warmup_epochs} with schedule 'one-cycle', which rises "
                f"by itself; set warmup_epochs to 0"
            )

    @classmethod
    def finetune(cls, epochs: int, **changes: Any) -> Self:
        """Settings that let a cut network recover: a tenth of the learning rate, after a short warm-up.

        >>> TrainConfig.finetune(10, seed=3).lr
        0.01
        """
        return cls(**{"epochs": epochs, "lr": 0.01, "warmup_epochs": min(0.5, epochs / 10), **changes})


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of one step, in closed form.

    Args:
        config: what to follow.
        step: which step, from 0.
        steps: how many the run has.
    Differs: one-cycle moves the learning rate only, not the momentum (as PyTorch's OneCycleLR with
        `cycle_momentum=False`).

    >>> [round(learning_rate(TrainConfig(epochs=4, lr=1.0), step, 4), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    warmup = round(config.warmup_epochs / config.epochs * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "cosine":
        return _cosine(config.lr, 0.0, (step - warmup) / (steps - warmup))
    if config.schedule == "steps":
        return config.lr * config.step_factor ** sum(step >= m * steps for m in config.milestones)
    if config.schedule == "one-cycle":
        start, peak, last = config.lr / 25, 0.3 * steps - 1, steps - 1
        if step <= peak:
            return _cosine(start, config.lr, step / peak)
        return _cosine(config.lr, start / 1e4, (step - peak) / (last - peak))
    return config.lr


def image_side(config: TrainConfig, step: int, steps: int, side: int) -> int:
    """The side of the images in one step, in pixels: a multiple of 4 until it is whole.

    Args:
        config: says how small they are at first.
        step: which step, from 0.
        steps: how many the run has.
        side: of the images as they are.

    >>> [image_side(TrainConfig(epochs=8, initial_size=0.5), step, 8, 32) for step in range(8)]
    [16, 20, 24, 28, 32, 32, 32, 32]
    """
    share = min(1.0, config.initial_size + (1 - config.initial_size) * 2 * step / steps)
    return side if share == 1 else min(side, max(4, 4 * round(share * side / 4)))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
