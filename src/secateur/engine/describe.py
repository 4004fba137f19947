"""What a report says about a pruned model itself: widths, groups, what stayed and why, and the proof."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from secateur.cost import Cost
from secateur.graph import Graph
from secateur.plan import Plan
from secateur.proof import Verification
from secateur.report.data import Ending, FrozenGroup, Group, LayerCurve, Width


def layer_facts(graph: Graph, dense: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Widths of layers before and after, and what is frozen, plain JSON.

    Args:
        graph: whose groups and frozen layers are meant.
        dense: with the widths before.
        small: with the widths after.
    """
    return {
        "widths": [vars(width) for width in _widths(graph, dense, small)],
        "frozen": [vars(row) for row in _frozen(graph, dense)],
    }


def width_of(layer: nn.Module) -> int | None:
    """Output channels or features of a layer that has a number for them."""
    for name in ("out_channels", "out_features"):
        if isinstance(width := getattr(layer, name, None), int):
            return width
    return None


def _widths(graph: Graph, dense: nn.Module, small: nn.Module) -> list[Width]:
    producers = {m.module for group in graph.groups for m in group.members if m.role in ("out", "depthwise")}
    after = dict(small.named_modules())
    widths = []
    for name, layer in dense.named_modules():
        old, new = width_of(layer), width_of(after[name]) if name in after else None
        if name in producers and old is not None and new is not None:
            widths.append(Width(name, old, new))
    return widths


def _frozen(graph: Graph, dense: nn.Module) -> list[FrozenGroup]:
    """What stays; of a layer that is frozen in part, its share of the layer's costs."""
    macs, layers = Cost(graph).layers(), dict(dense.named_modules())
    rows = []
    for item in graph.frozen:
        layer = layers[item.name]
        width = width_of(layer) or item.units
        share = item.units / width
        name = item.name if share == 1 else f"{item.name} ({item.units} of {width} channels)"
        params = sum(p.numel() for p in layer.parameters(recurse=False))
        rows.append(
            FrozenGroup(name, item.reason, round(share * params), round(share * macs.get(item.name, 0)))
        )
    return rows


def describe(pruned: Any) -> dict[str, Any]:
    """Fields of a `Report` that follow from a `Pruned`."""
    proof, facts = pruned.proof, pruned.facts
    return {
        "before": dict(pruned.before),
        "after": dict(pruned.after),
        "verify_max_abs_error": proof.max_abs_error if proof else None,
        "verify_rel_error_float32": proof.max_rel_error_float32 if proof else None,
        "verify_rel_error_float64": proof.max_rel_error if proof else None,
        "widths": [Width(**row) for row in facts.get("widths", ())],
        "groups": _groups(pruned.graph, pruned.plan, pruned.scores),
        "frozen": [FrozenGroup(**row) for row in facts.get("frozen", ())],
        "pruning_history": facts.get("history", ()),
        "curves": [LayerCurve(**row) for row in facts.get("curves", ())]
        if isinstance(pruned.plan, Plan)
        else (),
        "distortion_predicted": facts.get("predicted"),
        "distortion_measured": facts.get("measured"),
        "decays": [Ending(**row) for row in facts.get("endings", ())],
    }


def _groups(graph: Graph, plan: object, scores: Sequence[Any]) -> list[Group]:
    if not isinstance(plan, Plan):
        return []
    shown = [[value if math.isfinite(value) else math.nan for value in score.tolist()] for score in scores]
    rows: Sequence[list[float] | None] = shown if shown else [None for _ in graph.groups]
    return [
        Group(group.name, mask.tolist(), row)
        for group, mask, row in zip(graph.groups, plan.masks(graph), rows, strict=True)
    ]


def width_notes(plan: object) -> list[str]:
    """What widths are multiples of, and why, where a method chose that."""
    why = plan.origin.get("multiples", {}).get("why") if isinstance(plan, Plan) else None
    return [why] if why else []


def proof_notes(graph: Graph, proof: Verification | None) -> list[str]:
    """What a reader must know about the proof, one sentence each."""
    if proof is None:
        return []
    notes = []
    if proof.rewritten:
        notes.append(f"The model's own forward cannot express the new widths: {proof.form}.")
    if proof.sizes:
        notes.append(f"Cut and masked model were also compared at {proof.sizes}.")
    if proof.uncompared:
        notes.append(f"They were not compared at every size: {proof.uncompared}.")
    if proof.statistics:
        notes.append(
            f"Statistics change: {len(proof.statistics)} operators take them over channels of which some are "
            f"gone ({_some(proof.statistics)}), so the reference takes them over the channels that are left."
        )
    if proof.randomised:
        notes.append(
            "The model's answers hardly depend on its input, so cut and masked model were also compared with "
            "random weights."
        )
    if proof.choices:
        notes.append(
            f"The model chooses ({_some(proof.choices)}), and rounding in float32 made the cut model choose something "
            f"else. There float32 was compared with the choices of the original; float64 compares the whole as it is."
        )
    if proof.stale:
        notes.append(
            f"On other ways than the one that was compared, this may be stale: {'; '.join(proof.stale)}."
        )
    if proof.untrained:
        notes.append(f"No training step was compared: the original cannot be trained ({proof.untrained}).")
    if graph.parts:
        notes.append(f"The model cannot be captured as a whole. It was {graph.parts.told}.")
    if graph.unused:
        notes.append(f"No forward pass reads these parameters, which were left alone: {_some(graph.unused)}.")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def settings_in_words(record: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """A method with the options that differ from its defaults.

    >>> settings_in_words({"method": "lapp", "bypass": "none", "weight": 4.0}, {"bypass": "full", "weight": 4.0})
    'lapp, bypass none'
    """
    parts = [str(record["method"])]
    for name, value in record.items():
        if name not in ("method", "seed") and value != defaults.get(name) and value not in ([], None):
            parts.append(f"{name} {_said(value)}")
    return ", ".join(parts)


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_said(entry)}" for name, entry in value.items() if entry is not None)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
