"""`secateur inspect`."""

import json
from typing import Any

import typer

from secateur.cli.flags import FREEZE, Flags, Given, command, flag
from secateur.runs.config import METHOD, MODEL, Task

CLASSES = flag("classes", int, "Size of the output.", panel=MODEL, shown="the model's own", metavar="N")
CHANNELS = flag("channels", int, "Channels of the input.", panel=MODEL, shown="3", metavar="N")
INPUT_SIZE = flag(
    "image_size",
    int,
    "Side of the input images.",
    panel=MODEL,
    shown="32 for built-in models, else 224",
    metavar="N",
)


@command(
    Flags(Task, only=["model", "weights"]),
    INPUT_SIZE,
    CHANNELS,
    CLASSES,
    FREEZE,
    flag(
        "attention",
        str,
        "What attention loses: whole heads, or the same dims of every head.",
        panel=METHOD,
        shown="heads",
        metavar="NAME",
    ),
    flag("json", bool, "Print JSON."),
)
def inspect(given: Given) -> None:
    """Show what can be pruned, what stays and why, and which budgets can be reached."""
    found = look(given)
    if "json" in given:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found)


def look(given: Given) -> dict[str, Any]:
    """What there is to know about a model, as plain JSON."""
    import torch

    from secateur import Cost, analyze
    from secateur.errors import SecateurError
    from secateur.runs.config import check_model_name, reachable
    from secateur.runs.task import fresh_model, input_shape, load_into

    if "model" not in given:
        raise SecateurError("no model: give --model")
    model, channels = given["model"], given.get("channels", 3)
    check_model_name(model)
    shape = input_shape(model, channels, given.get("image_size"))
    network = fresh_model(model, given.get("classes"), channels, seed=0)
    if "weights" in given:
        load_into(network, given["weights"])
    graph = analyze(
        network,
        torch.zeros(1, *shape),
        freeze=given.get("freeze", ()),
        attention=given.get("attention", "heads"),
    )
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
    return {
        "model": model,
        "input_shape": list(shape),
        "macs": cost.macs(),
        "params": cost.params(),
        "groups": groups,
        "frozen": [{"name": item.name, "units": item.units, "reason": item.reason} for item in graph.frozen],
        "unused": list(graph.unused),
        "reachable": {name: {"least": low, "dense": high} for name, (low, high) in reachable(graph).items()},
    }


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
        rows = table("Prunable", columns, right=columns[1:])
        for group in found["groups"]:
            counts = str(group["units"]), str(len(group["layers"]))
            rows.add_row(group["name"], *counts, share(group, "macs"), share(group, "params"))
        rows.caption = "MACs and params: saved if one unit stays"
        print_table(rows)
    if found["frozen"]:
        rows = table("Frozen", ("layer", "channels", "because"), right=("channels",))
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
