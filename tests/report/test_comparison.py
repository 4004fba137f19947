"""Means over seeds, what to recommend, and the page of a comparison."""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from secateur.report import ComparisonReport, LatencyPair, Outcome, advice, standings, write_comparison
from secateur.report.comparison import margin_of, markdown
from secateur.report.comparison_figures import arms_of, comparison_figures, widths
from secateur.report.data import Width
from secateur.report.html import render_comparison

from .browser import Browser, browser, missing
from .examples import comparison, latency
from .test_report import HOSTILE, Page


def outcome(arm: str, seed: int, accuracy: float | None, **more: object) -> Outcome:
    return Outcome(
        **{"arm": arm, "seed": seed, "accuracy": accuracy, "budget": {"macs": 0.5}, "macs": 0.5} | more
    )  # type: ignore[arg-type]


def timed(ms: float) -> LatencyPair:
    return LatencyPair(latency(2.0, "pytorch"), latency(ms, "pytorch"))


def test_means_and_differences_are_paired_by_seed():
    found = standings(
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
    assert row.macs == pytest.approx(0.45)
    assert row.difference == pytest.approx(-0.03)
    assert row.difference_spread == pytest.approx(0.0283, abs=1e-4)
    assert (row.seconds_per_epoch, row.training_seconds) == (10.0, 20.0)
    assert (row.seeds, row.failed, row.over) == (2, "broke", False)


def test_differences_may_be_to_another_arm_at_the_same_budget():
    found = standings(
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


def test_the_largest_budget_comes_first_whichever_cells_there_are():
    found = [outcome("dense", 0, 0.9, budget={}, macs=1.0)]
    for arm, share in (("a", 0.3), ("a", 0.7), ("b", 0.5), ("b", 0.3)):
        kept = [Width("conv", 10, round(10 * share))]
        found.append(outcome(arm, 0, 0.8, budget={"macs": share}, macs=share, widths=kept))
    rows = ["", "70 % of the MACs", "50 % of the MACs", "30 % of the MACs"]
    assert list(dict.fromkeys(line.budget for line in standings(found))) == rows
    assert [one.budget for one in advice(found)] == rows[1:]
    assert [trace["z"] for trace in widths(found)["data"]] == [
        [[0.7], [None]],
        [[None], [0.5]],
        [[0.3], [0.3]],
    ]


def test_differences_are_to_the_given_weights_where_all_start_from_them():
    (row, scratch) = standings([outcome("a", 0, 0.85, accuracy_dense=0.9), outcome("from scratch", 0, 0.8)])
    assert row.difference == pytest.approx(-0.05)
    assert scratch.difference == pytest.approx(-0.1)


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
    assert margin_of(values) == pytest.approx(4.896 * sigma / np.sqrt(seeds), rel=1e-3)
    assert margin_of(values[:1]) is None
    assert margin_of(values[:, :1]) is None


def test_equal_arms_are_rarely_told_apart():
    """Whatever their number: in one comparison out of twenty."""
    rng, told = np.random.default_rng(1), 0
    for _ in range(400):
        values = rng.normal(0.9, 0.003, (8, 3)) + rng.normal(0, 0.01, 3)
        means = values.mean(1)
        told += means.max() - means.min() > (margin_of(values) or 0)
    assert 0.02 < told / 400 < 0.09


def test_a_clear_lead_is_told():
    runs = [
        outcome("a", s, 0.9 + 0.01 * s) for s in (0, 1, 2)
    ]  # the seeds differ as much, but the pairs do not
    runs += [outcome("b", s, 0.89 + 0.01 * s + 0.0001 * (s == 1)) for s in (0, 1, 2)]
    runs += [outcome("c", s, 0.5 + 0.01 * s) for s in (0, 1, 2)]
    (one,) = advice(runs)
    assert (one.best, one.rival, one.cheaper, one.others) == ("a", "b", None, ())
    assert one.lead == pytest.approx(0.01, abs=1e-4)
    assert one.margin is not None
    assert one.margin < 0.001
    assert "ahead of all others" in one.text


def test_an_arm_that_scatters_far_behind_blurs_nothing():
    runs = [outcome("a", s, 0.90 + 0.001 * s) for s in (0, 1, 2)]
    runs += [outcome("b", s, 0.89 + 0.001 * s + 0.0002 * (s == 1)) for s in (0, 1, 2)]
    runs += [outcome("c", s, a) for s, a in enumerate((0.3, 0.5, 0.4))]
    (one,) = advice(runs)
    assert one.others == ()
    assert "ahead of all others" in one.text
    assert margin_of([[0.9, 0.901, 0.902], [0.89, 0.8912, 0.892], [0.3, 0.5, 0.4]]) > 0.1


def test_the_margin_that_is_named_parts_the_arms():
    rng = np.random.default_rng(2)
    for _ in range(100):
        values = rng.normal(0.9, 0.01, (5, 3)) - np.array([0, 0, 0.02, 0.03, 0.05])[:, None]
        runs = [outcome("abcde"[arm], seed, values[arm, seed]) for arm in range(5) for seed in range(3)]
        (one,) = advice(runs)
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
    (one,) = advice(runs)
    assert (one.best, one.rival, one.cheaper, one.others) == ("a", "b", "d", ("b", "d"))
    assert "With these 3 seeds means closer than" in one.text
    assert (
        "it is not ahead of “b”, “d”. Of these “d” is the cheapest to run: 0.9 ms against 2 ms." in one.text
    )
    (one,) = advice([dataclasses.replace(run, latency=None) for run in runs])
    assert one.cheaper is None  # equal MACs


def test_zeros_are_computed_with_all_the_same():
    best, second, third = (0.92, 0.90, 0.915), (0.90, 0.91, 0.905), (0.91, 0.89, 0.90)
    masked = {"budget": {"params": 0.5}, "params": 0.5, "macs": 0.3, "masked": True}
    runs = [outcome("a", s, a, **masked | {"macs": 0.5}) for s, a in enumerate(best)]
    runs += [outcome("b", s, a, **masked) for s, a in enumerate(second)]
    (one,) = advice(runs)
    assert (one.others, one.cheaper) == (("b",), None)
    small = {"budget": {"params": 0.5}, "params": 0.5, "macs": 0.8}
    (one,) = advice([*runs, *(outcome("c", s, a, **small) for s, a in enumerate(third))])
    assert one.cheaper == "c"
    assert one.text.endswith("Of these “c” is the cheapest to run: 80.0 % of the MACs against 100.0 %.")


def test_a_latency_that_scatters_makes_nothing_cheaper():
    runs = [outcome("a", s, a, latency=timed(2.0)) for s, a in enumerate((0.92, 0.90))]
    runs += [outcome("b", s, a, latency=timed(ms)) for s, a, ms in ((0, 0.90, 1.0), (1, 0.91, 2.6))]
    (one,) = advice(runs)
    assert (one.others, one.cheaper) == (("b",), None)
    row = next(row for row in standings(runs) if row.arm == "b")
    assert (row.latency_ms, row.latency_spread) == (pytest.approx(1.8), pytest.approx(1.131, abs=1e-3))


def test_arms_with_missing_runs_and_masks_under_a_budget_of_macs_are_not_recommended():
    runs = [outcome("a", s, 0.9 + 0.001 * s) for s in (0, 1)] + [outcome("b", s, 0.8) for s in (0, 1)]
    runs += [outcome("lucky", 0, 0.95), outcome("lucky", 1, None, error="broke")]
    runs += [outcome("masked", s, 0.93, masked=True) for s in (0, 1)]
    (one,) = advice(runs)
    assert (one.best, one.rival) == ("a", "b")
    assert "Left out, since runs are missing: “lucky”." in one.text
    (one,) = advice([dataclasses.replace(run, budget={"params": 0.5}, params=0.5) for run in runs])
    assert one.best == "masked"


def test_a_clock_that_drifts_between_runs_does_not_matter():
    slow = LatencyPair(latency(20.0, "pytorch"), latency(10.0, "pytorch"))
    runs = [
        outcome("a", 0, 0.9, latency=slow),
        outcome("b", 0, 0.8, latency=timed(1.0)),
        outcome("c", 0, 0.7, latency=timed(2.0)),
    ]
    assert [(row.latency_ms, row.speed_up) for row in standings(runs)] == [(1.0, 2.0), (1.0, 2.0), (2.0, 1.0)]


def test_what_other_work_disturbed_is_left_out_and_said():
    disturbed = LatencyPair(
        latency(2.0, "pytorch"), dataclasses.replace(latency(1.0, "pytorch"), p90_ms=20.0)
    )
    runs = [outcome("a", 0, 0.9, latency=disturbed), outcome("b", 0, 0.8, latency=timed(1.0))]
    assert [row.latency_ms for row in standings(runs)] == [None, 1.0]
    report = dataclasses.replace(comparison(), outcomes=runs)
    for text in (markdown(report), Page(render_comparison(report)).text):
        assert "Other work disturbed 1 of 2 measurements" in text


def test_one_seed_tells_nothing_apart():
    (one,) = advice([outcome("a", 0, 0.92), outcome("b", 0, 0.60, macs=0.3)])
    assert (one.best, one.cheaper, one.margin) == ("a", None, None)
    assert "one seed tells nothing about spread" in one.text


def test_a_training_that_took_more_than_it_gave_is_named():
    runs = [outcome("a", 0, 0.9, accuracy_cut=0.1), outcome("b", 0, 0.89, accuracy_cut=0.912)]
    (one,) = advice(runs)
    assert one.best == "a"
    assert one.text.endswith(
        "“b” had more right after its cut, 91.20 %: this training took more than it gave."
    )
    (one,) = advice([runs[0], outcome("b", 0, 0.89, accuracy_cut=0.9)])
    assert "right after its cut" not in one.text


def test_what_is_over_the_budget_is_not_recommended():
    (one,) = advice([outcome("masks", 0, 0.95, macs=1.0), outcome("b", 0, 0.9)])
    assert one.best == "b"
    assert [row.arm for row in standings([outcome("masks", 0, 0.95, macs=1.0), outcome("b", 0, 0.9)])] == [
        "b",
        "masks",
    ]
    assert advice([outcome("masks", 0, 0.95, macs=1.0), outcome("b", 0, None, error="broke")]) == []


def test_one_run_over_the_budget_is_enough():
    runs = [outcome("a", s, 0.9, macs=macs) for s, macs in enumerate((0.55, 0.45, 0.45))]
    assert [row.over for row in standings(runs)] == [True]


def test_a_message_of_several_lines_is_one_cell():
    report = dataclasses.replace(
        comparison(), outcomes=[outcome("a", 0, None, error="one\ntwo | three")], notes={}
    )
    assert "failed: one two \\| three |" in markdown(report)


def test_the_fronts_and_widths_hold_the_table():
    report = comparison()
    drawn, arms, table = (
        comparison_figures(report.outcomes),
        arms_of(report.outcomes),
        standings(report.outcomes),
    )
    for name, field, factor in (("plot-macs", "macs", 100), ("plot-latency", "latency_ms", 1)):
        *lines, dense = drawn[name]["data"]
        assert [line["name"] for line in lines] == arms
        assert dense["y"] == [92.6]
        for line in lines:
            rows = [row for row in table if row.arm == line["name"]]
            assert sorted(line["x"]) == pytest.approx(
                sorted(factor * getattr(row, field) for row in rows), abs=1e-4
            )
            assert sorted(line["error_y"]["array"]) == pytest.approx(
                sorted(100 * row.spread for row in rows), abs=1e-3
            )
    heats = drawn["plot-widths"]["data"]
    assert [heat["visible"] for heat in heats] == [True, False, False]
    ours = [o for o in report.outcomes if (o.arm, o.budget) == (arms[1], {"macs": 0.5})]
    assert heats[1]["z"][1][0] == pytest.approx(
        sum(o.widths[0].after for o in ours) / 3 / ours[0].widths[0].before, abs=1e-4
    )


def test_plotly_knows_every_property():
    import plotly.graph_objects

    for figure in comparison_figures(comparison().outcomes).values():
        plotly.graph_objects.Figure(figure)  # raises for what it does not know


def test_page_and_table_say_the_same(tmp_path: Path):
    report = comparison()
    write_comparison(tmp_path, report)
    text = (tmp_path / "table.md").read_text()
    page = Page((tmp_path / "index.html").read_text())
    found = advice(report.outcomes)
    assert len(found) == 3
    for one in found:
        assert one.text in text
        assert one.text in page.text
    assert text.count("\n| ") == 1 + len(standings(report.outcomes))
    assert "torch.nn.utils.prune, global magnitude: weights are masked" in text
    assert len(list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))) == len(
        report.outcomes
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "table.csv", "table.md"]


def hostile() -> ComparisonReport:
    runs = [dataclasses.replace(o, arm=HOSTILE) if o.arm == "rd" else o for o in comparison().outcomes]
    report = dataclasses.replace(comparison(), outcomes=runs, notes={HOSTILE: HOSTILE}, command=HOSTILE)
    return dataclasses.replace(report, model=HOSTILE, dataset=HOSTILE)


def nothing_worked() -> ComparisonReport:
    return dataclasses.replace(comparison(), outcomes=[outcome("a", 0, None, error="broke")], notes={})


def test_hostile_names_are_text():
    page = render_comparison(hostile())
    assert Page(page).tags.count("script") == 3
    assert "img" not in Page(page).tags


def test_a_comparison_in_which_nothing_worked_has_a_page_and_a_table():
    assert "failed: broke" in Page(render_comparison(nothing_worked())).text
    assert "failed: broke" in markdown(nothing_worked())


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("example", [comparison, hostile, nothing_worked])
def test_a_browser_shows_it_offline(window: Browser, example, width: int, tmp_path: Path):
    write_comparison(tmp_path, example())
    window.requests()
    window.open(tmp_path / "index.html", width)
    assert window.console() == []
    page = (tmp_path / "index.html").as_uri()
    assert [url for url in window.requests() if url != page and not url.startswith("data:")] == []
    overflow = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
    assert window.run(overflow) == 0


@pytest.mark.slow
def test_one_can_sort_hide_and_choose_a_budget(window: Browser, tmp_path: Path):
    write_comparison(tmp_path, comparison())
    window.open(tmp_path / "index.html", 1400)
    window.run("document.querySelectorAll('table.standings th')[4].querySelector('button').click()")
    rows = "[...document.querySelector('table.standings').tBodies[0].rows]"
    column = f"return {rows}.map(row => +row.cells[4].dataset.value)"
    values = window.run(column)
    assert values == sorted(values, reverse=True)
    window.run("document.querySelector('button.key').click()")
    assert window.run("return document.getElementById('plot-params').data[0].visible") is False
    window.run(
        "const s = document.getElementById('budget'); s.selectedIndex = 2; s.dispatchEvent(new Event('change'))"
    )
    visible = "return document.getElementById('plot-widths').data.map(trace => trace.visible)"
    assert window.run(visible) == [False, False, True]
    assert window.console() == []
