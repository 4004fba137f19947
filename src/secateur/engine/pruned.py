"""The one result: what every method gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur.allocate.density import costs_of, list_layers
from secateur.cost import Cost
from secateur.engine.describe import describe, layer_facts, proof_notes, width_notes
from secateur.errors import CutError
from secateur.graph import Graph
from secateur.graph.duplicate import duplicate
from secateur.measures import MEASURES, per_weight
from secateur.plan import Plan, WeightPlan
from secateur.proof import Verification, verify
from secateur.report.data import Report, current_versions
from secateur.surgery import save
from secateur.surgery.cut import cut_copy


@dataclass(frozen=True, repr=False)
class Pruned:
    """A pruned model and how it came about.

    Attributes:
        model: the user's class; smaller, or with weights at zero.
        plan: what was removed: a plan of channels, or of single weights; None: the method does not say.
        graph: of the original.
        scores: (units,) per group of the graph, higher = keep; empty where single weights go.
        proof: that the cut model equals the masked original; None: nothing was cut, or there is no plan.
        before, after: cost by measure; weights at zero count as removed.
        facts: what else the method found out, plain JSON.
    """

    model: nn.Module
    plan: Plan | WeightPlan | None
    graph: Graph
    scores: Sequence[Tensor]
    proof: Verification | None
    before: Mapping[str, float]
    after: Mapping[str, float]
    facts: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def save(self, path: str | Path) -> None:
        """Write the model for `secateur.load`."""
        save(self.model, path)

    @property
    def report(self) -> Report:
        """What was pruned and how it went, for `secateur.report.write_report` and for printing."""
        origin = dict(self.plan.origin) if self.plan else {}
        return Report(
            model=type(self.model).__name__,
            method=str(origin.get("method", "your own")),
            budget=origin.get("budget", {}),
            seed=int(origin.get("seed", 0)),
            command="",
            notes=[*width_notes(self.plan), *proof_notes(self.graph, self.proof)],
            versions=current_versions(),
            **describe(self),
        )

    def __repr__(self) -> str:
        costs = (
            f"{m}={self.before[m]:,.6g} -> {self.after[m]:,.6g}"
            for m in ("macs", "params")
            if m in self.before
        )
        return f"<Pruned {type(self.model).__name__}: {', '.join(costs)}>"

    def __str__(self) -> str:
        zeros = ", as zeros" if isinstance(self.plan, WeightPlan) else ""
        lines = []
        bounded = self.plan.origin.get("budget", {}) if self.plan else {}
        for name in dict.fromkeys(("macs", "params", *bounded, "latency_ms")):
            if name in self.before:
                before, after, measure = self.before[name], self.after[name], MEASURES[name]
                kept = "" if measure.timed else f" ({after / before:.1%} kept{zeros})"
                lines.append(f"{measure.label}: {measure.show(before)} -> {measure.show(after)}{kept}")
        lines += [str(self.graph.parts)] if self.graph.parts else []
        return "\n".join([*lines, *width_notes(self.plan), *([str(self.proof)] if self.proof else [])])


def cut_and_prove(
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    scores: Sequence[Tensor],
    *,
    seed: int = 0,
    facts: Mapping[str, Any] | None = None,
    prove: bool = True,
) -> Pruned:
    """Cut a copy of a model by a plan, and prove that the cut is right.

    Args:
        model: only read.
        graph: of the model.
        plan: which channels go.
        scores: (units,) per group.
        seed: of the images for the proof.
        facts: what else the method found out, plain JSON.
        prove: without, only cut.
    Raises:
        CutError: the model's forward cannot run at other widths, or the result is not equal.
    """
    small = cut_copy(model, graph, plan)
    cost = Cost(graph)
    told = {**layer_facts(graph, model, small), **(facts or {})}
    pruned = Pruned(small, plan, graph, scores, None, cost.all(), cost.all(plan.kept(graph)), facts=told)
    return proven(model, pruned, seed=seed) if prove else pruned


def proven(model: nn.Module, pruned: Pruned, *, seed: int = 0) -> Pruned:
    """The same with the proof that its cut of a model is right.

    Raises:
        CutError: the result is not equal.
    """
    assert isinstance(pruned.plan, Plan)
    proof = verify(model, pruned.model, pruned.graph, pruned.plan, seed=seed)
    require_equal(model, proof)
    return replace(pruned, proof=proof)


def mask_copy(
    model: nn.Module, graph: Graph, plan: WeightPlan, *, facts: Mapping[str, Any] | None = None
) -> Pruned:
    """A copy of a model with the weights that a plan removes at zero; nothing is cut, so there is nothing to prove.

    Args:
        model: only read.
        graph: of the model.
        plan: which weights go.
        facts: what else the method found out, plain JSON.
    """
    before, after = costs_left(graph, plan.masks)
    small = plan.apply_(duplicate(model))
    return Pruned(small, plan, graph, (), None, before, after, facts=facts or {})


def costs_left(graph: Graph, masks: Mapping[str, Tensor]) -> tuple[dict[str, int], dict[str, int]]:
    """Cost by measure, dense and if a weight at zero cost nothing; units are the weights that have a mask.

    Args:
        graph: of the model.
        masks: weight name -> bool of its shape, True = keep.
    """
    cost = Cost(graph)
    layers = [layer for layer in list_layers(graph, classifier=True) if layer.weight in masks]
    gone = np.array([1 - float(masks[layer.weight].double().mean()) for layer in layers])
    before = {m: cost.of(m) for m in per_weight()}
    after = {m: dense - round(float(costs_of(layers, m) @ gone)) for m, dense in before.items()}
    before["units"] = sum(mask.numel() for mask in masks.values())
    after["units"] = sum(int(mask.sum()) for mask in masks.values())
    return before, after


def require_equal(model: nn.Module, proof: Verification) -> None:
    """Raise CutError unless the proof holds."""
    if not proof.ok:
        raise CutError(f"{type(model).__name__}: the cut model is {proof}. Please report this model.")
