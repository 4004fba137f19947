"""The report as one HTML page: style and pictures are all inside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.cost.latency import Latency
from secateur.cost.training import TrainingCost
from secateur.measures import MEASURES
from secateur.report.data import LatencyPair, Report
from secateur.report.figures import Picture, figures


@dataclass(frozen=True)
class Row:
    """One line of the table that compares before and after; the `_exact` texts stand below in small print."""

    name: str
    before: str
    after: str
    change: str
    before_exact: str = ""
    after_exact: str = ""


def render(report: Report) -> str:
    """The page of one run."""
    return fill_template(
        "report.html.j2",
        figures(report),
        report=report,
        tiles=_tiles(report),
        rows=_rows(report),
        timings=[pair for pair in (report.latency_pytorch, report.latency_onnxruntime) if pair],
        budget=_budget(report),
        verdict=_verdict(report),
        headline=_headline(report),
        slow=_where_time_goes(report),
        unscored=sum(1 for group in report.groups if group.scores is None),
    )


def fill_template(
    template: str,
    pictures: Mapping[str, Picture],
    *,
    room: str = "report",
    filters: Mapping[str, Callable[..., str]] | None = None,
    **values: Any,
) -> str:
    """A page that extends `base.html.j2`. Every name in the values is escaped, and the page's own policy forbids it to
    load anything.

    Args:
        template: a file of `room`, the folder of the package that it lies in.
        pictures: by the id of the element that each stands in.
        filters: further ones by name.
        values: what the template names.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader("secateur", name) for name in (room, "report")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"si": si, "percent": percent, "duration": duration, **(filters or {})}
    return environment.get_template(template).render(figures=pictures, **values)


def si(value: float, unit: str = "") -> str:
    """A quantity with four digits and a decimal prefix.

    >>> si(40600000), si(272474, "B"), si(12)
    ('40.60 M', '272.5 kB', '12')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:#.4g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(42.3), duration(1500), duration(40000)
    ('42 s', '25 min', '11.1 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction in words.

    >>> percent(0.5), percent(0.9173, 2)
    ('50.0 %', '91.73 %')
    """
    return f"{100 * fraction:.{digits}f} %"


def speed(pair: LatencyPair) -> str:
    """The speed-up, or the slow-down, as a reader would say it."""
    return faster(pair.speed_up)


def faster(times: float) -> str:
    """A quotient of times, before over after, in words.

    >>> faster(2), faster(0.8)
    ('2.00× faster', '1.25× slower')
    """
    return f"{times:.2f}× faster" if times >= 1 else f"{1 / times:.2f}× slower"


def points(before: float | None, after: float) -> str:
    """The difference of two accuracies, where both are known.

    >>> points(0.9173, 0.911)
    '−0.63 points'
    """
    return "" if before is None else f"{100 * (after - before):+.2f} points".replace("-", "−")


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    macs, params = report.before["macs"], report.before["params"]
    tiles = [
        ("MACs kept", percent(report.share("macs")), f"of {si(macs)}"),
        ("parameters kept", percent(report.share("params")), f"of {si(params)}"),
    ]
    if (facts := report.weights) is not None:
        tiles = [("weights kept", percent(facts.kept / facts.total), f"of {si(facts.total)}")]
    if (after := report.accuracy_after) is not None:
        tiles.append(("accuracy", percent(after, 2), points(report.accuracy_before, after)))
    if pair := report.latency_pytorch:
        tiles.append(("latency in PyTorch", f"{pair.after.median_ms:.3g} ms", speed(pair)))
    return tiles


def _verdict(report: Report) -> tuple[str, bool | None]:
    """Whether the budget is met, in words and as a fact; None: not all of it is known."""
    met = [bound.met for bound in report.bounds]
    if not met or (None in met and False not in met):
        return "", None
    if all(met):
        return "Budget met", True
    return "Budget not met", False


def _headline(report: Report) -> str:
    """What came of it, without what the verdict says."""
    parts = report.outcomes[1:] if _verdict(report)[0] else report.outcomes
    if pair := report.latency_pytorch:
        parts = [*parts[:-1], f"{speed(pair)} in PyTorch", parts[-1]]
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]


def _where_time_goes(report: Report) -> str:
    """What became of the time of layers with and without multiply-adds, in a sentence."""
    told = []
    for said, rows in (
        ("layers with multiply-adds", [row for row in report.layers if row.macs_before or row.macs_after]),
        ("all else", [row for row in report.layers if not (row.macs_before or row.macs_after)]),
    ):
        old, new = sum(row.ms_before or 0 for row in rows), sum(row.ms_after or 0 for row in rows)
        if old and new:
            told.append(f"{said} took {old:.3g} ms before and {new:.3g} ms after ({percent(new / old)})")
    return "; ".join(told)


def _rows(report: Report) -> list[Row]:
    rows = []
    before, cut, after = report.accuracy_before, report.accuracy_cut, report.accuracy_after
    for name, value in (("Accuracy, right after the cut", cut), ("Accuracy, in the end", after)):
        if value is not None:
            old_text = "–" if before is None else percent(before, 2)
            rows.append(Row(name, old_text, percent(value, 2), points(before, value)))
    if (facts := report.weights) is not None:
        share = f"{percent(facts.kept / facts.total)} kept"
        exact = f"{facts.total:,}", f"{facts.kept:,}"
        rows.append(Row("Weights that are not zero", si(facts.total), si(facts.kept), share, *exact))
    cost = report.training_cost
    for name, old, new, unit in (
        ("MACs per image, if zeros cost nothing", report.before["macs"], facts.macs if facts else None, ""),
        ("Parameters, if zeros cost nothing", report.before["params"], facts.params if facts else None, ""),
        *((label[0].upper() + label[1:], old, new, unit) for label, old, new, unit in report.costs),
        ("Weights file", report.weights_bytes_before, report.weights_bytes_after, "B"),
        ("ONNX file", report.onnx_bytes_before, report.onnx_bytes_after, "B"),
        ("MACs per training step", cost and cost.before.macs, cost and cost.after.macs, ""),
        (
            "Peak memory of a training step",
            cost and cost.before.peak_bytes,
            cost and cost.after.peak_bytes,
            "B",
        ),
    ):
        if old and new:
            kept = f"{percent(new / old)} kept"
            rows.append(
                Row(
                    name,
                    si(old, unit),
                    si(new, unit),
                    kept,
                    f"{old:,} {unit}".rstrip(),
                    f"{new:,} {unit}".rstrip(),
                )
            )
    for name, pair in (
        ("Latency, PyTorch", report.latency_pytorch),
        ("Latency, onnxruntime", report.latency_onnxruntime),
    ):
        if pair:
            old_ms, new_ms = f"{pair.before.median_ms:.3g} ms", f"{pair.after.median_ms:.3g} ms"
            rows.append(Row(name, old_ms, new_ms, speed(pair), _spread(pair.before), _spread(pair.after)))
    if cost:
        old_cost, new_cost = cost.before, cost.after
        rows.append(
            Row(
                "Time of a training step",
                f"{1e3 * old_cost.seconds:.3g} ms",
                f"{1e3 * new_cost.seconds:.3g} ms",
                faster(old_cost.seconds / new_cost.seconds),
                _extremes(old_cost),
                _extremes(new_cost),
            )
        )
    return rows


def _spread(latency: Latency) -> str:
    return f"{latency.p10_ms:.3g} – {latency.p90_ms:.3g}"


def _extremes(cost: TrainingCost) -> str:
    return " – ".join(f"{1e3 * seconds:.3g}" for seconds in cost.extremes)


def _budget(report: Report) -> str:
    parts = []
    for key, value in report.budget.items():
        label = MEASURES[key].label if key in MEASURES else key
        if key == "latency_ms":
            parts.append(f"{label} ≤ {value:g} ms")
        else:
            parts.append(f"{label} ≤ {format(100 * value, 'g') + ' %' if value < 1 else format(value, ',')}")
    return ", ".join(parts)
