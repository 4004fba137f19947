"""Slow, obvious versions of what the product computes cleverly."""

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur import Cost, Plan
from secateur.graph import Graph, named_tensors


def counted_macs(model: nn.Module, inputs: torch.Tensor) -> int:
    """Multiply-adds counted by torch while the model runs (two floating-point operations each)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(inputs)
    return counter.get_total_flops() // 2 // len(inputs)


def counted_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares all tensors: cheap, and safe as long as tensors are replaced and not written."""
    memo = {
        id(tensor): nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.detach()
        for _, tensor in named_tensors(model)
    }
    return copy.deepcopy(model, memo)


def random_masks(graph: Graph, seed: int, share: float = 0.4, only: int | None = None) -> list[torch.Tensor]:
    """Keep each unit with probability 1 - share, at least one per group; `only` one group is touched."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for number, group in enumerate(graph.groups):
        mask = torch.rand(group.units, generator=generator) >= share
        mask[int(torch.randint(group.units, (1,), generator=generator))] = True
        if mask.all():
            mask[0] = group.units == 1
        masks.append(mask if only in (None, number) else torch.ones(group.units, dtype=torch.bool))
    return masks


def plan_of(graph: Graph, masks: Sequence[torch.Tensor]) -> Plan:
    return Plan.of(graph, masks)


def best_masks(scores: Sequence[torch.Tensor], cost: Cost, measure: str, limit: int) -> float:
    """Largest sum of kept scores over every choice of widths that fits, by exhaustive search."""
    best = float("-inf")
    ranked = [score.sort(descending=True).values for score in scores]
    for kept in itertools.product(*(range(1, len(score) + 1) for score in scores)):
        if cost.of(measure, kept) <= limit:
            best = max(best, sum(r[:k].sum().item() for r, k in zip(ranked, kept, strict=True)))
    return best
