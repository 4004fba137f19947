"""What a pruning run did, as one web page and one JSON file; and what a comparison of runs showed.

report = Report(model="resnet20", method="l1", …)
write_report(folder, report)        # folder/report.html and folder/report.json
"""

import json
from pathlib import Path

from secateur.files import atomic_write
from secateur.report.comparison import ComparisonReport, Outcome, advice, as_csv, markdown, standings
from secateur.report.data import (
    FrozenGroup,
    Group,
    LatencyPair,
    Report,
    TrainingPair,
    Width,
    current_versions,
)

__all__ = [
    "ComparisonReport",
    "FrozenGroup",
    "Group",
    "LatencyPair",
    "Outcome",
    "Report",
    "TrainingPair",
    "Width",
    "advice",
    "current_versions",
    "standings",
    "write_comparison",
    "write_report",
    "write_tables",
]


def write_report(folder: str | Path, report: Report) -> None:
    """Write `report.json` and `report.html` into a folder, each of them whole or not at all.

    The page needs no network and no other file. The JSON has one key per line.

    Args:
        folder: an existing folder.
        report: what to tell.
    Raises:
        FileError: a file cannot be written.
    """
    from secateur.report.html import render

    page = render(report)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.to_json().items()]
    atomic_write(Path(folder) / "report.json", "{\n" + ",\n".join(lines) + "\n}\n")
    atomic_write(Path(folder) / "report.html", page)


def write_tables(folder: str | Path, report: ComparisonReport) -> None:
    """Write `table.md` and `table.csv` into an existing folder.

    Raises:
        FileError: a file cannot be written.
    """
    atomic_write(Path(folder) / "table.md", markdown(report))
    atomic_write(Path(folder) / "table.csv", as_csv(report.outcomes))


def write_comparison(folder: str | Path, report: ComparisonReport) -> None:
    """Write `index.html`, `table.md` and `table.csv`; the page needs no network and no other file.

    Raises:
        FileError: a file cannot be written.
    """
    from secateur.report.html import render_comparison

    write_tables(folder, report)
    atomic_write(Path(folder) / "index.html", render_comparison(report))
