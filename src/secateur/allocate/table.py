"""The table of allocations, and the one way in which each of them meets a budget.

An allocation is an order: whose units leave first. `allocate` removes along it until the budget holds, then
restores units, the last removed first, until no more fit. Where widths are multiples, whole steps leave and return.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.cost import Budget, Cost
from secateur.cost.frozen import what_stays
from secateur.errors import BudgetError
from secateur.graph import Group
from secateur.imports import look_up
from secateur.settings import checked

Order = npt.NDArray[np.int64]
"""The group that gives up a unit, step by step; a group gives its lowest units first."""

Fits = Callable[[Sequence[int]], bool]


Rule = Callable[[Sequence[Tensor], Sequence[int]], Order]
"""(scores per group, least units per group) -> the order in which groups give up units."""


@dataclass(frozen=True)
class Allocation:
    """An entry of the table.

    Attributes:
        order: names the group of every unit but the least ones, in the order in which they leave.
        summary: one line for lists of choices.
    """

    order: Rule
    summary: str


def uniform(scores: Sequence[Tensor], least: Sequence[int]) -> Order:
    """Keep the same share of every group.

    Source: the usual control, for example Li et al. 2017, arXiv:1608.08710, sec. 3.2. Differs: nothing.

    >>> uniform([torch.ones(2), torch.ones(4)], [1, 1])
    array([1, 0, 1, 1])
    """
    return _by_value([(np.arange(len(s)) + 0.5) / len(s) for s in scores], least)


def global_(scores: Sequence[Tensor], least: Sequence[int]) -> Order:
    """Rank the units of all groups together and remove the lowest.

    Source: Molchanov et al. 2017, arXiv:1611.06440, sec. 2.2.
    Differs: scores without a common unit are divided by the mean of their group; the paper divides by the
    L2 norm.

    >>> global_([torch.tensor([5., 1.]), torch.tensor([2., 3., 4.])], [1, 1])
    array([0, 1, 1])
    """
    return _by_value([np.sort(s.numpy()) for s in scores], least)


def _by_value(values: Sequence[npt.NDArray[np.floating]], least: Sequence[int]) -> Order:
    """Order steps by ascending values per group; the last `least` of each group stay."""
    steps = [v[: len(v) - low] for v, low in zip(values, least, strict=True)]
    group = np.repeat(np.arange(len(steps)), [len(v) for v in steps])
    return group[np.argsort(np.concatenate(steps), kind="stable")]


ALLOCATIONS: dict[str, Allocation] = {
    "global": Allocation(global_, "rank the units of all groups together"),
    "uniform": Allocation(uniform, "keep the same share of every group"),
}


def allocation_named(value: str | Rule) -> Allocation:
    """An allocation by its name in `ALLOCATIONS`, by `module:function`, or the function itself.

    Raises:
        BudgetError: there is none of this name.
    """
    return look_up("allocation", value, ALLOCATIONS, Allocation, BudgetError)


@checked(BudgetError)
def allocate(
    scores: Sequence[Tensor],
    cost: Cost,
    budget: Budget,
    allocation: str | Rule = "global",
    *,
    relative: bool = True,
    min_keep: int = 1,
    round_to: int | Sequence[int] = 1,
) -> list[Tensor]:
    """Choose the units to keep: as many as the budget allows.

    Args:
        scores: (units,) per group of `cost.graph`; higher = keep. Blocks together count as one group.
        cost: what widths cost.
        budget: every bound is met from below; no further step of any group would fit.
        allocation: a name in `ALLOCATIONS`, `module:function`, or a function like those in the table.
        relative: divide scores by their group's mean before groups are compared.
        min_keep: units that every group keeps at least.
        round_to: kept units are a multiple of this, or all of them; one number, or one per group.
    Returns:
        (units,) bool per group, True = keep.
    Raises:
        BudgetError: unknown allocation, or a budget out of reach; the message gives the reachable range.
    """
    groups = cost.graph.groups
    chosen = allocation_named(allocation)
    multiples = [round_to] * len(scores) if isinstance(round_to, int) else list(round_to)
    if min_keep < 1 or min(multiples, default=1) < 1:
        raise BudgetError(f"min_keep={min_keep}, round_to={round_to}: both must be at least 1")
    if len(multiples) != len(scores):
        raise BudgetError(
            f"round_to has {len(multiples)} numbers; expected one, or one for each of {len(scores)} groups"
        )
    if len(scores) != len(cost.full):
        raise BudgetError(f"got scores of {len(scores)} groups; the graph has {len(cost.full)}")
    if not scores:
        raise BudgetError(
            f"nothing can be pruned: the model has no group of removable units (see graph.frozen)."
            f"{what_stays(cost, 'macs', [])}"
        )
    blocks = [i for i, group in enumerate(groups) if group.branch]  # the last groups
    pooled = scores[: len(scores) - len(blocks)]
    if blocks:  # each is the only unit of its group; together they are compared like the units of one
        pooled = [*pooled, torch.cat([scores[i] for i in blocks])]
    if relative:
        pooled = [_relative(score) for score in pooled]
    levels = [widths_of(group, min_keep, step) for group, step in zip(groups, multiples, strict=True)]
    limits = cost.limits(budget)
    fits = partial(cost.within, limits)
    least = [level[0] for level in levels]
    if not fits(least):
        ranges = ", ".join(
            f"{name} {budget.bounds[name]:g} asks for at most {limit:,}; reachable are {cost.of(name, least):,} "
            f"({cost.of(name, least) / cost.of(name):.4f} of the dense model) to {cost.of(name):,}"
            for name, limit in limits.items()
        )
        given = {"min_keep": min_keep, "round_to": max(multiples)}
        lower = [name for name, value in given.items() if value > 1]
        with_ = f" with {', '.join(f'{name}={given[name]}' for name in lower)}" if lower else ""
        worst = max(limits, key=lambda name: cost.of(name, least) / max(1, limits[name]))
        raise BudgetError(
            f"budget out of reach{with_}: {ranges}. Raise the budget{', or lower ' if lower else ''}"
            f"{' or '.join(lower)}.{what_stays(cost, worst, least)}"
        )
    low = [*least[: len(pooled) - 1], 0] if blocks else least
    order = np.asarray(chosen.order(pooled, low))
    expected = [len(score) - some for score, some in zip(pooled, low, strict=True)]
    if sorted(order.tolist()) != np.repeat(np.arange(len(pooled)), expected).tolist():
        raise BudgetError(
            f"allocation {chosen.summary!r}: got an order of {len(order)} steps; expected the number of each group "
            f"once for every unit that it may lose, {sum(expected)} in all"
        )
    if blocks:
        order[order == blocks[0]] = blocks[0] + pooled[-1].sort(stable=True).indices.numpy()
    steps = _whole_steps(order, levels)

    def after(count: int) -> list[int]:
        gone = np.bincount(steps[:count], minlength=len(levels)).tolist()
        return [level[-1 - g] for level, g in zip(levels, gone, strict=True)]

    count = bisect_left(range(len(steps)), True, key=lambda count: fits(after(count)))
    kept = _restore(after(count), steps[:count][::-1].tolist(), levels, fits)
    return [_top(score, k) for score, k in zip(scores, kept, strict=True)]


def _relative(score: Tensor) -> Tensor:
    mean = score.abs().mean()
    return score / mean if mean > 0 else score


def list_widths(units: int, min_keep: int, round_to: int) -> list[int]:
    """Numbers of units a group may keep, ascending.

    >>> list_widths(10, 3, 4)
    [4, 8, 10]
    """
    low = min(units, -(-min_keep // round_to) * round_to)
    return sorted({*range(low, units + 1, round_to), units})


def widths_of(group: Group, min_keep: int, round_to: int) -> list[int]:
    """The same for a group; a block goes or stays, whatever the multiples are."""
    return [0, 1] if group.branch else list_widths(group.units, min_keep, round_to)


def _whole_steps(order: Order, levels: Sequence[Sequence[int]]) -> Order:
    """The order in which groups go down one level: each when half of the units in between would have left.

    >>> _whole_steps(np.array([0, 0, 1, 0, 0, 0, 1, 0, 0]), [[1, 4, 8], [1, 2, 3]])
    array([0, 1, 1, 0])
    """
    places, groups = [], []
    for group, level in enumerate(levels):
        own = np.flatnonzero(order == group)
        middles = [-(-(2 * level[-1] - low - high) // 2) for low, high in itertools.pairwise(level)]
        places += [own[gone - 1] for gone in reversed(middles)]
        groups += [group] * len(middles)
    return np.array(groups, dtype=np.int64)[np.argsort(places, kind="stable")]


def _restore(kept: list[int], order: Sequence[int], levels: Sequence[list[int]], fits: Fits) -> list[int]:
    """Give groups back one level at a time, as long as one still fits.

    A group that does not fit now never will: restoring others only makes its units dearer.
    """
    closed: set[int] = set()
    while True:
        before = kept
        for group in order:
            above = bisect_right(levels[group], kept[group])
            if group in closed or above == len(levels[group]):
                continue
            trial = [*kept[:group], levels[group][above], *kept[group + 1 :]]
            if fits(trial):
                kept = trial
            else:
                closed.add(group)
        if kept == before:
            return kept


def _top(score: Tensor, k: int) -> Tensor:
    """The k units with the highest score; of equals, the first."""
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[score.sort(descending=True, stable=True).indices[:k]] = True
    return mask
