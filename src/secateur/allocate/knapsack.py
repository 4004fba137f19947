"""Which level each item takes: distortion as low as a budget allows, as a multiple-choice knapsack.

    minimise    sum over items of distortion[item][level[item]]
    subject to  sum over items of cost[m][item][level[item]] <= limit[m]     for every measure m

Costs may be anything that adds up: weights, multiply-adds, bytes, milliseconds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from secateur.errors import BudgetError, unknown

Curve: TypeAlias = npt.NDArray[np.float64]
"""(levels,), one number per level of an item."""

_SLACK = 1e-9  # of a limit: sums of costs are rounded
_FEASIBLE = 1e-6  # of a limit: HiGHS overspends by so much at most


@dataclass(frozen=True)
class Problem:
    """Items, of each of which one level is to be taken.

    Attributes:
        names: of the items, for messages.
        distortion: per item, what each level does to the output; any order of levels.
        costs: measure -> per item, what each level costs.
    """

    names: tuple[str, ...]
    distortion: tuple[Curve, ...]
    costs: Mapping[str, tuple[Curve, ...]]

    def __post_init__(self) -> None:
        for measure, costs in self.costs.items():
            for name, curve, cost in zip(self.names, self.distortion, costs, strict=True):
                if len(curve) != len(cost) or not len(curve):
                    raise BudgetError(
                        f"item {name!r}: {len(curve)} distortions and {len(cost)} costs in {measure}; expected one "
                        f"of each per level, and at least one level"
                    )
                if not (np.isfinite(curve).all() and np.isfinite(cost).all()):
                    raise BudgetError(
                        f"item {name!r}: its distortions or its costs in {measure} are not finite"
                    )

    def reachable(self, measure: str) -> tuple[float, float]:
        """The least and the largest total cost."""
        costs = self.costs[measure]
        return sum(float(c.min()) for c in costs), sum(float(c.max()) for c in costs)

    def total(self, measure: str, levels: Sequence[int]) -> float:
        """What a choice of levels costs."""
        return float(sum(cost[k] for cost, k in zip(self.costs[measure], levels, strict=True)))

    def value(self, levels: Sequence[int]) -> float:
        """The summed distortion of a choice of levels."""
        return float(sum(curve[k] for curve, k in zip(self.distortion, levels, strict=True)))


@dataclass(frozen=True)
class Solution:
    """A choice of levels within the limits.

    Attributes:
        levels: one per item.
        distortion: their sum.
        bound: no choice within the limits has less; minus infinity where the solver proves nothing.
    """

    levels: tuple[int, ...]
    distortion: float
    bound: float

    @property
    def gap(self) -> float:
        """How far the solution may be from the best, as a share of its distortion."""
        return max(0.0, self.distortion - self.bound) / self.distortion if self.distortion > 0 else 0.0


@dataclass(frozen=True)
class Front:
    """All trade-offs that Lagrange multipliers find, from the cheapest choice to the least distortion.

    Attributes:
        cost: (points,), ascending.
        distortion: (points,), descending.
        slope: (points - 1,), distortion saved per cost from each point to the next; descending.
        first: levels of the cheapest choice.
        moves: (item, level) from each point to the next.
    """

    cost: Curve
    distortion: Curve
    slope: Curve
    first: tuple[int, ...]
    moves: tuple[tuple[int, int], ...]

    def levels(self, point: int) -> list[int]:
        """The choice at a point."""
        levels = list(self.first)
        for item, level in self.moves[:point]:
            levels[item] = level
        return levels


def front(problem: Problem, measure: str) -> Front:
    """The lower convex hull of each item's (cost, distortion), merged by slope.

    Source: Shoham & Gersho 1988, IEEE Trans. ASSP 36(9), bit allocation by Lagrange multipliers.
    Differs: the whole front in one sort, instead of one multiplier at a time.
    """
    first: list[int] = []
    steps: list[tuple[float, int, int, float, float]] = []
    for item, (curve, cost) in enumerate(zip(problem.distortion, problem.costs[measure], strict=True)):
        hull = lower_hull(cost, curve)
        first.append(hull[0])
        for a, b in pairwise(hull):
            gain, price = float(curve[a] - curve[b]), float(cost[b] - cost[a])
            steps.append((gain / price, item, b, price, gain))
    steps.sort(key=lambda step: -step[0])  # stable: the steps of one item stay in order
    start = problem.total(measure, first), problem.value(first)
    return Front(
        cost=start[0] + np.cumsum([0.0, *(step[3] for step in steps)]),
        distortion=start[1] - np.cumsum([0.0, *(step[4] for step in steps)]),
        slope=np.array([step[0] for step in steps]),
        first=tuple(first),
        moves=tuple((step[1], step[2]) for step in steps),
    )


def lower_hull(cost: Curve, curve: Curve) -> list[int]:
    """Levels on the lower convex hull, from the cheapest on, as long as distortion falls.

    >>> lower_hull(np.array([4., 3., 2., 1.]), np.array([0., 5., 2., 6.]))
    [3, 2, 0]
    """
    hull: list[int] = []
    for k in np.lexsort((curve, cost)).tolist():
        if hull and curve[k] >= curve[hull[-1]]:
            continue
        if hull and cost[k] == cost[hull[-1]]:
            hull.pop()
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (curve[a] - curve[b]) * (cost[k] - cost[b]) > (curve[b] - curve[k]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(k)
    return hull


def hull(problem: Problem, limits: Mapping[str, float]) -> Solution:
    """Walk the front up to the limit, past what does not fit, and fill what is left.

    The multiplier at which the walk first stops bounds what any choice can reach.
    """
    if len(limits) > 1:
        raise BudgetError(f"solver 'hull' takes one limit, got {', '.join(limits)}; use solver 'milp'")
    ((measure, limit),) = limits.items()
    costs = problem.costs[measure]
    way = front(problem, measure)
    levels, left = list(way.first), limit - way.cost[0]
    stopped: set[int] = set()
    multiplier = 0.0
    for (item, level), slope in zip(way.moves, way.slope.tolist(), strict=True):
        price = costs[item][level] - costs[item][levels[item]]
        if item in stopped or price > left:
            multiplier = multiplier or slope
            stopped.add(item)
            continue
        levels[item], left = level, left - price
    bound = -multiplier * limit + sum(
        float((curve + multiplier * cost).min())
        for curve, cost in zip(problem.distortion, costs, strict=True)
    )
    _fill(problem, costs, levels, left)
    return Solution(tuple(levels), problem.value(levels), bound)


def _fill(problem: Problem, costs: Sequence[Curve], levels: list[int], left: float) -> None:
    """Take the single moves that save most and fit, until none does."""
    while True:
        best, move = 0.0, None
        for item, (curve, cost) in enumerate(zip(problem.distortion, costs, strict=True)):
            gain = np.where(cost - cost[levels[item]] <= left, curve[levels[item]] - curve, 0.0)
            k = int(gain.argmax())
            if gain[k] > best:
                best, move = float(gain[k]), (item, k)
        if move is None:
            return
        item, k = move
        left -= float(costs[item][k] - costs[item][levels[item]])
        levels[item] = k


def dp(problem: Problem, limits: Mapping[str, float], *, buckets: int = 10_000) -> Solution:
    """The paper's dynamic programme over the layers, on a coarser axis of costs, rounded up.

        F[n][s] = min over k of distortion[n][k] + F[n-1][s - cost[n][k]]

    Source: Xu et al. 2023, arXiv:2308.10438, and the code released with it.
    Differs: `buckets` costs instead of one per weight, so the result may lie above the optimum by what
    rounding wastes; infeasible states stay infinite, so a budget is never exceeded.
    """
    if len(limits) > 1:
        raise BudgetError(f"solver 'dp' takes one limit, got {', '.join(limits)}; use solver 'milp'")
    ((measure, limit),) = limits.items()
    least = [float(cost.min()) for cost in problem.costs[measure]]
    beyond = limit - sum(least)  # only what exceeds the cheapest level of each item competes
    unit = beyond / buckets
    best = np.zeros(buckets + 1)
    taken = np.zeros((len(problem.names), buckets + 1), dtype=np.int32)
    for n, (curve, cost) in enumerate(zip(problem.distortion, problem.costs[measure], strict=True)):
        extra = cost - least[n]
        need = np.ceil(extra / unit - 1e-9) if unit > 0 else np.where(extra > 0, np.inf, 0.0)
        row = np.full(buckets + 1, np.inf)
        for k in np.flatnonzero(need <= buckets).tolist():
            s = int(need[k])
            candidate = curve[k] + best[: buckets + 1 - s]
            better = candidate < row[s:]
            row[s:][better] = candidate[better]
            taken[n, s:][better] = k
        best = row
    levels, state = [0] * len(problem.names), buckets
    for n in reversed(range(len(levels))):
        k = levels[n] = int(taken[n, state])
        above = float(problem.costs[measure][n][k]) - least[n]
        state -= int(np.ceil(above / unit - 1e-9)) if unit > 0 else 0
    return Solution(tuple(levels), problem.value(levels), float("-inf"))


def milp(
    problem: Problem, limits: Mapping[str, float], *, gap: float = 1e-6, seconds: float = 60.0
) -> Solution:
    """The exact optimum by branch and bound (HiGHS), for any number of limits.

    Args:
        gap: relative gap at which the search ends.
        seconds: at which it ends with the best choice found; `Solution.bound` says what is proven.
    """
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as highs
    from scipy.sparse import csr_array

    sizes = [len(curve) for curve in problem.distortion]
    item = np.repeat(np.arange(len(sizes)), sizes)
    columns = np.arange(len(item))
    value = np.concatenate(problem.distortion)
    scale = float(np.abs(value).max()) or 1.0
    once = csr_array((np.ones(len(item)), (item, columns)), shape=(len(sizes), len(item)))
    bound = float("-inf")
    for margin in (0.0, 4 * _FEASIBLE):
        constraints = [LinearConstraint(once, 1, 1)]
        for measure, limit in limits.items():
            size = abs(limit) or 1.0
            row = csr_array(np.concatenate(problem.costs[measure])[None] / size)
            constraints.append(LinearConstraint(row, -np.inf, limit / size - margin))
        found = highs(
            value / scale,
            integrality=np.ones(len(item)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
        if found.x is None:
            raise BudgetError(f"{_described(problem, limits)}: no choice of levels meets all limits together")
        if not margin and found.mip_dual_bound is not None:
            bound = float(found.mip_dual_bound) * scale
        starts = np.cumsum([0, *sizes])
        levels = tuple(int(found.x[a:b].argmax()) for a, b in pairwise(starts.tolist()))
        if all(problem.total(m, levels) <= limit * (1 + _SLACK) + _SLACK for m, limit in limits.items()):
            return Solution(levels, problem.value(levels), bound)
    raise BudgetError(
        f"solver 'milp' overspent {_described(problem, limits)}. Use solver 'hull', or a limit that is not tight to "
        f"the last digit."
    )


SOLVERS: dict[str, Callable[[Problem, Mapping[str, float]], Solution]] = {
    "hull": hull,
    "dp": dp,
    "milp": milp,
}


def solve(problem: Problem, limits: Mapping[str, float], solver: str = "hull") -> Solution:
    """Choose a level for every item, as little distortion as the limits allow.

    Args:
        problem: items, their levels, what these cost and do.
        limits: measure -> largest total cost; several limits need solver "milp".
        solver: a name in `SOLVERS`.
    Raises:
        BudgetError: unknown solver, or limits out of reach; the message gives the reachable range.

    >>> problem = Problem(("a", "b"), (np.array([0., 1., 9.]), np.array([0., 4., 5.])),
    ...                   {"weights": (np.array([8., 4., 1.]), np.array([8., 4., 1.]))})
    >>> solve(problem, {"weights": 8}).levels, solve(problem, {"weights": 8}, "milp").levels
    ((1, 1), (1, 1))
    """
    if solver not in SOLVERS:
        raise BudgetError(unknown("solver", solver, SOLVERS))
    for measure, limit in limits.items():
        least, most = problem.reachable(measure)
        if limit < least - _SLACK * abs(least):
            raise BudgetError(
                f"{measure} {limit:,.6g}: out of reach; within reach are {least:,.6g} to {most:,.6g}. "
                f"Raise the budget, or lower the least that every layer keeps."
            )
    return SOLVERS[solver](problem, limits)


def _described(problem: Problem, limits: Mapping[str, float]) -> str:
    return ", ".join(
        f"{measure} {limit:,.6g} of {problem.reachable(measure)[0]:,.6g} to {problem.reachable(measure)[1]:,.6g}"
        for measure, limit in limits.items()
    )
