"""The report's pictures, as the plain dictionaries that Plotly draws.

Text and grid lines take their colours from the page's style sheet, so that they follow its light and dark
themes; the colours here are readable on both.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from secateur.report.data import Group, Report, WeightFacts

Figure: TypeAlias = dict[str, Any]

BEFORE, AFTER, REMOVED = "#9aa7b8", "#159a9c", "#e07a3f"
_BINS = 60
_LABEL = 26


def figures(report: Report) -> dict[str, Figure]:
    """The pictures for which there is data, by the id of the element that they are drawn in."""
    drawn: dict[str, Figure] = {}
    if report.widths:
        drawn["plot-widths"] = widths(report)
    if scored := [group for group in report.groups if group.scores is not None]:
        drawn["plot-scores"] = scores(scored)
    if report.weights is not None:
        drawn["plot-densities"] = densities(report.weights)
        if report.weights.curves:
            drawn["plot-curves"] = curves(report.weights)
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


def cost(report: Report) -> Figure:
    """MACs and parameters over the steps of the training, as shares of the dense model."""
    layout = plain_layout(300)
    layout["xaxis"] |= {"title": {"text": "optimizer step"}}
    layout["yaxis"] |= {"ticksuffix": " %", "rangemode": "tozero"}
    lines = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": [point["step"] for point in report.pruning_history],
            "y": [100 * point[key] for point in report.pruning_history],
            "line": {"color": color},
            "hovertemplate": f"step %{{x}}: %{{y:.1f}} of the {name}<extra></extra>",
        }
        for key, name, color in (("params", "parameters", BEFORE), ("macs", "MACs", AFTER))
    ]
    return {"data": lines, "layout": layout}


def over_time(report: Report, key: str) -> Figure:
    """One row per group or layer, one column per point of the history; darker is more.

    Units and the MACs of layers are shares of their first; of several scores of one group the mean is shown.
    """
    names, counted = list(report.pruning_history[0][key]), key in ("units", "layers")
    rows = []
    for name in names:
        values = [
            np.mean(point[key][name]) if point[key].get(name) else 0.0 for point in report.pruning_history
        ]
        first = values[0] if counted and values[0] else 1.0
        rows.append([round(float(value / first), 4) for value in values])
    layout = plain_layout(60 + 18 * len(names))
    layout["xaxis"] |= {"title": {"text": "optimizer step"}, "showgrid": False}
    layout["yaxis"] |= {
        "autorange": "reversed",
        "tickvals": list(range(len(names))),
        "ticktext": [escape(shorten(name)) for name in names],
        "tickfont": {"size": 11},
        "showgrid": False,
    }
    scale = [[0, "rgba(21,154,156,0.05)"], [1, AFTER]] if counted else [[0, AFTER], [1, REMOVED]]
    heat = {
        "type": "heatmap",
        "x": [point["step"] for point in report.pruning_history],
        "y": list(range(len(names))),
        "z": rows,
        "text": [[escape(name)] * len(report.pruning_history) for name in names],
        "colorscale": scale,
        "showscale": not counted,
        "hovertemplate": "%{text}<br>step %{x}: %{z:.3~f}<extra></extra>",
    }
    return {"data": [heat | ({"zmin": 0, "zmax": 1} if counted else {})], "layout": layout}


def decays(report: Report) -> Figure:
    """One row per group; in it one line per decay, from its start to its end, units from top to bottom."""
    counts = {group.name: group.units for group in report.groups}
    faded = {decay.group for decay in report.decays}
    names = [name for name in counts if name in faded]
    row = {name: number for number, name in enumerate(names)}
    layout = plain_layout(80 + 26 * len(names))
    layout["xaxis"] |= {"title": {"text": "optimizer step"}}
    layout["yaxis"] |= {
        "range": [len(names) - 0.4, -0.6],
        "tickvals": list(range(len(names))),
        "ticktext": [escape(shorten(name)) for name in names],
        "tickfont": {"size": 11},
        "showgrid": False,
    }
    lines = []
    for restored, color in ((False, BEFORE), (True, REMOVED)):
        ended = [decay for decay in report.decays if decay.restored == restored]
        places = [
            row[decay.group] + 0.8 * ((decay.unit + 0.5) / counts[decay.group] - 0.5) for decay in ended
        ]
        what = "restored" if restored else "zero"
        said = [f"{escape(d.group)}<br>unit {d.unit}: steps {d.start} to {d.end}, {what}" for d in ended]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [x for d in ended for x in (d.start, d.end, None)],
                "y": [y for place in places for y in (round(place, 3), round(place, 3), None)],
                "text": [text for text in said for _ in range(3)],
                "hovertemplate": "%{text}<extra></extra>",
                "line": {"color": color, "width": 2 + restored},
            }
        )
    return {"data": lines, "layout": layout}


def resistance(report: Report) -> Figure:
    """What the test for restoring last measured of each unit that faded, and its thresholds."""
    layout = plain_layout(320)
    layout["xaxis"] |= {"title": {"text": "rate"}}
    layout["yaxis"] |= {"title": {"text": "length"}}
    edges = (("rate", "x", "y"), ("length", "y", "x"))
    layout["shapes"] = [
        {
            "type": "line",
            f"{axis}0": report.restore_above[name],
            f"{axis}1": report.restore_above[name],
            f"{other}0": 0,
            f"{other}1": 1,
            f"{other}ref": "paper",
            "line": {"color": BEFORE, "dash": "dot", "width": 1},
        }
        for name, axis, other in edges
        if name in report.restore_above
    ]
    points = []
    for restored, color in ((False, BEFORE), (True, REMOVED)):
        ended = [d for d in report.decays if d.restored == restored and d.rate is not None]
        points.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [d.rate for d in ended],
                "y": [d.length for d in ended],
                "text": [f"{escape(d.group)}, unit {d.unit}" for d in ended],
                "hovertemplate": "%{text}<br>rate %{x:.3~f}, length %{y:.3~f}<extra></extra>",
                "marker": {"color": color, "size": 6, "opacity": 0.7},
            }
        )
    return {"data": points, "layout": layout}


def widths(report: Report) -> Figure:
    """One bar per layer: the width before, and in front of it the width after."""
    x = list(range(1, len(report.widths) + 1))
    hover = [
        f"{escape(w.layer)}<br>{w.before} → {w.after} units ({100 * w.after / w.before:.1f} % kept)"
        for w in report.widths
    ]
    shared = {"type": "bar", "x": x, "hovertext": hover, "hoverinfo": "text"}
    layout = plain_layout(300)
    layout["barmode"] = "overlay"
    layout["bargap"] = 0.15
    layout["xaxis"] |= _whole("layer, from input to output", len(x)) | {"showgrid": False}
    layout["yaxis"] |= {"title": {"text": "units"}, "rangemode": "tozero"}
    return {
        "data": [
            {**shared, "name": "before", "y": [w.before for w in report.widths], "marker": {"color": BEFORE}},
            {**shared, "name": "after", "y": [w.after for w in report.widths], "marker": {"color": AFTER}},
        ],
        "layout": layout,
    }


def densities(facts: WeightFacts) -> Figure:
    """One bar per layer: the share of its weights that stays."""
    names, counts = list(facts.layers), list(facts.layers.values())
    layout = plain_layout(300)
    layout["bargap"] = 0.15
    layout["xaxis"] |= _whole("layer, from input to output", len(names)) | {"showgrid": False}
    layout["yaxis"] |= {"title": {"text": "weights kept"}, "ticksuffix": " %", "range": [0, 100]}
    hover = [
        f"{escape(name)}<br>{kept:,} of {total:,} weights ({100 * kept / total:.1f} %)"
        for name, (total, kept) in zip(names, counts, strict=True)
    ]
    bars = {
        "type": "bar",
        "x": list(range(1, len(names) + 1)),
        "y": [round(100 * kept / total, 3) for total, kept in counts],
        "hovertext": hover,
        "hoverinfo": "text",
        "marker": {"color": AFTER},
    }
    return {"data": [bars], "layout": layout}


def curves(facts: WeightFacts) -> Figure:
    """One line per layer: distortion over the share kept, and a mark where the plan left it."""
    data = []
    for curve in facts.curves:
        total, kept = facts.layers[curve.layer]
        x = [100 * k / total for k in curve.kept]
        positive = [(a, d) for a, d in zip(x, curve.distortion, strict=True) if d > 0]
        if not positive:
            continue
        name = escape(shorten(curve.layer))
        line = {
            "type": "scatter", "mode": "lines", "name": name, "x": [a for a, _ in positive],
            "y": [d for _, d in positive], "line": {"color": AFTER, "width": 1}, "opacity": 0.6,
            "hovertemplate": f"{name}<br>%{{x:.3~g}} % kept: %{{y:.3~g}}<extra></extra>",
        }  # fmt: skip
        share = np.log([a for a, _ in positive][::-1])
        there = np.exp(np.interp(np.log(100 * kept / total), share, np.log([d for _, d in positive][::-1])))
        mark = {
            "type": "scatter", "mode": "markers", "x": [100 * kept / total], "y": [float(there)],
            "marker": {"color": REMOVED, "size": 6},
            "hovertemplate": f"{name}<br>chosen: %{{x:.3~g}} % kept<extra></extra>",
        }  # fmt: skip
        data += [line, mark]
    layout = plain_layout(340)
    layout["xaxis"] |= {"type": "log", "title": {"text": "weights kept, %"}}
    layout["yaxis"] |= {"type": "log", "title": {"text": "distortion"}, "exponentformat": "power"}
    return {"data": data, "layout": layout}


def scores(groups: list[Group]) -> Figure:
    """Two strips per group: where its kept units' scores lie, and below it the removed ones'.

    Each group's scores are spread from its lowest to its highest, and a darker cell holds more units; the
    square root of the count keeps single units visible.
    """
    z: list[list[float | None]] = []
    text: list[list[str]] = []
    for group in groups:
        for row, words in _strips(group):
            z.append(row)
            text.append(words)
        z.append([None] * _BINS)  # a gap between this group and the next
        text.append([""] * _BINS)

    track = [[None if i % 3 == 2 else 0] for i in range(len(z))]
    rows = list(range(len(z)))
    layout = plain_layout(16 + 21 * len(groups))
    layout["margin"] |= {"t": 8}
    layout["xaxis"] |= {"range": [0, 1], "visible": False}
    layout["yaxis"] |= {
        "autorange": "reversed",
        "tickvals": [3 * i + 0.5 for i in range(len(groups))],
        "ticktext": [escape(shorten(group.name)) for group in groups],
        "tickfont": {"size": 11},
        "showgrid": False,
    }
    faint = "rgba(128,128,128,0.13)"
    heat = {"type": "heatmap", "y": rows, "showscale": False, "hoverongaps": False, "zmin": -1, "zmax": 1}
    return {
        "data": [
            {**heat, "x": [0, 1], "z": track, "colorscale": [[0, faint], [1, faint]], "hoverinfo": "skip"},
            {
                **heat,
                "x": [round(edge, 4) for edge in np.linspace(0, 1, _BINS + 1).tolist()],
                "z": z,
                "text": text,
                "hovertemplate": "%{text}<extra></extra>",
                "colorscale": [
                    [0, REMOVED],
                    [0.5, "rgba(224,122,63,0.1)"],
                    [0.5, "rgba(21,154,156,0.1)"],
                    [1, AFTER],
                ],
            },
        ],
        "layout": layout,
    }


def _strips(group: Group) -> Iterator[tuple[list[float | None], list[str]]]:
    values = np.asarray(group.scores, dtype=np.float64)
    kept = np.asarray(group.mask, dtype=bool)
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    position = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    counts = [np.histogram(position[finite & part], _BINS, (0, 1))[0] for part in (kept, ~kept)]
    most = max(count.max() for count in counts) or 1
    edges = low + (high - low) * np.linspace(0, 1, _BINS + 1)
    name = escape(group.name)
    for count, sign, word in zip(counts, (1, -1), ("kept", "removed"), strict=True):
        row = [sign * round(float((n / most) ** 0.5), 3) if n else None for n in count]
        words = [
            f"{name}<br>{n} {word}, score {edges[i]:.3g} … {edges[i + 1]:.3g}" if n else ""
            for i, n in enumerate(count)
        ]
        yield row, words


def accuracy(report: Report) -> Figure:
    """Accuracy over the epochs, with the drop at the cut."""
    layout = _curve_layout(report)
    layout["yaxis"] |= {"ticksuffix": " %"}
    data = [
        _curve(report, "train_accuracy", "training images", BEFORE, scale=100),
        _curve(report, "accuracy", "test images", AFTER, scale=100),
    ]
    x = next((i for i, line in enumerate(report.history) if line.get("phase") == "finetune"), None)
    if report.accuracy_cut is not None and x is not None:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "right after the cut",
                "x": [x + 0.5],
                "y": [100 * report.accuracy_cut],
                "marker": {"color": REMOVED, "size": 10, "symbol": "diamond"},
            }
        )
    return {"data": data, "layout": layout}


def loss(report: Report) -> Figure:
    """Training loss over the epochs."""
    return {
        "data": [_curve(report, "loss", "training loss", AFTER)],
        "layout": _curve_layout(report),
    }


def _curve(report: Report, key: str, name: str, color: str, scale: float = 1) -> Figure:
    values = [line.get(key) for line in report.history]
    points = [(x, v) for x, v in enumerate(values, start=1) if v is not None]
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(points) <= 30 else "lines",
        "name": name,
        "x": [x for x, _ in points],
        "y": [scale * v if np.isfinite(v) else None for _, v in points],
        "hovertemplate": "epoch %{x}: %{y:.4~f}<extra></extra>",
        "line": {"color": color, "width": 2},
    }


def _curve_layout(report: Report) -> Figure:
    layout = plain_layout(300)
    layout["xaxis"] |= _whole("epoch", len(report.history))
    layout["shapes"], layout["annotations"] = [], []
    for start, phase in _phases(report.history):
        if start > 0:
            layout["shapes"].append(
                {
                    "type": "line",
                    "x0": start + 0.5,
                    "x1": start + 0.5,
                    "yref": "paper",
                    "y0": 0,
                    "y1": 1,
                    "line": {"color": BEFORE, "width": 1, "dash": "dot"},
                }
            )
        layout["annotations"].append(
            {
                "text": escape(phase),
                "x": start + 0.5,
                "xanchor": "left",
                "yref": "paper",
                "y": 1,
                "yanchor": "bottom",
                "showarrow": False,
            }
        )
    return layout


def _phases(history: Any) -> Iterator[tuple[int, str]]:
    previous = None
    for i, line in enumerate(history):
        if (phase := str(line.get("phase", ""))) != previous:
            yield i, phase
        previous = phase


def _whole(title: str, n: int) -> dict[str, Any]:
    """An axis of the numbers from 1 to n, without fractions between them."""
    step = {"dtick": 1} if n <= 10 else {}
    return {"title": {"text": title}, "range": [0.5, n + 0.5], "tick0": 1} | step


def plain_layout(height: int) -> dict[str, Any]:
    axis: Mapping[str, Any] = {"automargin": True, "fixedrange": True, "zeroline": False}
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 24, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "showlegend": False,  # the page names the colours, in text that wraps
        "xaxis": dict(axis),
        "yaxis": dict(axis),
        "hovermode": "closest",
    }


def shorten(name: str, length: int = _LABEL) -> str:
    """A name that fits beside a plot: its end says more than its beginning.

    >>> shorten("features.denseblock4.denselayer24.conv1", 20)
    '…denselayer24.conv1'
    """
    if len(name) <= length:
        return name
    end = name[-(length - 1) :]
    return "…" + (end.partition(".")[2] or end)


def escape(name: str) -> str:
    """Plotly reads some HTML in its labels; a name is to be shown as it is."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
