"""The pictures of a comparison, as the plain dictionaries that Plotly draws."""

import statistics
from collections.abc import Sequence
from typing import Any

from secateur.report.comparison import (
    Outcome,
    Standing,
    budgets_of,
    dense_accuracies,
    dense_latency,
    in_words,
    standings,
)
from secateur.report.figures import AFTER, BEFORE, REMOVED, Figure, escape, plain_layout

_COLORS = (
    AFTER, REMOVED, "#7a6fd0", "#c94f7c", "#5b9a3c", "#b58a1b", "#3f7fd0", "#a5603c", "#6b7785", "#d0504a"
)  # fmt: skip
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")
_LABEL = 24

FRONTS = {
    "plot-macs": ("macs", 100, "MACs kept, %"),
    "plot-params": ("params", 100, "parameters kept, %"),
    "plot-latency": ("latency_ms", 1, "latency, ms"),
}
"""Element -> what accuracy is drawn over: a field of `Standing`, its factor, and the axis's title."""


def comparison_figures(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """The pictures for which there is data, by the id of the element that they are drawn in."""
    table = standings(outcomes)
    drawn = {}
    for name, (field, _, _) in FRONTS.items():
        if any(_drawable(line, field) for line in table if line.budget):
            drawn[name] = front(outcomes, name)
    if any(outcome.widths for outcome in outcomes):
        drawn["plot-widths"] = widths(outcomes)
    return drawn


def arms_of(outcomes: Sequence[Outcome]) -> list[str]:
    """The arms that prune, as they come."""
    return list(dict.fromkeys(outcome.arm for outcome in outcomes if outcome.budget))


def marker_of(place: int) -> tuple[str, bool]:
    """Colour of the arm at that place, and whether its marks are hollow; no two of twenty are alike."""
    return _COLORS[place % len(_COLORS)], place // len(_COLORS) % 2 == 1


def front(outcomes: Sequence[Outcome], name: str) -> Figure:
    """Accuracy over a cost: a line per arm over its budgets, bars of one standard deviation, and the dense model.

    The arms are the first traces, in the order of `arms_of`, so that the page can hide them by number.
    """
    field, factor, title = FRONTS[name]
    table, dense = standings(outcomes), dense_accuracies(outcomes)
    data: list[dict[str, Any]] = []
    for place, arm in enumerate(arms_of(outcomes)):
        lines = [line for line in table if line.arm == arm and line.budget and _drawable(line, field)]
        lines.sort(key=lambda line: getattr(line, field))
        color, hollow = marker_of(place)
        symbol = _SYMBOLS[place % len(_SYMBOLS)] + ("-open" if hollow else "")
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(arm),
                "x": [round(factor * getattr(line, field), 4) for line in lines],
                "y": [round(100 * (line.accuracy or 0), 3) for line in lines],
                "error_y": {
                    "type": "data",
                    "array": [round(100 * (line.spread or 0), 3) for line in lines],
                    "thickness": 1,
                    "width": 3,
                },
                "error_x": {
                    "type": "data",
                    "array": [
                        round((line.latency_spread or 0) if field == "latency_ms" else 0, 4) for line in lines
                    ],
                    "thickness": 1,
                    "width": 3,
                },
                "line": {"color": color, "width": 1.5, "dash": "dot" if hollow else "solid"},
                "marker": {"color": color, "size": 8, "symbol": symbol},
                "hovertemplate": f"{escape(arm)}<br>{title.split(',')[0]} %{{x:.3~f}}<br>accuracy %{{y:.2f}} %"
                "<extra></extra>",
            }
        )
    at = {"macs": 100.0, "params": 100.0, "latency_ms": dense_latency(outcomes)}[field]
    if dense and at is not None:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "dense",
                "x": [at],
                "y": [round(100 * statistics.mean(dense.values()), 3)],
                "marker": {"color": BEFORE, "size": 13, "symbol": "star"},
                "hovertemplate": "dense<br>accuracy %{y:.2f} %<extra></extra>",
            }
        )
    layout = plain_layout(380)
    layout["xaxis"] |= {"title": {"text": title}, "fixedrange": False}
    layout["yaxis"] |= {"title": {"text": "accuracy, %"}, "fixedrange": False}
    return {"data": data, "layout": layout}


def _drawable(line: Standing, field: str) -> bool:
    return line.accuracy is not None and getattr(line, field) is not None


def widths(outcomes: Sequence[Outcome]) -> Figure:
    """Share of its units that each layer keeps, a row per arm, mean over the seeds; one trace per budget."""
    arms = arms_of(outcomes)
    layers = {width.layer: width.before for outcome in outcomes for width in outcome.widths}
    data = []
    for number, budget in enumerate(filter(None, budgets_of(outcomes))):
        rows, words = [], []
        for arm in arms:
            found = [o for o in outcomes if o.arm == arm and in_words(o.budget) == budget]
            row, text = [], []
            for name, before in layers.items():
                kept = [w.after for o in found for w in o.widths if w.layer == name]
                mean = statistics.mean(kept) if kept else None
                row.append(None if mean is None else round(mean / before, 4))
                share = "" if mean is None else f"{mean:.4g} of {before} units ({100 * mean / before:.0f} %)"
                text.append(f"{escape(arm)}<br>{escape(name)}: {share or 'not known'}")
            rows.append(row)
            words.append(text)
        data.append(
            {
                "type": "heatmap",
                "x": list(range(1, len(layers) + 1)),
                "y": list(range(len(arms))),
                "z": rows,
                "text": words,
                "zmin": 0,
                "zmax": 1,
                "xgap": 1,
                "ygap": 2,
                "showscale": False,
                "hoverongaps": False,
                "visible": number == 0,
                "colorscale": [[0, "rgba(21,154,156,0.04)"], [1, AFTER]],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    layout = plain_layout(70 + 24 * len(arms))
    layout["xaxis"] |= {"title": {"text": "layer, from input to output"}, "showgrid": False}
    layout["yaxis"] |= {
        "autorange": "reversed",
        "tickvals": list(range(len(arms))),
        "ticktext": [escape(arm if len(arm) <= _LABEL else arm[: _LABEL - 1] + "…") for arm in arms],
        "tickfont": {"size": 11},
        "showgrid": False,
    }
    return {"data": data, "layout": layout}
