"""Tables, pictures and the page of a comparison."""

import csv
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.compare.advice import recommend
from secateur.compare.figures import draw_fronts, draw_widths, list_arms
from secateur.compare.page import render_page, write_page
from secateur.compare.statistics import list_within_latencies, rank_arms
from secateur.compare.tables import format_markdown, write_tables
from secateur.compare.words import format_percentage
from secateur.report import LatencyPair
from secateur.report.svg import number
from tests.report.browser import Browser, browser, missing
from tests.report.examples import latency
from tests.report.test_report import LIMIT, Page

from .examples import hostile, nothing_worked, outcome, results, timed


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_tables(folder, results())
    write_page(folder, results())
    return folder


def test_what_other_work_disturbed_is_left_out_and_said():
    disturbed = LatencyPair(
        latency(2.0, "pytorch"), dataclasses.replace(latency(1.0, "pytorch"), p90_ms=20.0)
    )
    runs = [outcome("a", 0, 0.9, latency=disturbed), outcome("b", 0, 0.8, latency=timed(1.0))]
    assert [row.latency_ms for row in rank_arms(runs)] == [None, 1.0]
    told = dataclasses.replace(results(), outcomes=runs)
    for text in (format_markdown(told), Page(render_page(told)).text):
        assert "Other work disturbed 1 of 2 measurements" in text


def test_a_message_of_several_lines_is_one_cell():
    told = dataclasses.replace(
        results(), outcomes=[outcome("a", 0, None, error="one\ntwo | three")], notes={}
    )
    assert "failed: one two \\| three |" in format_markdown(told)


def test_the_fronts_hold_the_table():
    outcomes = results().outcomes
    drawn, arms, table = draw_fronts(outcomes), list_arms(outcomes), rank_arms(outcomes)
    assert list(drawn) == ["plot-latency", "plot-macs", "plot-params"]  # time first
    for name, said, cost in (
        ("plot-macs", "MACs kept", lambda row: 100 * row.kept["macs"]),
        ("plot-params", "parameters kept", lambda row: 100 * row.kept["params"]),
        ("plot-latency", "latency", lambda row: row.latency_ms),
    ):
        picture = drawn[name].svg
        assert "<title>dense: accuracy 92.60 %</title>" in picture
        assert re.findall(r'data-series="(\d+)"', picture) == [str(place) for place in range(len(arms))]
        for row in table:
            accuracy = f"{100 * row.accuracy:.2f} ± {100 * row.spread:.2f} %"
            words = f"{row.arm}: accuracy {accuracy}, {said} {number(cost(row))}"
            assert picture.count(f"<title>{words}</title>") == 1
    untimed = [dataclasses.replace(outcome, latency=None) for outcome in outcomes]
    assert list(draw_fronts(untimed)) == ["plot-macs", "plot-params"]


def test_marks_stand_where_the_numbers_are():
    runs = [
        outcome("a", 0, 0.9),
        outcome("b", 0, 0.8, macs=0.25),
        outcome("dense", 0, 0.9, budget={}, macs=1.0),
    ]
    picture = draw_fronts(runs)["plot-macs"].svg
    places = [
        tuple(map(float, pair))
        for pair in re.findall(r'<\w+ c?x="([\d.]+)%" c?y="([\d.]+)"[^>]*class="mark', picture)
    ]
    (a, b, dense) = places
    assert (dense[0] - a[0]) / (a[0] - b[0]) == pytest.approx(2, abs=0.01)  # 100, 50 and 25 % kept
    assert a[1] == dense[1] < b[1]


def test_widths_are_means_over_seeds():
    outcomes = results().outcomes
    drawn, arms = draw_widths(outcomes), list_arms(outcomes)
    assert list(drawn) == [f"{share} % of the MACs" for share in (70, 50, 30)]
    row = drawn["50 % of the MACs"].rows[1]
    assert row[0] == arms[1]
    ours = [o for o in outcomes if (o.arm, o.budget) == (arms[1], {"macs": 0.5})]
    first = [o.widths[0] for o in ours]
    mean = sum(width.after for width in first) / 3
    assert f"<title>{first[0].layer}: {number(mean)} of {first[0].before} units</title>" in row[1]


def test_page_and_table_say_the_same(written: Path):
    told = results()
    text, page = (written / "table.md").read_text(), Page((written / "index.html").read_text())
    found, table = recommend(told.outcomes), rank_arms(told.outcomes)
    rows = [[cell.strip() for cell in row] for row in page.rows]
    cells = [row[4:6] for row in rows]
    assert len(found) == 3
    for one in found:
        assert one.text in text
        assert one.text in page.text
    times, arms = list_within_latencies(told.outcomes)
    assert text.count("\n| ") == 1 + len(table) + 1 + len(arms)
    assert len(times) == 3
    for arm, accuracies in arms.items():
        said = [format_percentage(accuracy) for accuracy in accuracies]
        assert f"| {arm} | {' | '.join(said)} |" in text
        assert [arm, *said] in rows
    assert "torch.nn.utils.prune, global magnitude: weights are masked" in text
    for row in table:
        shares = [row.kept["macs"], row.kept["params"]]
        if row.accuracy is not None:
            assert (
                f"| {row.budget} | {row.arm}{' (over the budget)' if row.over else ''} | "
                + " | ".join(f"{share:.3f}" for share in shares)
                in text
            )
            assert [f"{100 * share:.1f} %" for share in shares] in cells
    assert len(list(csv.DictReader((written / "table.csv").read_text().splitlines()))) == len(told.outcomes)
    assert sorted(path.name for path in written.iterdir()) == ["index.html", "table.csv", "table.md"]


def test_hostile_names_are_text():
    page = render_page(hostile())
    assert Page(page).tags.count("script") == 1
    assert "img" not in Page(page).tags


def test_a_comparison_in_which_nothing_worked_has_a_page_and_a_table():
    assert "failed: broke" in Page(render_page(nothing_worked())).text
    assert "failed: broke" in format_markdown(nothing_worked())


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 420])
@pytest.mark.parametrize("example", [results, hostile, nothing_worked])
def test_a_browser_shows_it_offline(window: Browser, example, width: int, scheme: str, tmp_path: Path):
    write_page(tmp_path, example())
    assert (tmp_path / "index.html").stat().st_size < LIMIT
    window.requests()
    window.theme(scheme)
    window.open(tmp_path / "index.html", width)
    assert window.console() == []
    page = (tmp_path / "index.html").as_uri()
    assert [url for url in window.requests() if url != page and not url.startswith("data:")] == []
    assert window.overflow() == []


@pytest.mark.slow
def test_one_can_sort_and_hide(window: Browser, written: Path):
    window.open(written / "index.html", 1400)
    window.run("document.querySelectorAll('#table table.standings th')[4].querySelector('button').click()")
    rows = "[...document.querySelector('#table table.standings').tBodies[0].rows]"
    column = f"return {rows}.map(row => +row.cells[4].dataset.value)"
    values = window.run(column)
    assert values == sorted(values, reverse=True)
    shown = "return getComputedStyle(document.querySelector('#plot-params [data-series=\"0\"]')).display"
    assert window.run(shown) == "inline"
    window.run("document.querySelector('button.key').click()")
    assert window.run(shown) == "none"
    opened = "return [...document.querySelectorAll('#widths details')].map(one => one.open)"
    assert window.run(opened) == [True, False, False]
    assert window.console() == []
