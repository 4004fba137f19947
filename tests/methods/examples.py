"""A task small enough to train in tests, and every training method with settings for it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur import Budget, analyze
from secateur.engine.decay import Decay, Restore
from secateur.engine.session import Session
from secateur.engine.training_method import TrainingMethod
from secateur.graph import Graph, Inputs
from secateur.methods.depgraph import DepGraph
from secateur.methods.gate_decorator import GateDecorator
from secateur.methods.gradual import Gradual
from secateur.methods.hesso import HESSO
from secateur.methods.lapp import LAPP
from secateur.methods.oto import OTO
from secateur.methods.paam import PAAM
from secateur.recipes.train import FitResult, TrainConfig, fit, training_steps
from tests.methods.halfway import Halfway
from tests.recipes.test_train import toy_data

CONFIG = TrainConfig(epochs=3, batch_size=16, lr=0.05, checkpoint_every=2)
INPUTS = torch.zeros(1, 3, 8, 8)


class Residual(nn.Module):
    """A stem, two residual blocks and a head; 8 × 8 images, three classes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


STEPS = training_steps(toy_data(), CONFIG)

Make = Callable[..., Session[Any]]
"""A model, and options that differ."""


def start(kind: type[TrainingMethod], options: dict[str, Any]) -> Make:
    """What starts a method of a kind; budget and steps are among the options here."""
    given = {"budget": Budget(macs=0.6), "steps": STEPS, "round_to": 1, **options}
    begin = {name: given.pop(name) for name in ("budget", "steps")}

    def make(model: nn.Module, **more: Any) -> Session[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.engine.method.analyze", analyze_once)
            return kind(**given | more).start(model, INPUTS, **begin)

    return make


GRAPHS: dict[tuple[str, ...], Graph] = {}


def analyze_once(model: nn.Module, inputs: Inputs, *, freeze: Sequence[str] = (), **how: Any) -> Graph:
    """The analysis of a model; those built alike share it, since a graph is read only and knows no weights."""
    shapes = (f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items())
    key = (repr(model), *shapes, *freeze, repr(how))
    if key not in GRAPHS:
        GRAPHS[key] = analyze(model, inputs, freeze=freeze, **how)
    return GRAPHS[key]


def lapp(**options: Any) -> Make:
    return start(LAPP, {"prune_share": 0.6, "bypass": "full", **options})


def paam(**options: Any) -> Make:
    return start(PAAM, {"regime": "alternate", "lr": 0.02, "hidden": 4, "scorer_every": 2, **options})


def host(kind: type[TrainingMethod], **options: Any) -> Make:
    return start(kind, options)


SOFT = Decay(steps=3, restore=Restore(rate=0.0, length=0.0, cool_down=2))

KINDS: tuple[type[TrainingMethod], ...] = (
    LAPP, PAAM, Gradual, DepGraph, OTO, HESSO, GateDecorator, Halfway
)  # fmt: skip

METHODS: dict[str, Make] = {
    "lapp, full bypass": lapp(),
    "lapp, full bypass, removal on the way": lapp(
        remove_every=3, threshold_optimizer="sgd", threshold_lr=0.5, side="pointwise", side_start=0.0
    ),
    "lapp, shared bypass": lapp(bypass="shared", score="gamma", constraint="log"),
    "lapp, no bypass": lapp(bypass="none", score="taylor", slope="dst", remove_every=2),
    "lapp, decay": lapp(removal=Decay(steps=3), remove_every=2),
    "lapp, shared bypass, decay": lapp(bypass="shared", removal=Decay(steps=4)),
    "lapp, soft, no learning": lapp(bypass="none", slope="soft", learn=False),
    "paam, alternating": paam(),
    "paam, joint, linear": paam(regime="joint", scorer="linear"),
    "paam, additive, binary": paam(scorer="additive", binary=True, select_every=2),
    "paam, dot": paam(scorer="dot", weight=3.0),
    "paam, free, streams": paam(scorer="free", streams=True),
    "gradual, l2": host(Gradual, rounds=3, prune_share=0.8),
    "gradual, taylor, decay and restore": host(
        Gradual, score="taylor", rounds=3, prune_share=0.9, removal=SOFT
    ),
    "depgraph": host(DepGraph, sparse_share=0.3, prune_share=0.5, pieces=3),
    "depgraph, decay of everything": host(
        DepGraph, sparse_share=0.2, prune_share=0.8, rounds=2, removal=Decay(steps=3, parts="full")
    ),
    "oto": host(OTO, strength=0.5, most=1.0),
    "oto, decay and restore": host(OTO, strength=0.5, most=1.0, prune_share=0.8, removal=SOFT),
    "hesso": host(HESSO, periods=2, prune_share=0.8),
    "gate decorator": host(GateDecorator, ticks=2, ticks_per_tock=1, prune_share=0.8),
    "gate decorator, decay": host(
        GateDecorator, ticks=2, ticks_per_tock=1, prune_share=0.8, removal=Decay(steps=3)
    ),
    "a method of a user's own": host(Halfway),
}
"""Every training method in every form -> how to make it for a model."""


def train(
    make: Make, folder: Path, config: TrainConfig = CONFIG, *, resume: bool = False, seed: int = 0
) -> tuple[Session[Any], FitResult]:
    """Train a fresh model with a method in the built-in loop."""
    model = Residual(seed)
    session = make(model)
    return session, fit(model, toy_data(), config, folder, session=session, resume=resume, progress=False)
