"""Masks of single weights of a network before it is trained: by a score, or at random at given densities.

All masks are `WeightPlan`s, which hold through training with `with plan.holding(model):`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocate.density import Densities, Layer, Vector, costs_of, list_layers, rank_weights
from secateur.cost import Budget, Cost
from secateur.engine.method import Context, Method, Removes, When, pairs_of
from secateur.engine.pruned import Pruned, mask_copy
from secateur.errors import BudgetError, ScoreError
from secateur.graph import Graph, Inputs, is_frozen
from secateur.plan import WeightPlan
from secateur.plan.weight_plan import top
from secateur.scores.at_init import WEIGHT_SCORES, Weights, weight_score_named
from secateur.settings import option, settings

SHUFFLES = {
    "none": "the weights that the score chose",
    "weights": "as many of each layer, drawn at random: the control for which ones",
    "filters": "as much of each layer in whole filters, drawn at random",
}
"""What stays of a layer, once a score has said how much -> one line for lists of choices."""


@settings
class AtInit(Method):
    """Set single weights of convolutions and linear layers of a fresh network to zero, by a score of weights.

    A weight at zero costs nothing in budgets, which bound parameters, MACs or both. Train within
    `plan.holding(model)`.

    Raises:
        BudgetError: out of reach, or not of parameters and MACs.
        ScoreError: a score that needs data and got none.
    Source: of the shuffles, Frankle et al. 2020, arXiv:2009.08576, sec. 5, for single weights.
    """

    name: ClassVar[str] = "at-init"
    summary: ClassVar[str] = "mask weights before training, by a score of weights"
    when: ClassVar[When] = "before"
    removes: ClassVar[Removes] = "weights"

    score: str | Callable[..., Any] = option(
        "which weights matter", default="synflow", choices=WEIGHT_SCORES, custom=True
    )
    rounds: int = option("of scoring and removing, for scores that are asked again", default=100, least=1)
    shuffle: str = option(
        "whether the chosen weights stay, or others as many", default="none", choices=SHUFFLES
    )
    seed: int = option("of what is drawn at random", default=0, least=0)

    @property
    def needs_data(self) -> bool:
        return weight_score_named(self.score).needs_data

    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> Pruned:
        graph = context.graph or self.analyze(model, inputs)
        layers = tuple(
            layer for layer in list_layers(graph, classifier=True) if not is_frozen(layer.name, self.freeze)
        )
        cost = Cost(graph)
        dense = {name: cost.of(name) for name in budget.bounds}
        bounds = layer_bounds(layers, budget.limits(dense), dense)
        masks = choose_weights(
            model, inputs, layers, bounds, self.score, context, rounds=self.rounds, seed=self.seed
        )
        if self.shuffle != "none":
            found = densities_of(layers, masks)
            masks = draw_masks(model, graph, layers, found, bounds, self.shuffle, seed=self.seed)
        plan = WeightPlan.of(model, masks, self.record() | {"budget": budget.given})
        return mask_copy(model, graph, plan, facts={"densities": densities_of(layers, masks)})


@settings
class SynFlow(AtInit):
    """Masks by SynFlow, which needs no data; see `secateur.scores.at_init.Synflow`."""

    name: ClassVar[str] = "synflow"
    summary: ClassVar[str] = f"mask weights before training: {WEIGHT_SCORES['synflow'].summary}"
    score: str = option("which weights matter", default="synflow", choices=("synflow",))


@settings
class SNIP(AtInit):
    """Masks by SNIP; see `secateur.scores.at_init.snip`."""

    name: ClassVar[str] = "snip"
    summary: ClassVar[str] = f"mask weights before training: {WEIGHT_SCORES['snip'].summary}"
    score: str = option("which weights matter", default="snip", choices=("snip",))


@settings
class GraSP(AtInit):
    """Masks by GraSP; see `secateur.scores.at_init.grasp`."""

    name: ClassVar[str] = "grasp"
    summary: ClassVar[str] = f"mask weights before training: {WEIGHT_SCORES['grasp'].summary}"
    score: str = option("which weights matter", default="grasp", choices=("grasp",))


def layer_bounds(
    layers: Sequence[Layer], limits: Mapping[str, int], dense: Mapping[str, int]
) -> dict[str, float]:
    """What is left of each budget for the weights of these layers, once everything else is paid for.

    Raises:
        BudgetError: nothing is left, or the budget bounds something that weights do not cost.
    """
    bounds = {}
    for measure, limit in limits.items():
        own = float(costs_of(layers, measure).sum())
        bounds[measure] = limit - (dense[measure] - own)
        if bounds[measure] <= 0:
            raise BudgetError(
                f"budget {measure}: {limit:,} asked for, but what no layer of weights costs is already "
                f"{dense[measure] - own:,.0f} (biases, norms, the classifier, what is frozen, "
                f"layers without a parameter `weight`, such as weight-normed ones). Raise the budget."
            )
    return bounds


def choose_weights(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[Layer],
    bounds: Mapping[str, float],
    score: str | Callable[..., Any],
    context: Context,
    *,
    rounds: int = 100,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The best weights of all layers within the budget, by weight name; bool, True = keep.

    Where a score is asked again, what is left shrinks by the same factor in each of the rounds.

    Args:
        model: untrained; only read.
        inputs: example inputs.
        layers: from `list_layers`.
        bounds: what these layers may cost together, in "params" and "macs".
        score: as for `weight_score_named`.
        context: data and loss, for scores that need them.
        rounds: for scores that are asked again.
        seed: of random scores.
    Raises:
        ScoreError: unknown score, or data that it needs is missing.
    """
    entry = weight_score_named(score)
    if entry.needs_data and context.data is None:
        raise ScoreError(f"score {score!r} needs data: pass data=, an iterable of (inputs, targets)")
    names = [layer.weight for layer in layers]
    each = {m: {layer.weight: layer.costs[m] / layer.weights for layer in layers} for m in bounds}
    data = [] if context.data is None else list(pairs_of(context.data))
    scores = entry.function(Weights(model, inputs, names, data, context.loss, seed))
    if not callable(scores):
        return rank_weights(scores, each, bounds)
    total = {m: float(costs_of(layers, m).sum()) for m in bounds}
    parameters = dict(model.named_parameters())
    masks = {name: torch.ones(parameters[name].shape, dtype=torch.bool) for name in names}
    for number in range(1, rounds + 1):
        now = {m: total[m] * min(1.0, bound / total[m]) ** (number / rounds) for m, bound in bounds.items()}
        found = {n: s.cpu().masked_fill(~masks[n], -1.0) for n, s in scores(masks).items()}
        masks = rank_weights(found, each, now)
    return masks


def densities_of(layers: Sequence[Layer], masks: Mapping[str, Tensor]) -> Densities:
    """Share of weights that each layer keeps."""
    return {layer.name: int(masks[layer.weight].sum()) / layer.weights for layer in layers}


def draw_masks(
    model: nn.Module,
    graph: Graph,
    layers: Sequence[Layer],
    densities: Mapping[str, float],
    bounds: Mapping[str, float],
    granularity: str,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Masks at given densities within every budget, at random: of single weights or of whole filters.

    A layer that makes the model's outputs loses inputs instead of filters, as in a crop: no class goes. Those that no
    filter makes any more go first; chosen by itself, it might be left with nothing to read.

    Args:
        graph: of the model.
        layers: from `list_layers`; others stay whole.
        densities: per layer, by name.
        bounds: what these layers may cost together, in "params" and "macs".
        granularity: "weights" or "filters".
        seed: of the choice.
    Raises:
        BudgetError: one weight or filter per layer is too much already.
    """
    shapes = {layer.name: model.get_parameter(layer.weight).shape for layer in layers}
    outputs = {f.name for f in graph.frozen if f.reason.startswith("model output")} & shapes.keys()
    if granularity == "weights":
        places = {name: shape.numel() for name, shape in shapes.items()}
    else:
        places = {name: shape[1] if name in outputs else shape[0] for name, shape in shapes.items()}
    counts = counts_within(layers, densities, places, bounds)
    exact = {name: counts[name] / places[name] for name in places}
    if granularity == "weights":
        return dict(draw_weights(model, exact, seed=seed).masks)
    masks = dict(draw_filters(model, {n: p for n, p in exact.items() if n not in outputs}, seed=seed).masks)
    made = {weight: mask.flatten(1).any(1) for weight, mask in masks.items()}
    generator = torch.Generator().manual_seed(seed)
    for name in outputs:
        weight = f"{name}.weight"
        first = _share_produced(graph, weight, made, shapes[name][1])
        first += 1e-4 * torch.rand(len(first), generator=generator)  # among equals, at random
        masks[weight] = _spread(top(first, counts[name]), 1, shapes[name])
    return masks


def _share_produced(graph: Graph, weight: str, made: Mapping[str, Tensor], size: int) -> Tensor:
    """Of the producers of each input of a layer, the share whose filters for it stay; (size,).

    Args:
        weight: of the consumer.
        made: filters that stay, (filters,) bool, by weight.
        size: how many inputs there are.
    """
    found = torch.ones(size)
    for group in graph.groups:
        producers = [
            m for m in group.members if m.dim == 0 and m.role in ("out", "depthwise") and m.tensor in made
        ]
        for consumer in group.members:
            if producers and (consumer.tensor, consumer.dim) == (weight, 1):
                share = torch.stack([m.take(made[m.tensor].float()).mean(1) for m in producers]).mean(0)
                index = torch.as_tensor(consumer.index)
                found[index] = share[:, None].expand(index.shape)
    return found


def counts_within(
    layers: Sequence[Layer],
    densities: Mapping[str, float],
    places: Mapping[str, int],
    bounds: Mapping[str, float],
) -> dict[str, int]:
    """How many places of each layer stay: its density rounded down, and up where every budget still holds.

    The largest remainders are rounded up first. Where even the smaller counts cost too much, one factor below 1
    is put before all densities: masks save no norms, which a crop does.

    Args:
        places: per layer: its weights, or its filters; all of a layer's cost alike.
        layers, densities, bounds: as for `draw_masks`.

    >>> counts_within([Layer("a", "a.weight", 40, {"params": 40})], {"a": 0.33}, {"a": 10}, {"params": 13.5})
    {'a': 3}
    """
    full = np.array([places[layer.name] for layer in layers], dtype=float)
    wanted = np.array([densities[layer.name] for layer in layers]) * full
    each = {m: costs_of(layers, m) / full for m in bounds}

    def fits(counts: Vector) -> bool:
        return all(each[m] @ counts <= bound * (1 + 1e-12) for m, bound in bounds.items())

    def down(factor: float) -> Vector:
        return np.asarray(np.maximum(1.0, np.floor(factor * wanted + 1e-9)), dtype=float)

    if not fits(down(0.0)):
        raise BudgetError(
            f"budget {dict(bounds)} for the weights of {len(layers)} layers: less than one place in each; "
            f"raise the budget"
        )
    factor, high = (1.0, 1.0) if fits(down(1.0)) else (0.0, 1.0)
    while high - factor > 1e-9:
        middle = (factor + high) / 2
        factor, high = (middle, high) if fits(down(middle)) else (factor, middle)
    counts = down(factor)
    for index in np.argsort(counts - factor * wanted, kind="stable"):
        if counts[index] < wanted[index] - 1e-9:
            counts[index] += 1
            if not fits(counts):
                counts[index] -= 1
    return {layer.name: int(count) for layer, count in zip(layers, counts, strict=True)}


def draw_weights(model: nn.Module, densities: Mapping[str, float], *, seed: int = 0) -> WeightPlan:
    """Keep a share of each layer's weights at random.

    Args:
        model: its layers' weights are `<layer>.weight`.
        densities: per layer, by name.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, w in _weights(model, densities).items():
        count = max(1, round(densities[name] * w.numel()))
        masks[f"{name}.weight"] = top(torch.rand(w.shape, generator=generator), count)
    return WeightPlan.of(model, masks, {"method": "random-weights", "seed": seed})


def draw_filters(
    model: nn.Module,
    densities: Mapping[str, float],
    *,
    seed: int = 0,
) -> WeightPlan:
    """Keep a share of each layer's filters at random, whole; the others are zero.

    Args:
        model, densities, seed: as for `draw_weights`.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, w in _weights(model, densities).items():
        filters = top(torch.rand(len(w), generator=generator), max(1, round(densities[name] * len(w))))
        masks[f"{name}.weight"] = _spread(filters, 0, w.shape)
    return WeightPlan.of(model, masks, {"method": "random-filters", "seed": seed})


def _spread(mask: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """A mask of the positions along one dim, for all weights of a tensor of this shape."""
    return mask.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(*shape).clone()


def _weights(model: nn.Module, densities: Mapping[str, float]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    for name, density in densities.items():
        if f"{name}.weight" not in parameters or not 0 < density <= 1:
            raise BudgetError(
                f"density {density} of layer {name!r}: expected a layer of the model and a share above 0, at most 1"
            )
    return {name: parameters[f"{name}.weight"] for name in densities}
