"""Removal by zeros: the reference every cut is compared with."""

import torch
from torch import nn

from secateur.graph import Graph
from secateur.plan import Plan


def mask_(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """Set every parameter position of the removed units to zero; shapes stay.

    The filters that make a unit, its biases and norm scales and shifts, and the columns that read it all
    become zero, so in evaluation mode the model computes what it would if the unit did not exist.

    Args:
        model: the model `graph` was made from; changed in place.
        graph: from `analyze`.
        plan: which units go.
    Returns:
        the model.
    Raises:
        PlanError: the plan does not fit the graph.
    """
    masks = plan.masks(graph)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for group, mask in zip(graph.groups, masks, strict=True):
            for member in group.members:
                if member.tensor in parameters and not mask.all():
                    member.fill_(parameters[member.tensor], ~mask, 0.0)
    return model
