"""`secateur inspect`."""

import json
from typing import Annotated, Any

import typer
from typer import Option

from secateur.cli import options as o


def inspect(
    model: o.Model,
    weights: o.Weights = None,
    image_size: o.InputSize = None,
    channels: o.Channels = 3,
    classes: o.Classes = None,
    freeze: o.Freeze = None,
    attention: o.Attention = "heads",
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what can be pruned, what stays and why, and which budgets can be reached."""
    import torch

    from secateur import Cost, analyze
    from secateur.runs import fresh_model, load_into
    from secateur.runs.config import check_model_name, reachable
    from secateur.runs.subject import input_shape

    check_model_name(model)
    shape = input_shape(model, channels, image_size)
    network = fresh_model(model, classes, channels, seed=0)
    if weights is not None:
        load_into(network, weights)
    graph = analyze(network, torch.zeros(1, *shape), freeze=freeze or (), attention=attention)
    cost = Cost(graph)

    groups: list[dict[str, Any]] = []
    for i, group in enumerate(graph.groups):
        least = [1 if j == i else other.units for j, other in enumerate(graph.groups)]
        groups.append(
            {
                "name": group.name,
                "units": group.units,
                "layers": sorted({m.module for m in group.members if m.role in ("out", "depthwise")}),
                "macs": cost.macs() - cost.macs(least),
                "params": cost.params() - cost.params(least),
            }
        )
    found: dict[str, Any] = {
        "model": model,
        "input_shape": list(shape),
        "macs": cost.macs(),
        "params": cost.params(),
        "groups": groups,
        "frozen": [{"name": item.name, "units": item.units, "reason": item.reason} for item in graph.frozen],
        "unused": list(graph.unused),
        "reachable": {name: {"least": low, "dense": high} for name, (low, high) in reachable(graph).items()},
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from secateur.cli.show import print_table, say, table
    from secateur.report.html import percent, si
    from secateur.runs.config import rounded_up

    def share(group: dict[str, Any], measure: str) -> str:
        return percent(group[measure] / found[measure]) if found[measure] else "–"

    shape = "×".join(str(n) for n in found["input_shape"])
    say(f"{found['model']} on {shape}: {si(found['macs'])} MACs, {si(found['params'])} parameters")
    if found["groups"]:
        columns = ("group", "units", "layers", "MACs", "params")
        rows = table("What can go", columns, right=columns[1:])
        for group in found["groups"]:
            counts = str(group["units"]), str(len(group["layers"]))
            rows.add_row(group["name"], *counts, share(group, "macs"), share(group, "params"))
        rows.caption = "MACs and params: saved if one unit stays"
        print_table(rows)
    if found["frozen"]:
        rows = table("What stays", ("layer", "channels", "because"), right=("channels",))
        for item in found["frozen"]:
            rows.add_row(item["name"], str(item["units"]), item["reason"])
        print_table(rows)
    if found["unused"]:
        say(f"Never read by a forward pass: {', '.join(found['unused'])}")
    if found["groups"]:
        low = {name: rounded_up(r["least"] / r["dense"]) for name, r in found["reachable"].items()}
        say(
            f"Within reach: --keep-macs {low['macs']:.4f} to 1, --keep-params {low['params']:.4f} to 1, "
            f"--sparsity 0 to {1 - low['units']:.4f}"
        )
