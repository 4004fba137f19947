"""The tables of a comparison: Markdown for people, CSV run by run."""

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from secateur.compare.advice import recommend
from secateur.compare.results import Outcome, Results
from secateur.compare.statistics import (
    describe_disturbed,
    find_dense_accuracies,
    list_within_latencies,
    mean_of,
    rank_arms,
    spread_of,
)
from secateur.compare.words import MEASURES, format_milliseconds, format_percentage
from secateur.files import atomic_write

_HEADINGS = (
    "right after the cut", "accuracy", "difference", "ms", "step: MACs, memory", "s/epoch", "training, s", "seeds"
)  # fmt: skip

MASKS = (
    "Of masked networks, weights at zero are not counted as kept. Their operations are done all the same, so under a "
    "budget of MACs none is recommended."
)


WITHIN = (
    "Accuracy in % within a latency, between two budgets on the line that joins them; – where even the smallest budget "
    "takes longer."
)


def format_markdown(results: Results) -> str:
    """The table of a comparison, with what follows from it."""
    outcomes, dense = results.outcomes, find_dense_accuracies(results.outcomes)
    lines = [results.summary, ""]
    if dense:
        lines += [
            f"The dense network: {format_percentage(mean_of(dense.values()), spread_of([*dense.values()]))} %.",
            "",
        ]
    for one in recommend(outcomes):
        lines.append(f"- **At most {one.budget}:** {one.text}")
    if any(o.masked for o in outcomes):
        lines += ["", MASKS]
    times, arms = list_within_latencies(outcomes)
    if arms:
        lines += ["", WITHIN, "", _row("within", *(f"{time:.3g} ms" for time in times))]
        lines += ["|---" * (1 + len(times)) + "|"]
        lines += [_row(arm, *map(format_percentage, found)) for arm, found in arms.items()]
    lines += [
        "",
        _row("budget", "arm", *(f"{label} kept" for label in MEASURES.values()), *_HEADINGS),
        "|---" * (2 + len(MEASURES) + len(_HEADINGS)) + "|",
    ]
    for row in rank_arms(outcomes):
        if row.accuracy is None:
            nothing = [""] * (len(_HEADINGS) - 3)
            lines.append(
                _row(row.budget, row.arm, *[""] * len(MEASURES), "", f"failed: {row.failed}", *nothing, "0")
            )
            continue
        cut = "" if row.accuracy_cut is None else format_percentage(row.accuracy_cut)
        difference = ""
        if row.difference is not None:
            difference = f"{format_percentage(row.difference, row.difference_spread, '+')} to {row.against}"
        step = "" if row.step_macs is None else f"{row.step_macs:.2f}, {row.step_bytes:.2f}"
        latency = "" if row.latency_ms is None else format_milliseconds(row.latency_ms, row.latency_spread)
        lines.append(
            _row(
                row.budget or "dense",
                row.arm + (" (over the budget)" if row.over else ""),
                *(f"{row.kept[measure]:.3f}" for measure in MEASURES),
                cut,
                format_percentage(row.accuracy, row.spread),
                difference,
                latency,
                step,
                _seconds(row.seconds_per_epoch),
                _seconds(row.training_seconds),
                f"{row.seeds} ({row.failed})" if row.failed else str(row.seeds),
            )
        )
    if note := describe_disturbed(outcomes):
        lines += ["", note]
    lines += ["", *(f"- {arm}: {note}" for arm, note in results.notes.items())]
    return "\n".join(lines).rstrip() + "\n"


_COLUMNS = (
    "step_macs", "step_bytes", "accuracy_cut", "accuracy", "accuracy_dense", "epochs", "training_seconds", "latency_ms",
    "latency_dense_ms", "error",
)  # fmt: skip


def format_csv(outcomes: Sequence[Outcome]) -> str:
    """One line per run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "budget", "seed", *MEASURES, *_COLUMNS))
    for o in outcomes:
        values = {f.name: getattr(o, f.name) for f in fields(o)}
        values["latency_ms"] = o.latency.after.p10_ms if o.latency else None
        values["latency_dense_ms"] = o.latency.before.p10_ms if o.latency else None
        bound = ", ".join(f"{name} {value:g}" for name, value in o.budget.items())
        shares = [o.share(measure) for measure in MEASURES]
        writer.writerow((o.arm, bound, o.seed, *shares, *(values[name] for name in _COLUMNS)))
    return text.getvalue()


def _row(*cells: str) -> str:
    """One line of a Markdown table; a message of several lines is one cell."""
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def write_tables(folder: str | Path, results: Results) -> None:
    """Write `table.md` and `table.csv` into an existing folder.

    Raises:
        FileError: a file cannot be written.
    """
    atomic_write(Path(folder) / "table.md", format_markdown(results))
    atomic_write(Path(folder) / "table.csv", format_csv(results.outcomes))
