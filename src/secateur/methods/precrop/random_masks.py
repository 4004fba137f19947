"""The controls of PreCropping: as dense in every layer as the crop, at random places of a network of full width."""

from typing import ClassVar

from torch import nn

from secateur.allocate.density import list_layers
from secateur.cost import Budget, Cost
from secateur.engine.method import Context, Removes
from secateur.engine.pruned import Pruned, mask_copy
from secateur.graph import Inputs
from secateur.methods.at_init import densities_of, draw_masks, layer_bounds
from secateur.methods.precrop.design import WidthMethod, design, limits_of
from secateur.plan import WeightPlan
from secateur.settings import settings


@settings
class RandomWeights(WidthMethod):
    """Mask a fresh network at random, each layer as dense as `PreCrop` with the same options would leave it.

    If the claim holds that only densities matter, the three train to the same accuracy. Only the crop trains faster.
    Layers that the crop leaves whole stay whole. Layers are drawn independently of each other, as densities are meant:
    a filter that stays also reads what is at zero, while a layer of the crop reads only what the layer before produces.
    A weight at zero costs nothing in budgets; a budget of parameters leaves the network slightly less dense than the
    crop, whose norms are narrower too.

    Raises:
        CaptureError, BudgetError, ScoreError: see `PreCrop`.
    Source: Cai et al. 2022, arXiv:2203.02549: random pruning of weights and of filters at equal densities.
    Differs: known from the abstract and reviews only.
    """

    name: ClassVar[str] = "random-weights"
    summary: ClassVar[str] = "mask weights at random before training, as dense in each layer as precrop"
    removes: ClassVar[Removes] = "weights"

    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget | None, context: Context) -> Pruned:
        graph = context.graph or self.analyze(model, inputs)
        found = design(model, inputs, graph, limits_of(graph, budget, self), self, context)
        limits = found.limits
        layers = [layer for layer in list_layers(graph, classifier=True) if found.densities[layer.name] < 1]
        bounds = layer_bounds(layers, limits, {name: Cost(graph).of(name) for name in limits})
        masks = draw_masks(model, graph, layers, found.densities, bounds, self.removes, seed=self.seed)
        origin = self.record() | found.multiples.record(graph) | {"budget": budget.given if budget else {}}
        plan = WeightPlan.of(model, masks, origin)
        return mask_copy(model, graph, plan, facts={"densities": densities_of(layers, masks)})


@settings
class RandomFilters(RandomWeights):
    """The same with whole filters, as zeros that nothing is cut by."""

    name: ClassVar[str] = "random-filters"
    summary: ClassVar[str] = "mask whole filters at random before training, as dense in each layer as precrop"
    removes: ClassVar[Removes] = "filters"
