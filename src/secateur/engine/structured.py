"""What methods share that remove units from a model while it trains."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.allocate import allocate
from secateur.cost import Budget, Cost
from secateur.engine.decay import Ending
from secateur.engine.gates import Gates
from secateur.engine.pruned import Pruned, require_equal
from secateur.engine.training import TrainingMethod
from secateur.errors import BudgetError, ModelError, TrainingError
from secateur.graph import Graph, Group, Inputs, analyze
from secateur.graph.shrink import shrink
from secateur.plan import Plan
from secateur.proof import verify
from secateur.surgery import cut_, embed


class StructuredMethod(TrainingMethod):
    """Removal of units from a model that is being trained, with proof at the end.

    Args:
        model: pruned in place.
        inputs: example inputs.
        budget: what the result may cost at most; None: the method decides otherwise.
        steps: optimizer steps of the whole training.
        dense: the cost that shares in the budget refer to; None: the model's as it is now.
        freeze: module names or shell patterns that no cut may touch.
    Attributes:
        whole: the graph of the model at the start; the plan refers to it.
        graph: of the model as it is now; the same groups with the units that are left.
        kept: per group, the numbers that its units had at the start.
        targets: numbers of the groups that lose units.
        least: units that each group keeps at least.
        scores: (units,) per group of `whole`, as they were when last looked at; higher = keep.
        limits: the largest allowed cost per bounded measure.
        curves: points of the course of the training, plain JSON.
        original: a copy of the model at the start.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget | None,
        steps: int,
        dense: Cost | None = None,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__(model, steps=steps)
        self.budget, self.freeze = budget, tuple(freeze)
        self.whole = self.graph = analyze(model, inputs, freeze=freeze)
        self.cost = Cost(self.whole)
        self.dense = dense or self.cost
        bounds = budget.bounds if budget else {}
        self.limits = budget.limits({name: self.dense.of(name) for name in bounds}) if budget else {}
        self.kept = [torch.arange(group.units) for group in self.whole.groups]
        self.targets: list[int] = []
        self.least = [1] * len(self.whole.groups)
        self.curves: list[dict[str, Any]] = []
        self.scores = [torch.zeros(group.units) for group in self.whole.groups]
        self.gates: tuple[Gates, ...] = ()
        self.original = copy.deepcopy(model)

    def aim(self, targets: Sequence[int], least: Sequence[int]) -> None:
        """Say which groups lose units, and how many every group keeps at least.

        Raises:
            ModelError: there is no such group.
            BudgetError: the budget cannot be reached that way; the message says what can.
        """
        self.targets, self.least = list(targets), list(least)
        name = type(self).__name__
        if not self.targets:
            raise ModelError(
                f"{name}: no layer can lose units on its own; `secateur inspect` says what is frozen"
            )
        counts = [group.units for group in self.whole.groups]
        for number in self.targets:
            counts[number] = self.least[number]
        for measure, limit in self.limits.items():
            if (reach := self.cost.of(measure, counts)) > limit:
                raise BudgetError(
                    f"{name}: the budget asks for at most {limit:,} {measure}; whatever goes, {reach:,} "
                    f"stay ({reach / self.dense.of(measure):.4f} of the dense model). Ask for more."
                )

    def choose(self, scores: Sequence[Tensor], slack: float = 0.0) -> list[Tensor]:
        """Which units of the model as it is now to keep, so that the budget holds: those that score best.

        Args:
            scores: (units,) per target group.
            slack: from 0, the budget, to 1, the dense model.
        Returns:
            (units,) bool per group of `graph`.
        """
        pooled = [torch.full((len(units),), math.inf) for units in self.kept]
        for number, score in zip(self.targets, scores, strict=True):
            self.scores[number][self.kept[number]] = score.detach().float().cpu()
            pooled[number] = score.detach().float().cpu().clone()
            best = pooled[number].topk(min(self.least[number], len(score))).indices
            pooled[number][best] = math.inf
        bounds = {
            name: limit + math.floor(slack * max(0, self.dense.of(name) - limit))
            for name, limit in self.limits.items()
        }
        over = {name: bound for name, bound in bounds.items() if self.count(name) > bound}
        if not over:
            return [torch.ones(len(units), dtype=torch.bool) for units in self.kept]
        return allocate(pooled, Cost(self.graph), Budget(**over), "global", relative=False)

    def note(self, counts: Sequence[int], **facts: Any) -> None:
        """Add a point to the curves: the step, units of target groups, MACs of layers, costs, and more facts."""
        names = [self.whole.groups[number].name for number in self.targets]
        self.curves.append(
            {
                "step": self.step,
                "units": dict(zip(names, (counts[number] for number in self.targets), strict=True)),
                "layers": self.cost.layers(counts),
                "macs": self.cost.macs(counts) / self.dense.macs(),
                "params": self.cost.params(counts) / self.dense.params(),
                **facts,
            }
        )

    def endings(self) -> Sequence[Ending]:
        """How each decay of a unit ended, for methods whose units can decay."""
        return ()

    def install(self) -> None:
        self.gates = self.make_gates()
        for gates in self.gates:
            for model in (self.model, *self.followers):
                gates.install(model)

    def uninstall(self) -> None:
        for gates in self.gates:
            gates.remove()
        self.gates = ()

    def make_gates(self) -> tuple[Gates, ...]:
        """The gates of the model as it is now."""
        return ()

    def settings(self) -> dict[str, Any]:
        bounds = self.budget.bounds if self.budget else None
        return super().settings() | {"budget": bounds, "freeze": list(self.freeze)}

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
        gated = bool(self.gates)
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
            TrainingError: training is not over, so the budget is not met; or its hooks are still on the model.
            CutError: the models are not equal; the message says by how much.
        """
        if self._handle is not None:
            raise TrainingError(
                f"{type(self).__name__}: finish() within `with method.attach(optimizer):`; call it after the block"
            )
        over = [name for name, limit in self.limits.items() if self.count(name) > limit]
        if over:
            raise TrainingError(
                f"{type(self).__name__}: {over[0]} are {self.count(over[0]):,} after {self.step} of {self.steps} "
                f"steps, the budget is {self.limits[over[0]]:,}. Finish the training, with after_step() in every step."
            )
        plan, device = self.plan(), next(self.model.parameters()).device
        original = embed(self.original, self.model.cpu(), self.whole, plan)
        proof = verify(original, self.model, self.whole, plan)
        require_equal(self.model, proof)
        counts = [len(units) for units in self.kept]
        return Pruned(
            self.model.to(device),
            plan,
            self.whole,
            self.scores,
            proof,
            self.dense.all(),
            self.cost.all(counts),
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        for number, (kept, scores) in enumerate(zip(self.kept, self.scores, strict=True)):
            tensors |= {f"kept.{number}": kept, f"scores.{number}": scores}
        return tensors, facts | {"curves": self.curves}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().restore(tensors, facts)
        masks = []
        for number, group in enumerate(self.whole.groups):
            mask = torch.zeros(group.units, dtype=torch.bool)
            mask[tensors[f"kept.{number}"]] = True
            masks.append(mask)
        self.remove(masks)
        self.curves = list(facts["curves"])
        self.scores = [tensors[f"scores.{n}"].clone() for n in range(len(self.whole.groups))]


def _to(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def makers(group: Group) -> set[str]:
    """The layers whose outputs a group's units are."""
    return {member.module for member in group.members if member.role == "out"}


def own_groups(graph: Graph) -> list[int]:
    """Groups made by one layer alone, so not part of a residual sum; without the network's first layer."""
    first = graph.macs[0].name
    return [n for n, group in enumerate(graph.groups) if len(m := makers(group)) == 1 and m != {first}]
