"""Physical removal: smaller tensors in the user's own module."""

import functools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CutError, first_line
from secateur.graph import Graph, mirrored, named_tensors
from secateur.graph.duplicate import duplicate
from secateur.graph.groups import PadSite, check_model
from secateur.graph.guard import uncompiled
from secateur.graph.modes import modes_kept
from secateur.graph.modules import HELD, Keep, held, worked_out
from secateur.graph.positions import kept_positions
from secateur.plan import Plan
from secateur.rewriting.known import following
from secateur.rewriting.rewrite import rewrite_
from secateur.rewriting.settle import settle
from secateur.settings import checked
from secateur.surgery.edit import Edit, select, select_states


@uncompiled
@checked(CutError)
def cut_(model: nn.Module, graph: Graph, plan: Plan, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Remove the units of a plan from the model's tensors, and let its layers' attributes follow.

    The result is the user's own module. Where its own forward does not compute the cut network, the smallest
    submodule that will do is rewritten (`rewritten_modules` names them). Any failure leaves model and
    optimizer as they were.

    Args:
        model: the model `graph` was made from; changed in place, parameters keep their identity.
        graph: from `analyze`.
        plan: which units go.
        optimizer: its state (momentum and the like) is cut along.
    Returns:
        the model.
    Raises:
        PlanError: the plan fits neither graph nor model.
        CutError: the model's own forward cannot run at the new widths, and cannot be rewritten.
    """
    masks = plan.masks(graph)
    check_model(model, graph)
    keep = kept_positions(model, graph, masks)
    edit = Edit(model)
    edit.attributes(layer_attributes(model, keep))
    edit.attributes(pad_widths(graph.pads, masks))
    assert graph.trace is not None
    edit.attributes(following(model, graph.trace, graph.trace.survivors(masks)))
    for tensor, dims in tensor_cuts(model, keep):
        edit.tensor(tensor, select(tensor.data, dims))
        if tensor.grad is not None:
            edit.grad(tensor, select(tensor.grad, dims))
        if optimizer is not None:
            select_states(edit, optimizer, tensor, dims)
    edit.apply()
    renew_(model, edit)
    try:
        _settle(model, graph, masks, edit)
    except Exception as error:
        edit.undo()
        if isinstance(error, CutError):
            raise
        raise CutError(
            f"{type(model).__name__}: the plan cannot be applied ({first_line(error)}). The model is unchanged."
        ) from error
    with modes_kept(model):
        model.train()  # what modules keep of the weights before the cut goes
    return model


def renew_(model: nn.Module, edit: Edit) -> None:
    """Let weights that hooks work out follow the tensors they are worked out from, as a change that was made."""
    for module in model.modules():
        new = worked_out(module)
        if new:
            old = {name: module.__dict__[name] for name in new}
            module.__dict__.update(new)
            edit.done(functools.partial(module.__dict__.update, old))


def _settle(model: nn.Module, graph: Graph, masks: list[Tensor], edit: Edit) -> None:
    """Rewrite the submodules whose own forward does not compute the cut network."""

    def whole() -> nn.Module:
        edit.undo()
        try:
            return duplicate(model, share=True)
        finally:
            edit.apply()

    drafts = settle(model, graph, masks, whole)
    for name, draft in drafts.items():
        module = model.get_submodule(name)
        edit.done(rewrite_(module, draft.program, draft.constants, draft.lost, draft.tied))


def layer_attributes(
    model: nn.Module, keep: Mapping[tuple[str, int], Keep]
) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """Module name -> attributes that change, for every stock layer with a cut tensor."""
    cut = {tensor for tensor, _ in keep}
    first = {id(tensor): name for name, tensor in reversed(named_tensors(model))}
    edits = {}
    for name, module in model.named_modules():
        own: dict[tuple[str, int], Keep] = {}
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        tensors |= {local: found[1] for local in HELD if (found := held(module, local))}
        for local, tensor in tensors.items():
            if first[id(tensor)] in cut:
                own |= {(local, dim): mask for (key, dim), mask in keep.items() if key == first[id(tensor)]}
        if own:
            try:
                edits[name] = mirrored(module, own)
            except CutError as error:
                raise CutError(f"{name}: {error}") from None
    return edits


def pad_widths(pads: tuple[PadSite, ...], masks: list[Tensor]) -> dict[str, dict[str, int]]:
    """Module name -> attribute -> how many channels it pads."""
    edits: dict[str, dict[str, int]] = {}
    for pad in pads:
        kept = sum(bool(masks[group][unit]) for group, unit in pad.units)
        edits.setdefault(pad.module, {})[pad.attribute] = pad.base + kept
    return edits


def tensor_cuts(
    model: nn.Module, keep: Mapping[tuple[str, int], Keep]
) -> list[tuple[Tensor, dict[int, Tensor]]]:
    """Every tensor to cut with the positions it keeps, dim -> positions."""
    tensors = dict(named_tensors(model))
    cuts: dict[str, dict[int, Tensor]] = {}
    for (name, dim), mask in keep.items():
        cuts.setdefault(name, {})[dim] = torch.from_numpy(np.flatnonzero(mask))
    return [(tensors[name], dims) for name, dims in cuts.items()]


@uncompiled
@checked(CutError)
def cut_copy(model: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """A cut copy; the model stays whole."""
    return cut_(duplicate(model), graph, plan)
