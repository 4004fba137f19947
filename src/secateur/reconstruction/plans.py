"""Making up for what a plan of channels removes, whatever chose it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from secateur.graph import Graph, Group, Inputs
from secateur.graph.duplicate import duplicate
from secateur.graph.modes import evaluating
from secateur.graph.replay import Replay, chunks
from secateur.plan import Plan
from secateur.reconstruction.compensate import compensate, layers, reestimate

COMPENSATIONS = {
    "none": "the remaining weights stay as they are",
    "batch-norm": "means and variances of batch norms are measured again",
    "least-squares": "the remaining weights of each layer are solved again, on the pruned network's inputs",
}
"""What is done after pruning, without training -> one line for lists of choices."""


def positions(program: Replay, groups: Sequence[Group], masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameter name -> bool of its shape, False where a removed unit lies."""
    owned = dict(program.model.named_parameters())
    keep: dict[str, Tensor] = {}
    for group, mask in zip(groups, masks, strict=True):
        if mask.all():
            continue
        for member in group.members:
            if member.tensor in owned:
                if member.tensor not in keep:
                    keep[member.tensor] = torch.ones_like(owned[member.tensor], dtype=torch.bool)
                member.fill_(keep[member.tensor], ~mask, 0)
    return keep


@torch.no_grad()
def compensated(
    program: Replay,
    graph: Graph,
    plan: Plan,
    batches: Sequence[Inputs],
    compensation: str,
    tick: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """The tensors of the masked network that make up for what a plan removes; removed units stay zero.

    Args:
        program: of the dense model.
        graph: of the same model.
        plan: any plan for it, whatever chose it.
        batches: calibration images, (n, …) each.
        compensation: a name in `COMPENSATIONS`.
        tick: is called after every layer that is solved again.
    """
    keep = positions(program, graph.groups, plan.masks(graph))
    start = {name: program.tensor(name) * k for name, k in keep.items()}
    if compensation == "none":
        return start
    if compensation == "batch-norm":
        return reestimate(program, batches, start)
    masks = {
        layer.weight: keep.get(layer.weight, torch.ones_like(program.tensor(layer.weight), dtype=torch.bool))
        for layer in layers(program)
        if layer.weight not in keep or keep[layer.weight].any()  # not in a block that is left out
    }
    return compensate(program, batches, masks, start=start, keep=keep, tick=tick).tensors


@torch.no_grad()
def compensated_copy(
    model: nn.Module, graph: Graph, plan: Plan, batches: Sequence[Inputs], compensation: str
) -> nn.Module:
    """A copy of a model whose tensors make up for what a plan removes; see `compensated`."""
    copied = duplicate(model)
    with evaluating(copied):
        program = Replay(copied, batches[0])
        parts = chunks(program, batches)
        for name, tensor in compensated(program, graph, plan, parts, compensation).items():
            program.tensor(name).copy_(tensor)
    return copied
