"""The report's pictures, each with the numbers it shows as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from secateur.report.data import Ending, Group, LayerCurve, Report
from secateur.report.svg import AFTER, BEFORE, REMOVED, Axis, Chart, box, cells, number, steps, strip

_BINS = 48
_MARKS = 40  # a line of more points shows them only when pointed at
FEW = 10  # answers of about equal confidence that say little
_COLUMNS = 24  # points of a history that are shown


@dataclass(frozen=True)
class Figure:
    """A picture with axes.

    Attributes:
        svg: the picture.
        heads, rows: its numbers.
        about: what must be said of the numbers.
    """

    svg: Markup
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    about: str = ""


@dataclass(frozen=True)
class Strips:
    """A table with small pictures in its rows.

    Attributes:
        heads: of the columns.
        rows: name, then pictures and texts.
        about: what must be said of the pictures.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    about: str = ""


Picture = Figure | Strips


def figures(report: Report) -> dict[str, Picture]:
    """The pictures for which there is data, by the id of the element that they stand in."""
    drawn: dict[str, Picture] = {}
    if report.widths:
        drawn["plot-widths"] = widths(report)
    if report.layers:
        drawn["plot-time"] = time_and_macs(report)
    if report.classes:
        drawn["plot-classes"] = classes(report)
    if report.calibration:
        drawn["plot-calibration"] = calibration(report)
    if found := curves_of(report):
        drawn["plot-curves"] = curves(*found)
    elif scored := [group for group in report.groups if group.scores is not None]:
        drawn["plot-scores"] = scores(scored)
    if report.weights is not None:
        drawn["plot-densities"] = densities(report.weights.layers)
    if report.pruning_history:
        drawn["plot-cost"] = cost(report)
        drawn["plot-units"] = over_time(report, "units")
        drawn["plot-layers"] = over_time(report, "layers")
        for key in ("threshold", "scores"):
            if key in report.pruning_history[0]:
                drawn["plot-learnt"] = over_time(report, key)
    if report.decays:
        drawn["plot-decays"] = decays(report)
        if any(decay.rate is not None for decay in report.decays):
            drawn["plot-resistance"] = resistance(report)
    if report.history:
        drawn["plot-accuracy"] = accuracy(report)
        drawn["plot-loss"] = loss(report)
    return drawn


def widths(report: Report) -> Figure:
    """The network from input to output: each layer as thick as it is wide, before and after."""
    most = max(width.before for width in report.widths)
    chart = Chart(Axis(0, len(report.widths)), Axis(-most / 2, most / 2), 220)
    for place, width in enumerate(report.widths):
        title = f"{width.layer}: {width.before} → {width.after} units ({100 * width.after / width.before:.1f} % kept)"
        for color, units in ((BEFORE, width.before), (AFTER, width.after)):
            chart.add(color, chart.bar(place + 0.14, place + 0.86, -units / 2, units / 2, title))
    return Figure(
        chart.draw("Width of each layer before and after, from input to output", axes=False), (), ()
    )


def time_and_macs(report: Report) -> Strips:
    """What each layer takes of a pass, in order: its multiply-adds and its time, before and after."""
    ms = max((v for layer in report.layers for v in (layer.ms_before, layer.ms_after) if v), default=1.0)
    macs = max((v for layer in report.layers for v in (layer.macs_before, layer.macs_after) if v), default=1)
    rows = []
    for layer in report.layers:
        row: list[str | Markup] = [layer.layer]
        for old, new, most in (
            (layer.macs_before, layer.macs_after, macs),
            (layer.ms_before, layer.ms_after, ms),
        ):
            known = old is not None or new is not None
            row += [_two_bars(old, new, most), f"{brief(old)} → {brief(new)}"] if known else ["", ""]
        rows.append(row)
    return Strips(("layer", "", "MACs", "", "milliseconds"), rows)


def _two_bars(old: float | None, new: float | None, most: float) -> Markup:
    pairs = ((BEFORE, old, 1), (AFTER, new, 6))
    return strip(100, 11, (box(color, 0, y, 100 * value / most, 4) for color, value, y in pairs if value))


def brief(value: float | None) -> str:
    """A count or a time in little room.

    >>> brief(0.01234), brief(1234567), brief(0), brief(None)
    ('0.012', '1.23M', '0', '–')
    """
    if value is None:
        return "–"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3f}" if 0 < value < 1 else f"{value:.3g}"


def classes(report: Report, shown: int = 20) -> Strips:
    """Accuracy of each class before and after, those that lost most first."""
    rows: list[Sequence[str | Markup]] = []
    for one in sorted(report.classes, key=lambda one: one.after - one.before)[:shown]:
        bars = strip(100, 11, [box(BEFORE, 0, 1, 100 * one.before, 4), box(AFTER, 0, 6, 100 * one.after, 4)])
        change = f"{100 * (one.after - one.before):+.1f}".replace("-", "−")
        rows.append(
            (one.name, bars, f"{100 * one.before:.1f} → {100 * one.after:.1f} %", change, f"{one.images:,}")
        )
    return Strips(("class", "", "accuracy", "points", "images"), rows)


def calibration(report: Report) -> Figure:
    """Accuracy of the answers over how sure the models were of them."""
    chart = Chart(Axis(0, 100, "confidence", unit=" %"), Axis(0, 100, "accuracy", unit=" %"), 300)
    chart.add(BEFORE, chart.rule((0, 0), (100, 100), "thin dashed"))
    rows = []
    for name, color in (("before", BEFORE), ("after", AFTER)):
        if (one := report.calibration.get(name)) is None:
            continue
        points = [(100 * b.confidence, 100 * b.accuracy, b.images) for b in one.bins if b.images]
        marks = (
            chart.mark(
                x,
                y,
                f"{n:,} answers {name}: {x:.1f} % sure, {y:.1f} % right",
                kind="" if n >= FEW else "hollow",
            )
            for x, y, n in points
        )
        chart.add(color, chart.line([(x, y) for x, y, n in points if n >= FEW]), *marks)
        rows += [(name, f"{x:.1f} %", f"{y:.1f} %", f"{n:,}") for x, y, n in points]
    label = "Accuracy over confidence, before and after; on the dotted line both are equal"
    return Figure(chart.draw(label), ("model", "mean confidence", "accuracy", "answers"), rows)


def curves_of(report: Report) -> tuple[Sequence[LayerCurve], Mapping[str, tuple[int, int]]] | None:
    """Distortion curves of weights or of units, with (all, kept) of each layer or group; None: not measured."""
    if report.weights is not None and report.weights.curves:
        return report.weights.curves, report.weights.layers
    counts = {group.name: (group.units, group.kept) for group in report.groups}
    found = [curve for curve in report.curves if curve.layer in counts]
    return (found, counts) if found else None


def curves(found: Sequence[LayerCurve], counts: Mapping[str, tuple[int, int]]) -> Figure:
    """One line per layer: distortion over the share kept, and a mark where the plan left it."""
    lines, marks, rows = [], [], []
    for curve in found:
        total, kept = counts[curve.layer]
        points = [
            (100 * k / total, d) for k, d in zip(curve.kept, curve.distortion, strict=True) if d > 0 and k > 0
        ]
        if not points:
            continue
        share, values = np.log([x for x, _ in points][::-1]), np.log([y for _, y in points][::-1])
        there = float(np.exp(np.interp(np.log(100 * kept / total), share, values))) if kept else points[-1][1]
        lines.append((curve.layer, points))
        if kept:
            marks.append((100 * kept / total, there, f"{curve.layer}: {kept:,} of {total:,} kept"))
        rows.append((curve.layer, f"{kept:,} of {total:,}", number(there), number(points[-1][1])))
    chart = Chart(
        Axis.over(
            [x for _, points in lines for x, _ in points] + [x for x, *_ in marks],
            "kept",
            log=True,
            unit=" %",
        ),
        Axis.over([y for _, points in lines for _, y in points], "distortion", log=True),
        360,
    )
    chart.add(AFTER, *(chart.line(points, name, thin=True) for name, points in lines))
    chart.add(REMOVED, *(chart.mark(*mark) for mark in marks))
    heads = ("layer", "kept", "distortion there", "at the last level")
    return Figure(chart.draw("Distortion of each layer alone over the share that it keeps"), heads, rows)


def densities(layers: Mapping[str, tuple[int, int]]) -> Strips:
    """One bar per layer: the share of its weights that stays."""
    rows = []
    for name, (total, kept) in layers.items():
        share = kept / total
        bars = [box(BEFORE, 0, 1, 100, 8, 0.35), box(AFTER, 0, 1, 100 * share, 8)]
        rows.append((name, strip(100, 10, bars), f"{100 * share:.1f} %", f"{kept:,} of {total:,}"))
    return Strips(("layer", "", "weights kept", "in numbers"), rows)


def scores(groups: Sequence[Group]) -> Strips:
    """One row per group: where its kept units' scores lie, above the line, and the removed ones', below it.

    Each group's scores are spread from its lowest to its highest; the square root of the counts keeps single units
    visible.
    """
    rows: list[Sequence[str | Markup]] = []
    for group in groups:
        values = np.asarray(group.scores, dtype=np.float64)
        kept, finite = np.asarray(group.mask, dtype=bool), np.isfinite(values)
        parts = [values[finite & part] for part in (kept, ~kept)]
        low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
        middle = high <= low
        spread = [np.full_like(part, 0.5) if middle else (part - low) / (high - low) for part in parts]
        counts = [np.histogram(part, _BINS, (0, 1))[0] for part in spread]
        most = max(count.max() for count in counts) or 1
        shapes = [box(BEFORE, 0, 9.8, _BINS, 0.4)]
        for color, count, sign in zip((AFTER, REMOVED), counts, (-1, 1), strict=True):
            shapes.append(steps(color, 10, [10 + sign * 9.5 * (n / most) ** 0.5 for n in count.tolist()]))
        words = [
            f"{part.min():.3g} … {part.max():.3g}" if len(part) else "–" for part in parts
        ]  # fmt: skip
        rows.append((group.name, strip(_BINS, 20, shapes), f"{group.kept} of {group.units}", *words))
    return Strips(("group", "lowest to highest score", "kept", "scores kept", "scores removed"), rows)


def cost(report: Report) -> Figure:
    """MACs and parameters over the steps of the training, as shares of the dense model."""
    history = _thinned(report.pruning_history)
    at = [point["step"] for point in history]
    lines = {key: [100 * point[key] for point in history] for key in ("params", "macs")}
    chart = Chart(
        Axis(at[0], max(at[-1], at[0] + 1), "optimizer step", whole=True),
        Axis.over([y for values in lines.values() for y in values], zero=True, unit=" %"),
    )
    for (key, values), color in zip(lines.items(), (BEFORE, AFTER), strict=True):
        said = "MACs" if key == "macs" else "parameters"
        points = list(zip(at, values, strict=True))
        marks = (chart.mark(x, y, f"step {x}: {y:.1f} % of the {said}", kind="faint") for x, y in points)
        chart.add(color, chart.line(points), *marks)
    rows = [(f"{x:,}", f"{m:.1f} %", f"{p:.1f} %") for x, p, m in zip(at, *lines.values(), strict=True)]
    label = "MACs and parameters over the steps of the training"
    return Figure(chart.draw(label), ("step", "MACs", "parameters"), rows)


def over_time(report: Report, key: str) -> Strips:
    """One row per group or layer, one cell per point of the history; a stronger colour is more.

    Units and the MACs of layers are shares of their first; of several scores of one group the mean is shown.
    """
    history, counted = _thinned(report.pruning_history), key in ("units", "layers")
    names = list(history[0][key])
    values = np.array(
        [[np.mean(point[key][name]) if point[key].get(name) else 0.0 for point in history] for name in names]
    )
    values = np.nan_to_num(values, posinf=0, neginf=0)
    if counted:
        shares = values / np.where(values[:, :1] > 0, values[:, :1], 1)
    else:
        shares = (values - values.min()) / (np.ptp(values) or 1)
    first, last = history[0]["step"], history[-1]["step"]
    rows = []
    for name, row, share in zip(names, values, shares, strict=True):
        said = ", ".join(f"step {history[n]['step']:,}: {number(row[n])}" for n in _spread(len(history), 5))
        picture = strip(len(history), 10, [cells(AFTER, share.tolist())], said)
        rows.append((name, picture, f"{number(row[0])} → {number(row[-1])}"))
    return Strips(("", f"step {first:,} to {last:,}", "first → last"), rows)


def _thinned(history: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """So many points of a history as a picture can show, the first and the last among them."""
    return [history[place] for place in _spread(len(history), _COLUMNS)]


def _spread(count: int, most: int) -> list[int]:
    """Some of so many places, evenly spread, the first and the last among them.

    >>> _spread(10, 4), _spread(2, 4)
    ([0, 3, 6, 9], [0, 1])
    """
    return [round(place) for place in np.linspace(0, count - 1, min(most, count)).tolist()]


def decays(report: Report) -> Strips:
    """One row per group; in it one line per decay, from its start to its end, units from top to bottom."""
    units = {group.name: group.units for group in report.groups}
    first, last = min(d.start for d in report.decays), max(d.end for d in report.decays)
    span, every = max(last - first, 1), _one_in(report)
    rows = []
    for name, count in units.items():
        ended = [decay for decay in report.decays if decay.group == name]
        if not ended:
            continue
        thick = min(max(24 / count, 1), 3)
        lines = [
            box(
                REMOVED if d.restored else BEFORE, d.start - first, 30 * (d.unit + 0.5) / count - thick / 2,
                max(d.end - d.start, span / 200), thick,
                title=f"unit {d.unit}: steps {d.start} to {d.end}, {_ended(d)}",
            )
            for d in ended[::every]
        ]  # fmt: skip
        restored = sum(d.restored for d in ended)
        rows.append((name, strip(span, 30, lines), f"{len(ended) - restored:,}", f"{restored:,}"))
    about = f"Drawn is one decay in {every} of each group." if every > 1 else ""
    return Strips(("group", f"step {first:,} to {last:,}", "zero", "restored"), rows, about)


def _one_in(report: Report) -> int:
    """Of so many decays one is drawn: where the page has rows for many groups, it has less room for them."""
    return 1 + len(report.decays) // max(250, 1500 - 12 * len(report.groups))


def _ended(decay: Ending) -> str:
    return "restored" if decay.restored else "zero"


def resistance(report: Report) -> Figure:
    """What the test for restoring last measured of each unit that faded, and its thresholds."""
    found = [(d.rate, d.length, d) for d in report.decays if d.rate is not None and d.length is not None]
    every = _one_in(report)
    edges = report.restore_above
    chart = Chart(
        Axis.over([rate for rate, *_ in found] + [edges.get("rate", 0.0)], "rate"),
        Axis.over([length for _, length, _ in found] + [edges.get("length", 0.0)], "length"),
        320,
    )
    x, y = chart.x, chart.y
    if "rate" in edges:
        chart.add(BEFORE, chart.rule((edges["rate"], y.low), (edges["rate"], y.high), "thin dashed"))
    if "length" in edges:
        chart.add(BEFORE, chart.rule((x.low, edges["length"]), (x.high, edges["length"]), "thin dashed"))
    for restored, color in ((False, BEFORE), (True, REMOVED)):
        chart.add(
            color,
            *(
                chart.mark(a, b, f"{d.group}, unit {d.unit}: rate {number(a)}, length {number(b)}")
                for a, b, d in found[::every]
                if d.restored == restored
            ),
        )
    rows = [(d.group, f"{d.unit}", number(a), number(b), _ended(d)) for a, b, d in found[:100]]
    return Figure(
        chart.draw("Rate and length of the resistance of each unit that faded"),
        ("group", "unit", "rate", "length", "ended"),
        rows,
        f"Of {len(found):,} decays, one in {every} is drawn, and the first 100 are listed."
        if len(found) > 100
        else "",
    )


def accuracy(report: Report) -> Figure:
    """Accuracy over the epochs, with the drop at the cut."""
    lines = {
        "training images": [(x, 100 * v) for x, v in _known(report, "train_accuracy")],
        "test images": [(x, 100 * v) for x, v in _known(report, "accuracy")],
    }
    start = next((i for i, line in enumerate(report.history) if line.get("phase") == "finetune"), None)
    cut = None
    if report.accuracy_cut is not None and start is not None:
        cut = (start + 0.5, 100 * report.accuracy_cut)
    values = [y for points in lines.values() for _, y in points] + ([cut[1]] if cut else [])
    chart = _over_epochs(report, Axis.over(values, unit=" %"))
    for (name, points), color in zip(lines.items(), (BEFORE, AFTER), strict=True):
        _curve(chart, points, color, f"{name}: {{:.2f}} %")
    if cut:
        chart.add(REMOVED, chart.mark(*cut, f"right after the cut: {cut[1]:.2f} %", "diamond"))
    heads = ("epoch", *lines)
    return Figure(chart.draw("Accuracy over the epochs"), heads, _by_epoch(report, *lines.values()))


def loss(report: Report) -> Figure:
    """Training loss over the epochs."""
    points = _known(report, "loss")
    chart = _over_epochs(report, Axis.over([y for _, y in points], zero=True))
    _curve(chart, points, AFTER, "loss {:.4g}")
    return Figure(chart.draw("Training loss over the epochs"), ("epoch", "loss"), _by_epoch(report, points))


def _known(report: Report, key: str) -> list[tuple[float, float]]:
    """(epoch, value) where a finite value is known."""
    values = [line.get(key) for line in report.history]
    return [(float(x), v) for x, v in enumerate(values, start=1) if v is not None and np.isfinite(v)]


def _over_epochs(report: Report, y: Axis) -> Chart:
    """A chart over the epochs, with the names of the phases above it and a line between them."""
    chart = Chart(Axis(0.5, len(report.history) + 0.5, "epoch", whole=True), y)
    previous = None
    for start, line in enumerate(report.history):
        if (phase := str(line.get("phase", ""))) != previous:
            if start:
                chart.add(BEFORE, chart.rule((start + 0.5, y.low), (start + 0.5, y.high), "thin dashed"))
            chart.add(BEFORE, chart.note(start + 0.5, phase))
            previous = phase
    return chart


def _curve(chart: Chart, points: Sequence[tuple[float, float]], color: str, words: str) -> None:
    kind = "faint" if len(points) > _MARKS else ""
    few = points[:: 1 + len(points) // 100]
    marks = (chart.mark(x, y, f"epoch {x:g}, {words.format(y)}", kind=kind) for x, y in few)
    chart.add(color, chart.line(points), *marks)


def _by_epoch(report: Report, *lines: Sequence[tuple[float, float]]) -> list[list[str]]:
    found = [dict(points) for points in lines]
    epochs = range(1, len(report.history) + 1)
    return [[f"{n}", *(number(one[n]) if n in one else "–" for one in found)] for n in epochs]
