"""Pruning single weights of a network before it is trained, and what papers compare it with.

`prune_initial` keeps the best weights by a score. At given densities, `random_weights` keeps as many at random and
`random_filters` whole filters at random; `precrop` with the same densities makes the layers narrower instead. All
masks are `WeightPlan`s, which hold through training with `with plan.holding(model):`.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocate.density import Densities, Layer, Vector, costs_of, list_layers, rank_weights
from secateur.cost import Budget, Cost
from secateur.errors import BudgetError, ScoreError, unknown
from secateur.graph import Graph, Inputs, analyze, is_frozen
from secateur.plan.weight_plan import WeightPlan, top
from secateur.scores.at_init import Loss, Synflow, grasp, snip

INITIAL_SCORES = {
    "synflow": "paths through the weight, signs dropped; iterated, needs no data",
    "snip": "first-order reaction of the loss to the weight's removal; needs data",
    "grasp": "what the removal does to the norm of the gradient; needs data",
    "magnitude": "absolute value",
    "random": "random numbers: the control",
}
"""Scores of weights before training -> one line for lists of choices."""

SHUFFLES = {
    "none": "the weights that the score chose",
    "weights": "as many of each layer, drawn at random: the control for which ones",
    "filters": "as much of each layer in whole filters, drawn at random",
}
"""What stays of a layer, once a score has said how much -> one line for lists of choices."""


@dataclass(frozen=True)
class Sparse:
    """A network with single weights at zero before its training.

    Attributes:
        model: a copy of the user's, masked.
        plan: which weights stay; train within `plan.holding(model)`.
        densities: share of weights that each layer keeps.
        macs: before, after; zeros count as saved, although dense kernels do multiply by them.
        params: before, after.
    """

    model: nn.Module
    plan: WeightPlan
    densities: Densities
    macs: tuple[int, int]
    params: tuple[int, int]

    def __str__(self) -> str:
        counts = [("MACs", *self.macs), ("parameters", *self.params)]
        return "\n".join(f"{n}: {a:,} -> {b:,} ({b / a:.1%} kept, as zeros)" for n, a, b in counts)


def prune_initial(
    model: nn.Module,
    inputs: Inputs,
    budget: Budget,
    *,
    score: str = "synflow",
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Loss = nn.functional.cross_entropy,
    freeze: Sequence[str] = (),
    rounds: int = 100,
    shuffle: str = "none",
    seed: int = 0,
) -> Sparse:
    """Set single weights of convolutions and linear layers of a fresh network to zero.

    Args:
        model: untrained; it is only read.
        inputs: example inputs.
        budget: of parameters, MACs or both; a weight at zero costs nothing.
        score: a name in `INITIAL_SCORES`.
        data: (inputs, targets) batches for "snip" and "grasp"; ten images per class are usual.
        loss: of (outputs, targets), a mean over the batch.
        freeze: module names or shell patterns; their weights stay.
        rounds: of scoring and removing for "synflow"; the others score once.
        shuffle: a name in `SHUFFLES`: whether the chosen weights stay, or others at the same densities.
        seed: of what is drawn at random.
    Raises:
        BudgetError: out of reach, or not of parameters and MACs.
        ScoreError: unknown score or shuffle, or a score that needs data and got none.
    Source: of the shuffles, Frankle et al. 2020, arXiv:2009.08576, sec. 5, for single weights.
    """
    if shuffle not in SHUFFLES:
        raise ScoreError(unknown("shuffle", shuffle, SHUFFLES))
    graph = analyze(model, inputs, freeze=freeze)
    layers = tuple(
        layer for layer in list_layers(graph, classifier=True) if not is_frozen(layer.name, freeze)
    )
    cost = Cost(graph)
    dense = {name: cost.of(name) for name in budget.bounds}
    bounds = layer_bounds(layers, budget.limits(dense), dense)
    masks = initial_masks(
        model, inputs, layers, bounds, score, data=data, loss=loss, rounds=rounds, seed=seed
    )
    if shuffle != "none":
        found = densities_of(layers, masks)
        masks = random_masks(model, graph, layers, found, bounds, shuffle, seed=seed)
    origin = {
        "method": score,
        "budget": budget.bounds,
        "freeze": list(freeze),
        "rounds": rounds,
        "shuffle": shuffle,
        "seed": seed,
    }
    return masked(model, graph, layers, masks, origin)


def masked(
    model: nn.Module,
    graph: Graph,
    layers: Sequence[Layer],
    masks: Mapping[str, Tensor],
    origin: Mapping[str, Any],
) -> Sparse:
    """A copy of a model under masks of its layers' weights."""
    plan = WeightPlan.of(model, masks, origin)
    left = costs_left(graph, masks)
    return Sparse(
        plan.apply_(copy.deepcopy(model)), plan, densities_of(layers, masks), left["macs"], left["params"]
    )


def costs_left(graph: Graph, masks: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """MACs and parameters, before and after, if a weight at zero cost nothing."""
    layers = [layer for layer in list_layers(graph, classifier=True) if layer.weight in masks]
    gone = np.array([1 - float(masks[layer.weight].double().mean()) for layer in layers])
    cost, left = Cost(graph), {}
    for measure in ("macs", "params"):
        dense = cost.of(measure)
        left[measure] = dense, dense - round(float(costs_of(layers, measure) @ gone))
    return left


def layer_bounds(
    layers: Sequence[Layer], limits: Mapping[str, int], dense: Mapping[str, int]
) -> dict[str, float]:
    """What is left of each budget for the weights of these layers, once everything else is paid for.

    Raises:
        BudgetError: nothing is left, or the budget bounds something that weights do not cost.
    """
    bounds = {}
    for measure, limit in limits.items():
        if measure not in ("macs", "params"):
            raise BudgetError(f"budget {measure}: densities follow from macs and params; give one of these")
        own = float(costs_of(layers, measure).sum())
        bounds[measure] = limit - (dense[measure] - own)
        if bounds[measure] <= 0:
            raise BudgetError(
                f"budget {measure}: {limit:,} asked for, but what no layer of weights costs is already "
                f"{dense[measure] - own:,.0f} (biases, norms, the classifier, what is frozen, "
                f"layers without a parameter `weight` of their own, such as weight-normed ones). Ask for more."
            )
    return bounds


def initial_masks(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[Layer],
    bounds: Mapping[str, float],
    score: str,
    *,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Loss = nn.functional.cross_entropy,
    rounds: int = 100,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The best weights of all layers within the budget, by weight name; bool, True = keep.

    With "synflow" what is left shrinks by the same factor in each of the rounds, and scores are taken again.

    Args:
        layers: from `list_layers`.
        bounds: what these layers may cost together, in "params" and "macs".
        model, inputs, score, data, loss, rounds, seed: as for `prune_initial`.
    """
    if score not in INITIAL_SCORES:
        raise ScoreError(unknown("score", score, INITIAL_SCORES))
    if rounds < 1:
        raise ScoreError(f"score {score!r}: rounds is {rounds}; expected at least 1")
    names = [layer.weight for layer in layers]
    each = {
        "params": dict.fromkeys(names, 1.0),
        "macs": {layer.weight: layer.costs["macs"] / layer.weights for layer in layers},
    }
    if score == "synflow":
        flow = Synflow(model, inputs, names)
        total = {m: float(costs_of(layers, m).sum()) for m in bounds}
        masks = {name: torch.ones_like(w, dtype=torch.bool, device="cpu") for name, w in flow.whole.items()}
        for number in range(1, rounds + 1):
            now = {
                m: total[m] * min(1.0, bound / total[m]) ** (number / rounds) for m, bound in bounds.items()
            }
            scores = {n: s.cpu().masked_fill(~masks[n], -1.0) for n, s in flow(masks).items()}
            masks = rank_weights(scores, each, now)
        return masks
    if score in ("snip", "grasp"):
        if data is None:
            raise ScoreError(f"score {score!r} needs data: pass data=, an iterable of (inputs, targets)")
        scores = (snip if score == "snip" else grasp)(model, names, list(data), loss)
    else:
        parameters = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(seed)
        scores = {
            n: parameters[n].detach().abs()
            if score == "magnitude"
            else torch.rand(parameters[n].shape, generator=generator)
            for n in names
        }
    return rank_weights(scores, each, bounds)


def densities_of(layers: Sequence[Layer], masks: Mapping[str, Tensor]) -> Densities:
    """Share of weights that each layer keeps."""
    return {layer.name: int(masks[layer.weight].sum()) / layer.weights for layer in layers}


def random_masks(
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
        return dict(random_weights(model, exact, seed=seed).masks)
    masks = dict(random_filters(model, {n: p for n, p in exact.items() if n not in outputs}, seed=seed).masks)
    made = {weight: mask.flatten(1).any(1) for weight, mask in masks.items()}
    generator = torch.Generator().manual_seed(seed)
    for name in outputs:
        weight = f"{name}.weight"
        first = _share_made(graph, weight, made, shapes[name][1])
        first += 1e-4 * torch.rand(len(first), generator=generator)  # among equals, at random
        masks[weight] = _spread(top(first, counts[name]), 1, shapes[name])
    return masks


def _share_made(graph: Graph, weight: str, made: Mapping[str, Tensor], size: int) -> Tensor:
    """Of the layers that make each input of a layer, the share whose filters for it stay; (size,).

    Args:
        weight: of the layer that reads.
        made: filters that stay, (filters,) bool, by weight.
        size: how many inputs there are.
    """
    found = torch.ones(size)
    for group in graph.groups:
        makers = [
            m for m in group.members if m.dim == 0 and m.role in ("out", "depthwise") and m.tensor in made
        ]
        for reader in group.members:
            if makers and (reader.tensor, reader.dim) == (weight, 1):
                share = torch.stack([m.take(made[m.tensor].float()).mean(1) for m in makers]).mean(0)
                index = torch.as_tensor(reader.index)
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
        layers, densities, bounds: as for `random_masks`.

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
            f"budget {dict(bounds)} for the weights of {len(layers)} layers: less than one place in each; ask for more"
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


def random_weights(model: nn.Module, densities: Mapping[str, float], *, seed: int = 0) -> WeightPlan:
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


def random_filters(
    model: nn.Module,
    densities: Mapping[str, float],
    *,
    seed: int = 0,
) -> WeightPlan:
    """Keep a share of each layer's filters at random, whole; the others are zero.

    Args:
        model, densities, seed: as for `random_weights`.
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
