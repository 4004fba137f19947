"""How dense each layer is to be before anything is trained: from sizes alone, or from scores of single weights.

A density is the share of a layer's weights that stays. It says nothing about which ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.allocate.sparsity import Rule, allocate_weights
from secateur.cost import Cost
from secateur.errors import BudgetError
from secateur.graph import Graph
from secateur.measures import MEASURES, measure_named, per_weight

Densities = dict[str, float]
"""Layer -> share of its weights that stays; above 1 where a layer grows."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer.

    Attributes:
        name: of the module.
        weight: name of its weight.
        weights: their number.
        costs: what they cost together, by every measure that is a sum over weights.
    """

    name: str
    weight: str
    weights: int
    costs: Mapping[str, float]

    @property
    def pointwise(self) -> bool:
        """Whether every weight is used once per image, as in a linear layer."""
        return self.costs["macs"] == self.weights


def list_layers(graph: Graph, *, classifier: bool = False) -> tuple[Layer, ...]:
    """The layers whose densities are to be chosen, in the order of the forward pass.

    Args:
        graph: from `analyze`.
        classifier: also the linear layers that make the model's outputs, which papers leave whole.
    """
    cost = Cost(graph)
    sums = {name: cost.layers(measure=name) for name in per_weight()}
    outputs = {frozen.name for frozen in graph.frozen if frozen.reason.startswith("model output")}
    layers = []
    for name in sums["macs"]:
        weight = f"{name}.weight"
        if weight in sums["params"]:
            costs = {measure: float(terms.get(name, terms.get(weight, 0))) for measure, terms in sums.items()}
            layer = Layer(name, weight, sums["params"][weight], costs)
            if classifier or name not in outputs or not layer.pointwise:
                layers.append(layer)
    return tuple(layers)


def costs_of(layers: Sequence[Layer], measure: str) -> Vector:
    """What each layer costs at density 1.

    Raises:
        BudgetError: the measure does not follow from how many weights each layer keeps.
    """
    if not measure_named(measure).per_weight:
        raise BudgetError(
            f"{measure}: {MEASURES[measure].label} does not follow from how many weights each layer keeps; bound one "
            f"of: {', '.join(per_weight())}"
        )
    return np.array([layer.costs[measure] for layer in layers], dtype=float)


def solve_densities(
    costs: Mapping[str, Sequence[float] | Vector], limits: Mapping[str, float], *, cap: float = 1.0
) -> Vector:
    """The densities of greatest product under linear budgets.

        max sum_l log p_l   s.t.   sum_l c_ml p_l <= B_m for every measure m,   p_l <= cap
        p_l = min(cap, 1 / sum_m lambda_m c_ml)

    With one budget, all layers that are touched keep the same amount of it. The multipliers are found by bisection,
    one inside the other.

    Args:
        costs: per measure, what each layer costs at density 1 (weights, MACs, milliseconds, …).
        limits: per measure, what all layers may cost together.
        cap: largest density; above 1, layers may grow.
    Returns:
        (layers,), above 0.
    Raises:
        BudgetError: a limit is not positive.
    Source: Cai et al. 2022, arXiv:2203.02549, in its later versions: the sum of the logarithms of densities.
    Differs: the closed form and its bisection are a reconstruction from the published abstracts and reviews; the
    paper's own solver is not known. Any number of linear costs may be bounded.

    >>> solve_densities({"params": [100, 400, 1600]}, {"params": 900}).tolist()
    [1.0, 1.0, 0.25]
    """
    for name, limit in limits.items():
        if not limit > 0:
            raise BudgetError(f"budget {name}: {limit:,.0f} is left for the layers; it must be above 0")
    rows = [np.asarray(costs[name], dtype=float) / limit for name, limit in limits.items()]
    size = len(next(iter(costs.values())))

    def best(number: int, price: Vector) -> Vector:
        if number == len(rows):
            return np.minimum(cap, 1 / np.maximum(price, 1 / cap / 2))
        from scipy.optimize import brentq  # slow to import

        row = rows[number]

        def excess(multiplier: float) -> float:
            return float(row @ best(number + 1, price + multiplier * row)) - 1

        if excess(0.0) <= 0:
            return best(number + 1, price)
        multiplier = brentq(
            excess, 0.0, 2.0 * size, xtol=1e-15, rtol=1e-14
        )  # sum of c / (lambda c) = size / lambda
        return best(number + 1, price + multiplier * row)

    return best(0, np.zeros(size))


def allocate_densities(
    layers: Sequence[Layer],
    weights: Mapping[str, Tensor],
    limits: Mapping[str, float],
    allocation: str | Rule,
) -> Densities:
    """Densities by an allocation of single weights: the most weights with which every budget holds.

    Args:
        layers: from `list_layers`.
        weights: their weights by parameter name; the formulas read shapes, some also values.
        limits: what these layers may cost together, by measure.
        allocation: as for `allocate_weights`.
    Raises:
        BudgetError: unknown allocation, or limits that not even one weight per layer meets.
    """
    own = {layer.weight: weights[layer.weight] for layer in layers}

    def at(total: int) -> Densities:
        counts = allocate_weights(own, total, allocation)
        return {layer.name: counts[layer.weight] / layer.weights for layer in layers}

    def fits(total: int) -> bool:
        found = at(total)
        p = np.array([found[layer.name] for layer in layers])
        return all(costs_of(layers, m) @ p <= limit + 1e-6 for m, limit in limits.items())

    low, high = len(layers), sum(layer.weights for layer in layers)
    if not fits(low):
        raise BudgetError(
            f"{allocation}: the budget {dict(limits)} is below one weight per layer; raise the budget"
        )
    while high - low > 0:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return at(low)


def rank_weights(
    scores: Mapping[str, Tensor], costs: Mapping[str, Mapping[str, float]], limits: Mapping[str, float]
) -> dict[str, Tensor]:
    """The longest list of best weights of all layers that meets every budget.

    Args:
        scores: per weight tensor, of its shape; higher = keep; of equals, the first stay.
        costs: per measure, what one weight of each tensor costs.
        limits: per measure, what all kept weights may cost together.
    Returns:
        bool masks, True = keep.

    >>> rank_weights({"a": torch.tensor([3., 1.]), "b": torch.tensor([2.])}, {"macs": {"a": 1., "b": 5.}}, {"macs": 6})
    {'a': tensor([ True, False]), 'b': tensor([True])}
    """
    sizes = [s.numel() for s in scores.values()]
    order = torch.cat([s.detach().double().flatten().cpu() for s in scores.values()]).sort(
        descending=True, stable=True
    )
    layer = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order.indices]
    count = len(layer)
    for measure, limit in limits.items():
        each = torch.tensor([costs[measure][name] for name in scores], dtype=torch.float64)
        spent = each[layer].cumsum(0)
        bound = torch.tensor([limit * (1 + 1e-12)], dtype=torch.float64)
        count = min(count, int(torch.searchsorted(spent, bound, right=True)))
    keep = torch.zeros(len(layer), dtype=torch.bool)
    keep[order.indices[:count]] = True
    parts = torch.split(keep, sizes)
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}
