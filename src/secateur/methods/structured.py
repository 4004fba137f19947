"""What methods share that remove units from a model while it trains."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.cost import Budget, Cost
from secateur.errors import CutError, TrainingError
from secateur.graph import Inputs, analyze
from secateur.graph.shrink import shrink
from secateur.methods.gates import Gates
from secateur.methods.oneshot import Pruned
from secateur.methods.training import TrainingMethod
from secateur.plan import Plan
from secateur.surgery import cut_, embed, verify


class StructuredMethod(TrainingMethod):
    """Removal of units from a model that is being trained, with proof at the end.

    Args:
        model: pruned in place.
        inputs: example inputs.
        budget: what the result may cost at most.
        steps: optimizer steps of the whole training.
        dense: the cost that shares in the budget refer to; None: the model's as it is now.
        freeze: module names or shell patterns that no cut may touch.
    Attributes:
        whole: the graph of the model at the start; the plan refers to it.
        graph: of the model as it is now; the same groups with the units that are left.
        kept: per group, the numbers that its units had at the start.
        scores: (units,) per group of `whole`, as they were when last looked at; higher = keep.
        limits: the largest allowed cost per bounded measure.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget,
        steps: int,
        dense: Cost | None = None,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__(model, steps=steps)
        self.budget, self.freeze = budget, tuple(freeze)
        self.whole = self.graph = analyze(model, inputs, freeze=freeze)
        self.cost = Cost(self.whole)
        self.dense = dense or self.cost
        self.limits = budget.limits({name: self.dense.of(name) for name in budget.bounds})
        self.kept = [torch.arange(group.units) for group in self.whole.groups]
        self.scores = [torch.zeros(group.units) for group in self.whole.groups]
        self.gates: Gates | None = None
        self._original = copy.deepcopy(model)

    def install(self) -> None:
        self.gates = self.make_gates()
        if self.gates is not None:
            for model in (self.model, *self.followers):
                self.gates.install(model)

    def uninstall(self) -> None:
        if self.gates is not None:
            self.gates.remove()
        self.gates = None

    def make_gates(self) -> Gates | None:
        """The gates of the model as it is now; None: there are none."""
        return None

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"budget": self.budget.bounds, "freeze": list(self.freeze)}

    def count(self, measure: str, masks: Sequence[Tensor] | None = None) -> int:
        """MACs, parameters or units of the model as it is now, or with only the units marked True."""
        return self.cost.of(measure, [int(m.sum()) for m in masks] if masks else [len(k) for k in self.kept])

    def remove(self, masks: Sequence[Tensor]) -> None:
        """Cut units out of the model now; the optimizer's state and the followers lose the same.

        Args:
            masks: (units,) bool per group of `graph`, True = keep.
        """
        masks = [mask.cpu() for mask in masks]
        if all(mask.all() for mask in masks):
            return
        gated = self.gates is not None
        self.uninstall()
        device = next(self.model.parameters()).device
        here = replace(self.graph, inputs=pytree.tree_map(lambda x: _to(x, device), self.graph.inputs))
        plan = Plan.of(here, masks)
        cut_(self.model, here, plan, optimizer=self.optimizer)
        for follower in self.followers:
            cut_(follower, here, plan)
        self.graph = shrink(self.graph, self.model, masks)
        self.kept = [units[mask] for units, mask in zip(self.kept, masks, strict=True)]
        if gated:
            self.install()

    def plan(self) -> Plan:
        """What has been removed so far, of the model at the start."""
        masks = [torch.zeros(group.units, dtype=torch.bool) for group in self.whole.groups]
        for mask, units in zip(masks, self.kept, strict=True):
            mask[units] = True
        return Plan.of(self.whole, masks, self.settings())

    def finish(self) -> Pruned:
        """Prove the result: the small model equals the original with its weights and zeros for the rest.

        Raises:
            TrainingError: training is not over, so the budget is not met.
            CutError: the models are not equal; the message says by how much.
        """
        over = [name for name, limit in self.limits.items() if self.count(name) > limit]
        if over:
            raise TrainingError(
                f"{type(self).__name__}: {over[0]} are {self.count(over[0]):,} after {self.step} of {self.steps} "
                f"steps, the budget is {self.limits[over[0]]:,}. Finish the training, with after_step() in every step."
            )
        plan, device = self.plan(), next(self.model.parameters()).device
        original = embed(self._original, self.model.cpu(), self.whole, plan)
        verification = verify(original, self.model, self.whole, plan)
        if not verification.ok:
            raise CutError(
                f"{type(self.model).__name__}: the cut model is {verification}. Please report this model."
            )
        return Pruned(
            self.model.to(device),
            plan,
            self.whole,
            self.scores,
            verification,
            macs=(self.dense.macs(), self.count("macs")),
            params=(self.dense.params(), self.count("params")),
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        for number, (kept, scores) in enumerate(zip(self.kept, self.scores, strict=True)):
            tensors |= {f"kept.{number}": kept, f"scores.{number}": scores}
        return tensors, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().restore(tensors, facts)
        masks = []
        for number, group in enumerate(self.whole.groups):
            mask = torch.zeros(group.units, dtype=torch.bool)
            mask[tensors[f"kept.{number}"]] = True
            masks.append(mask)
        self.remove(masks)
        self.scores = [tensors[f"scores.{n}"].clone() for n in range(len(self.whole.groups))]


def _to(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x
