"""Widths of a network that is not trained yet, from densities of its layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from secateur.allocate.density import (
    Densities,
    Layer,
    Vector,
    allocate_densities,
    costs_of,
    list_layers,
    solve_densities,
)
from secateur.allocate.sparsity import WEIGHT_ALLOCATIONS
from secateur.allocate.widths import RULES, Widths, fit_shares, meet_budget
from secateur.cost import Budget, Cost
from secateur.cost.multiples import AUTO, ROUND_TO, ROUND_TO_HELP, Multiples, choose_multiples
from secateur.engine.method import Context, Method, When
from secateur.errors import BudgetError, unknown
from secateur.graph import Graph, Inputs
from secateur.graph.duplicate import duplicate
from secateur.methods.at_init import choose_weights, densities_of, layer_bounds
from secateur.methods.precrop.reset import reset_
from secateur.scores.at_init import WEIGHT_SCORES
from secateur.settings import option, settings

SCORED = ("synflow", "snip", "grasp")
"""Scores whose masks give densities."""

DENSITIES = (
    {"optimal": "greatest product of densities under the budget, in closed form"}
    | {name: WEIGHT_SCORES[name].summary for name in SCORED}
    | {name: WEIGHT_ALLOCATIONS[name].summary for name in ("erk", "smart-ratio", "uniform")}
)
"""Where densities come from -> one line for lists of choices."""

STREAMS = {
    "keep": "residual streams keep their width",
    "shared": "each stream shrinks by one factor, the mean of what its layers ask for",
    "part": "streams keep their width, and layers read and write the first channels of them (precrop only)",
}
"""What happens to residual streams -> one line for lists of choices."""


REPEATS = 12
"""Times that a formula is asked again for other amounts; after a few the cost hardly moves."""


@settings
class WidthMethod(Method):
    """Base class for methods that choose how dense layers are before training."""

    when: ClassVar[When] = "before"
    takes_parts: ClassVar[bool] = False
    """Whether `streams="part"` is for it."""

    densities: str | Mapping[str, float] = option(
        "where densities come from; or a density per layer, where layers left out have no say",
        default="optimal",
        choices=DENSITIES,
    )
    streams: str = option("what happens to residual streams", default="keep", choices=STREAMS)
    rule: str = option("from densities of layers to shares of groups", default="fit", choices=RULES)
    min_keep: int = option("units that every group keeps at least", default=1, least=1)
    round_to: int | str = option(ROUND_TO_HELP, default=AUTO, choices=ROUND_TO, least=1)
    latency: tuple[Mapping[str, float], float] | None = option(
        "milliseconds per layer at density 1 and how many of them are allowed, a further bound", default=None
    )
    draws: int = option(
        "networks with weights drawn again whose densities are averaged, for scores", default=3, least=1
    )
    seed: int = option("of what is drawn at random", default=0, least=0)

    def check(self) -> None:
        if self.streams == "part" and not self.takes_parts:
            raise BudgetError(f"{self.name}: streams is 'part', which only precrop takes; choose another")
        if isinstance(self.densities, str) and self.densities != "optimal" and (self.cap > 1 or self.latency):
            raise BudgetError(
                f"densities={self.densities!r} knows no growth and no latency; choose densities='optimal'"
            )

    @property
    def needs_data(self) -> bool:
        return (
            isinstance(self.densities, str)
            and self.densities in SCORED
            and WEIGHT_SCORES[self.densities].needs_data
        )

    @property
    def cap(self) -> float:
        """Largest density, and share of its units that a group may have."""
        return 1.0


@dataclass(frozen=True)
class Design:
    """Widths of a network that is not built yet.

    Attributes:
        graph: of the dense model.
        limits: largest cost of the whole network, by measure.
        widths: units per group of it.
        multiples: what widths are multiples of.
        targets: density that each layer was to have, of those whose widths can change.
        densities: density that it has at these widths.
        before, after: cost by measure, dense and at these widths.
    """

    graph: Graph
    limits: dict[str, int]
    widths: tuple[int, ...]
    multiples: Multiples
    targets: Densities
    densities: Densities
    before: dict[str, int]
    after: dict[str, int]


def layer_densities(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[Layer],
    bounds: Mapping[str, float],
    how: "WidthMethod",
    context: Context,
) -> Densities:
    """How dense each layer is to be, by the source that `how.densities` names.

    Args:
        model: untrained; only read.
        inputs: example inputs.
        layers: from `list_layers`.
        bounds: what these layers may cost together, in "params" and "macs".
        how: the source, the largest density, times of layers, draws and seed.
        context: data and loss, for scores that need them.
    Raises:
        BudgetError: a budget out of reach.
        ScoreError: data that a score needs is missing.
    """
    densities = how.densities
    assert isinstance(densities, str)
    if densities == "optimal":
        costs = {measure: costs_of(layers, measure) for measure in bounds}
        limits = dict(bounds)
        if how.latency is not None:
            times, allowed = how.latency
            costs["latency_ms"] = np.array([times.get(layer.name, 0.0) for layer in layers])
            limits["latency_ms"] = allowed
        values = solve_densities(costs, limits, cap=how.cap)
        return {layer.name: float(p) for layer, p in zip(layers, values, strict=True)}
    if densities in WEIGHT_ALLOCATIONS:
        return allocate_densities(layers, dict(model.named_parameters()), bounds, densities)
    data = None if context.data is None else list(context.data)
    context = replace(context, data=data)
    total = dict.fromkeys((layer.name for layer in layers), 0.0)
    for draw in range(how.draws):
        drawn = reset_(duplicate(model), seed=how.seed * how.draws + draw) if draw else model
        masks = choose_weights(drawn, inputs, layers, bounds, densities, context, seed=how.seed)
        for name, p in densities_of(layers, masks).items():
            total[name] += p / how.draws
    return total


def design(
    model: nn.Module,
    inputs: Inputs,
    graph: Graph,
    limits: Mapping[str, int],
    how: "WidthMethod",
    context: Context | None = None,
) -> Design:
    """Choose widths; nothing is cut.

    Formulas are asked again for more or less of each cost until the widths they lead to cost what is allowed; what
    still differs, and what scores or given densities lead to, is corrected by one factor for all (`meet_budget`).

    Args:
        model: untrained; only read.
        inputs: example inputs.
        graph: of the model.
        limits: largest cost of the whole network, by measure; none with given densities: what these cost in weights.
        how: where densities come from, and what widths may be.
        context: data and loss, for densities by scores.
    Raises:
        BudgetError: a budget out of reach.
    """
    context = context or Context()
    if not graph.groups:
        raise BudgetError("no width can change: the model has no group of removable units (see graph.frozen)")
    cost, layers = Cost(graph), list_layers(graph, classifier=True)
    densities, latency = how.densities, how.latency
    if not isinstance(densities, str):
        _check_densities(densities, layers, how.cap)
    if latency is not None:
        _check_times(latency, layers)
    widths = Widths(graph, layers)
    tied = widths.streams([name for name, m in model.named_modules() if getattr(m, "groups", 1) > 1])
    keep = [] if how.streams == "shared" else tied
    measures = list(limits) or ["params"]
    weigh = sum(costs_of(layers, m) / costs_of(layers, m).sum() for m in measures if m != "units")
    times = (
        np.array([latency[0].get(layer.name, 0.0) for layer in layers]) if latency else np.zeros(len(layers))
    )

    def milliseconds(kept: Vector) -> float:
        return float(times @ widths.densities(kept / widths.units))

    def fitted(p: Mapping[str, float]) -> Vector:
        shared = how.streams == "shared"
        return fit_shares(widths, p, streams=tied, shared=shared, rule=how.rule, cap=how.cap, weigh=weigh)

    able = [layer for layer, can in zip(layers, widths.change(keep), strict=True) if can]
    if not isinstance(densities, str) and not limits and latency is None:
        gone = sum((1 - densities.get(layer.name, 1.0)) * layer.weights for layer in able)
        limits = {"params": int(cost.params() - gone + 1e-6)}
    bounds = layer_bounds(able, limits, {m: cost.of(m) for m in limits})
    if isinstance(densities, str):
        if latency is not None:
            bounds["latency_ms"] = latency[1]
        fixed = {m: limits[m] - bound for m, bound in bounds.items() if m in limits}

        def wanted(allowed: Mapping[str, float]) -> Densities:
            own = {m: bound for m, bound in allowed.items() if m in limits}
            timed = (latency[0], allowed["latency_ms"]) if latency else None
            return layer_densities(
                model, inputs, able, own, replace(how, latency=timed) if timed else how, context
            )

        def spent(measure: str, shares: Vector) -> float:
            if measure == "latency_ms":
                return milliseconds(shares * widths.units)
            return cost.soft(measure, torch.as_tensor(shares * widths.units)).item() - fixed[measure]

        targets = wanted(bounds)
        shares = fitted(targets)
        if densities not in SCORED:
            shares = _asked_again(bounds, shares, lambda allowed: fitted(wanted(allowed)), spent)
    else:
        targets = {layer.name: densities[layer.name] for layer in able if layer.name in densities}
        shares = fitted(targets)

    def fits(least: Sequence[int]) -> bool:
        kept = [n if g in keep else k for g, (n, k) in enumerate(zip(cost.full, least, strict=True))]
        return cost.within(limits, kept) and (latency is None or milliseconds(np.array(kept)) <= latency[1])

    multiples = choose_multiples(model, graph, how.round_to, fits, min_keep=how.min_keep)
    kept = meet_budget(
        cost,
        shares,
        limits,
        keep=keep,
        cap=how.cap,
        min_keep=how.min_keep,
        round_to=multiples.units,
        extra={"latency_ms": (milliseconds, latency[1])} if latency else {},
    )
    realised = widths.densities(np.array(kept) / widths.units)
    return Design(
        graph,
        dict(limits),
        tuple(kept),
        multiples,
        targets,
        {layer.name: float(p) for layer, p in zip(layers, realised, strict=True)},
        before=cost.all(),
        after=cost.all(kept),
    )


def _asked_again(
    bounds: Mapping[str, float],
    shares: Vector,
    shares_for: Callable[[Mapping[str, float]], Vector],
    spent: Callable[[str, Vector], float],
) -> Vector:
    """Shares of widths that cost what the bounds allow: a formula knows densities, of which widths make something else,
    so it is asked for more or less of each cost.
    """
    allowed = dict(bounds)
    for _ in range(REPEATS):
        for m, bound in bounds.items():
            factor = bound / max(spent(m, shares), 0.1 * bound)
            allowed[m] = min(max(factor * allowed[m], 0.1 * bound), 10 * bound)
        try:
            shares = shares_for(allowed)
        except BudgetError:  # less than one weight per layer
            break
    return shares


def limits_of(graph: Graph, budget: Budget | None, how: "WidthMethod") -> dict[str, int]:
    """Largest cost of the whole network, by measure; empty where densities or latency alone decide."""
    cost = Cost(graph)
    if budget is not None:
        return cost.limits(budget)
    if isinstance(how.densities, str) and how.latency is None:
        raise BudgetError("no budget: give one, or a density for each layer")
    return {}


def _check_densities(densities: Mapping[str, float], layers: Sequence[Layer], cap: float) -> None:
    known = {layer.name for layer in layers}
    for name, p in densities.items():
        if name not in known:
            raise BudgetError(unknown("layer", name, known))
        if not 0 < p <= cap:
            raise BudgetError(f"density {p} of layer {name!r}; expected above 0, at most {cap:g}")


def _check_times(latency: tuple[Mapping[str, float], float], layers: Sequence[Layer]) -> None:
    known = {layer.name for layer in layers}
    for name, ms in latency[0].items():
        if name not in known:
            raise BudgetError(unknown("layer", name, known))
        if not 0 <= ms < np.inf:
            raise BudgetError(f"latency of layer {name!r}: {ms} ms; expected a number, at least 0")
