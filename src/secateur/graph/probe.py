"""Random images and random weights that hide nothing, and how far two sets of outputs are apart."""

import functools
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.graph import Graph, named_tensors
from secateur.graph.capture import BATCH, Inputs, as_call, with_images
from secateur.graph.guard import opened
from secateur.graph.modes import chance_kept, device_of, evaluating

STATISTICS = ("running_mean", "running_var")
"""Buffers that normalisation layers learn."""


def probe_inputs(graph: Graph) -> Inputs:
    """The example inputs at the batch size of the captured graph."""
    if graph.trace is None:
        return with_images(graph.given, BATCH)
    captured = graph.trace.captured
    return captured.batching.resized(graph.given, captured.batch)


def random_inputs(graph: Graph, dtype: torch.dtype, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two random images (normal) of the shape of the example inputs; integer inputs as they are."""
    generator = torch.Generator().manual_seed(seed)

    def random(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, dtype)

    args, kwargs = as_call(probe_inputs(graph))
    return pytree.tree_map(random, args), pytree.tree_map(random, kwargs)


def randomise_(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and batch-norm statistic values that hide nothing; shapes and modes stay."""
    values = random_values(model, seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if name in values:
                t.copy_(values[name])
    return model


def random_values(model: nn.Module, seed: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Name -> values for every floating-point parameter and buffer, tied ones once.

    Parameters and batch-norm statistics are random; other buffers (a table, a mask, the mean of the images) are
    part of the method and keep theirs.

    Args:
        model: gives names, shapes and devices; meta tensors get values on the CPU.
        seed: of the values.
        dtype: of the values; default: that of each tensor.
    """
    noise_of = Noise(seed)
    values = {}
    constants = {name for name, _ in model.named_buffers() if not name.endswith(STATISTICS)}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if not t.is_floating_point():
            continue
        if name in constants and not t.is_meta:
            values[name] = t.detach().to(dtype or t.dtype, copy=True)  # a forward may write to it
            continue
        noise = noise_of.take(t.shape, dtype or t.dtype)
        if t.ndim > 1:
            noise *= (2 / max(1, t.shape[1:].numel())) ** 0.5
        elif name.endswith("running_var") or name.endswith("weight"):
            noise = 1 + 0.5 * noise.tanh()
        else:
            noise *= 0.3
        values[name] = noise.to("cpu" if t.is_meta else t.device)
    return values


class Noise:
    """Normal numbers for any number of tensors, much faster than from a generator.

    They are taken from one table, over and over. Its length is a prime, so that no two rows of a tensor are equal, and
    no two tensors of a network either.
    """

    LENGTH = 1_048_573

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._next = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next numbers."""
        table = _table(self._seed, dtype)
        count, parts = math.prod(shape), []
        while count:
            parts.append(table[self._next : self._next + count])
            count -= len(parts[-1])
            self._next = (self._next + len(parts[-1])) % self.LENGTH
        return torch.cat(parts).reshape(shape) if parts else torch.zeros(shape, dtype=dtype)


@functools.lru_cache(maxsize=4)
def _table(seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(Noise.LENGTH, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def fit_norms_(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give batch norms the statistics of one pass, so that activations do not grow from layer to layer.

    Grown ones saturate what could tell two networks apart, or amplify rounding until equal networks differ.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_var is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    # torch refuses statistics of a single value; the norms before it have theirs by then
    with evaluating(model), chance_kept(), suppress(ValueError):
        for norm in norms:
            norm.training, norm.momentum = True, 1.0
        model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None:
            norm.running_var.clamp_(min=0.1)


def aliases(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values under every name that their tensor has; what has no value is as in the model."""
    first = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    return {name: values.get(first[id(t)], t) for name, t in named_tensors(model)}


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors among what a model returns."""
    leaves = pytree.tree_leaves(opened(output))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim]


def difference(reference: Sequence[Tensor], result: Sequence[Tensor]) -> tuple[float, float]:
    """Largest absolute and relative difference; infinite where shapes differ or a value is not finite.

    Infinities in the same places, such as those of a mask, are equal; a tensor of nothing else shows nothing.
    """
    nested = any(t.is_nested for t in (*reference, *result))
    if nested or [t.shape for t in reference] != [t.shape for t in result]:
        return float("inf"), float("inf")
    error = scale = 0.0
    for a, b in zip(reference, result, strict=True):
        if not a.numel():
            continue
        apart = (a - b).abs().max().item()
        if not math.isfinite(apart):
            finite = torch.isfinite(a) & torch.isfinite(b)
            if not finite.any() or not torch.equal(a[~finite], b[~finite]):
                return float("inf"), float("inf")
            a, b = a[finite], b[finite]
            apart = (a - b).abs().max().item()
        error, scale = max(error, apart), max(scale, a.abs().max().item())
    return error, error / scale if scale else error


def run_once(model: nn.Module, inputs: Inputs) -> Any:
    """One evaluation-mode forward pass that leaves modes and random numbers as they were."""
    device = device_of(model)
    args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, as_call(inputs))
    with evaluating(model), torch.no_grad(), chance_kept():
        return model(*args, **kwargs)
