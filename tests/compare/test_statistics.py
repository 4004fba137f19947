"""Means over seeds, differences paired by seed, and Tukey's margin."""

import numpy as np
import pytest

from secateur.compare.advice import recommend
from secateur.compare.figures import draw_widths
from secateur.compare.statistics import find_margin, list_within_latencies, rank_arms
from secateur.report import LatencyPair, Width
from tests.report.examples import latency

from .examples import outcome, timed


def test_means_and_differences_are_paired_by_seed():
    found = rank_arms(
        [
            outcome("dense", 0, 0.9, budget={}, macs=1.0),
            outcome("dense", 1, 0.8, budget={}, macs=1.0),
            outcome("a", 0, 0.85, epochs=2, training_seconds=10.0),
            outcome("a", 1, 0.79, macs=0.4, epochs=2, training_seconds=30.0),
            outcome("a", 2, None, error="broke"),
        ]
    )
    dense, row = found
    assert dense.difference is None
    assert row.accuracy == pytest.approx(0.82)
    assert row.kept["macs"] == pytest.approx(0.45)
    assert row.difference == pytest.approx(-0.03)
    assert row.difference_spread == pytest.approx(0.0283, abs=1e-4)
    assert (row.seconds_per_epoch, row.training_seconds) == (10.0, 20.0)
    assert (row.seeds, row.failed, row.over) == (2, "broke", False)


def test_differences_may_be_to_another_arm_at_the_same_budget():
    found = rank_arms(
        [
            outcome("a", 0, 0.85),
            outcome("a", 1, 0.79),
            outcome("a", 0, 0.5, budget={"macs": 0.3}),
            outcome("b", 0, 0.82, against="a"),
            outcome("b", 1, 0.8, against="a"),
        ]
    )
    row = next(row for row in found if row.arm == "b")
    assert row.difference == pytest.approx((0.82 - 0.85 + 0.8 - 0.79) / 2)
    assert row.against == "a"
    assert {row.against for row in found if row.arm == "a"} == {""}


def test_within_a_latency_an_arm_is_on_the_line_between_its_budgets():
    found = []
    for arm, share, ms, accuracy in (
        ("a", 0.7, 1.5, 0.9), ("a", 0.5, 1.0, 0.8), ("a", 0.3, 0.5, 0.5),
        ("b", 0.7, 1.7, 0.8), ("b", 0.5, 1.2, 0.7), ("b", 0.3, 0.7, 0.6),
        ("c", 0.5, 1.1, 0.85),
    ):  # fmt: skip
        budget = {"macs": share}
        found.append(outcome(arm, 0, accuracy, budget=budget, macs=share, latency=timed(ms)))
    times, arms = list_within_latencies(found)
    assert times == pytest.approx([1.6, 1.1, 0.6])
    assert list(arms) == ["a", "b"]  # one budget makes no line
    assert arms["a"] == pytest.approx([0.9, 0.82, 0.56])
    assert arms["b"] == [pytest.approx(0.78), pytest.approx(0.68), None]


def test_within_a_latency_a_network_that_is_slower_and_worse_is_not_taken():
    found = [
        outcome("a", 0, accuracy, budget={"macs": share}, macs=share, latency=timed(ms))
        for share, ms, accuracy in ((0.7, 2.0, 0.9), (0.5, 1.0, 0.8), (0.3, 1.5, 0.5))
    ]
    times, arms = list_within_latencies(found)
    assert times == pytest.approx([2.0, 1.0, 1.5])
    assert arms["a"] == pytest.approx([0.9, 0.8, 0.8])


def test_the_largest_budget_comes_first_whichever_cells_there_are():
    found = [outcome("dense", 0, 0.9, budget={}, macs=1.0)]
    for arm, share in (("a", 0.3), ("a", 0.7), ("b", 0.5), ("b", 0.3)):
        kept = [Width("conv", 10, round(10 * share))]
        found.append(outcome(arm, 0, 0.8, budget={"macs": share}, macs=share, widths=kept))
    rows = ["", "70 % of the MACs", "50 % of the MACs", "30 % of the MACs"]
    assert list(dict.fromkeys(line.budget for line in rank_arms(found))) == rows
    assert [one.budget for one in recommend(found)] == rows[1:]
    drawn = draw_widths(found)
    assert list(drawn) == rows[1:]
    assert [[row[2] for row in strips.rows] for strips in drawn.values()] == [
        ["conv, 70 % kept", "not known"],
        ["not known", "conv, 50 % kept"],
        ["conv, 30 % kept", "conv, 30 % kept"],
    ]


def test_differences_are_to_the_given_weights_where_all_start_from_them():
    (row, scratch) = rank_arms([outcome("a", 0, 0.85, accuracy_dense=0.9), outcome("from scratch", 0, 0.8)])
    assert row.difference == pytest.approx(-0.05)
    assert scratch.difference == pytest.approx(-0.1)


def test_a_clock_that_drifts_between_runs_does_not_matter():
    slow = LatencyPair(latency(20.0, "pytorch"), latency(10.0, "pytorch"))
    runs = [
        outcome("a", 0, 0.9, latency=slow),
        outcome("b", 0, 0.8, latency=timed(1.0)),
        outcome("c", 0, 0.7, latency=timed(2.0)),
    ]
    assert [(row.latency_ms, row.speed_up) for row in rank_arms(runs)] == [(1.0, 2.0), (1.0, 2.0), (2.0, 1.0)]


def test_one_run_over_the_budget_is_enough():
    runs = [outcome("a", s, 0.9, macs=macs) for s, macs in enumerate((0.55, 0.45, 0.45))]
    assert [row.over for row in rank_arms(runs)] == [True]


def test_the_margin_is_that_of_tukey():
    """Against least squares: noise is what arm and seed leave unexplained."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.9, 0.01, (4, 3)) + np.array([0.0, 0.02, -0.01])
    arms, seeds = values.shape
    columns = [[i == a for i in range(arms) for _ in range(seeds)] for a in range(arms)]
    columns += [[j == b for _ in range(arms) for j in range(seeds)] for b in range(1, seeds)]
    design = np.array(columns, dtype=float).T
    rest = values.ravel() - design @ np.linalg.lstsq(design, values.ravel())[0]
    sigma = np.sqrt((rest**2).sum() / ((arms - 1) * (seeds - 1)))
    # 4.896 is the 5 % point of the studentised range for 4 means and 6 degrees of freedom, from printed tables
    assert find_margin(values) == pytest.approx(4.896 * sigma / np.sqrt(seeds), rel=1e-3)
    assert find_margin(values[:1]) is None
    assert find_margin(values[:, :1]) is None


def test_equal_arms_are_rarely_told_apart():
    """Whatever their number: in one comparison out of twenty."""
    rng, told = np.random.default_rng(1), 0
    for _ in range(400):
        values = rng.normal(0.9, 0.003, (8, 3)) + rng.normal(0, 0.01, 3)
        means = values.mean(1)
        told += means.max() - means.min() > (find_margin(values) or 0)
    assert 0.02 < told / 400 < 0.09
