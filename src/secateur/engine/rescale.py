"""The size of weights across a cut: behind a batch norm it changes no output, but how far a step turns them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@contextmanager
def norms_kept(
    model: nn.Module, norms: Mapping[str, str], optimizer: Optimizer | None = None, followers: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Around a cut: layers before batch norms end with the norm of weights that they had.

    A layer that loses inputs or outputs has smaller weights. The batch norm behind it makes up for that in what the
    network computes, but a step of the same size then turns the weights further, by (norm before / norm after)². Weights,
    biases and the statistics of the batch norm are scaled, momentum the other way, so that outputs stay as they are but
    for the norm's eps.

    Args:
        model: that is cut within.
        norms: layer -> the batch norm that alone reads it.
        optimizer: its momentum buffers (SGD) follow.
        followers: copies that are cut along; they are scaled by the model's factors.
    """
    before = {name: _size(model, name) for name in norms}
    yield
    for name, norm in norms.items():
        size = _size(model, name)
        if size in (0.0, before[name]):
            continue
        factor = before[name] / size
        for copy in (model, *followers):
            _scale_(copy.get_submodule(name), copy.get_submodule(norm), factor)
        for p in model.get_submodule(name).parameters():
            momentum = optimizer.state.get(p, {}).get("momentum_buffer") if optimizer is not None else None
            if momentum is not None:
                momentum.div_(factor)


def _size(model: nn.Module, name: str) -> float:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))


@torch.no_grad()
def _scale_(layer: nn.Module, norm: nn.Module, factor: float) -> None:
    for p in layer.parameters():
        p.mul_(factor)
    if isinstance(norm.running_mean, Tensor) and isinstance(norm.running_var, Tensor):
        norm.running_mean.mul_(factor)
        norm.running_var.mul_(factor**2)
