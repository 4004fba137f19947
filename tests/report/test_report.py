"""The report says what the data says, whatever the names, and draws it without a network."""

import dataclasses
import html.parser
import itertools
import json
import math
import random
import re
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
from secateur.report.data import ClassAccuracy, Ending, LayerCost, OutputFile, WeightFacts
from secateur.report.figures import figures
from secateur.report.html import render
from secateur.report.svg import Axis, Chart, number

from .browser import Browser, browser, missing
from .examples import deep, faded, latency, measured, resnet20

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
        layers=[LayerCost(HOSTILE, 1, 1, 1.0, 1.0)],
        classes=[ClassAccuracy(HOSTILE, 1, 1.0, 0.0, True)],
        changed=[dataclasses.replace(resnet20().changed[0], label=HOSTILE, before=HOSTILE, after=HOSTILE)],
        files=[OutputFile(HOSTILE, 1, HOSTILE)],
        loading=[HOSTILE],
        repeat=HOSTILE,
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
    for width in report.widths:
        assert (
            drawn["plot-widths"].svg.count(f"<title>{width.layer}: {width.before} → {width.after} units") == 2
        )
    scored = [group for group in report.groups if group.scores is not None]
    rows = drawn["plot-scores"].rows
    assert [row[0] for row in rows] == [group.name for group in scored]
    assert [row[2] for row in rows] == [f"{group.kept} of {group.units}" for group in scored]
    for group, row in zip(scored, rows, strict=True):
        assert row[3:] == (min_max(group, True), min_max(group, False))
    assert ("plot-accuracy" in drawn) == bool(report.history)
    if report.history:
        assert len(drawn["plot-accuracy"].rows) == len(drawn["plot-loss"].rows) == 25
        assert drawn["plot-accuracy"].rows[24] == ["25", "93.44", "90.44"]  # 0.911 − 0.016 · 0.8⁴


def min_max(group: Group, kept: bool) -> str:
    found = [score for score, mask in zip(group.scores, group.mask, strict=True) if mask == kept]
    return f"{min(found):.3g} … {max(found):.3g}" if found else "–"


def test_places_on_a_chart():
    chart = Chart(Axis(0, 10), Axis(0, 100), 164)  # 100 pixels between the titles
    assert 'cx="25.00%" cy="74.0"' in chart.mark(2.5, 50, "half")
    assert 'x="25.00%" y="74.0"' in chart.mark(2.5, 50, "half", "square")
    assert 'x="10.00%" width="20.00%" y="24.0" height="100.0"' in chart.bar(1, 3, 0, 100, "all")
    assert 'points="0.00,124.0 100.00,24.0"' in chart.line([(0, 0), (10, 100)])
    assert Axis(1, 100, log=True).at(10) == pytest.approx(0.5)


def test_histograms_count_every_unit():
    report = dataclasses.replace(
        resnet20(), groups=[Group("g", [False, True, True, True], [0.0, 1.0, 1.0, 0.99])]
    )
    picture = figures(report)["plot-scores"].rows[0][1]
    kept, removed = re.findall(r'd="M0 10([^"]*)V10z"', picture)
    assert kept == "V10h47V0.5h1"  # three units, the most of all
    assert removed == "V15.5h1V10h47"  # one of them: 9.5 / √3 below the line


def test_how_units_faded():
    report = faded()
    rows = figures(report)["plot-decays"].rows
    assert sum(int(row[2]) for row in rows) == 35
    assert sum(int(row[3]) for row in rows) == 5
    first = next(decay for decay in report.decays if decay.restored)
    picture = next(row[1] for row in rows if row[0] == first.group)
    assert f"<title>unit {first.unit}: steps 0 to 6, restored</title>" in picture
    drawn = figures(report)["plot-resistance"]
    assert len(drawn.rows) == drawn.svg.count("<title>") == 39  # one was never measured
    assert drawn.svg.count("thin dashed") == 2
    assert "40 units faded: 35 to zero, 5 were restored." in Page(render(report)).text
    assert json.loads(json.dumps(report.to_json()["decays"]))[7]["restored"] is True
    never_restored = dataclasses.replace(
        report, restore_above={}, decays=[d for d in report.decays if not d.restored]
    )
    assert "since this run used no test for restoring" in Page(render(never_restored)).text


def test_how_pruning_went():
    report = faded()
    drawn, last = figures(report), report.pruning_history[-1]
    for row in drawn["plot-units"].rows:
        assert row[2] == f"{report.pruning_history[0]['units'][row[0]]} → {last['units'][row[0]]}"
    assert drawn["plot-cost"].rows[-1] == ("200", "50.0 %", "52.0 %")
    layer = drawn["plot-layers"].rows[0][1]
    assert (
        "<title>step 0: 10,000, step 50: 8,750, step 100: 7,500, step 150: 6,250, step 200: 5,000</title>"
        in layer
    )
    assert re.findall(r'<path opacity="([\d.]+)" d="M([^"]*)"/>', layer) == [
        ("1", "0 5h1"), ("0.9", "1 5h1"), ("0.8", "2 5h1"), ("0.6", "3 5h1"), ("0.5", "4 5h1")
    ]  # fmt: skip


def test_the_verdict_comes_first():
    text = Page(render(resnet20())).text
    assert text.index("✓ Budget met: 49.98 % of the MACs kept, at most 50 % asked for.") < text.index(
        "run-again"
    )
    assert text.index("sc.load(dense") < text.index("Before and after")
    tight = dataclasses.replace(resnet20(), budget={"macs": 0.4, "latency_ms": 4})
    assert [bound.met for bound in tight.bounds] == [False, True]
    assert (
        "✗ Budget not met: 49.98 % of the MACs kept, at most 40 % asked for; latency 3.92 ms"
        in Page(render(tight)).text
    )
    assert "Budget" not in Page(render(dataclasses.replace(smallest(), budget={"latency_ms": 3}))).text
    assert [bound.met for bound in smallest().bounds] == [True]  # 1000 parameters, as a count
    weights = WeightFacts(total=100, kept=30, layers={"a": (100, 30)}, macs=50, params=60)
    sparse = dataclasses.replace(resnet20(), budget={"units": 0.3, "macs": 0.2}, weights=weights)
    assert [bound.met for bound in sparse.bounds] == [True, True]


def test_time_classes_and_calibration():
    drawn, page = figures(resnet20()), Page(render(resnet20()))
    assert [[row[n] for n in (0, 2, 4)] for row in drawn["plot-time"].rows] == [
        ["conv1", "442k → 442k", "0.210 → 0.200"],
        ["layer1.0.conv1", "2.36M → 1.03M", "0.400 → 0.250"],
        ["BatchNorm2d (19×)", "", "0.600 → 0.550"],
        ["Identity (1×)", "", "0.010 → –"],
    ]
    assert "layers with multiply-adds took 0.61 ms before and 0.45 ms after (73.8 %)" in page.text
    assert [row[0] for row in drawn["plot-classes"].rows] == ["cat", "dog"]
    assert "16 test images that the dense model got right are wrong now, 2 the other way round" in page.text
    assert "Lost more than chance explains: cat." in page.text
    assert page.tags.count("img") == 1
    error = resnet20().calibration["after"].error
    assert error == pytest.approx(0.04 * 0.2 + 0.36 * 0.1 + 0.6 * 0.1)
    assert f"{100 * error:.2f} points after" in page.text
    written = resnet20().to_json()
    assert written["calibration"]["after"]["error"] == error
    assert "picture" not in written["changed"][0]


def test_curves_take_the_place_of_ranks():
    drawn, text = figures(measured()), Page(render(measured())).text
    assert "plot-scores" not in drawn
    assert len(drawn["plot-curves"].rows) == len(measured().groups)
    group = measured().groups[0]
    assert drawn["plot-curves"].rows[0][:3] == (
        group.name, f"{group.kept} of {group.units}", number(0.1 / group.kept)
    )  # fmt: skip
    assert "The curves add up to 0.05; measured with all of them pruned: 0.04." in text
    assert measured().to_json()["groups"][0]["scores"]  # the file still has them


def test_what_is_missing_is_left_out_or_said():
    page = render(smallest())
    text = Page(page).text
    assert "Accuracy was not measured." in text
    assert "Latency was not measured." in text
    assert "The cut was not verified in this run." in text
    assert "Nothing: every group of the model was up for removal." in text
    assert "Training" not in text
    assert "svg" not in Page(page).tags
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
    rows = figures(report)["plot-scores"].rows
    assert [(row[0], *row[2:]) for row in rows] == [
        ("equal", "2 of 3", "1 … 1", "1 … 1"),
        ("diverged", "2 of 3", "–", "1 … 1"),
        ("lost", "1 of 2", "–", "–"),
    ]
    assert report.to_json()["groups"][3]["scores"] == [None, None]


def test_hostile_names_are_text():
    page = render(hostile())
    assert Page(page).tags.count("script") == 1
    assert "<img src=x" not in page
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
    drawn = figures(dataclasses.replace(resnet20(), history=lines))["plot-accuracy"]
    assert [row[2] for row in drawn.rows] == ["50", "–"] * 12 + ["50"]
    line = re.findall(r'points="([^"]*)"', drawn.svg)[1]
    assert len(line.split()) == 13


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


LIMIT = 600_000  # bytes of a page


@EXAMPLES
def test_pages_are_light_and_load_nothing(example):
    page = render(example())
    assert len(page.encode()) < LIMIT
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_even_a_long_training_of_a_deep_network_is_a_light_page():
    report, rng = deep(), random.Random(0)
    names = [group.name for group in report.groups]
    rates = {name: rng.random() for name in names}
    history = [
        {
            "step": n, "macs": 0.5, "params": 0.5,
            "units": dict.fromkeys(names, 1000 - n),
            "layers": dict.fromkeys(names, 1000 - n),
            "threshold": {name: [n * rate] for name, rate in rates.items()},
        }
        for n in range(400)
    ]  # fmt: skip
    decays = [Ending(names[n % 120], n % 32, n, n + 50, n % 9 == 0, rng.random(), 1.0) for n in range(5_000)]
    lines = [{"phase": "train", "loss": 1 / n, "accuracy": 1 - 1 / n} for n in range(1, 301)]
    heavy = dataclasses.replace(report, pruning_history=history, decays=decays, history=lines)
    assert len(render(heavy).encode()) < LIMIT
    assert "Drawn is one decay in 21 of each group." in Page(render(heavy)).text
    assert sum(int(row[2]) + int(row[3]) for row in figures(heavy)["plot-decays"].rows) == 5_000


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 420])
@pytest.mark.parametrize("example", [resnet20, faded, measured, deep, hostile, smallest])
def test_a_browser_shows_it_offline(window: Browser, example, width: int, scheme: str, tmp_path: Path):
    report = example()
    write_report(tmp_path, report)
    window.requests()
    window.theme(scheme)
    window.open(tmp_path / "report.html", width)
    assert window.console() == []
    page = (tmp_path / "report.html").as_uri()
    assert [url for url in window.requests() if url != page and not url.startswith("data:")] == []
    assert window.overflow() == []
    plots = window.run("return [...document.querySelectorAll('.figure')].map(plot => plot.id)")
    assert sorted(plots) == sorted(figures(report))
    for plot in plots:
        drawn = f"return [...document.querySelectorAll('#{plot} :is(.bar, polyline, .mark, .strip rect, .strip path)')]"
        assert window.run(f"{drawn}.filter(shape => shape.getBoundingClientRect().width > 0).length"), plot
    if report.widths:
        bars = window.run("return document.querySelectorAll('#plot-widths .bar').length")
        assert bars == 2 * len(report.widths)


@pytest.mark.slow
def test_a_browser_shows_hostile_names_as_they_are(window: Browser, tmp_path: Path):
    write_report(tmp_path, hostile())
    window.open(tmp_path / "report.html", 1400)
    assert window.run("return document.title") == f"{HOSTILE} on {HOSTILE} · Secateur"
    assert window.run("return document.querySelector('.layers span').textContent") == HOSTILE
    assert window.run("return document.querySelector('#again pre').textContent") == HOSTILE
    assert window.run("return document.querySelector('#plot-loss .note').textContent") == HOSTILE


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_one_can_read_it(window: Browser, scheme: str, tmp_path: Path):
    """Text and marks stand out from the page as WCAG 2.2 asks for: 4.5 times, and 3 times."""
    write_report(tmp_path, resnet20())
    window.theme(scheme)
    window.open(tmp_path / "report.html", 1400)
    paper = window.color("getComputedStyle(document.body).backgroundColor")
    assert (contrast(paper, (255, 255, 255)) > 10) == (scheme == "dark")
    for selector, css, least in (
        ("body", "color", 4.5), (".muted", "color", 4.5), (".verdict strong", "color", 4.5), ("td.after", "color", 4.5),
        (".chart text", "fill", 4.5), (".tiles dt", "color", 4.5), ("#plot-widths .bar", "fill", 3),
        ("#plot-widths g:last-of-type .bar", "fill", 3), ("#plot-accuracy g:last-of-type .mark", "fill", 3),
    ):  # fmt: skip
        found = window.color(f'getComputedStyle(document.querySelector("{selector}")).{css}')
        assert contrast(paper, found) >= least, (selector, found)


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Source: WCAG 2.2, relative luminance and contrast ratio."""

    def light(color: tuple[int, ...]) -> float:
        parts = [c / 255 for c in color]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    low, high = sorted((light(one), light(other)))
    return high / low


@pytest.mark.slow
def test_keys_and_screen_readers_find_their_way(window: Browser, tmp_path: Path):
    write_report(tmp_path, resnet20())
    window.open(tmp_path / "report.html", 1400)
    assert window.run("return ['header', 'main', 'footer'].map(name => document.querySelectorAll(name).length)") == [
        1, 1, 1
    ]  # fmt: skip
    assert window.run("return document.documentElement.lang") == "en"
    levels = window.run("return [...document.querySelectorAll('h1, h2, h3')].map(one => +one.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    unnamed = (
        "return [...document.querySelectorAll('img:not([alt]), svg[role=img]:not([aria-label])')].length"
    )
    assert window.run(unnamed) == 0
    scrolling = "return [...document.querySelectorAll('.scroll')].filter(one => one.tabIndex !== 0).length"
    assert window.run(scrolling) == 0
    assert window.run("return document.querySelectorAll('.copied button').length") == 2
    tree = window.devtools("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in tree]
    assert roles.count("main") == 1
    assert {"image", "table", "columnheader", "rowheader", "button", "DisclosureTriangle"} <= set(roles)
