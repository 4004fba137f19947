"""The controls of precropping: as dense in every layer as the crop, at random places of a network of full width."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from secateur.allocate.density import list_layers
from secateur.cost import Budget, Cost
from secateur.errors import BudgetError, unknown
from secateur.graph import Inputs, analyze
from secateur.methods.at_init import Sparse, layer_bounds, masked, random_masks
from secateur.methods.precrop.crop import design, limits_of
from secateur.scores.at_init import Loss

PLACES = {
    "weights": "single weights, drawn at random in each layer",
    "filters": "whole filters, drawn at random in each layer",
}
"""What a mask may keep at the densities of a crop -> one line for lists of choices."""


def crop_masks(
    model: nn.Module,
    inputs: Inputs,
    budget: Budget | None,
    *,
    granularity: str = "weights",
    densities: str | Mapping[str, float] = "optimal",
    streams: str = "keep",
    rule: str = "fit",
    freeze: Sequence[str] = (),
    min_keep: int = 1,
    round_to: int = 1,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Loss = nn.functional.cross_entropy,
    draws: int = 3,
    seed: int = 0,
) -> Sparse:
    """Mask a fresh network at random, each layer as dense as `precrop` with the same arguments would leave it.

    If the claim holds that only densities matter, the three train to the same accuracy. Only the crop trains faster.
    Layers that the crop leaves whole stay whole. Layers are drawn independently of each other, as densities are meant:
    a filter that stays also reads what is at zero, while a layer of the crop reads only what the layer before makes.

    Args:
        model: untrained; it is only read.
        inputs: example inputs.
        budget: of parameters, MACs or both; a weight at zero costs nothing. None with densities that are given.
        granularity: a name in `PLACES`.
        densities, streams, rule, freeze, min_keep, round_to: as for `precrop`.
        data, loss, draws: for densities by scores, as for `precrop`.
        seed: of the places.
    Returns:
        the masked network. A budget of parameters leaves it slightly less dense than the crop, whose norms are
        narrower too.
    Raises:
        CaptureError, BudgetError, ScoreError: see `precrop`.
    Source: Cai et al. 2022, arXiv:2203.02549: random pruning of weights and of filters at equal densities.
    Differs: known from the abstract and reviews only.
    """
    if granularity not in PLACES:
        raise BudgetError(unknown("granularity", granularity, PLACES))
    graph = analyze(model, inputs, freeze=freeze)
    found = design(
        model,
        inputs,
        limits_of(graph, budget, densities, None),
        densities=densities,
        streams=streams,
        rule=rule,
        min_keep=min_keep,
        round_to=round_to,
        graph=graph,
        data=data,
        loss=loss,
        draws=draws,
        seed=seed,
    )
    limits = found.limits
    layers = [layer for layer in list_layers(graph, classifier=True) if found.densities[layer.name] < 1]
    bounds = layer_bounds(layers, limits, {name: Cost(graph).of(name) for name in limits})
    masks = random_masks(model, graph, layers, found.densities, bounds, granularity, seed=seed)
    origin = {
        "method": "precrop",
        "granularity": granularity,
        "densities": densities if isinstance(densities, str) else dict(densities),
        "streams": streams,
        "rule": rule,
        "freeze": list(freeze),
        "min_keep": min_keep,
        "round_to": round_to,
        "seed": seed,
        "budget": budget.bounds if budget else {},
    }
    return masked(model, graph, layers, masks, origin)
