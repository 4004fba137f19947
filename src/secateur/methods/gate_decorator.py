"""Gate Decorator: batch norms as gates, pruned by what a first-order look says they are worth."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.cost import Budget
from secateur.engine.decay import INSTANT, Decay
from secateur.engine.pruned import Pruned
from secateur.errors import ModelError, SecateurError
from secateur.graph import Inputs
from secateur.methods.gradual import RemovalMethod


class GatedBatchNorm2d(nn.BatchNorm2d):
    """y = phi (x^ + b'), with phi in `weight` and b' in `bias`: phi = 0 closes the channel, shift and all."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to the same shape."""
        self._check_input_dim(x)
        momentum = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        batch = self.training or self.running_mean is None
        y = F.batch_norm(x, self.running_mean, self.running_var, None, None, batch, momentum, self.eps)
        return (y + self.bias.view(1, -1, 1, 1)) * self.weight.view(1, -1, 1, 1)


def gate_(model: nn.Module) -> None:
    """Turn every affine batch norm of images into a gated one; it computes what it did, if |beta| <= 10 |gamma|."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine:
            with torch.no_grad():
                safe = torch.where(module.weight == 0, torch.ones_like(module.weight), module.weight)
                module.bias.copy_((module.bias / safe).clamp(-10, 10))
            module.__class__ = GatedBatchNorm2d


def melt_(model: nn.Module) -> None:
    """Turn gated norms back into ordinary ones, exactly."""
    for module in model.modules():
        if type(module) is GatedBatchNorm2d:
            with torch.no_grad():
                module.bias.mul_(module.weight)
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]


class GateDecorator(RemovalMethod):
    """Tick: freeze convolutions, train the gates, add up |phi dL/dphi|, close the lowest. Tock: train everything.

    Ticks close gates so that the cost falls by equal parts; before every `ticks_per_tock` of them one Tock
    trains all weights, with strength · sum |phi| added to the loss. A Tock takes as many steps as the Ticks that
    follow it. Layers whose outputs are added share their gates' fate: their scores add up.

    Args:
        model: trained; pruned in place. Its batch norms are gated until the budget is met.
        inputs: example inputs.
        budget: what the result may cost at most.
        steps: optimizer steps of the whole training.
        ticks: how many.
        ticks_per_tock: Ticks between two Tocks.
        prune_share: share of the steps that Ticks and Tocks take; the rest is fine-tuning.
        strength: of the penalty on gates.
        keep_share: share of its units that every group keeps.
        removal: how gates close: at once, or by a decay of phi (`parts` is "gate" here).
        freeze: module names or shell patterns that no cut may touch.
    Raises:
        ModelError: the model has no batch norm to make a gate of.
    Source: You et al. 2019, arXiv:1909.08174, and the authors' released code.
    Differs: equal parts of the cost per Tick, instead of a fixed share of the filters until it is met; the
        learning rate is the caller's throughout.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget,
        steps: int,
        ticks: int = 20,
        ticks_per_tock: int = 10,
        prune_share: float = 0.6,
        strength: float = 1e-3,
        keep_share: float = 0.1,
        removal: Decay = INSTANT,
        freeze: Sequence[str] = (),
    ) -> None:
        removal = Decay(removal.steps, removal.rectify, "gate", removal.form)
        super().__init__(model, inputs, budget=budget, steps=steps, removal=removal, freeze=freeze)
        self.aim(self.targets, [max(1, round(keep_share * group.units)) for group in self.whole.groups])
        tocks = -(-ticks // max(1, ticks_per_tock))
        self.tick_steps = round(prune_share * steps) // max(1, ticks + tocks * ticks_per_tock)
        if ticks < 1 or ticks_per_tock < 1 or self.tick_steps < removal.steps:
            raise SecateurError(
                f"GateDecorator: {ticks} ticks with {ticks_per_tock} per tock leave {self.tick_steps} steps for one, "
                f"removal takes {removal.steps}; use fewer ticks, a shorter removal, or more steps"
            )
        self._options: dict[str, Any] = {
            "ticks": ticks,
            "ticks_per_tock": ticks_per_tock,
            "prune_share": prune_share,
            "strength": strength,
            "keep_share": keep_share,
        }
        self.plan_of_steps = list(self._course())
        self.worth = [torch.zeros(group.units) for group in self.whole.groups]
        self._look: list[tuple[int, Tensor]] = []
        self.melted = False
        gate_(model)

    def prunable(self) -> list[int]:
        gated = [n for n, g in enumerate(self.whole.groups) if any(m.role == "scale" for m in g.members)]
        if not gated:
            raise ModelError(
                "GateDecorator: no prunable layer is followed by a batch norm, which it makes gates of"
            )
        return gated

    def _course(self) -> Iterator[str]:
        """What each step is for: "tock", "tick", or "close", a tick's last."""
        for tick in range(self._options["ticks"]):
            if tick % self._options["ticks_per_tock"] == 0:
                yield from ["tock"] * (self._options["ticks_per_tock"] * self.tick_steps)
            yield from ["tick"] * (self.tick_steps - 1)
            yield "close"

    def now(self) -> str:
        """What the coming step is for; "tune" after the last Tick."""
        return self.plan_of_steps[self.step] if self.step < len(self.plan_of_steps) else "tune"

    def penalty(self) -> Tensor:
        """strength · sum |phi| over the gates that can close, in a Tock."""
        if self.now() != "tock":
            return super().penalty()
        scales = {m.tensor for n in self.targets for m in self.graph.groups[n].members if m.role == "scale"}
        total = torch.stack([self.tensors[name].abs().sum() for name in sorted(scales)]).sum()
        strength: float = self._options["strength"]
        return strength * total

    def before_step(self) -> None:
        super().before_step()
        self._look = []
        if self.now() not in ("tick", "close"):
            return
        for number in self.targets:
            scales = [m for m in self.graph.groups[number].members if m.role == "scale"]
            for member in scales:
                p = self.tensors[member.tensor]
                if p.grad is not None:
                    product = (member.take(p.detach()) * member.take(p.grad)).abs().sum(1)
                    self._look.append((number, product.float().cpu()))
        for module in self.model.modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                module.weight.grad = None

    def advance(self) -> None:
        step = self.plan_of_steps[self.step - 1] if self.step <= len(self.plan_of_steps) else "tune"
        for number, product in self._look:
            self.worth[number][self.kept[number]] += product
        super().advance()
        if step == "close":
            done = self.plan_of_steps[: self.step].count("close")
            left = self._options["ticks"] - done
            self.drop()  # those of the tick before
            self.pool.rectifying = left > 0
            scores = [self.worth[n][self.kept[n]] for n in self.targets]
            self.leave(self.pick(scores, left / self._options["ticks"]))
            for worth in self.worth:
                worth.zero_()
            self.note(self.standing())
        if self.now() == "tune" and not self.melted and not self.pool.busy():
            self.drop()
            self.melt()

    def remove(self, masks: Sequence[Tensor]) -> None:
        """Cut with ordinary norms in place, which the graph was made with: the tensors are the same."""
        models = (self.model, *self.followers)
        gated = [m for model in models for m in model.modules() if type(m) is GatedBatchNorm2d]
        for module in gated:
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
        try:
            super().remove(masks)
        finally:
            for module in gated:
                module.__class__ = GatedBatchNorm2d

    def melt(self) -> None:
        """Back to ordinary batch norms; their shifts start afresh in the optimizer."""
        for model in (self.model, *self.followers):
            melt_(model)
        self.melted = True
        if self.optimizer is not None:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm2d) and module.affine:
                    for value in self.optimizer.state.get(module.bias, {}).values():
                        if isinstance(value, Tensor) and value.ndim:
                            value.zero_()

    def finish(self) -> Pruned:
        if not self.melted:
            melt_(self.model)
        return super().finish()

    def settings(self) -> dict[str, Any]:
        return super().settings() | self._options

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        tensors |= {f"worth.{n}": worth for n, worth in enumerate(self.worth)}
        return tensors, facts | {"melted": self.melted}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().restore(tensors, facts)
        self.worth = [tensors[f"worth.{n}"].clone() for n in range(len(self.worth))]
        if facts["melted"]:
            self.melt()
