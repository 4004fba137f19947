"""Growth: the user's own module with more channels, before it is trained."""

from collections.abc import Sequence

import numpy as np
from torch import nn

from secateur.errors import CutError, PlanError, first_line
from secateur.graph import Graph, fingerprint, named_tensors
from secateur.graph.groups import Member
from secateur.graph.modules import resized
from secateur.graph.probe import run_once
from secateur.surgery.edit import Edit


def widen_(model: nn.Module, graph: Graph, widths: Sequence[int]) -> nn.Module:
    """Give groups more units than they have; weights become zero and are for the caller to draw.

    Args:
        model: the model `graph` was made from; changed in place, parameters keep their identity.
        graph: from `analyze`.
        widths: units per group, none below what it has.
    Returns:
        the model.
    Raises:
        PlanError: widths or model do not fit the graph.
        CutError: a layer that is to grow is not stock, or the model's forward does not run; the model is unchanged.
    """
    if fingerprint(model) != graph.fingerprint:
        raise PlanError("the graph was made from a model with other tensors; analyse this model again")
    extra = [width - group.units for width, group in zip(widths, graph.groups, strict=True)]
    if min(extra, default=0) < 0:
        raise PlanError("widths below the model's: widen first, then cut")
    tensors = dict(named_tensors(model))
    sizes: dict[str, dict[int, int]] = {}
    gained: dict[str, int] = {}
    for group, more in zip(graph.groups, extra, strict=True):
        for member in group.members if more else ():
            own = sizes.setdefault(member.tensor, {})
            own[member.dim] = own.get(member.dim, tensors[member.tensor].shape[member.dim])
            own[member.dim] += more * member.index.shape[1]
            gained[member.module] = gained.get(member.module, 0) + more * whole_groups(model, member)
    edit = Edit(model)
    for name in sorted({tensor.rpartition(".")[0] for tensor in sizes}):
        mine = {
            (tensor.rpartition(".")[2], dim): size
            for tensor, dims in sizes.items()
            if tensor.rpartition(".")[0] == name
            for dim, size in dims.items()
        }
        try:
            edit.attributes({name: resized(model.get_submodule(name), mine, gained.get(name, 0))})
        except CutError as error:
            raise CutError(f"{name or type(model).__name__}: {error}") from None
    edit.attributes(_pads(model, graph, extra))
    for name, dims in sizes.items():
        tensor = tensors[name]
        edit.tensor(tensor, tensor.data.new_zeros([dims.get(d, n) for d, n in enumerate(tensor.shape)]))
        if tensor.grad is not None:
            edit.grad(tensor, tensor.grad.new_zeros([dims.get(d, n) for d, n in enumerate(tensor.shape)]))
    edit.apply()
    try:
        run_once(model, graph.inputs)
    except Exception as error:
        edit.undo()
        raise CutError(
            f"{type(model).__name__}: its forward does not run at larger widths ({first_line(error)}). A "
            f"size is probably written into forward; allow no growth (cap=1). The model is unchanged."
        ) from error
    return model


def whole_groups(model: nn.Module, member: Member) -> int:
    """Groups of a grouped convolution that come with one more unit; 0 where units are positions in all groups."""
    module = model.get_submodule(member.module)
    groups = getattr(module, "groups", 1)
    if groups == 1 or member.dim != 0 or not member.tensor.endswith("weight"):
        return 0
    each = len(dict(named_tensors(model))[member.tensor]) // groups
    covered = len(np.unique(member.index[0] // each))
    return covered if covered * each == member.index.shape[1] else 0


def _pads(model: nn.Module, graph: Graph, extra: Sequence[int]) -> dict[str, dict[str, int]]:
    """Module name -> attribute -> channels it pads: new units are padded where most of their group's are."""
    sides: dict[tuple[str, int], dict[str, int]] = {}
    for pad in graph.pads:
        for group, _ in pad.units:
            counts = sides.setdefault((pad.module, group), {})
            counts[pad.attribute] = counts.get(pad.attribute, 0) + 1
    edits: dict[str, dict[str, int]] = {}
    for (module, group), counts in sides.items():
        attribute = max(counts, key=lambda name: counts[name])
        own = edits.setdefault(module, {})
        own[attribute] = own.get(attribute, getattr(model.get_submodule(module), attribute)) + extra[group]
    return edits
