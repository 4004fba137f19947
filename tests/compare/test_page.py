"""Tables, pictures and the page of a comparison."""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.compare.advice import recommend
from secateur.compare.figures import draw_figures, list_arms
from secateur.compare.page import render_page, write_page
from secateur.compare.statistics import rank_arms
from secateur.compare.tables import format_markdown, write_tables
from secateur.report import LatencyPair
from tests.report.browser import Browser, browser, missing
from tests.report.examples import latency
from tests.report.test_report import Page

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


def test_the_fronts_and_widths_hold_the_table():
    outcomes = results().outcomes
    drawn, arms, table = draw_figures(outcomes), list_arms(outcomes), rank_arms(outcomes)
    for name, cost in (
        ("plot-macs", lambda row: 100 * row.kept["macs"]),
        ("plot-params", lambda row: 100 * row.kept["params"]),
        ("plot-latency", lambda row: row.latency_ms),
    ):
        *lines, dense = drawn[name]["data"]
        assert [line["name"] for line in lines] == arms
        assert dense["y"] == [92.6]
        for line in lines:
            rows = [row for row in table if row.arm == line["name"]]
            assert sorted(line["x"]) == pytest.approx(sorted(map(cost, rows)), abs=1e-4)
            assert sorted(line["error_y"]["array"]) == pytest.approx(
                sorted(100 * row.spread for row in rows), abs=1e-3
            )
    heats = drawn["plot-widths"]["data"]
    assert [heat["visible"] for heat in heats] == [True, False, False]
    ours = [o for o in outcomes if (o.arm, o.budget) == (arms[1], {"macs": 0.5})]
    assert heats[1]["z"][1][0] == pytest.approx(
        sum(o.widths[0].after for o in ours) / 3 / ours[0].widths[0].before, abs=1e-4
    )


def test_plotly_knows_every_property():
    import plotly.graph_objects

    for figure in draw_figures(results().outcomes).values():
        plotly.graph_objects.Figure(figure)  # raises for what it does not know


def test_page_and_table_say_the_same(written: Path):
    told = results()
    text, page = (written / "table.md").read_text(), Page((written / "index.html").read_text())
    found, table = recommend(told.outcomes), rank_arms(told.outcomes)
    cells = [[cell.strip() for cell in row[4:6]] for row in page.rows]
    assert len(found) == 3
    for one in found:
        assert one.text in text
        assert one.text in page.text
    assert text.count("\n| ") == 1 + len(table)
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
    assert Page(page).tags.count("script") == 3
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
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("example", [results, hostile, nothing_worked])
def test_a_browser_shows_it_offline(window: Browser, example, width: int, tmp_path: Path):
    write_page(tmp_path, example())
    window.requests()
    window.open(tmp_path / "index.html", width)
    assert window.console() == []
    page = (tmp_path / "index.html").as_uri()
    assert [url for url in window.requests() if url != page and not url.startswith("data:")] == []
    overflow = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
    assert window.run(overflow) == 0


@pytest.mark.slow
def test_one_can_sort_hide_and_choose_a_budget(window: Browser, written: Path):
    window.open(written / "index.html", 1400)
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
