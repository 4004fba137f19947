"""How many single weights each layer keeps: the table of allocations by closed formulas.

Each takes the layers' weights and a total, and keeps exactly that many in all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.errors import BudgetError
from secateur.imports import look_up

Counts = dict[str, int]
"""Layer -> weights it keeps."""


Rule = Callable[[Mapping[str, Tensor], int], dict[str, float]]
"""(weights per layer in the order of the model, weights to keep in all) -> how many of these each layer keeps: real
numbers, none above the layer's size."""


@dataclass(frozen=True)
class WeightAllocation:
    """An entry of the table.

    Attributes:
        counts: rounded by `allocate_weights`.
        summary: one line for lists of choices.
    """

    counts: Rule
    summary: str


def uniform(weights: Mapping[str, Tensor], total: int) -> dict[str, float]:
    """Keep the same share of every layer.

    Source: the usual control, for example Zhu & Gupta 2017, arXiv:1710.01878. Differs: nothing.
    """
    share = total / sum(w.numel() for w in weights.values())
    return {name: share * w.numel() for name, w in weights.items()}


def uniform_plus(weights: Mapping[str, Tensor], total: int) -> dict[str, float]:
    """Keep the first layer whole and at least a fifth of the last, and the same share of all others.

    Source: Gale et al. 2019, arXiv:1902.09574, sec. 5. Differs: the first and last layer are those of the model's
    order; a total that does not even hold these is shared out uniformly.
    """
    names = list(weights)
    fixed = {names[0]: float(weights[names[0]].numel())}
    rest = [name for name in names if name not in fixed]
    for name in (names[-1],):
        share = (total - sum(fixed.values())) / sum(weights[n].numel() for n in rest)
        if name not in fixed and share < 0.2:
            fixed[name] = 0.2 * weights[name].numel()
    left = total - sum(fixed.values())
    others = {name: weights[name] for name in names if name not in fixed}
    size = sum(w.numel() for w in others.values())
    if left < 0 or (not others and left):
        return uniform(weights, total)
    return {name: fixed[name] if name in fixed else left / size * weights[name].numel() for name in names}


def global_magnitude(weights: Mapping[str, Tensor], total: int) -> dict[str, float]:
    """Rank all weights together by magnitude.

    Source: Han et al. 2015, arXiv:1506.02626; the global variant is the usual baseline. Differs: nothing.
    """
    return _ranked({name: w.detach().abs().flatten() for name, w in weights.items()}, total)


def lamp(weights: Mapping[str, Tensor], total: int) -> dict[str, float]:
    """Rank all weights together by what each adds to its layer's larger ones.

        s(w) = w^2 / sum over v in the layer with |v| >= |w| of v^2

    Source: Lee et al. 2021, arXiv:2010.07611, sec. 2. Differs: nothing.
    """
    scores = {}
    for name, w in weights.items():
        square, order = w.detach().flatten().double().square().sort(descending=True, stable=True)
        score = torch.empty_like(square)
        score[order] = square / square.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
        scores[name] = score
    return _ranked(scores, total)


def erk(weights: Mapping[str, Tensor], total: int) -> dict[str, float]:
    """Keep weights in proportion to the sum of a layer's dims; layers that this fills stay whole.

    Source: Evci et al. 2020, arXiv:1911.11134, sec. 3 (Erdős–Rényi kernel). Differs: nothing.
    """
    whole: set[str] = set()
    while True:
        left = total - sum(weights[name].numel() for name in whole)
        dims = {name: sum(w.shape) for name, w in weights.items() if name not in whole}
        factor = left / sum(dims.values()) if dims else 0.0
        full = {name for name, size in dims.items() if factor * size > weights[name].numel()}
        if not full:
            return {
                name: float(w.numel()) if name in whole else factor * dims[name]
                for name, w in weights.items()
            }
        whole |= full


def smart_ratio(weights: Mapping[str, Tensor], total: int) -> dict[str, float]:
    """Keep less of later layers, by a formula of their place alone; three tenths of a last linear layer.

        density of layer l  ~  (L - l + 1)^2 + (L - l + 1),   l from the input, 1 … L

    Source: Su et al. 2020, arXiv:2009.11094, sec. 4 (smart ratios), and the code released with it.
    Differs: what would fill a layer beyond its size goes to the layers behind it, and where those are full to
    the first ones; VGG gets no further division by l^2.
    """
    names = list(weights)
    sizes = {name: float(w.numel()) for name, w in weights.items()}
    last = names[-1]
    fixed = 0.3 * sizes[last] if weights[last].ndim == 2 and 0.6 * sizes[last] < total else 0.0
    rest = names[:-1] if fixed and len(names) > 1 else names
    places = {name: len(rest) - number for number, name in enumerate(rest)}
    ask = {name: (place**2 + place) * sizes[name] for name, place in places.items()}
    scale = (total - (fixed if rest != names else 0.0)) / sum(ask.values())
    shares = {name: scale * ask[name] for name in rest}
    over = 0.0
    for name in [*rest, *rest]:
        shares[name], over = (
            min(sizes[name], shares[name] + over),
            max(0.0, shares[name] + over - sizes[name]),
        )
    return shares if rest == names else {**shares, last: min(sizes[last], fixed + over)}


def _ranked(scores: Mapping[str, Tensor], total: int) -> dict[str, float]:
    """How many of the `total` highest scores are in each layer; of equals, the first."""
    order = torch.cat([s.double().cpu() for s in scores.values()]).sort(descending=True, stable=True).indices
    layer = torch.repeat_interleave(
        torch.arange(len(scores)), torch.tensor([s.numel() for s in scores.values()])
    )
    kept = torch.bincount(layer[order[:total]], minlength=len(scores)).tolist()
    return {name: float(count) for name, count in zip(scores, kept, strict=True)}


WEIGHT_ALLOCATIONS: dict[str, WeightAllocation] = {
    "erk": WeightAllocation(erk, "in proportion to the sum of a layer's dims (Erdős–Rényi kernel)"),
    "global": WeightAllocation(global_magnitude, "rank the weights of all layers together by magnitude"),
    "lamp": WeightAllocation(lamp, "rank them by magnitude relative to the layer's larger weights"),
    "smart-ratio": WeightAllocation(smart_ratio, "less of later layers, by a formula of their place alone"),
    "uniform": WeightAllocation(uniform, "keep the same share of every layer"),
    "uniform+": WeightAllocation(uniform_plus, "uniform, but the first layer whole and a fifth of the last"),
}


def weight_allocation_named(value: str | Rule) -> WeightAllocation:
    """An allocation by its name in `WEIGHT_ALLOCATIONS`, by `module:function`, or the function itself.

    Raises:
        BudgetError: there is none of this name.
    """
    return look_up("allocation", value, WEIGHT_ALLOCATIONS, WeightAllocation, BudgetError)


def allocate_weights(weights: Mapping[str, Tensor], total: int, allocation: str | Rule) -> Counts:
    """How many weights each layer keeps: at least one, and exactly `total` in all.

    Args:
        weights: per layer, any shape.
        total: weights to keep.
        allocation: a name in `WEIGHT_ALLOCATIONS`, `module:function`, or a function like those in the table.
    Raises:
        BudgetError: unknown allocation, or a total out of reach; the message gives the reachable range.

    >>> allocate_weights({"a": torch.ones(2, 8), "b": torch.ones(4, 8)}, 12, "uniform")
    {'a': 4, 'b': 8}
    """
    chosen = weight_allocation_named(allocation)
    sizes = {name: w.numel() for name, w in weights.items()}
    if not len(sizes) <= total <= sum(sizes.values()) or not sizes:
        raise BudgetError(
            f"{total:,} weights to keep: out of reach; within reach are {len(sizes):,} (one per layer) to "
            f"{sum(sizes.values()):,}"
        )
    shares = chosen.counts(weights, total)
    counts = {name: min(sizes[name], max(1, int(np.floor(share + 1e-9)))) for name, share in shares.items()}
    return meet_total(counts, sizes, total)


def meet_total(counts: Counts, sizes: Counts, total: int) -> Counts:
    """Counts that sum to `total` exactly: what is left over, or overdrawn, is shared out as counts are.

    >>> meet_total({"a": 5, "b": 3}, {"a": 5, "b": 9}, 10)
    {'a': 5, 'b': 5}
    """
    counts = dict(counts)
    while (left := total - sum(counts.values())) != 0:
        able = [n for n in counts if (counts[n] < sizes[n] if left > 0 else counts[n] > 1)]
        size = sum(counts[n] for n in able)
        for name in sorted(able, key=lambda n: -counts[n]):
            now = total - sum(counts.values())
            if now == 0:
                break
            step = max(1, round(abs(left) * counts[name] / size))
            if now > 0:
                counts[name] += min(step, now, sizes[name] - counts[name])
            else:
                counts[name] -= min(step, -now, counts[name] - 1)
    return counts
