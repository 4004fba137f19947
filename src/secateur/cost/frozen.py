"""Why a model cannot become cheaper: the layers that stay, what they cost, and what would free them."""

from collections.abc import Sequence

from secateur.cost.cost import Cost
from secateur.measures import MEASURES

FREED = {
    "frozen by the user": "leave it out of freeze",
    "model output": "cut the task's outputs yourself, if it needs fewer",
    "no rule for": "write it with operators that have a rule",
    "meets a tensor whose channels are fixed": "make that tensor by a layer or as a parameter",
    "tied to channels that are given": "put a layer between it and what is given",
    "channels are ": "take runs of channels by split or chunk instead",
    "one channel is selected": "take runs of channels by split or chunk instead",
    "a single channel": "give it more than one channel",
    "positions of a convolution kernel": "none of it can go",
}
"""How a reason starts -> what would free the layer."""


def what_stays(cost: Cost, measure: str, least: Sequence[int], *, most: int = 3) -> str:
    """The layers with frozen outputs that cost most at some widths, by their reasons and with what would free them.

    Args:
        cost: of the model.
        measure: by which they are ranked; parameters, or else MACs.
        least: units kept of every group.
        most: reasons that are named.
    Returns:
        a sentence, or "" if nothing is frozen.
    """
    measure = measure if measure == "params" else "macs"
    costs: dict[str, int] = {}
    for name, number in cost.layers(least, measure).items():
        layer = name if measure == "macs" else name.rpartition(".")[0]
        costs[layer] = costs.get(layer, 0) + number
    reasons: dict[str, dict[str, int]] = {}
    for item in cost.graph.frozen:
        layers = reasons.setdefault(item.reason.partition(" (in ")[0], {})
        layers[item.name or "the model itself"] = costs.get(item.name, 0)
    parts = []
    for reason, layers in sorted(reasons.items(), key=lambda pair: -sum(pair[1].values()))[:most]:
        named = sorted(layers, key=lambda name: -layers[name])
        names = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
        total = f"{sum(layers.values()):,} {MEASURES[measure].label}"
        parts.append(f"{names} ({total}): {reason}{_freed(reason)}")
    return f" What stays and costs most: {'; '.join(parts)}." if parts else ""


def _freed(reason: str) -> str:
    words = next((words for start, words in FREED.items() if reason.startswith(start)), None)
    return f" – {words}" if words else ""
