"""The graph of a cut model, from the graph of the model before the cut."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph.groups import Graph, Group, Member, PadSite, fingerprint
from secateur.graph.positions import removed_positions


def shrink(graph: Graph, model: nn.Module, masks: Sequence[Tensor]) -> Graph:
    """What may still be cut of a model, without capturing it again.

    Groups keep their names and their order, and widths stay the same functions of the units kept, so a
    method that cuts in several steps speaks of the same groups throughout.

    Args:
        graph: of the model before the cut.
        model: after the cut.
        masks: (units,) bool per group of `graph`: what was kept.
    """
    gone = removed_positions(graph, masks)

    def follow(member: Member, mask: Tensor) -> Member:
        index = member.index[mask.numpy()]
        before = np.searchsorted(gone.get((member.tensor, member.dim), ()), index)
        return replace(member, index=index - before)

    groups = tuple(
        Group(group.name, int(mask.sum()), tuple(follow(member, mask) for member in group.members))
        for group, mask in zip(graph.groups, masks, strict=True)
    )
    rank = [torch.cumsum(mask, 0) - 1 for mask in masks]
    pads = tuple(
        PadSite(p.module, p.attribute, p.base, tuple((g, int(rank[g][u])) for g, u in p.units if masks[g][u]))
        for p in graph.pads
    )
    trace = graph.trace.after(masks) if graph.trace else None
    return replace(graph, groups=groups, pads=pads, fingerprint=fingerprint(model), trace=trace)
