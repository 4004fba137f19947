"""The pictures of a comparison, as the plain dictionaries that Plotly draws."""

import statistics
from collections.abc import Sequence
from typing import Any

from secateur.compare.results import Outcome
from secateur.compare.statistics import (
    Standing,
    find_dense_accuracies,
    find_dense_latency,
    list_budgets,
    rank_arms,
)
from secateur.compare.words import MEASURES, describe_budget
from secateur.report.figures import AFTER, BEFORE, REMOVED, Figure, escape, plain_layout

_COLORS = (
    AFTER, REMOVED, "#7a6fd0", "#c94f7c", "#5b9a3c", "#b58a1b", "#3f7fd0", "#a5603c", "#6b7785", "#d0504a"
)  # fmt: skip
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")
_LABEL = 24

LATENCY = "latency"

COSTS = {**{measure: f"{label} kept, %" for measure, label in MEASURES.items()}, LATENCY: "latency, ms"}
"""What accuracy is drawn over -> the title of that axis; the picture of `macs` is drawn in the element `plot-macs`."""


def draw_figures(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """The pictures for which there is data, by the id of the element that they are drawn in."""
    table = rank_arms(outcomes)
    drawn = {}
    for cost in COSTS:
        if any(_cost(line, cost) is not None for line in table if line.budget):
            drawn[f"plot-{cost}"] = draw_front(outcomes, cost)
    if any(outcome.widths for outcome in outcomes):
        drawn["plot-widths"] = draw_widths(outcomes)
    return drawn


def list_arms(outcomes: Sequence[Outcome]) -> list[str]:
    """The arms that prune, as they come."""
    return list(dict.fromkeys(outcome.arm for outcome in outcomes if outcome.budget))


def choose_marker(place: int) -> tuple[str, bool]:
    """Colour of the arm at that place, and whether its marks are hollow; no two of twenty are alike."""
    return _COLORS[place % len(_COLORS)], place // len(_COLORS) % 2 == 1


def draw_front(outcomes: Sequence[Outcome], cost: str) -> Figure:
    """Accuracy over a cost: a line per arm over its budgets, bars of one standard deviation, and the dense model.

    The arms are the first traces, in the order of `list_arms`, so that the page can hide them by number.
    """
    title = COSTS[cost]
    table, dense = rank_arms(outcomes), find_dense_accuracies(outcomes)
    data: list[dict[str, Any]] = []
    for place, arm in enumerate(list_arms(outcomes)):
        costs = [(_cost(line, cost), line) for line in table if line.arm == arm and line.budget]
        found = sorted(((x, line) for x, line in costs if x is not None), key=lambda pair: pair[0])
        color, hollow = choose_marker(place)
        symbol = _SYMBOLS[place % len(_SYMBOLS)] + ("-open" if hollow else "")
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(arm),
                "x": [round(x, 4) for x, _ in found],
                "y": [round(100 * (line.accuracy or 0), 3) for _, line in found],
                "error_y": {
                    "type": "data",
                    "array": [round(100 * (line.spread or 0), 3) for _, line in found],
                    "thickness": 1,
                    "width": 3,
                },
                "error_x": {
                    "type": "data",
                    "array": [
                        round((line.latency_spread or 0) if cost == LATENCY else 0, 4) for _, line in found
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
    at = find_dense_latency(outcomes) if cost == LATENCY else 100.0
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


def _cost(line: Standing, cost: str) -> float | None:
    """In the unit of its axis; None: not known, or no seed worked."""
    if line.accuracy is None:
        return None
    return line.latency_ms if cost == LATENCY else 100 * line.kept[cost]


def draw_widths(outcomes: Sequence[Outcome]) -> Figure:
    """Share of its units that each layer keeps, a row per arm, mean over the seeds; one trace per budget."""
    arms = list_arms(outcomes)
    layers = {width.layer: width.before for outcome in outcomes for width in outcome.widths}
    data = []
    for number, budget in enumerate(filter(None, list_budgets(outcomes))):
        rows, words = [], []
        for arm in arms:
            found = [o for o in outcomes if o.arm == arm and describe_budget(o.budget) == budget]
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
