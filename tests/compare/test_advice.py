"""What is recommended at each budget, and what is not."""

import dataclasses

import numpy as np
import pytest

from secateur.compare.advice import recommend
from secateur.compare.statistics import find_margin, rank_arms

from .examples import outcome, timed


def test_a_clear_lead_is_told():
    runs = [
        outcome("a", s, 0.9 + 0.01 * s) for s in (0, 1, 2)
    ]  # the seeds differ as much, but the pairs do not
    runs += [outcome("b", s, 0.89 + 0.01 * s + 0.0001 * (s == 1)) for s in (0, 1, 2)]
    runs += [outcome("c", s, 0.5 + 0.01 * s) for s in (0, 1, 2)]
    (one,) = recommend(runs)
    assert (one.best, one.rival, one.cheaper, one.others) == ("a", "b", None, ())
    assert one.lead == pytest.approx(0.01, abs=1e-4)
    assert one.margin is not None
    assert one.margin < 0.001
    assert "ahead of all others" in one.text


def test_an_arm_that_scatters_far_behind_blurs_nothing():
    runs = [outcome("a", s, 0.90 + 0.001 * s) for s in (0, 1, 2)]
    runs += [outcome("b", s, 0.89 + 0.001 * s + 0.0002 * (s == 1)) for s in (0, 1, 2)]
    runs += [outcome("c", s, a) for s, a in enumerate((0.3, 0.5, 0.4))]
    (one,) = recommend(runs)
    assert one.others == ()
    assert "ahead of all others" in one.text
    assert find_margin([[0.9, 0.901, 0.902], [0.89, 0.8912, 0.892], [0.3, 0.5, 0.4]]) > 0.1


def test_the_margin_that_is_named_parts_the_arms():
    rng = np.random.default_rng(2)
    for _ in range(100):
        values = rng.normal(0.9, 0.01, (5, 3)) - np.array([0, 0, 0.02, 0.03, 0.05])[:, None]
        runs = [outcome("abcde"[arm], seed, values[arm, seed]) for arm in range(5) for seed in range(3)]
        (one,) = recommend(runs)
        means = dict(zip("abcde", values.mean(1), strict=True))
        assert one.margin is not None
        assert set(one.others) == {
            arm for arm in means if arm != one.best and means[one.best] - means[arm] <= one.margin
        }


def test_what_cannot_be_told_apart_is_named_with_the_cheapest():
    runs = [outcome("a", s, a, latency=timed(2.0)) for s, a in enumerate((0.92, 0.90, 0.915))]
    runs += [outcome("b", s, a, latency=timed(1.0)) for s, a in enumerate((0.90, 0.91, 0.905))]
    runs += [outcome("c", s, 0.5 + 0.001 * s, latency=timed(0.5)) for s in (0, 1, 2)]
    runs += [outcome("d", s, a, latency=timed(0.9)) for s, a in enumerate((0.91, 0.89, 0.90))]
    (one,) = recommend(runs)
    assert (one.best, one.rival, one.cheaper, one.others) == ("a", "b", "d", ("b", "d"))
    assert "With these 3 seeds means closer than" in one.text
    assert (
        "it is not ahead of “b”, “d”. Of these “d” is the cheapest to run: 0.9 ms against 2 ms." in one.text
    )
    (one,) = recommend([dataclasses.replace(run, latency=None) for run in runs])
    assert one.cheaper is None  # equal MACs


def test_zeros_are_computed_with_all_the_same():
    best, second, third = (0.92, 0.90, 0.915), (0.90, 0.91, 0.905), (0.91, 0.89, 0.90)
    masked = {"budget": {"params": 0.5}, "params": 0.5, "macs": 0.3, "masked": True}
    runs = [outcome("a", s, a, **masked | {"macs": 0.5}) for s, a in enumerate(best)]
    runs += [outcome("b", s, a, **masked) for s, a in enumerate(second)]
    (one,) = recommend(runs)
    assert (one.others, one.cheaper) == (("b",), None)
    small = {"budget": {"params": 0.5}, "params": 0.5, "macs": 0.8}
    (one,) = recommend([*runs, *(outcome("c", s, a, **small) for s, a in enumerate(third))])
    assert one.cheaper == "c"
    assert one.text.endswith("Of these “c” is the cheapest to run: 80.0 % of the MACs against 100.0 %.")


def test_a_latency_that_scatters_makes_nothing_cheaper():
    runs = [outcome("a", s, a, latency=timed(2.0)) for s, a in enumerate((0.92, 0.90))]
    runs += [outcome("b", s, a, latency=timed(ms)) for s, a, ms in ((0, 0.90, 1.0), (1, 0.91, 2.6))]
    (one,) = recommend(runs)
    assert (one.others, one.cheaper) == (("b",), None)
    row = next(row for row in rank_arms(runs) if row.arm == "b")
    assert (row.latency_ms, row.latency_spread) == (pytest.approx(1.8), pytest.approx(1.131, abs=1e-3))


def test_arms_with_missing_runs_and_masks_under_a_budget_of_macs_are_not_recommended():
    runs = [outcome("a", s, 0.9 + 0.001 * s) for s in (0, 1)] + [outcome("b", s, 0.8) for s in (0, 1)]
    runs += [outcome("lucky", 0, 0.95), outcome("lucky", 1, None, error="broke")]
    runs += [outcome("masked", s, 0.93, masked=True) for s in (0, 1)]
    (one,) = recommend(runs)
    assert (one.best, one.rival) == ("a", "b")
    assert "Left out, since runs are missing: “lucky”." in one.text
    (one,) = recommend(
        [dataclasses.replace(run, budget={"params": 0.5}, kept={"params": 0.5}) for run in runs]
    )
    assert one.best == "masked"


def test_one_seed_tells_nothing_apart():
    (one,) = recommend([outcome("a", 0, 0.92), outcome("b", 0, 0.60, macs=0.3)])
    assert (one.best, one.cheaper, one.margin) == ("a", None, None)
    assert "one seed tells nothing about spread" in one.text


def test_a_training_that_took_more_than_it_gave_is_named():
    runs = [outcome("a", 0, 0.9, accuracy_cut=0.1), outcome("b", 0, 0.89, accuracy_cut=0.912)]
    (one,) = recommend(runs)
    assert one.best == "a"
    assert one.text.endswith(
        "“b” had more right after its cut, 91.20 %: this training took more than it gave."
    )
    (one,) = recommend([runs[0], outcome("b", 0, 0.89, accuracy_cut=0.9)])
    assert "right after its cut" not in one.text


def test_what_is_over_the_budget_is_not_recommended():
    (one,) = recommend([outcome("masks", 0, 0.95, macs=1.0), outcome("b", 0, 0.9)])
    assert one.best == "b"
    assert [row.arm for row in rank_arms([outcome("masks", 0, 0.95, macs=1.0), outcome("b", 0, 0.9)])] == [
        "b",
        "masks",
    ]
    assert recommend([outcome("masks", 0, 0.95, macs=1.0), outcome("b", 0, None, error="broke")]) == []
