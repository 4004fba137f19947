"""PreCropping and PreConfig: widths before training, from densities; then one training of a dense, smaller network."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from secateur.cost import Budget, Cost
from secateur.engine.describe import layer_facts
from secateur.engine.method import Context
from secateur.engine.pruned import Pruned, cut_and_prove
from secateur.errors import BudgetError, CutError
from secateur.graph import Inputs, analyze
from secateur.graph.duplicate import duplicate
from secateur.imports import imported
from secateur.methods.precrop.design import Design, WidthMethod, design, limits_of
from secateur.methods.precrop.reset import reset_
from secateur.methods.precrop.widen import widen_
from secateur.plan import Plan
from secateur.settings import option, settings
from secateur.surgery.part import add_parts_, can_part, find_parts

Initialise: TypeAlias = str | Callable[[nn.Module], Any]


@settings
class PreCrop(WidthMethod):
    """Make a copy of an untrained network narrower, with fresh weights, to be trained once.

    The proof is of the cut, before its weights were drawn again. Without a budget, given densities decide: what these
    cost in weights.

    Raises:
        CaptureError, BudgetError, ScoreError: see `analyze` and `design`.
        CutError: the model's forward cannot run at other widths, or the result is not equal.
    Source: Cai et al. 2022, arXiv:2203.02549 (PreCropping) and its later versions (PreCrop).
    Differs: a reconstruction, see docs/precrop.md. Units that stay are spread evenly over a group rather than the
        first, but for streams="part"; fresh weights make this the same network.
    """

    name: ClassVar[str] = "precrop"
    summary: ClassVar[str] = "choose narrower widths before training, and draw fresh weights"
    takes_parts: ClassVar[bool] = True

    initialise: Initialise | None = option(
        "draws the weights of the narrow model in place", default=None, custom=True
    )

    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget | None, context: Context) -> Pruned:
        how = self
        if self.streams == "part":
            model, how = self._in_parts(model, inputs)
            context = replace(context, graph=None)
        graph = context.graph or how.analyze(model, inputs)
        found = design(model, inputs, graph, limits_of(graph, budget, how), how, context)
        origin = self.record() | found.multiples.record(graph) | {"budget": budget.given if budget else {}}
        return build(model, found, how, self.initialise, origin)

    def _in_parts(self, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, "PreCrop"]:
        """A copy whose layers can read and write parts of streams, and options that name them as it does."""
        found = find_parts(analyze(model, inputs, freeze=self.freeze, scope=self.scope, granularity="both"))
        layers = dict(model.named_modules())
        sides = {name: side for name, side in found.items() if can_part(layers[name], side)}
        if not sides:
            raise BudgetError("streams='part': no layer reads or writes a residual stream; choose 'keep'")
        copy = duplicate(model)
        add_parts_(copy, sides)

        def named(values: Mapping[str, float]) -> dict[str, float]:
            return {f"{name}.layer" if name in sides else name: value for name, value in values.items()}

        densities = self.densities if isinstance(self.densities, str) else named(self.densities)
        latency = self.latency and (named(self.latency[0]), self.latency[1])
        return copy, replace(self, densities=densities, latency=latency)


@settings
class PreConfig(WidthMethod):
    """Give an untrained network other proportions: some layers grow, some shrink.

    Parameters and MACs are both bounded; what the budget does not name may cost what it does now. Layers that grow must
    be stock convolutions, linear layers or batch norms. `graph`, `plan` and proof of the result are of the widened
    network that it was cut from.

    Raises:
        CutError: a layer that is to grow cannot, or the model's forward cannot run at other widths.
        CaptureError, BudgetError: see `PreCrop`.
    Source: Cai et al., later versions of arXiv:2203.02549 (PreConfig).
    Differs: a reconstruction, see docs/precrop.md; the cap is our choice.
    """

    name: ClassVar[str] = "preconfig"
    summary: ClassVar[str] = "choose other proportions before training; some layers grow"

    cap: float = option("largest density and share of units", default=2.0, least=1)
    initialise: Initialise | None = option(
        "draws the weights of the network in place", default=None, custom=True
    )

    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> Pruned:
        graph = context.graph or self.analyze(model, inputs)
        cost = Cost(graph)
        dense = {"macs": cost.macs(), "params": cost.params()}
        limits = dense | cost.limits(budget)
        found = design(model, inputs, graph, limits, self, context)
        origin = self.record() | found.multiples.record(graph) | {"budget": budget.given}
        return build(model, found, self, self.initialise, origin)


def build(
    model: nn.Module, found: Design, how: WidthMethod, initialise: Initialise | None, origin: dict[str, Any]
) -> Pruned:
    """The network of a design: widened where groups grow, cut where they shrink, proven, and drawn again."""
    graph, whole = found.graph, model
    widths = dict(zip((group.name for group in graph.groups), found.widths, strict=True))
    if any(widths[group.name] > group.units for group in graph.groups):
        whole = widen_(duplicate(model), graph, [max(g.units, widths[g.name]) for g in graph.groups])
        reset_(whole, seed=how.seed)
        graph = how.analyze(whole, graph.inputs)
        if {group.name for group in graph.groups} != widths.keys():
            raise CutError(
                f"{type(model).__name__}: channels are tied otherwise once it is wider. Allow no growth (cap=1)."
            )
    choose = first if how.streams == "part" else spread
    masks = [choose(group.units, widths[group.name]) for group in graph.groups]
    plan = Plan.of(graph, masks, origin | {"widths": widths, "densities": found.densities})
    pruned = cut_and_prove(whole, graph, plan, [mask.float() for mask in masks], seed=how.seed)
    if {m: pruned.after[m] for m in found.after} != found.after:
        raise CutError(
            f"{type(model).__name__}: the network costs {dict(pruned.after)}, the design {found.after}. Please report "
            f"this model."
        )
    if initialise is None:
        reset_(pruned.model, seed=how.seed)
    elif isinstance(initialise, str):
        imported("initialise", initialise)(pruned.model)
    else:
        initialise(pruned.model)
    facts = {**pruned.facts, **layer_facts(found.graph, model, pruned.model)}
    return replace(pruned, before=found.before, after=found.after, facts=facts)


def first(units: int, kept: int) -> Tensor:
    """Mask of the first `kept` of `units` units: what layers read and write of a stream, they share.

    >>> first(6, 3).tolist()
    [True, True, True, False, False, False]
    """
    return torch.arange(units) < kept


def spread(units: int, kept: int) -> Tensor:
    """Mask of `kept` of `units` units, evenly spaced: zeros padded on two sides go from both.

    >>> spread(6, 3).tolist()
    [False, True, False, True, False, True]
    """
    mask = torch.zeros(units, dtype=torch.bool)
    mask[((torch.arange(kept) + 0.5) * units / kept).long()] = True
    return mask
