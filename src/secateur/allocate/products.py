"""Choosing widths by distortion curves where costs are products of neighbouring widths.

Groups that share no product are independent once the others are fixed: their cost is then linear in their own
width, and the knapsack is exact up to its certificate. So a small set of groups that touches every product, in
ResNets the streams, is searched over, and the rest is solved for each choice.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.allocate.knapsack import Curve, Problem, Solution, hull, milp
from secateur.cost import Cost
from secateur.errors import BudgetError
from secateur.graph import Product

EXHAUSTIVE = 1000
"""Choices of the widths searched over that are tried at most, before it becomes a descent."""

_FEWEST = 5  # levels of each group searched over; where even these are too many choices, it is a descent

POLISHED = 1e-3
"""Gap above which the groups that are not searched over are solved exactly."""

Solver = Callable[[Problem, Mapping[str, float]], Solution]

Levels = npt.NDArray[np.int64]
"""(levels,), the widths that a group may have."""


@dataclass(frozen=True)
class ChosenWidths:
    """Widths within a budget.

    Attributes:
        kept: units per group.
        distortion: sum of the curves there.
        bound: no widths among those tried have less within the budget; minus infinity after a descent.
    """

    kept: tuple[int, ...]
    distortion: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the choice may be from the best, as a share of its distortion."""
        return max(0.0, self.distortion - self.bound) / self.distortion if self.distortion > 0 else 0.0


def cover(products: Sequence[Product], groups: int) -> list[int]:
    """Groups such that every product of widths has at most one group outside of them; most connected first.

    >>> from secateur.graph import Axis
    >>> chain = [Product("a", 1.0, (Axis(0, ((0, 1),)), Axis(0, ((1, 1),)))),
    ...          Product("b", 1.0, (Axis(0, ((1, 1),)), Axis(0, ((2, 1),))))]
    >>> cover(chain, 3)
    [1]
    """
    ties: set[tuple[int, int]] = set()
    inside: set[int] = set()
    for product in products:
        sets = [{group for group, _ in axis.parts} for axis in product.axes if axis.parts]
        for a, b in itertools.combinations(sets, 2):
            inside |= a & b  # a square of one width
            ties |= {(i, j) for i in a for j in b if i != j}
    while ties := {(i, j) for i, j in ties if i not in inside and j not in inside}:
        degree = [sum(group in pair for pair in ties) for group in range(groups)]
        inside.add(int(np.argmax(degree)))
    return sorted(inside)


def choose_widths(
    cost: Cost,
    names: Sequence[str],
    levels: Sequence[Levels],
    curves: Sequence[Curve],
    measure: str,
    limit: float,
) -> ChosenWidths:
    """The widths of least summed distortion whose cost is within a limit.

    Args:
        cost: of the model.
        levels: per group, the widths to choose from.
        curves: per group, the distortion at each of them.
        measure: of the cost: one that is a sum of products of widths.
        limit: on it.
    Raises:
        BudgetError: the measure is no such sum, or the limit is out of reach; the message gives the range.
    """
    products = cost.sum(measure).products
    least = cost.of(measure, [int(level.min()) for level in levels])
    if least > limit:
        raise BudgetError(
            f"{measure} at most {limit:,.6g}: out of reach; within reach are {least:,} to {cost.of(measure):,}"
        )
    fixed = cover(products, len(levels))
    task = _Inner(cost, tuple(names), tuple(levels), tuple(curves), measure, limit, tuple(fixed))
    most = int(EXHAUSTIVE ** (1 / max(1, len(fixed))) + 1e-9)
    if most >= _FEWEST:
        tried = [thin(len(levels[g]), most) for g in fixed]
        found = [task.solved(choice) for choice in itertools.product(*tried)]
        solved = [choice for choice in found if choice is not None]
        best = task.polished(min(solved, key=lambda choice: choice.distortion))
        return ChosenWidths(best.kept, best.distortion, min(choice.bound for choice in solved))
    best = task.polished(
        min((task.descended(s) for s in task.starts()), key=lambda choice: choice.distortion)
    )
    return ChosenWidths(best.kept, best.distortion, float("-inf"))


def thin(count: int, most: int) -> list[int]:
    """Numbers of at most so many levels, evenly spread, the first and the last among them.

    >>> thin(9, 3)
    [0, 4, 8]
    """
    many = min(count, most)
    return sorted({round(i * (count - 1) / max(1, many - 1)) for i in range(many)})


@dataclass(frozen=True)
class _Inner:
    cost: Cost
    names: tuple[str, ...]
    levels: tuple[Levels, ...]
    curves: tuple[Curve, ...]
    measure: str
    limit: float
    fixed: tuple[int, ...]

    def polished(self, choice: ChosenWidths) -> ChosenWidths:
        """The same with the exact optimum of all groups that are not searched over, if that is better."""
        levels = [self.levels[g].tolist().index(choice.kept[g]) for g in self.fixed]
        exact = self.solved(levels, milp) if choice.gap > POLISHED else None
        return exact if exact is not None and exact.distortion < choice.distortion else choice

    def solved(self, choice: Sequence[int], solver: Solver = hull) -> ChosenWidths | None:
        """The best widths of all other groups, when those searched over take these levels; None if none fit."""
        free = [g for g in range(len(self.levels)) if g not in self.fixed]
        kept = [0] * len(self.levels)
        for group, level in zip(self.fixed, choice, strict=True):
            kept[group] = int(self.levels[group][level])
        own = sum(float(self.curves[g][k]) for g, k in zip(self.fixed, choice, strict=True))
        base = float(self.cost.of(self.measure, kept))
        costs = []
        for group in free:
            kept[group] = 1
            each = float(self.cost.of(self.measure, kept)) - base
            kept[group] = 0
            costs.append(each * self.levels[group].astype(np.float64))
        left = self.limit - base
        if not free:
            return ChosenWidths(tuple(kept), own, own) if left >= 0 else None
        if sum(float(c.min()) for c in costs) > left:
            return None
        problem = Problem(
            tuple(self.names[g] for g in free),
            tuple(self.curves[g] for g in free),
            {self.measure: tuple(costs)},
        )
        solution = solver(problem, {self.measure: left})
        for group, level in zip(free, solution.levels, strict=True):
            kept[group] = int(self.levels[group][level])
        return ChosenWidths(tuple(kept), own + solution.distortion, own + solution.bound)

    def starts(self) -> Iterator[list[int]]:
        """Choices to start from: the same share of every group, from narrow to wide."""
        for share in np.linspace(0, 1, 5):
            yield [round(share * (len(self.levels[g]) - 1)) for g in self.fixed]

    def descended(self, choice: list[int]) -> ChosenWidths:
        """Change one level at a time for as long as that helps."""
        choice = list(choice)
        best = self.solved(choice)
        narrow = [int(self.levels[g].argmin()) for g in self.fixed]
        if best is None:
            choice = narrow
            best = self.solved(choice)
        assert best is not None  # the narrowest fits
        improved = True
        while improved:
            improved = False
            for place, group in enumerate(self.fixed):
                for step in (-2, -1, 1, 2):
                    level = choice[place] + step
                    if not 0 <= level < len(self.levels[group]):
                        continue
                    trial = self.solved([*choice[:place], level, *choice[place + 1 :]])
                    if trial is not None and trial.distortion < best.distortion:
                        choice[place], best, improved = level, trial, True
        return best
