"""The page of `secateur inspect`: what can be pruned in a model, what stays and why, and where the time goes."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import secateur
from secateur.cost.latency import device_name
from secateur.report.figures import Figure, Picture, Strips, brief
from secateur.report.html import fill_template, percent
from secateur.report.svg import AFTER, BEFORE, REMOVED, Axis, Chart, box, strip


def render_inspection(found: Mapping[str, Any], passes: int) -> str:
    """The page.

    Args:
        found: what `secateur inspect --json --layers` prints.
        passes: over which the layers were timed.
    """
    pictures: dict[str, Picture] = {
        "plot-network": _network(found),
        "plot-layers": _layers(found),
        "plot-groups": _groups(found),
    }
    return fill_template(
        "inspect.html.j2",
        pictures,
        found=found,
        least={name: low["least"] / low["dense"] for name, low in found["reachable"].items()},
        passes=passes,
        threads=torch.get_num_threads(),
        footer=f"Secateur {secateur.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"{device_name(torch.device('cpu'))}",
    )


def _network(found: Mapping[str, Any]) -> Figure:
    """Each layer with weights as thick as it is wide, from input to output."""
    rows = [row for row in found["layers"] if row["channels"]]
    most = max((row["channels"] for row in rows), default=1)
    chart = Chart(Axis(0, max(len(rows), 1)), Axis(-most / 2, most / 2), 220)
    for place, row in enumerate(rows):
        said, color = (f"prunable with {row['group']}", AFTER) if row["group"] else (_reason(row), REMOVED)
        half = row["channels"] / 2
        title = f"{row['name']}: {row['channels']} channels, {said}"
        chart.add(color, chart.bar(place + 0.14, place + 0.86, -half, half, title))
    return Figure(chart.draw("Width of each layer, from input to output", axes=False), (), ())


def _reason(row: Mapping[str, Any]) -> str:
    return f"stays: {row['frozen']}" if row["frozen"] else "stays"


def _layers(found: Mapping[str, Any]) -> Strips:
    rows: Sequence[Mapping[str, Any]] = found["layers"]
    macs, ms = (max((row[key] for row in rows), default=0) or 1 for key in ("macs", "ms"))
    return Strips(
        ("layer", "kind", "", "MACs", "", "milliseconds"),
        [
            (
                row["name"],
                row["kind"] + (f", {row['channels']} channels" if row["channels"] else ""),
                *((_bar(row["macs"], macs), brief(row["macs"])) if row["macs"] else ("", "")),
                _bar(row["ms"], ms),
                brief(row["ms"]),
            )
            for row in rows
        ],
    )


def _bar(value: float, most: float) -> Any:
    return strip(100, 8, [box(AFTER, 0, 1, 100 * value / most, 6)])


def _groups(found: Mapping[str, Any]) -> Strips:
    rows = []
    for group in found["groups"]:
        macs, params = (group[key] / found[key] if found[key] else 0.0 for key in ("macs", "params"))
        bars = strip(100, 11, [box(AFTER, 0, 1, 100 * macs, 4), box(BEFORE, 0, 6, 100 * params, 4)])
        layers = ", ".join(group["layers"][:4]) + (" …" if len(group["layers"]) > 4 else "")
        rows.append(
            (group["name"], bars, f"{percent(macs)} / {percent(params)}", f"{group['units']}", layers)
        )
    return Strips(("group", "", "MACs / parameters", "units", "layers"), rows)
