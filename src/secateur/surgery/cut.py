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
from secateur.graph.modes import forget_kept
from secateur.graph.modules import HELD, Keep, held, worked_out
from secateur.graph.positions import kept_positions
from secateur.graph.probe import random_inputs
from secateur.plan import Plan
from secateur.rewriting.elsewhere import look_elsewhere
from secateur.rewriting.known import following
from secateur.rewriting.rewrite import rewrite_
from secateur.rewriting.settle import settle
from secateur.settings import checked
from secateur.surgery.absent import leave_out
from secateur.surgery.edit import Edit, select, select_states


@uncompiled
@checked(CutError)
def cut_(model: nn.Module, graph: Graph, plan: Plan, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Remove the units of a plan from the model's tensors, and let its layers' attributes follow.

    Modules of a block that goes are replaced by an `Absent`.

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
    whole, model = model, graph.view(model)
    assert graph.trace is not None
    survivors = graph.trace.survivors(masks)
    before = duplicate(model, share=True)
    keep = kept_positions(model, graph, masks)
    edit = Edit(model)
    emptied = leave_out(edit, model, graph, survivors.skipped)
    edit.attributes(layer_attributes(model, keep))
    edit.attributes(pad_widths(graph.pads, masks))
    edit.attributes(following(model, graph.trace, survivors))
    nothing = torch.zeros(0, dtype=torch.long)
    for tensor, dims in [*tensor_cuts(model, keep), *((tensor, {0: nothing}) for tensor in emptied)]:
        edit.tensor(tensor, select(tensor.data, dims))
        if tensor.grad is not None:
            edit.grad(tensor, select(tensor.grad, dims))
        if optimizer is not None:
            select_states(edit, optimizer, tensor, dims)
    edit.apply()
    renew_(model, edit)
    try:
        _settle(model, before, graph, masks, edit)
        follow_elsewhere_(model, before, graph, edit)
    except Exception as error:
        edit.undo()
        if isinstance(error, CutError):
            raise
        raise CutError(
            f"{type(model).__name__}: the plan cannot be applied ({first_line(error)}). The model is unchanged."
        ) from error
    return whole


def renew_(model: nn.Module, edit: Edit) -> None:
    """Let what modules have worked out follow the tensors it is worked out from, as a change that was made."""
    forget_kept(model)
    for module in model.modules():
        new = worked_out(module)
        if new:
            old = {name: module.__dict__[name] for name in new}
            module.__dict__.update(new)
            edit.done(functools.partial(module.__dict__.update, old))


def _settle(model: nn.Module, before: nn.Module, graph: Graph, masks: list[Tensor], edit: Edit) -> None:
    """Rewrite the submodules whose own forward does not compute the cut network."""
    drafts = settle(model, graph, masks, functools.partial(duplicate, before, share=True))
    if "" in drafts and graph.parts is not None:
        raise CutError(
            f"{type(model).__name__}: one of its parts ({', '.join(graph.parts.names)}) can neither run at the new "
            f"widths nor be rewritten; name the others in scope=. The model is unchanged."
        )
    for name, draft in drafts.items():
        module = model.get_submodule(name)
        edit.done(rewrite_(module, draft.programs, draft.all_constants, draft.lost, draft.tied))


def follow_elsewhere_(model: nn.Module, before: nn.Module, graph: Graph, edit: Edit) -> None:
    """Set the numbers that only other ways through the modules read, as a change that was made."""
    found = look_elsewhere(before, model, random_inputs(graph, torch.float32, seed=0))
    numbers = Edit(model)
    numbers.attributes(found.edits)
    numbers.attributes({name: {"stands_in": ways} for name, ways in found.stands_in.items()})
    numbers.apply()
    edit.done(numbers.undo)


def layer_attributes(
    model: nn.Module, keep: Mapping[tuple[str, int], Keep]
) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """Module name -> attributes that change, for every stock layer with a cut tensor."""
    cut: dict[str, list[tuple[int, Keep]]] = {}
    for (tensor, dim), mask in keep.items():
        cut.setdefault(tensor, []).append((dim, mask))
    first = {id(tensor): name for name, tensor in reversed(named_tensors(model))}
    edits = {}
    for name, module in model.named_modules():
        own: dict[tuple[str, int], Keep] = {}
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        tensors |= {local: found[1] for local in HELD if (found := held(module, local))}
        for local, tensor in tensors.items():
            own |= {(local, dim): mask for dim, mask in cut.get(first[id(tensor)], ())}
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
    small = cut_(duplicate(model, share=True), graph, plan)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    for parameter in small.parameters():
        if parameter.data_ptr() in shared:
            parameter.data = parameter.data.clone()
    return small
