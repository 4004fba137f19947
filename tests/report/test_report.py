"""The report says what the data says, whatever the names, and draws it without a network."""

import dataclasses
import html.parser
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import FileError, SecateurError
from secateur.report import (
    FrozenGroup,
    Group,
    LatencyPair,
    Report,
    Width,
    current_versions,
    write_report,
)
from secateur.report.data import Ending
from secateur.report.figures import figures
from secateur.report.html import render

from .browser import Browser, browser, missing
from .examples import deep, faded, latency, resnet20

EXAMPLES = pytest.mark.parametrize("example", [resnet20, faded, deep])
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=alert(1)>&amp;'\"{{ 7 * 7 }}"


def smallest() -> Report:
    """Nothing but what every run knows."""
    return Report(
        model="tiny",
        method="l1",
        budget={"params": 1000},
        seed=0,
        command="secateur prune tiny",
        before={"macs": 200, "params": 2000},
        after={"macs": 100, "params": 1000},
    )


def hostile() -> Report:
    """A report whose every name tries to run code."""
    line = {**resnet20().history[-1], "phase": HOSTILE}
    return dataclasses.replace(
        resnet20(),
        model=HOSTILE,
        dataset=HOSTILE,
        method=HOSTILE,
        command=HOSTILE,
        budget={HOSTILE: 1},
        widths=[Width(HOSTILE, 8, 4)],
        groups=[Group(HOSTILE, [True, False], [2.0, 1.0])],
        frozen=[FrozenGroup(HOSTILE, HOSTILE, 1, 1)],
        notes=[HOSTILE],
        decays=[Ending(HOSTILE, 0, 1, 5, True, 0.7, 3.0)],
        history=[line],
        versions={HOSTILE: HOSTILE},
    )


class Page(html.parser.HTMLParser):
    """The page as a browser reads it: its elements, its text and the rows of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._open or "style" in self._open:
            return
        self.words.append(data)
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += f" {data}"

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def row(self, name: str) -> str:
        rows = [" ".join(" ".join(row).split()) for row in self.rows]
        return next(row for row in rows if row.startswith(name))


def test_the_headline():
    assert resnet20().headline == (
        "resnet20 on cifar10: 50.0 % of the MACs kept, accuracy 91.73 % → 91.10 % "
        "(after 5 epochs of fine-tuning), proven equal to the masked model (max error 2e-13)"
    )
    assert deep().headline.endswith(": 59.7 % of the MACs kept, within 3e-05 of the masked model")
    assert smallest().headline == "tiny: 50.0 % of the MACs kept, not verified against the masked model"


def test_equal_means_equal_in_float64():
    assert resnet20().is_proven
    assert not dataclasses.replace(resnet20(), verify_rel_error_float64=1e-6).is_proven
    assert not dataclasses.replace(resnet20(), verify_rel_error_float64=math.nan).is_proven
    assert not dataclasses.replace(resnet20(), verify_rel_error_float64=None).is_proven


def test_the_page_shows_the_numbers_of_the_data():
    page = Page(render(resnet20()))
    assert page.row("Accuracy, right after the cut").split(" ", 5)[5] == "91.73 % 74.18 % −17.55 points"
    assert page.row("Accuracy, in the end").endswith("91.73 % 91.10 % −0.63 points")
    assert page.row("MACs").endswith("40.81 M 40,813,184 20.40 M 20,398,720 50.0 % kept")
    assert page.row("Parameters").endswith("272.5 k 272,474 141.9 k 141,882 52.1 % kept")
    assert page.row("Weights file").endswith("1.113 MB 1,113,296 B 590.1 kB 590,104 B 53.0 % kept")
    assert page.row("ONNX file").endswith("1.102 MB 1,102,377 B 579.2 kB 579,240 B 52.5 % kept")
    assert page.row("Latency, PyTorch").endswith("5.31 ms 4.94 – 6.43 3.92 ms 3.65 – 4.74 1.35× faster")
    assert page.row("Latency, onnxruntime").endswith("1.68× faster")
    assert page.row("conv1 (input channels)").endswith("432 0.2 % 442.4 k 1.1 %")
    assert (
        "at most 2.3e-13; relative to the largest output, that is 4.1e-15 in float64 and 1.1e-06" in page.text
    )
    assert resnet20().command in page.text
    for width in resnet20().widths:
        assert f"{width.layer}{width.before} → {width.after}" in page.text
    for version in resnet20().versions.values():
        assert str(version) in page.text


def test_slower_is_called_slower():
    report = dataclasses.replace(
        resnet20(), latency_pytorch=LatencyPair(latency(2.0, "pytorch"), latency(3.0, "pytorch"))
    )
    assert "1.50× slower" in Page(render(report)).row("Latency, PyTorch")


@EXAMPLES
def test_the_pictures_hold_the_data(example):
    report = example()
    drawn = figures(report)
    bars = drawn["plot-widths"]["data"]
    assert bars[0]["y"] == [width.before for width in report.widths]
    assert bars[1]["y"] == [width.after for width in report.widths]

    scored = [group for group in report.groups if group.scores is not None]
    strips = drawn["plot-scores"]["data"][1]["text"]
    assert len(strips) == 3 * len(scored)
    for i, group in enumerate(scored):
        counts = [
            sum(int(cell.split("<br>")[1].split()[0]) for cell in strips[3 * i + j] if cell) for j in range(2)
        ]
        assert counts == [group.kept, group.units - group.kept]
    assert ("plot-accuracy" in drawn) == bool(report.history)


def test_how_units_faded():
    report = faded()
    zero, restored = figures(report)["plot-decays"]["data"]
    assert [len(line["x"]) for line in (zero, restored)] == [3 * 35, 3 * 5]
    first = next(decay for decay in report.decays if decay.restored)
    assert restored["x"][:3] == [first.start, first.end, None]
    assert f"unit {first.unit}: steps 0 to 6, restored" in restored["text"][0]
    drawn = figures(report)["plot-resistance"]
    assert sum(len(points["x"]) for points in drawn["data"]) == 39  # one was never measured
    assert {(line.get("x0"), line.get("y0")) for line in drawn["layout"]["shapes"]} == {(0.6, 0), (0, 2.5)}
    assert "40 units faded: 35 to zero, 5 were restored." in Page(render(report)).text
    assert json.loads(json.dumps(report.to_json()["decays"]))[7]["restored"] is True
    never_restored = dataclasses.replace(
        report, restore_above={}, decays=[d for d in report.decays if not d.restored]
    )
    assert "since this run used no test for restoring" in Page(render(never_restored)).text


@EXAMPLES
def test_plotly_knows_every_property(example):
    import plotly.graph_objects

    for figure in figures(example()).values():
        plotly.graph_objects.Figure(figure)  # raises for what it does not know


def test_what_is_missing_is_left_out_or_said():
    page = render(smallest())
    text = Page(page).text
    assert "Accuracy was not measured." in text
    assert "Latency was not measured." in text
    assert "The cut was not verified in this run." in text
    assert "Nothing: every group of the model was up for removal." in text
    assert "Training" not in text
    assert "script" not in Page(page).tags  # nothing to draw, so no library either
    assert len(page) < 20_000


def test_scores_that_are_missing_equal_or_not_finite():
    groups = [
        Group("none", [True, False]),
        Group("equal", [True, True, False], [1.0, 1.0, 1.0]),
        Group("diverged", [True, False, True], [math.nan, 1.0, math.inf]),
        Group("lost", [True, False], [math.nan, None]),
    ]
    report = dataclasses.replace(smallest(), groups=groups)
    assert "1 group has no scores." in Page(render(report)).text
    text = figures(report)["plot-scores"]["data"][1]["text"]
    assert [cell for row in text[:2] for cell in row if cell] == [
        "equal<br>2 kept, score 1 … 1",
        "equal<br>1 removed, score 1 … 1",
    ]
    assert report.to_json()["groups"][3]["scores"] == [None, None]


def test_hostile_names_are_text():
    page = render(hostile())
    assert Page(page).tags.count("script") == 3
    assert "img" not in Page(page).tags
    assert "taken'</script>" not in page
    assert Page(page).text.count("</script>") >= 10


def test_the_json_file(tmp_path: Path):
    write_report(tmp_path, resnet20())
    written = json.loads((tmp_path / "report.json").read_text())
    expected = {
        "before": {"macs": 40_813_184, "params": 272_474},
        "after": {"macs": 20_398_720, "params": 141_882},
        "accuracy_before": 0.9173,
        "accuracy_cut": 0.7418,
        "accuracy_after": 0.911,
        "verify_max_abs_error": 2.3e-13,
        "latency_ms_before": 5.31,
        "latency_ms_after": 3.92,
    }
    assert {key: written[key] for key in expected} == expected
    assert {field.name for field in dataclasses.fields(Report)} < set(written)
    assert written["headline"] == resnet20().headline
    assert written["latency_onnxruntime"]["before"]["median_ms"] == 1.87
    assert written["widths"][0] == {"layer": "layer1.0.conv1", "before": 16, "after": 7}
    assert written["groups"][0]["kept"] == sum(written["groups"][0]["mask"])
    assert written["frozen"][0]["reason"] == "its outputs are the model's outputs"
    assert written["history"] == list(resnet20().history)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_run_that_diverged_still_has_valid_json_and_a_page(tmp_path: Path):
    lines = [{**line, "loss": math.nan, "accuracy": None} for line in resnet20().history]
    write_report(tmp_path, dataclasses.replace(resnet20(), history=lines))
    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["history"][0]["loss"] is None


def test_epochs_that_were_not_tested_leave_no_gap():
    lines = [{**line, "accuracy": None if i % 2 else 0.5} for i, line in enumerate(resnet20().history)]
    drawn = figures(dataclasses.replace(resnet20(), history=lines))["plot-accuracy"]["data"][1]
    assert drawn["x"] == list(range(1, len(lines) + 1, 2))
    assert drawn["y"] == [50] * len(drawn["x"])


def test_the_same_report_gives_the_same_page():
    assert render(resnet20()) == render(resnet20())


def test_mistakes_are_named(tmp_path: Path):
    with pytest.raises(SecateurError, match=r"accuracy_after is 91\.1; expected a fraction"):
        dataclasses.replace(resnet20(), accuracy_after=91.1)
    with pytest.raises(SecateurError, match="group 'a': 1 scores for 2 units"):
        Group("a", [True, False], [1.0])
    with pytest.raises(FileError, match="Create its folder first"):
        write_report(tmp_path / "none", smallest())


def test_versions_are_of_this_machine():
    versions = current_versions()
    assert set(versions) == {"secateur", "torch", "python", "platform", "device", "threads"}
    assert all(versions.values())


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("example", [resnet20, deep, hostile, smallest])
def test_a_browser_shows_it_offline(window: Browser, example, width: int, tmp_path: Path):
    report = example()
    write_report(tmp_path, report)
    window.requests()
    window.open(tmp_path / "report.html", width)
    assert window.console() == []
    page = (tmp_path / "report.html").as_uri()
    assert [url for url in window.requests() if url != page and not url.startswith("data:")] == []
    overflow = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"
    assert window.run(overflow) == 0
    plots = window.run("return [...document.querySelectorAll('.figure')].map(plot => plot.id)")
    assert plots == list(figures(report))
    for plot in plots:
        drawn = "return document.querySelectorAll('#{} :is(.point, .js-line, .hm image)').length"
        assert window.run(drawn.format(plot)) > 0, plot
    if report.widths:
        bars = window.run("return document.querySelectorAll('#plot-widths .bars .point').length")
        assert bars == 2 * len(report.widths)


@pytest.mark.slow
def test_a_browser_shows_hostile_names_as_they_are(window: Browser, tmp_path: Path):
    write_report(tmp_path, hostile())
    window.open(tmp_path / "report.html", 1400)
    assert window.run("return document.title") == f"{HOSTILE} on {HOSTILE} · Secateur"
    assert window.run("return document.querySelector('.layers span').textContent") == HOSTILE
    assert window.run("return document.querySelector('pre').textContent") == HOSTILE
    phase = window.run("return document.querySelector('#plot-loss .annotation text').textContent")
    assert phase == HOSTILE


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "ink"), [("light", "rgb(24, 33, 44)"), ("dark", "rgb(229, 234, 240)")])
def test_pictures_follow_the_theme(window: Browser, scheme: str, ink: str, tmp_path: Path):
    write_report(tmp_path, resnet20())
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    window.devtools("Emulation.setEmulatedMedia", features=features)
    window.open(tmp_path / "report.html", 1400)
    fills = window.run(
        "return [...document.querySelectorAll('.figure text')].map(text => getComputedStyle(text).fill)"
    )
    assert set(fills) == {ink}
    assert window.run("return getComputedStyle(document.body).color") == ink
