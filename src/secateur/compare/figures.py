"""The pictures of a comparison."""

import statistics
from collections.abc import Sequence

from secateur.compare.results import Outcome
from secateur.compare.statistics import (
    Standing,
    find_dense_accuracies,
    find_dense_latency,
    list_budgets,
    rank_arms,
)
from secateur.compare.words import MEASURES, describe_budget
from secateur.report.figures import Figure, Strips
from secateur.report.svg import AFTER, BEFORE, REMOVED, SHAPES, Axis, Chart, box, number, strip

_COLORS = (
    AFTER, REMOVED, "#7a6fd0", "#c94f7c", "#5b9a3c", "#b58a1b", "#3f7fd0", "#a5603c", "#6b7785", "#d0504a"
)  # fmt: skip
_SAID = 2000  # cells at most that say their numbers; the words of more would outweigh the page

LATENCY = "latency"

COSTS = {LATENCY: "latency, ms", **{measure: f"{label} kept, %" for measure, label in MEASURES.items()}}
"""What accuracy is drawn over -> the title of that axis; the picture of `macs` stands in the element `plot-macs`."""


def draw_fronts(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Accuracy over each cost that is known, time first, by the id of the element that each stands in."""
    table = rank_arms(outcomes)
    return {
        f"plot-{cost}": draw_front(outcomes, cost)
        for cost in COSTS
        if any(_cost(line, cost) is not None for line in table if line.budget)
    }


def list_arms(outcomes: Sequence[Outcome]) -> list[str]:
    """The arms that prune, as they come."""
    return list(dict.fromkeys(outcome.arm for outcome in outcomes if outcome.budget))


def choose_marker(place: int) -> tuple[str, bool]:
    """Colour of the arm at that place, and whether its marks are hollow; no two of twenty are alike."""
    return _COLORS[place % len(_COLORS)], place // len(_COLORS) % 2 == 1


def draw_front(outcomes: Sequence[Outcome], cost: str) -> Figure:
    """Accuracy over a cost: a line per arm over its budgets, bars of one standard deviation, and the dense model.

    Each arm is a series that bears its place in `list_arms`, so that the page can hide it. The standings are its table.
    """
    title, dense = COSTS[cost], find_dense_accuracies(outcomes)
    lines: dict[str, list[tuple[float, float, Standing]]] = {arm: [] for arm in list_arms(outcomes)}
    for line in rank_arms(outcomes):
        if line.budget and line.accuracy is not None and (x := _cost(line, cost)) is not None:
            lines[line.arm].append((x, 100 * line.accuracy, line))
    found = [point for points in lines.values() for point in points]
    at, level = find_dense_latency(outcomes) if cost == LATENCY else 100.0, None
    if dense and at is not None:
        level = 100 * statistics.mean(dense.values())
    chart = Chart(
        Axis.over([x for x, *_ in found] + ([at] if level is not None and at is not None else []), title),
        Axis.over([y + side * _spread(line) for _, y, line in found for side in (-1, 1)] + ([level] if level else []),
                  "accuracy, %"),
        440 if cost == next(iter(COSTS)) else 360,
    )  # fmt: skip
    for place, (arm, points) in enumerate(lines.items()):
        color, hollow = choose_marker(place)
        shapes = [
            chart.line([(x, y) for x, y, _ in sorted(points, key=lambda point: point[0])], arm, dashed=hollow)
        ]
        for x, y, line in points:
            up, across = _spread(line), (line.latency_spread or 0.0) if cost == LATENCY else 0.0
            shapes += [chart.rule((x, y - up), (x, y + up))] if up else []
            shapes += [chart.rule((x - across, y), (x + across, y))] if across else []
            words = (
                f"{arm}: accuracy {y:.2f}{f' ± {up:.2f}' if up else ''} %, {title.split(',')[0]} {number(x)}"
            )
            shapes.append(
                chart.mark(x, y, words, SHAPES[place % (len(SHAPES) - 1)], "hollow" if hollow else "")
            )
        chart.add(color, *shapes, name=str(place))
    if level is not None and at is not None:
        chart.add("var(--ink)", chart.mark(at, level, f"dense: accuracy {level:.2f} %", "star"))
    return Figure(
        chart.draw(f"Accuracy of each method over {title}; the table below has the numbers"), (), ()
    )


def _spread(line: Standing) -> float:
    return 100 * (line.spread or 0.0)


def _cost(line: Standing, cost: str) -> float | None:
    """In the unit of its axis; None: not known, or no seed worked."""
    if line.accuracy is None:
        return None
    return line.latency_ms if cost == LATENCY else 100 * line.kept[cost]


def draw_widths(outcomes: Sequence[Outcome]) -> dict[str, Strips]:
    """By budget: the share of its units that each layer keeps, a row per arm, mean over the seeds."""
    layers = {width.layer: width.before for outcome in outcomes for width in outcome.widths}
    budgets = [budget for budget in list_budgets(outcomes) if budget] if layers else []
    arms = list_arms(outcomes)
    said = len(layers) * len(arms) * len(budgets) <= _SAID
    drawn = {}
    for budget in budgets:
        rows = []
        for arm in arms:
            found = [o for o in outcomes if o.arm == arm and describe_budget(o.budget) == budget]
            kept: dict[str, list[int]] = {}
            for width in (width for outcome in found for width in outcome.widths):
                kept.setdefault(width.layer, []).append(width.after)
            shares = {name: statistics.mean(units) / layers[name] for name, units in kept.items()}
            cells = [
                box(
                    AFTER, place, 0, 0.94, 10, max(0.04, shares[name]),
                    f"{name}: {number(shares[name] * before)} of {before} units" if said else "",
                )
                for place, (name, before) in enumerate(layers.items())
                if name in shares
            ]  # fmt: skip
            least = min(shares, key=lambda name: shares[name], default="")
            words = f"{least}, {100 * shares[least]:.0f} % kept" if least else "not known"
            rows.append(
                (
                    arm,
                    strip(len(layers), 10, [box(BEFORE, 0, 4.7, len(layers), 0.6, 0.5), *cells], arm),
                    words,
                )
            )
        drawn[budget] = Strips(("method", "layers from input to output", "cut most"), rows)
    return drawn
