"""`secateur inspect`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from secateur.cli.flags import FREEZE, Flags, Given, command, flag
from secateur.runs.config import METHOD, MODEL, Task

if TYPE_CHECKING:
    from secateur.graph.groups import Group, Member

PASSES = 10
"""Over which layers are timed."""

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
    flag(
        "granularity",
        str,
        "What a unit is: channels, whole residual branches (blocks), or both.",
        panel=METHOD,
        shown="channels",
        metavar="NAME",
    ),
    flag("layers", bool, "Show every layer too: its width, MACs and measured time."),
    flag("html", Path, "Also write all of it, with pictures, as a page to this file.", metavar="FILE"),
    flag("json", bool, "Print JSON."),
)
def inspect(given: Given) -> None:
    """Show what can be pruned, what stays and why, where the time goes, and which budgets can be reached."""
    found = look(given)
    if "html" in given:
        from secateur.files import atomic_write
        from secateur.report.inspection import render_inspection

        atomic_write(given["html"], render_inspection(found, PASSES))
    if "json" in given:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found)


def look(given: Given) -> dict[str, Any]:
    """What there is to know about a model, as plain JSON."""
    import torch

    from secateur import Cost, analyze
    from secateur.cost.layers import time_layers
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
        granularity=given.get("granularity", "channels"),
    )
    cost = Cost(graph)
    producers = {m.module: g for g in reversed(graph.groups) for m in g.members if made(m, g)}
    frozen = {item.name: item.reason for item in graph.frozen}

    groups: list[dict[str, Any]] = []
    for i, group in enumerate(graph.groups):
        least = [other.least if j == i else other.units for j, other in enumerate(graph.groups)]
        groups.append(
            {
                "name": group.name,
                "units": group.units,
                "layers": sorted({m.module for m in group.members if made(m, group)}),
                "macs": cost.macs() - cost.macs(least),
                "params": cost.params() - cost.params(least),
            }
        )
    layers: list[dict[str, Any]] = []
    if "layers" in given or "html" in given:
        for row in time_layers({"": network}, torch.zeros(1, *shape), passes=PASSES)[""]:
            weight = getattr(network.get_submodule(row.layer), "weight", None)
            layers.append(
                {
                    "name": row.layer or "(the model itself)",
                    "kind": row.kind,
                    "channels": len(weight) if isinstance(weight, torch.Tensor) and weight.ndim > 1 else None,
                    "group": producers[row.layer].name if row.layer in producers else None,
                    "frozen": frozen.get(row.layer),
                    "macs": row.macs,
                    "ms": row.ms,
                }
            )
    return {
        "model": model,
        "input_shape": list(shape),
        "macs": cost.macs(),
        "params": cost.params(),
        "layers": layers,
        "groups": groups,
        "frozen": [{"name": item.name, "units": item.units, "reason": item.reason} for item in graph.frozen],
        "parts": str(graph.parts).splitlines() if graph.parts else [],
        "unused": list(graph.unused),
        "reachable": {name: {"least": low, "dense": high} for name, (low, high) in reachable(graph).items()},
    }


def made(member: "Member", group: "Group") -> bool:
    """Whether a layer's own channels go with the units; all layers of a block go with it."""
    return member.role in ("out", "depthwise") or group.branch is not None


def _show(found: dict[str, Any]) -> None:
    from secateur.cli.show import print_table, say, table
    from secateur.report.html import percent, si
    from secateur.runs.config import rounded_up

    def share(group: dict[str, Any], measure: str) -> str:
        return percent(group[measure] / found[measure]) if found[measure] else "–"

    shape = "×".join(str(n) for n in found["input_shape"])
    say(f"{found['model']} on {shape}: {si(found['macs'])} MACs, {si(found['params'])} parameters")
    for line in found["parts"]:
        say(line)
    if found["groups"]:
        columns = ("group", "units", "layers", "MACs", "params")
        rows = table("Prunable", columns, right=columns[1:])
        for group in found["groups"]:
            counts = str(group["units"]), str(len(group["layers"]))
            rows.add_row(group["name"], *counts, share(group, "macs"), share(group, "params"))
        rows.caption = "MACs and params: saved if one unit stays, or none of a block"
        print_table(rows)
    if found["layers"]:
        heads = ("layer", "kind", "channels", "MACs", "ms", "group")
        rows = table("Layers", heads, right=("channels", "MACs", "ms"))
        for layer in found["layers"]:
            rows.add_row(
                layer["name"],
                layer["kind"],
                str(layer["channels"] or ""),
                si(layer["macs"]) if layer["macs"] else "",
                f"{layer['ms']:.3f}",
                layer["group"] or ("frozen" if layer["frozen"] else ""),
            )
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
