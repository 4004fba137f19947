"""PreCropping and PreConfig: widths before training, from densities; then one training of a dense, smaller network."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
from secateur.allocate.widths import Widths, fit_shares, meet_budget
from secateur.cost import Budget, Cost
from secateur.engine.pruned import Pruned, cut_and_prove
from secateur.errors import BudgetError, CutError, unknown
from secateur.graph import Graph, Inputs, analyze
from secateur.methods.at_init import INITIAL_SCORES, densities_of, initial_masks, layer_bounds
from secateur.methods.precrop.reset import reset_
from secateur.methods.precrop.widen import widen_
from secateur.plan import Plan
from secateur.scores.at_init import Loss

DENSITIES = (
    {"optimal": "greatest product of densities under the budget, in closed form"}
    | {name: INITIAL_SCORES[name] for name in ("synflow", "snip", "grasp")}
    | {name: WEIGHT_ALLOCATIONS[name].summary for name in ("erk", "smart-ratio", "uniform")}
)
"""Where densities come from -> one line for lists of choices."""

STREAMS = {
    "keep": "residual streams keep their width",
    "shared": "each stream shrinks by one factor, the mean of what its layers ask for",
}
"""What happens to residual streams -> one line for lists of choices."""


REPEATS = 12
"""Times that a formula is asked again for other amounts; after a few the cost hardly moves."""


@dataclass(frozen=True)
class Design:
    """Widths of a network that is not built yet.

    Attributes:
        graph: of the dense model.
        limits: largest cost of the whole network, by measure.
        widths: units per group of it.
        targets: density that each layer was to have, of those whose widths can change.
        densities: density that it has at these widths.
        before, after: cost by measure, dense and at these widths.
    """

    graph: Graph
    limits: dict[str, int]
    widths: tuple[int, ...]
    targets: Densities
    densities: Densities
    before: dict[str, int]
    after: dict[str, int]


def layer_densities(
    model: nn.Module,
    inputs: Inputs,
    layers: Sequence[Layer],
    bounds: Mapping[str, float],
    densities: str = "optimal",
    *,
    cap: float = 1.0,
    latency: tuple[Mapping[str, float], float] | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Loss = nn.functional.cross_entropy,
    draws: int = 3,
    seed: int = 0,
) -> Densities:
    """How dense each layer is to be.

    Args:
        model: untrained; only read.
        inputs: example inputs.
        layers: from `list_layers`.
        bounds: what these layers may cost together, in "params" and "macs".
        densities: a name in `DENSITIES`.
        cap: largest density, for "optimal".
        latency: (milliseconds per layer at density 1, how many of them are allowed), for "optimal".
        data: (inputs, targets) batches, for "snip" and "grasp".
        loss: of (outputs, targets), a mean over the batch.
        draws: networks whose densities are averaged, for scores: the given one and others with weights drawn again.
        seed: of what is drawn.
    Raises:
        BudgetError: unknown source, or a budget out of reach.
        ScoreError: data that a score needs is missing.
    """
    if densities not in DENSITIES:
        raise BudgetError(unknown("source of densities", densities, DENSITIES))
    if draws < 1:
        raise BudgetError(f"draws is {draws}; expected at least 1")
    if densities != "optimal" and (cap > 1 or latency):
        raise BudgetError(
            f"densities={densities!r} knows no growth and no latency; choose densities='optimal'"
        )
    if densities == "optimal":
        costs = {measure: costs_of(layers, measure) for measure in bounds}
        limits = dict(bounds)
        if latency is not None:
            times, allowed = latency
            costs["latency_ms"] = np.array([times.get(layer.name, 0.0) for layer in layers])
            limits["latency_ms"] = allowed
        values = solve_densities(costs, limits, cap=cap)
        return {layer.name: float(p) for layer, p in zip(layers, values, strict=True)}
    if densities in WEIGHT_ALLOCATIONS:
        return allocate_densities(layers, dict(model.named_parameters()), bounds, densities)
    data = None if data is None else list(data)
    total = dict.fromkeys((layer.name for layer in layers), 0.0)
    for draw in range(draws):
        drawn = reset_(copy.deepcopy(model), seed=seed * draws + draw) if draw else model
        masks = initial_masks(drawn, inputs, layers, bounds, densities, data=data, loss=loss, seed=seed)
        for name, p in densities_of(layers, masks).items():
            total[name] += p / draws
    return total


def design(
    model: nn.Module,
    inputs: Inputs,
    limits: Mapping[str, int],
    *,
    densities: str | Mapping[str, float] = "optimal",
    streams: str = "keep",
    rule: str = "fit",
    cap: float = 1.0,
    latency: tuple[Mapping[str, float], float] | None = None,
    freeze: Sequence[str] = (),
    min_keep: int = 1,
    round_to: int = 1,
    graph: Graph | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Loss = nn.functional.cross_entropy,
    draws: int = 3,
    seed: int = 0,
) -> Design:
    """Choose widths; nothing is cut.

    Formulas are asked again for more or less of each cost until the widths they lead to cost what is allowed; what
    still differs, and what scores or given densities lead to, is corrected by one factor for all (`meet_budget`).

    Args:
        model: untrained; only read.
        inputs: example inputs.
        limits: largest cost of the whole network, by measure; none with given densities: what these cost in weights.
        densities: a name in `DENSITIES`, or a density per layer. Layers left out have no say, nor have those whose
            width cannot change.
        streams: a name in `STREAMS`.
        rule: a name in `secateur.allocate.widths.RULES`.
        cap: largest density and share.
        latency: (milliseconds per layer at density 1, how many of them are allowed).
        freeze: module names or shell patterns that keep their widths.
        min_keep: units that every group keeps at least.
        round_to: widths are multiples of this, or what they were.
        graph: from `analyze`, if it is known.
        data, loss, draws, seed: as for `layer_densities`.
    Raises:
        BudgetError: an unknown name, or a budget out of reach.
    """
    if streams not in STREAMS:
        raise BudgetError(unknown("streams", streams, STREAMS))
    for name, number in (("min_keep", min_keep), ("round_to", round_to), ("cap", cap)):
        if not 1 <= number < np.inf:
            raise BudgetError(f"{name} is {number}; expected at least 1")
    graph = graph or analyze(model, inputs, freeze=freeze)
    if not graph.groups:
        raise BudgetError("no width can change: the model has no group of removable units (see graph.frozen)")
    cost, layers = Cost(graph), list_layers(graph, classifier=True)
    if not isinstance(densities, str):
        _check_densities(densities, layers, cap)
    if latency is not None:
        _check_times(latency, layers)
    widths = Widths(graph, layers)
    tied = widths.streams([name for name, m in model.named_modules() if getattr(m, "groups", 1) > 1])
    keep = [] if streams == "shared" else tied
    measures = list(limits) or ["params"]
    weigh = sum(costs_of(layers, m) / costs_of(layers, m).sum() for m in measures if m != "units")
    times = (
        np.array([latency[0].get(layer.name, 0.0) for layer in layers]) if latency else np.zeros(len(layers))
    )

    def milliseconds(kept: Vector) -> float:
        return float(times @ widths.densities(kept / widths.units))

    def fitted(p: Mapping[str, float]) -> Vector:
        shared = streams == "shared"
        return fit_shares(widths, p, streams=tied, shared=shared, rule=rule, cap=cap, weigh=weigh)

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
            given: dict[str, Any] = {"data": data, "loss": loss, "draws": draws, "seed": seed}
            return layer_densities(model, inputs, able, own, densities, cap=cap, latency=timed, **given)

        def spent(measure: str, shares: Vector) -> float:
            if measure == "latency_ms":
                return milliseconds(shares * widths.units)
            return cost.soft(measure, torch.as_tensor(shares * widths.units)).item() - fixed[measure]

        targets = wanted(bounds)
        shares = fitted(targets)
        if densities not in INITIAL_SCORES:
            shares = _asked_again(bounds, shares, lambda allowed: fitted(wanted(allowed)), spent)
    else:
        targets = {layer.name: densities[layer.name] for layer in able if layer.name in densities}
        shares = fitted(targets)
    kept = meet_budget(
        cost,
        shares,
        limits,
        keep=keep,
        cap=cap,
        min_keep=min_keep,
        round_to=round_to,
        extra={"latency_ms": (milliseconds, latency[1])} if latency else {},
    )
    realised = widths.densities(np.array(kept) / widths.units)
    return Design(
        graph,
        dict(limits),
        tuple(kept),
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


def precrop(
    model: nn.Module,
    inputs: Inputs,
    budget: Budget | None,
    *,
    densities: str | Mapping[str, float] = "optimal",
    streams: str = "keep",
    rule: str = "fit",
    latency: tuple[Mapping[str, float], float] | None = None,
    freeze: Sequence[str] = (),
    min_keep: int = 1,
    round_to: int = 1,
    initialise: Callable[[nn.Module], object] | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Loss = nn.functional.cross_entropy,
    draws: int = 3,
    seed: int = 0,
) -> Pruned:
    """Make a copy of an untrained network narrower, with fresh weights, to be trained once.

    Args:
        model: untrained; it is only read.
        inputs: example inputs.
        budget: what the result may cost at most; None with densities that are given: what these cost in weights.
        densities: a name in `DENSITIES`, or a density per layer. Layers left out have no say, nor have those whose
            width cannot change.
        streams: a name in `STREAMS`: what happens to residual streams.
        rule: a name in `secateur.allocate.widths.RULES`.
        latency: (milliseconds per layer at density 1, how many of them are allowed), a further bound.
        freeze: module names or shell patterns that keep their widths.
        min_keep: units that every group keeps at least.
        round_to: widths are multiples of this, or what they were.
        initialise: draws the weights of the narrow model in place; None: `secateur.methods.precrop.reset.reset_`.
        data, loss, draws: for densities by scores, as for `layer_densities`.
        seed: of what is drawn.
    Returns:
        the narrow network; the proof is of the cut, before its weights were drawn again.
    Raises:
        CaptureError, BudgetError, ScoreError: see `analyze` and `design`.
        CutError: the model's forward cannot run at other widths, or the result is not equal.
    Source: Cai et al. 2022, arXiv:2203.02549 (PreCropping) and its later versions (PreCrop).
    Differs: a reconstruction, see docs/precrop.md. Units that stay are spread evenly over a group rather than the
    first; fresh weights make this the same network.
    """
    settings = {
        "method": "precrop",
        "densities": densities if isinstance(densities, str) else dict(densities),
        "streams": streams,
        "rule": rule,
        "freeze": list(freeze),
        "min_keep": min_keep,
        "round_to": round_to,
        "seed": seed,
    }
    graph = analyze(model, inputs, freeze=freeze)
    found = design(
        model,
        inputs,
        limits_of(graph, budget, densities, latency),
        densities=densities,
        streams=streams,
        rule=rule,
        latency=latency,
        min_keep=min_keep,
        round_to=round_to,
        graph=graph,
        data=data,
        loss=loss,
        draws=draws,
        seed=seed,
    )
    return _built(model, found, freeze, initialise, seed, settings | {"budget": _bounds(budget)})


def limits_of(
    graph: Graph, budget: Budget | None, densities: str | Mapping[str, float], latency: object
) -> dict[str, int]:
    """Largest cost of the whole network, by measure; empty where densities or latency alone decide."""
    cost = Cost(graph)
    if budget is not None:
        return budget.limits({name: cost.of(name) for name in budget.bounds})
    if isinstance(densities, str) and latency is None:
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


def preconfig(
    model: nn.Module,
    inputs: Inputs,
    budget: Budget,
    *,
    cap: float = 2.0,
    densities: str | Mapping[str, float] = "optimal",
    rule: str = "fit",
    latency: tuple[Mapping[str, float], float] | None = None,
    streams: str = "keep",
    freeze: Sequence[str] = (),
    min_keep: int = 1,
    round_to: int = 1,
    initialise: Callable[[nn.Module], object] | None = None,
    seed: int = 0,
) -> Pruned:
    """Give an untrained network other proportions: some layers grow, some shrink.

    Parameters and MACs are both bounded; what the budget does not name may cost what it does now.

    Args:
        model: untrained; only read. Layers that grow must be stock convolutions, linear layers or batch norms.
        inputs: example inputs.
        budget: of parameters or MACs, or both.
        cap: largest density and share of units.
        densities: "optimal", or a density per layer.
        rule, latency, streams, freeze, min_keep, round_to, initialise, seed: as for `precrop`.
    Returns:
        the network; `graph` and `plan` are of the widened one that it was cut from, with proof of that cut.
    Raises:
        CutError: a layer that is to grow cannot, or the model's forward cannot run at other widths.
        CaptureError, BudgetError: see `precrop`.
    Source: Cai et al., later versions of arXiv:2203.02549 (PreConfig).
    Differs: a reconstruction, see docs/precrop.md; the cap is our choice.
    """
    graph = analyze(model, inputs, freeze=freeze)
    cost = Cost(graph)
    dense = {"macs": cost.macs(), "params": cost.params()}
    limits = dense | budget.limits({name: cost.of(name) for name in budget.bounds})
    found = design(
        model,
        inputs,
        limits,
        densities=densities,
        rule=rule,
        latency=latency,
        cap=cap,
        streams=streams,
        min_keep=min_keep,
        round_to=round_to,
        graph=graph,
        seed=seed,
    )
    settings = {
        "method": "preconfig",
        "densities": densities if isinstance(densities, str) else dict(densities),
        "rule": rule,
        "budget": _bounds(budget),
        "cap": cap,
        "streams": streams,
        "freeze": list(freeze),
        "min_keep": min_keep,
        "round_to": round_to,
        "seed": seed,
    }
    return _built(model, found, freeze, initialise, seed, settings)


def _bounds(budget: Budget | None) -> dict[str, float]:
    return budget.bounds if budget else {}


def _built(
    model: nn.Module,
    found: Design,
    freeze: Sequence[str],
    initialise: Callable[[nn.Module], object] | None,
    seed: int,
    origin: dict[str, Any],
) -> Pruned:
    """The network of a design: widened where groups grow, cut where they shrink, proven, and drawn again."""
    graph, whole = found.graph, model
    widths = dict(zip((group.name for group in graph.groups), found.widths, strict=True))
    if any(widths[group.name] > group.units for group in graph.groups):
        whole = widen_(copy.deepcopy(model), graph, [max(g.units, widths[g.name]) for g in graph.groups])
        reset_(whole, seed=seed)
        graph = analyze(whole, graph.inputs, freeze=freeze)
        if {group.name for group in graph.groups} != widths.keys():
            raise CutError(
                f"{type(model).__name__}: channels are tied otherwise once it is wider. Allow no growth (cap=1)."
            )
    masks = [spread(group.units, widths[group.name]) for group in graph.groups]
    plan = Plan.of(graph, masks, origin | {"widths": widths, "densities": found.densities})
    pruned = cut_and_prove(whole, graph, plan, [mask.float() for mask in masks], seed=seed)
    if {m: pruned.after[m] for m in found.after} != found.after:
        raise CutError(
            f"{type(model).__name__}: the network costs {dict(pruned.after)}, the design {found.after}. Please report "
            f"this model."
        )
    if initialise is None:
        reset_(pruned.model, seed=seed)
    else:
        initialise(pruned.model)
    return replace(pruned, before=found.before, after=found.after)


def spread(units: int, kept: int) -> Tensor:
    """Mask of `kept` of `units` units, evenly spaced: zeros padded on two sides go from both.

    >>> spread(6, 3).tolist()
    [False, True, False, True, False, True]
    """
    mask = torch.zeros(units, dtype=torch.bool)
    mask[((torch.arange(kept) + 0.5) * units / kept).long()] = True
    return mask
