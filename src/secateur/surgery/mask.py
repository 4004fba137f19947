"""Removal by zeros: the reference every cut is compared with."""

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from secateur.errors import PlanError
from secateur.graph import Graph
from secateur.graph.groups import check_model
from secateur.graph.guard import uncompiled
from secateur.graph.modes import forget_kept
from secateur.plan import Plan
from secateur.settings import checked


@uncompiled
@checked(PlanError)
def mask_(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """Set every parameter position of the removed units to zero; shapes stay.

    The filters that make a unit, its biases and norm scales and shifts, and the columns that read it all
    become zero, so in evaluation mode the model computes what it would if the unit did not exist. The
    direction of a weight-normalised filter stays: its gain is zero, and zero has no direction.

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
    check_model(model, graph)
    parameters = dict(model.named_parameters())
    kept = directions(model)
    forget_kept(model)
    with torch.no_grad():
        for group, mask in zip(graph.groups, masks, strict=True):
            for member in group.members:
                if (member.tensor, member.dim) in kept:
                    continue
                if member.tensor in parameters and not mask.all():
                    member.fill_(parameters[member.tensor], ~mask, 0.0)
    return model


def directions(model: nn.Module) -> set[tuple[str, int]]:
    """(tensor, dim) wherever weight normalisation divides the slices along `dim` by their norms."""
    found = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, parametrizations._WeightNorm) and module.dim is not None:
            found.add((f"{prefix.rpartition('0.')[0]}original1", module.dim))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm) and hook.dim is not None:
                found.add((f"{prefix}{hook.name}_v", hook.dim))
    return found
