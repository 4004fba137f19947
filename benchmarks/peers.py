"""Other libraries as methods of a comparison: `method = "benchmarks.peers:torch_pruning"` in a recipe.

They prune the same weights to the same budget, by the same count of MACs, and are trained on as all others are.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune as torch_prune
from torch.utils.flop_counter import FlopCounterMode

from secateur import Budget
from secateur.cost.multiples import AUTO, HARDWARE, hardware_of

Data = Iterable[tuple[Tensor, Tensor]]

STEPS = 200
"""Steps in which Torch-Pruning goes from nothing to 95 % of the channels; it stops where the budget is met."""


def torch_pruning(
    model: nn.Module,
    inputs: Tensor,
    budget: Budget,
    *,
    importance: str = "group-norm",
    data: Data | None = None,
    every: int = 10,
    round_to: int | str | None = None,
) -> nn.Module:
    """Torch-Pruning, global: step by step to the widths that first meet the budget.

    Args:
        importance: "group-norm", norms over all layers of a group, its default; "first-l2", of each group's first
            layer alone; "taylor", first order.
        data: for "taylor".
        every: steps between two measurements of the gradients; in between they are cut with the weights.
        round_to: widths are multiples of this; "auto": of what the hardware likes.
    """
    import torch_pruning as tp

    importances = {
        "first-l2": tp.importance.MagnitudeImportance(p=2, group_reduction="first"),
        "group-norm": tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance(),
    }
    pruner_type = tp.pruner.GroupNormPruner if importance == "group-norm" else tp.pruner.BasePruner
    outputs = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    if round_to == AUTO:
        round_to = HARDWARE[hardware_of(model)].multiple
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own use of torch
        pruner = pruner_type(
            model, inputs, importances[importance], global_pruning=True, pruning_ratio=0.95, iterative_steps=STEPS,
            ignored_layers=outputs, round_to=round_to, num_heads=heads_of(model),
        )  # fmt: skip
        dense = {name: count(model, inputs) for name, count in COUNTS.items()}
        limits = budget.limits(dense)
        while any(COUNTS[name](model, inputs) > limit for name, limit in limits.items()):
            if importance == "taylor" and pruner.current_step % every == 0:
                model.zero_grad()
                for x, y in data or ():
                    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            before = COUNTS["params"](model, inputs)
            pruner.step()
            follow_(model)
            if pruner.current_step >= STEPS and COUNTS["params"](model, inputs) == before:
                raise RuntimeError(
                    f"Torch-Pruning removes no more, and the budget {budget.bounds} is not met"
                )
    model.zero_grad()
    return model


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """How many heads each attention layer has, which Torch-Pruning has to be told."""
    return {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}


def follow_(model: nn.Module) -> None:
    """Set the number in which torchvision's ViT keeps its width: Torch-Pruning leaves that to its user."""
    if hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels


def torch_global_magnitude(model: nn.Module, inputs: Tensor, budget: Budget) -> nn.Module:
    """`torch.nn.utils.prune`, the smallest weights of all layers to zero, and held there while the model is trained.

    The share that stays is the budget's, whatever it bounds: nothing is cut, so MACs stay.
    """
    layers = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    share = min(budget.bounds.values())
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=1 - share)
    for layer, name in layers:
        torch_prune.remove(layer, name)  # type: ignore[no-untyped-call]
        layer.weight.register_hook(  # type: ignore[no-untyped-call]
            _holding(layer.weight.detach() != 0)
        )
    return model


def _holding(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * mask.to(gradient)


def macs(model: nn.Module, inputs: Tensor) -> int:
    """Multiply-adds for one image, by torch's own counter."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # what is fused, layers or attention, is not counted
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops()) // 2 // len(inputs)


COUNTS: dict[str, Callable[[nn.Module, Any], int]] = {
    "macs": macs,
    "params": lambda model, _: sum(p.numel() for p in model.parameters()),
}
