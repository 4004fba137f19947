"""What a pruning run did, as one web page and one JSON file.

report = Report(model="resnet20", method="l1", …)
write_report(folder, report)        # folder/report.html and folder/report.json
"""

import json
from pathlib import Path

from secateur.cost.latency import LatencyPair
from secateur.files import atomic_write
from secateur.report.data import (
    FrozenGroup,
    Group,
    Report,
    TrainingPair,
    Width,
    current_versions,
)

__all__ = [
    "FrozenGroup",
    "Group",
    "LatencyPair",
    "Report",
    "TrainingPair",
    "Width",
    "current_versions",
    "write_report",
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
