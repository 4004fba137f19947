"""How to train, as data; and the learning rate of each step, in closed form."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

from secateur.errors import TrainingError, unknown


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults train a CIFAR network from scratch; `finetune` is for a cut one.

    Args:
        epochs: passes over the training images.
        batch_size: images per step, over all processes together.
        optimizer: "sgd" (with momentum) or "adamw".
        lr: the highest learning rate.
        momentum: of SGD, 0..1.
        nesterov: look ahead along the momentum.
        weight_decay: pull towards zero; on convolution and linear weights only, unless `decay_all`.
        decay_all: decay biases and the parameters of norms as well.
        schedule: "cosine" to zero; "steps", times `step_factor` at each of `milestones`; "one-cycle", up over
            30 % of the run and down again (Smith & Topin 2017, arXiv:1708.07120); or "constant".
        warmup_epochs: linear rise at the start; a fraction is fine. Not with "one-cycle", which rises itself.
        milestones: of "steps", as fractions of the epochs.
        step_factor: of "steps".
        label_smoothing: share of the target spread evenly over all classes, 0..1.
        distill_weight: share of the loss that is distance to a teacher, 0..1 (0: no teacher).
        distill_temperature: softens both distributions (Hinton et al. 2015, arXiv:1503.02531).
        precision: "no" is float32; "bf16" computes in bfloat16 where torch deems it safe.
        compile: run the steps in which no method prunes through `torch.compile`, on one process. It costs a
            minute or more at the start and changes results by rounding; benchmarks/epoch.py tells if it pays.
        channels_last: lay images and weights out as n h w c, which is faster on most devices.
        ema: decay of a moving average of the weights, which then is what is tested and returned; None: off.
            Early on the decay is (1 + step) / (10 + step), so that the start is forgotten.
        clip_norm: largest norm of the gradient; None: unbounded.
        seed: of order, augmentation and dropout. Initial weights are the model's own.
        test_every: epochs between looks at the test images; the last epoch is always tested.
        checkpoint_every: steps between checkpoints; there is one at the start and one at the end.
    Raises:
        TrainingError: a value is out of range.

    >>> TrainConfig(epochs=3, lr=-1)
    Traceback (most recent call last):
    secateur.errors.TrainingError: TrainConfig: lr is -1; expected a number above 0
    """

    epochs: int
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_all: bool = False
    schedule: Literal["cosine", "steps", "one-cycle", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    step_factor: float = 0.1
    label_smoothing: float = 0.0
    distill_weight: float = 0.0
    distill_temperature: float = 4.0
    precision: Literal["no", "bf16"] = "no"
    compile: bool = False
    channels_last: bool = True
    ema: float | None = None
    clip_norm: float | None = None
    seed: int = 0
    test_every: int = 1
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))  # a list, when it comes from JSON
        for name, choices in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("cosine", "steps", "one-cycle", "constant")),
            ("precision", ("no", "bf16")),
        ):
            if (value := getattr(self, name)) not in choices:
                raise TrainingError(f"TrainConfig: {unknown(name, str(value), choices)}")
        numbers: dict[str, tuple[Callable[[Any], bool], str]] = {
            "epochs": (lambda v: isinstance(v, int) and v >= 1, "a whole number, at least 1"),
            "batch_size": (lambda v: isinstance(v, int) and v >= 1, "a whole number, at least 1"),
            "lr": (lambda v: 0 < v < math.inf, "a number above 0"),
            "momentum": (lambda v: 0 <= v < 1, "0 <= momentum < 1"),
            "nesterov": (lambda v: not v or self.momentum > 0, "False where momentum is 0"),
            "weight_decay": (lambda v: 0 <= v < math.inf, "a number, at least 0"),
            "warmup_epochs": (lambda v: 0 <= v < self.epochs, f"0 <= warmup_epochs < epochs ({self.epochs})"),
            "milestones": (
                lambda v: all(0 < m < 1 for m in v),
                "fractions of the run, each above 0, below 1",
            ),
            "step_factor": (lambda v: 0 < v < math.inf, "a number above 0"),
            "label_smoothing": (lambda v: 0 <= v < 1, "0 <= label_smoothing < 1"),
            "distill_weight": (lambda v: 0 <= v <= 1, "0 <= distill_weight <= 1"),
            "distill_temperature": (lambda v: 0 < v < math.inf, "a number above 0"),
            "ema": (lambda v: v is None or 0 <= v < 1, "None or 0 <= ema < 1"),
            "clip_norm": (lambda v: v is None or v > 0, "None or a number above 0"),
            "seed": (lambda v: isinstance(v, int) and v >= 0, "a whole number, at least 0"),
            "test_every": (lambda v: isinstance(v, int) and v >= 1, "a whole number, at least 1"),
            "checkpoint_every": (lambda v: isinstance(v, int) and v >= 1, "a whole number, at least 1"),
        }
        for name, (holds, expected) in numbers.items():
            value = getattr(self, name)
            try:
                fits = holds(value)
            except TypeError:
                fits = False
            if not fits:
                raise TrainingError(f"TrainConfig: {name} is {value!r}; expected {expected}")
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


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
