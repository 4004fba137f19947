"""Slow, obvious versions of what the product computes cleverly."""

import copy
import itertools
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from secateur import Cost, Plan, cut_, verify
from secateur.graph import Graph, named_tensors


def counted_macs(model: nn.Module, inputs: torch.Tensor) -> int:
    """Multiply-adds counted by torch while the model runs (two floating-point operations each)."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused encoder layer would not be counted
    try:  # nor would fused attention on a CPU
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
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


def random_masks(
    graph: Graph, seed: int, share: float = 0.4, only: Collection[int] | None = None
) -> list[torch.Tensor]:
    """Keep each unit with probability 1 - share, at least one per group; `only` some groups are touched."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for number, group in enumerate(graph.groups):
        mask = torch.rand(group.units, generator=generator) >= share
        mask[int(torch.randint(group.units, (1,), generator=generator))] = True
        if mask.all():
            mask[0] = group.units == 1
        touched = only is None or number in only
        masks.append(mask if touched else torch.ones(group.units, dtype=torch.bool))
    return masks


def proven_cut(model: nn.Module, graph: Graph, masks: Sequence[torch.Tensor]) -> tuple[nn.Module, Plan]:
    """A copy cut to the units that stay, proven equal to the masked model; and the plan."""
    plan = Plan.of(graph, masks)
    cut = cut_(copy.deepcopy(model), graph, plan)
    proof = verify(model, cut, graph, plan)
    assert proof.ok, proof
    return cut, plan


def separating_sets(count: int) -> list[list[int]]:
    """Few sets of the numbers below `count`: of any two numbers, some set holds the first and not the second.

    Each number is in another half of the sets, so n sets serve as many numbers as there are halves of n.
    """
    sets = next(n for n in itertools.count(2) if math.comb(n, n // 2) >= count)
    halves = itertools.islice(itertools.combinations(range(sets), sets // 2), count)
    where = dict(enumerate(halves))
    return [[number for number in where if one in where[number]] for one in range(sets)]


def culprits(suspects: Sequence[int], holds: Callable[[Sequence[int]], bool]) -> Sequence[int]:
    """A smallest part of the suspects, found by halving, for which something does not hold."""
    for half in (suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]):
        if len(suspects) > 1 and not holds(half):
            return culprits(half, holds)
    return suspects


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


def survivors(graph: Graph, plan: Plan, model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameter name -> which of its elements the plan leaves, for every parameter it touches."""
    tensors = dict(named_tensors(model))
    alive = {}
    for group, mask in zip(graph.groups, plan.masks(graph), strict=True):
        for member in group.members:
            if not mask.all():
                kept = alive.setdefault(
                    member.tensor, torch.ones(tensors[member.tensor].shape, dtype=torch.bool)
                )
                kept.index_fill_(member.dim, torch.as_tensor(member.index)[~mask].flatten(), False)
    return alive


def without_units(model: nn.Module, graph: Graph, plan: Plan, inputs: torch.Tensor) -> list[torch.Tensor]:
    """What the original computes when the removed units do not exist.

    All their weights are zero, and every normalisation over channels counts the others only. It knows the
    three norms with a weight; a network that looks at all channels in another way needs another oracle.
    """
    alive = survivors(graph, plan, model)
    masked = twin(model).eval()
    weights = {}
    for name, parameter in masked.named_parameters():
        if name in alive:
            parameter.data = parameter.data * alive[name]
            weights[id(parameter)] = alive[name]
    with torch.no_grad(), SurvivorNorms(weights):
        return tensors_of(masked(inputs))


def tensors_of(result: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


class SurvivorNorms(TorchFunctionMode):
    """Layer, RMS and group norms whose weights are listed take their statistics over the survivors."""

    def __init__(self, alive: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.alive = alive

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        form = {"layer_norm": "normalized_shape", "rms_norm": "normalized_shape", "group_norm": "num_groups"}
        name = getattr(func, "__name__", "")
        bound = dict(zip(("input", form.get(name), "weight", "bias", "eps"), args, strict=False)) | kwargs
        if name == "rms_norm" and len(args) > 3:
            bound |= {"bias": None, "eps": args[3]}
        alive = self.alive.get(id(bound.get("weight"))) if name in form else None
        if alive is None:
            return func(*args, **kwargs)
        x, weight, bias, eps = (bound.get(key) for key in ("input", "weight", "bias", "eps"))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        channel = 1 if name == "group_norm" else x.ndim - 1
        shape = [-1 if dim == channel else 1 for dim in range(x.ndim)]
        rows = (len(x), bound["num_groups"], -1) if name == "group_norm" else (*x.shape[:-1], 1, -1)
        counts = alive.to(x.dtype).reshape(shape).expand(x.shape).reshape(rows)
        values, total = x.reshape(rows), counts.sum(-1, keepdim=True)
        mean = 0 if name == "rms_norm" else (values * counts).sum(-1, keepdim=True) / total
        variance = ((values - mean).square() * counts).sum(-1, keepdim=True) / total
        y = ((values - mean) * (variance + eps).rsqrt()).reshape(x.shape) * weight.reshape(shape)
        y = y if bias is None else y + bias.reshape(shape)
        return y.where(alive.reshape(shape), 0)  # a group without survivors divides zero by zero
