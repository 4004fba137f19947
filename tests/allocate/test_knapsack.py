"""Solvers against exhaustive search, closed forms and each other."""

import itertools

import numpy as np
import pytest

from secateur.allocate.knapsack import SOLVERS, Problem, dp, front, hull, lower_hull, milp, solve
from secateur.errors import BudgetError


def random_problem(
    seed: int, *, items: int = 4, levels: int = 5, measures: tuple[str, ...] = ("weights",)
) -> Problem:
    """Falling costs and rising distortions, with some noise, so that curves are neither convex nor monotone."""
    rng = np.random.default_rng(seed)
    curves, costs = [], {measure: [] for measure in measures}
    for _ in range(items):
        n = int(rng.integers(1, levels + 1))
        curves.append(np.sort(rng.exponential(1, n)) * rng.uniform(0.1, 10) + 0.3 * rng.random(n))
        for measure in measures:
            costs[measure].append(np.sort(rng.integers(1, 60, n))[::-1].astype(float))
    names = tuple(f"layer{i}" for i in range(items))
    return Problem(names, tuple(curves), {m: tuple(c) for m, c in costs.items()})


def exhaustive(problem: Problem, limits: dict[str, float]) -> float:
    return min(
        problem.value(levels)
        for levels in itertools.product(*(range(len(curve)) for curve in problem.distortion))
        if all(problem.total(m, levels) <= limit for m, limit in limits.items())
    )


def limit_within(problem: Problem, measure: str, share: float) -> float:
    least, most = problem.reachable(measure)
    return least + share * (most - least)


@pytest.mark.parametrize("seed", range(200))
def test_solvers_against_exhaustive_search(seed: int) -> None:
    problem = random_problem(seed)
    limits = {"weights": limit_within(problem, "weights", (seed % 10) / 10)}
    best = exhaustive(problem, limits)
    exact = milp(problem, limits)
    assert exact.distortion == pytest.approx(best, rel=1e-6)
    for solution in (hull(problem, limits), dp(problem, limits), exact):
        assert problem.total("weights", solution.levels) <= limits["weights"]
        assert solution.distortion == problem.value(solution.levels)
        assert solution.distortion >= best - 1e-9
        assert solution.bound <= best + 1e-6 * (1 + best)
    # costs are whole numbers below 240: with one bucket for each the programme is exact
    least, _ = problem.reachable("weights")
    spare = int(limits["weights"] - least)
    assert dp(problem, {"weights": least + spare}, buckets=max(spare, 1)).distortion == pytest.approx(best)


@pytest.mark.parametrize("seed", range(60))
def test_two_budgets_against_exhaustive_search(seed: int) -> None:
    problem = random_problem(seed, measures=("weights", "macs"))
    limits = {m: limit_within(problem, m, 0.7) for m in ("weights", "macs")}
    try:
        best = exhaustive(problem, limits)
    except ValueError:
        with pytest.raises(BudgetError, match="together"):
            milp(problem, limits)
        return
    solution = milp(problem, limits)
    assert solution.distortion == pytest.approx(best, rel=1e-6)
    assert all(problem.total(m, solution.levels) <= limit for m, limit in limits.items())


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_item_takes_the_budget(solver: str) -> None:
    sparsity = np.arange(101) / 100
    problem = Problem(("only",), (sparsity**2,), {"weights": (1000 * (1 - sparsity),)})
    assert solve(problem, {"weights": 300.0}, solver).levels == (70,)


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_items_take_equal_levels(solver: str) -> None:
    sparsity = np.arange(101) / 100
    problem = Problem(tuple("abcd"), (sparsity**2,) * 4, {"weights": (1000 * (1 - sparsity),) * 4})
    assert solve(problem, {"weights": 4 * 400.0}, solver).levels == (60,) * 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_quadratic_curves_follow_the_closed_form(solver: str) -> None:
    """minimise sum a_l phi_l^2 subject to sum phi_l n_l = goal: phi_l is proportional to n_l / a_l."""
    a, n = np.array([1.0, 2.0, 8.0]), np.array([400.0, 400.0, 800.0])
    phi = 0.5 * (n / a) / (n / a).max()
    grid = np.arange(1001) / 1000
    problem = Problem(
        tuple("abc"), tuple(w * grid**2 for w in a), {"weights": tuple(m * (1 - grid) for m in n)}
    )
    solution = solve(problem, {"weights": float((n * (1 - phi)).sum())}, solver)
    assert np.allclose(grid[list(solution.levels)], phi, atol=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_convex_and_each_point_optimal(seed: int) -> None:
    problem = random_problem(seed)
    way = front(problem, "weights")
    assert (np.diff(way.cost) > 0).all()
    assert (np.diff(way.distortion) < 0).all()
    assert (np.diff(way.slope) <= 1e-12).all()
    for point in range(len(way.cost)):
        levels = way.levels(point)
        assert problem.total("weights", levels) == pytest.approx(way.cost[point])
        best = exhaustive(problem, {"weights": way.cost[point] + 1e-9})
        assert problem.value(levels) == pytest.approx(way.distortion[point]) == pytest.approx(best)


def test_hull_drops_levels_above_it() -> None:
    assert lower_hull(np.array([3.0, 3.0, 1.0]), np.array([2.0, 1.0, 1.0])) == [2]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_budget_out_of_reach_names_the_range(solver: str) -> None:
    problem = random_problem(0)
    least, most = problem.reachable("weights")
    with pytest.raises(BudgetError, match=f"{least:,.6g} to {most:,.6g}"):
        solve(problem, {"weights": least - 1}, solver)
    assert problem.total("weights", solve(problem, {"weights": least}, solver).levels) == least
    assert solve(problem, {"weights": 1.01 * most}, solver).distortion == pytest.approx(
        sum(curve.min() for curve in problem.distortion)
    )


def test_two_budgets_need_the_exact_solver() -> None:
    problem = random_problem(0, measures=("weights", "macs"))
    with pytest.raises(BudgetError, match="milp"):
        solve(problem, {"weights": 1e9, "macs": 1e9})


def test_malformed_items_are_named() -> None:
    with pytest.raises(BudgetError, match="'b'"):
        Problem(("a", "b"), (np.zeros(1), np.zeros(2)), {"weights": (np.ones(1), np.ones(3))})
    with pytest.raises(BudgetError, match="not finite"):
        Problem(("a",), (np.array([np.nan]),), {"weights": (np.ones(1),)})


def test_what_the_solver_takes_for_a_rounding_error_is_not_overspent() -> None:
    """Costs in milliseconds are no whole numbers; HiGHS lets them exceed a limit by a millionth."""
    problem = Problem(
        ("a", "b"),
        (np.array([0.0, 1.0]), np.array([0.0, 3.0])),
        {"ms": (np.array([1.0000004e6, 1.0]), np.array([1e6, 2.0]))},
    )
    found = milp(problem, {"ms": 2e6})
    assert found.levels == (1, 0)
    assert found.distortion == 1.0
