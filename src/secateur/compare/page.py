"""The page of a comparison: one HTML file that needs no network."""

import statistics
from pathlib import Path

from secateur.compare.advice import recommend
from secateur.compare.figures import COSTS, choose_marker, draw_fronts, draw_widths, list_arms
from secateur.compare.results import Results
from secateur.compare.statistics import (
    describe_disturbed,
    find_dense_accuracies,
    list_within_latencies,
    rank_arms,
)
from secateur.compare.tables import MASKS, WITHIN
from secateur.compare.words import MEASURES, format_milliseconds, format_percentage
from secateur.files import atomic_write
from secateur.report.html import fill_template
from secateur.report.svg import symbol


def render_page(results: Results) -> str:
    """The page as text; names in it are escaped."""
    outcomes = results.outcomes
    table, dense = rank_arms(outcomes), find_dense_accuracies(outcomes)
    timed = next((o.latency for o in outcomes if o.latency and o.latency.steady), None)
    figures = draw_fronts(outcomes)
    return fill_template(
        "page.html.j2",
        figures,
        room="compare",
        filters={"percentage": format_percentage, "milliseconds": format_milliseconds},
        results=results,
        measures=MEASURES,
        fronts=[
            (f"plot-{cost}", title.split(",")[0])
            for cost, title in COSTS.items()
            if f"plot-{cost}" in figures
        ],
        widths=draw_widths(outcomes),
        arms=[(arm, symbol(*choose_marker(place))) for place, arm in enumerate(list_arms(outcomes))],
        advice={one.budget: one for one in recommend(outcomes)},
        budgets={line.budget: [row for row in table if row.budget == line.budget] for line in table},
        dense=statistics.mean(dense.values()) if dense else None,
        within=list_within_latencies(outcomes),
        within_says=WITHIN,
        timed=timed.after if timed else None,
        disturbed=describe_disturbed(outcomes),
        masked=MASKS if any(o.masked for o in outcomes) else "",
        seconds=sum(o.training_seconds for o in outcomes),
    )


def write_page(folder: str | Path, results: Results) -> None:
    """Write `index.html` into an existing folder.

    Raises:
        FileError: the file cannot be written.
    """
    atomic_write(Path(folder) / "index.html", render_page(results))
