"""Choosing widths by distortion curves where costs are products of neighbouring widths.

Groups that share no product are independent once the others are fixed: their cost is then linear in their own
width, and the knapsack is exact up to its certificate. So a small set of groups that touches every product, in
ResNets the streams, is searched over, and the rest is solved for each choice.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from secateur.allocate.knapsack import Curve, Problem, Solution, hull, lower_hull, milp
from secateur.cost import Cost
from secateur.errors import BudgetError
from secateur.graph import Product

EXHAUSTIVE = 1000
"""Choices of the widths searched over that are tried at most, before it becomes a descent."""

_FEWEST = 5  # levels of each group searched over; where even these are too many choices, it is a descent

_REACH = (1, 3)  # levels that one group becomes wider or narrower by while another does the opposite

POLISHED = 1e-3
"""Gap above which the groups that are not searched over are solved exactly, and gain that exchanges are worth."""

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


def cover(products: Sequence[Product], groups: int, first: Collection[int] = ()) -> list[int]:
    """Groups such that every product of widths has at most one group outside of them; most connected first.

    Of equally connected groups, those in `first` are taken.

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
        degree = [(sum(group in pair for pair in ties), group in first) for group in range(groups)]
        inside.add(max(range(groups), key=degree.__getitem__))
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
    blocks = {g for g, level in enumerate(levels) if not level.min()}
    fixed = cover(products, len(levels), blocks)
    task = _Inner(Costs(cost, measure), tuple(names), tuple(levels), tuple(curves), measure, limit, fixed)
    if math.prod(len(levels[g]) for g in fixed) <= EXHAUSTIVE:  # each of them: the bound holds for all widths
        every = list(itertools.product(*(range(len(levels[g])) for g in fixed)))
        tried = np.array(every, dtype=np.int64).reshape(len(every), len(fixed))
        found, bounds = task.values(tried)
        best = task.polished(tried[int(found.argmin())].tolist())
        return ChosenWidths(best.kept, best.distortion, min(best.distortion, float(bounds.min())))
    most = int(EXHAUSTIVE ** (1 / max(1, len(fixed))) + 1e-9)
    if most >= _FEWEST:
        few = [thin(len(levels[g]), most) for g in fixed]
        tried = np.array(list(itertools.product(*few)), dtype=np.int64)
        starts = [tried[int(task.values(tried)[0].argmin())].tolist()]
    else:
        starts = list(task.starts())
    ends = [task.descended(start) for start in starts]
    best = task.polished(task.refined(*min(ends, key=lambda end: end[1])))
    return ChosenWidths(best.kept, best.distortion, float("-inf"))


class Costs:
    """A measure that is a sum of products of widths, and its slopes, for many choices of widths at once.

    Args:
        cost: of the model.
        measure: of it.
    """

    def __init__(self, cost: Cost, measure: str) -> None:
        formula = cost.sum(measure)
        self._factor, self._axes = formula.factor.numpy(), formula.axes.numpy()
        self._base, self._slope = formula.base.numpy(), formula.slope.numpy()

    def of(self, kept: npt.ArrayLike) -> Curve:
        """(choices, groups) -> (choices,)."""
        return np.asarray(self._widths(kept).prod(2) @ self._factor)

    def slopes(self, kept: npt.ArrayLike) -> Curve:
        """How the cost rises with each width: (choices, groups) -> (choices, groups)."""
        widths = self._widths(kept)
        total = np.zeros(np.shape(kept))
        for d in range(self._axes.shape[1]):
            others = np.delete(widths, d, axis=2).prod(2) * self._factor
            total += others @ self._slope[self._axes[:, d]]
        return total

    def _widths(self, kept: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """(choices, terms, axes)."""
        return np.asarray((self._base + np.asarray(kept, dtype=np.float64) @ self._slope.T)[:, self._axes])


def thin(count: int, most: int) -> list[int]:
    """Numbers of at most so many levels, evenly spread, the first and the last among them.

    >>> thin(9, 3)
    [0, 4, 8]
    """
    many = min(count, most)
    return sorted({round(i * (count - 1) / max(1, many - 1)) for i in range(many)})


@dataclass(frozen=True)
class _Inner:
    costs: Costs
    names: tuple[str, ...]
    levels: tuple[Levels, ...]
    curves: tuple[Curve, ...]
    measure: str
    limit: float
    fixed: Sequence[int]

    @cached_property
    def free(self) -> list[int]:
        """The groups that are not searched over."""
        return [g for g in range(len(self.levels)) if g not in self.fixed]

    @cached_property
    def steps(self) -> tuple[npt.NDArray[np.int64], Curve, Curve, Curve, float]:
        """The hulls of all free groups: per step its group's place, its widths and what it gains; and where each group
        starts: its least width, and all distortions there together. A group's cost only scales its hull.
        """
        place, width, gain, first, start = list[int](), list[float](), list[float](), list[int](), 0.0
        for number, group in enumerate(self.free):
            levels, curve = self.levels[group].astype(np.float64), self.curves[group]
            hull = lower_hull(levels, curve)
            first.append(int(levels[hull[0]]))
            start += float(curve[hull[0]])
            for a, b in pairwise(hull):
                place.append(number)
                width.append(float(levels[b] - levels[a]))
                gain.append(float(curve[a] - curve[b]))
        return np.array(place, dtype=np.int64), np.array(width), np.array(gain), np.array(first), start

    def kept(self, choices: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Widths of the groups searched over for some choices of levels, zero elsewhere: (choices, groups)."""
        kept = np.zeros((len(choices), len(self.levels)))
        for column, group in enumerate(self.fixed):
            kept[:, group] = self.levels[group][choices[:, column]]
        return kept

    def values(self, choices: npt.NDArray[np.int64]) -> tuple[Curve, Curve]:
        """What the greedy walk along the free groups' hulls reaches, and what no widths do better than.

        Args:
            choices: (choices, groups searched over), levels.
        Returns:
            (choices,) twice; infinite where nothing fits.
        """
        kept = self.kept(choices)
        own = np.zeros(len(choices))
        for column, group in enumerate(self.fixed):
            own += self.curves[group][choices[:, column]]
        left = self.limit - self.costs.of(kept)
        if not self.free:
            value = np.where(left >= 0, own, np.inf)
            return value, value
        place, width, gain, first, start = self.steps
        each = self.costs.slopes(kept)[:, self.free]
        left = left - each @ first
        price = each[:, place] * width
        order = np.argsort(-gain / np.maximum(price, 1e-300), axis=1, kind="stable")
        spent = np.take_along_axis(price, order, 1).cumsum(1)
        gained = np.concatenate([np.zeros((len(own), 1)), gain[order].cumsum(1)], 1)
        fits = (spent <= left[:, None]).sum(1)
        whole = np.take_along_axis(gained, fits[:, None], 1)[:, 0]
        last = np.minimum(fits, len(gain) - 1)[:, None]
        if len(gain):
            next_price = np.take_along_axis(price, np.take_along_axis(order, last, 1), 1)[:, 0]
            next_gain = gain[np.take_along_axis(order, last, 1)[:, 0]]
            before = np.take_along_axis(np.concatenate([np.zeros((len(own), 1)), spent], 1), fits[:, None], 1)
            share = np.where(fits < len(gain), (left - before[:, 0]) / np.maximum(next_price, 1e-300), 0.0)
            part = share * next_gain
        else:
            part = np.zeros(len(own))
        value = np.where(left >= 0, own + start - whole, np.inf)
        return value, np.where(left >= 0, value - part, np.inf)

    def polished(self, choice: Sequence[int]) -> ChosenWidths:
        """The widths for a choice of levels; the groups that are not searched over exactly, if that is better."""
        best = self.solved(choice, hull)
        exact = self.solved(choice, milp) if best.gap > POLISHED and self.free else best
        return exact if exact.distortion < best.distortion else best

    def solved(self, choice: Sequence[int], solver: Solver) -> ChosenWidths:
        """The best widths of all other groups, when those searched over take these levels, which must fit."""
        kept = self.kept(np.array([choice], dtype=np.int64).reshape(1, -1))
        own = sum(float(self.curves[g][k]) for g, k in zip(self.fixed, choice, strict=True))
        base, each = float(self.costs.of(kept)[0]), self.costs.slopes(kept)[0]
        found = kept[0].astype(np.int64)
        if not self.free:
            return ChosenWidths(tuple(found.tolist()), own, own)
        problem = Problem(
            tuple(self.names[g] for g in self.free),
            tuple(self.curves[g] for g in self.free),
            {self.measure: tuple(each[g] * self.levels[g] for g in self.free)},
        )
        solution = solver(problem, {self.measure: self.limit - base})
        for group, level in zip(self.free, solution.levels, strict=True):
            found[group] = self.levels[group][level]
        return ChosenWidths(tuple(found.tolist()), own + solution.distortion, own + solution.bound)

    def exchanged(self, choice: Sequence[int]) -> npt.NDArray[np.int64]:
        """The choices in which one group is some levels wider and another some narrower: (choices, groups).

        Where the budget is spent, no group can become wider by itself. Where there are blocks, these alone are
        exchanged: one comes back and another goes.
        """
        blocks = [place for place, group in enumerate(self.fixed) if not self.levels[group].min()]
        pairs = itertools.permutations(blocks or range(len(self.fixed)), 2)
        moves = [(a, b, up, down) for a, b in pairs for up in _REACH for down in _REACH]
        a, b, up, down = np.array(moves, dtype=np.int64).reshape(-1, 4).T
        rows, trials = np.arange(len(a)), np.tile(np.array(choice, dtype=np.int64), (len(a), 1))
        trials[rows, a] += up
        trials[rows, b] -= down
        able = np.array([len(self.levels[g]) for g in self.fixed], dtype=np.int64)
        return trials[((trials >= 0) & (trials < able)).all(1)]

    def starts(self) -> Iterator[list[int]]:
        """Choices to start from: the same share of every group, from narrow to wide."""
        for share in np.linspace(0, 1, 5):
            yield [round(share * (len(self.levels[g]) - 1)) for g in self.fixed]

    def descended(self, choice: list[int]) -> tuple[list[int], float]:
        """Change one level at a time for as long as that helps; the choice, and what it reaches."""
        best = float(self.values(np.array([choice]))[0][0])
        if not np.isfinite(best):
            choice = [int(self.levels[g].argmin()) for g in self.fixed]  # the narrowest fits
            best = float(self.values(np.array([choice]))[0][0])
        improved = True
        while improved:
            improved = False
            for place, group in enumerate(self.fixed):
                trials = np.tile(choice, (len(self.levels[group]), 1))
                trials[:, place] = np.arange(len(trials))
                values, _ = self.values(trials)
                level = int(values.argmin())
                if values[level] < best - 1e-12 * abs(best):
                    choice, best, improved = trials[level].tolist(), float(values[level]), True
        return choice, best

    def refined(self, choice: list[int], best: float) -> list[int]:
        """Exchange levels between two groups, and descend again, for as long as that helps noticeably."""
        while len(trials := self.exchanged(choice)):
            values, _ = self.values(trials)
            if values.min() >= best - POLISHED * abs(best):
                break
            choice, best = self.descended(trials[values.argmin()].tolist())
        return choice
