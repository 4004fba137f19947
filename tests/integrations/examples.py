"""What the tests of all trainers share: data, a number of steps, and methods in forms that fit them."""

from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.pruned import Pruned
from secateur.engine.training_method import TrainingMethod
from secateur.methods import LAPP, OTO, PAAM, Decay, DepGraph, GateDecorator, Gradual
from tests.methods.examples import SOFT

IMAGES, BATCH, ACCUMULATE, EPOCHS = 96, 8, 2, 2
STEPS = EPOCHS * IMAGES // BATCH // ACCUMULATE
KEEP = 0.6

ANY: dict[str, Any] = {"round_to": 1}
"""Widths as they fall."""

WITH_LAYERS: dict[str, TrainingMethod] = {
    "lapp, full bypass": LAPP(bypass="full", prune_share=0.6, **ANY),
    "lapp, shared bypass, decay": LAPP(bypass="shared", prune_share=0.6, removal=Decay(steps=3), **ANY),
}
"""Forms that add layers to the model."""

METHODS: dict[str, TrainingMethod] = WITH_LAYERS | {
    "lapp, no bypass": LAPP(bypass="none", score="taylor", prune_share=0.6, remove_every=2, **ANY),
    "paam, alternating": PAAM(regime="alternate", lr=0.02, hidden=4, scorer_every=2, **ANY),
    "paam, joint": PAAM(regime="joint", lr=0.02, hidden=4, **ANY),
    "gradual, decay": Gradual(rounds=3, prune_share=0.9, removal=SOFT, **ANY),
    "depgraph, decay": DepGraph(
        sparse_share=0.6, prune_share=0.9, pieces=3, removal=Decay(steps=3, parts="full"), **ANY
    ),
    "oto, decay": OTO(strength=0.5, most=1.0, prune_share=0.8, removal=SOFT, **ANY),
    "gate decorator, decay": GateDecorator(
        ticks=2, ticks_per_tock=1, prune_share=0.8, removal=Decay(steps=2), **ANY
    ),
}

FEW = ["lapp, full bypass", "lapp, no bypass", "paam, alternating", "gradual, decay", "gate decorator, decay"]
"""One form of each way in which units leave, for tests that take long."""


def images() -> list[tuple[Tensor, int]]:
    """Random images of three classes, always the same."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 8, 8, generator=generator) + n % 3, n % 3) for n in range(IMAGES)]


class Overflow(torch.amp.GradScaler):
    """A scaler for which the gradients of the first two steps overflow."""

    left = 2

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        if self.left:
            self.left -= 1
            for p in optimizer.param_groups[0]["params"]:
                p.grad.fill_(torch.inf)
        super().unscale_(optimizer)


def check(pruned: Pruned | None, model: nn.Module) -> None:
    """The result is the model that was trained, within budget, proven, and with nothing left on it."""
    assert pruned is not None
    assert pruned.model is model
    assert pruned.proof is not None
    assert pruned.proof.ok
    assert pruned.after["macs"] <= KEEP * pruned.before["macs"]
    assert pruned.after["macs"] > 0.7 * KEEP * pruned.before["macs"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def same(a: nn.Module, b: nn.Module) -> None:
    """Two models have the same values, to the bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
