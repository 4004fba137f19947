"""The table of allocations, and the one way in which each of them lands on a budget.

An allocation is an order: a path from everything kept to as little as is allowed, on which costs only fall.
`allocate` finds the first point of the path that fits the budget, then restores single units, best first,
until not one more fits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.cost import Budget, Cost
from secateur.errors import BudgetError, unknown

Path = Callable[[float], list[int]]
"""Fraction t of the way, 0 = all kept, 1 = the least -> units kept per group; never grows with t."""


@dataclass(frozen=True)
class Allocation:
    """An entry of the table.

    Attributes:
        path: (scores per group, least units per group) -> the path.
        summary: one line for lists of choices.
    """

    path: Callable[[Sequence[Tensor], Sequence[int]], Path]
    summary: str


def uniform(scores: Sequence[Tensor], least: Sequence[int]) -> Path:
    """Keep the same share of every group.

    Source: the usual control, for example Li et al. 2017, arXiv:1608.08710, sec. 3.2. Differs: nothing.
    """

    def path(t: float) -> list[int]:
        return [max(low, round(len(s) * (1 - t))) for s, low in zip(scores, least, strict=True)]

    return path


def global_(scores: Sequence[Tensor], least: Sequence[int]) -> Path:
    """Rank the units of all groups together and remove the lowest.

    Scores are divided by their mean within the group, so that layers of different scale can be compared.

    Source: Molchanov et al. 2017, arXiv:1611.06440, sec. 2.2 (layer-wise normalised global ranking).
    Differs: divided by the mean of the group; the paper divides by the L2 norm.
    """
    group = np.concatenate([np.full(len(s), i) for i, s in enumerate(scores)])
    value = np.concatenate([_relative(s).numpy() for s in scores])
    rank = np.concatenate([np.argsort(np.argsort(-s.numpy(), kind="stable"), kind="stable") for s in scores])
    removable = rank >= np.concatenate([np.full(len(s), low) for s, low in zip(scores, least, strict=True)])
    order = np.lexsort((group, value))
    order = group[order][removable[order]]

    def path(t: float) -> list[int]:
        removed = np.bincount(order[: round(t * len(order))], minlength=len(scores))
        return [len(s) - int(gone) for s, gone in zip(scores, removed, strict=True)]

    return path


def _relative(score: Tensor) -> Tensor:
    mean = score.abs().mean()
    return score / mean if mean > 0 else score


ALLOCATIONS: dict[str, Allocation] = {
    "global": Allocation(global_, "rank all units together, each score relative to its group's mean"),
    "uniform": Allocation(uniform, "keep the same share of every group"),
}


def allocate(
    scores: Sequence[Tensor],
    cost: Cost,
    budget: Budget,
    allocation: str = "global",
    *,
    min_keep: int = 1,
    round_to: int = 1,
) -> list[Tensor]:
    """Choose the units to keep: as many as the budget allows.

    Args:
        scores: (units,) per group of `cost.graph`; higher = keep.
        cost: what widths cost.
        budget: every bound is met from below; no single further unit (or step of `round_to`) would fit.
        allocation: a name in `ALLOCATIONS`.
        min_keep: units that every group keeps at least.
        round_to: kept units per group are a multiple of this, or all of them.
    Returns:
        (units,) bool per group, True = keep.
    Raises:
        BudgetError: unknown allocation, or a budget out of reach; the message gives the reachable range.
    """
    if allocation not in ALLOCATIONS:
        raise BudgetError(unknown("allocation", allocation, ALLOCATIONS))
    if min_keep < 1 or round_to < 1:
        raise BudgetError(f"min_keep={min_keep}, round_to={round_to}: both must be at least 1")
    if not scores:
        raise BudgetError("nothing can be pruned: the model has no group of removable units (see graph.frozen)")
    levels = [_levels(len(score), min_keep, round_to) for score in scores]
    dense = {name: cost.of(name) for name in budget.bounds}
    limits = budget.limits(dense)

    def fits(kept: Sequence[int]) -> bool:
        return all(cost.of(name, kept) <= limit for name, limit in limits.items())

    least = [level[0] for level in levels]
    if not fits(least):
        ranges = ", ".join(
            f"{name} {budget.bounds[name]:g} asks for at most {limit:,}; reachable are {cost.of(name, least):,} "
            f"({cost.of(name, least) / dense[name]:.4f} of the dense model) to {dense[name]:,}"
            for name, limit in limits.items()
        )
        raise BudgetError(
            f"budget out of reach with min_keep={min_keep}, round_to={round_to}: {ranges}. "
            f"Ask for more, or lower min_keep or round_to."
        )
    path = ALLOCATIONS[allocation].path(scores, least)

    def on_levels(t: float) -> list[int]:
        return [level[np.searchsorted(level, k, side="right") - 1] for level, k in zip(levels, path(t), strict=True)]

    kept = _fill(_first_fit(on_levels, fits), levels, scores, fits)
    return [_top(score, k) for score, k in zip(scores, kept, strict=True)]


def _levels(units: int, min_keep: int, round_to: int) -> list[int]:
    """Numbers of units a group may keep, ascending."""
    low = min(units, -(-min_keep // round_to) * round_to)
    return sorted({*range(low, units + 1, round_to), units})


def _first_fit(path: Path, fits: Callable[[Sequence[int]], bool]) -> list[int]:
    """The point nearest the start of the path that fits, by bisection; its end is known to fit."""
    low, high = 0.0, 1.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(path(middle)) else (middle, high)
    return path(high)


def _fill(
    kept: list[int], levels: list[list[int]], scores: Sequence[Tensor], fits: Callable[[Sequence[int]], bool]
) -> list[int]:
    """Restore units while one still fits, the best relative score first.

    A group that does not fit now never will: restoring others only makes its units dearer.
    """
    ranked = [_relative(score).sort(descending=True).values.tolist() for score in scores]
    step = [level.index(k) for level, k in zip(levels, kept, strict=True)]
    open_groups = {i for i, level in enumerate(levels) if step[i] + 1 < len(level)}
    while open_groups:
        best = max(open_groups, key=lambda i: (ranked[i][kept[i]], -i))
        trial = list(kept)
        trial[best] = levels[best][step[best] + 1]
        if fits(trial):
            kept, step[best] = trial, step[best] + 1
            if step[best] + 1 == len(levels[best]):
                open_groups.remove(best)
        else:
            open_groups.remove(best)
    return kept


def _top(score: Tensor, k: int) -> Tensor:
    """The k units with the highest score; of equals, the first."""
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[score.sort(descending=True, stable=True).indices[:k]] = True
    return mask
