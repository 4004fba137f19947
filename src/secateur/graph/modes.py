"""Where a model is, and modes and random numbers that are given back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """After the block, every module is in training or evaluation mode as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model is in evaluation mode; afterwards every module is in its own again."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def default_precision(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, what a forward makes without naming a precision (`torch.zeros(n)`) is of this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def chance_kept() -> Iterator[None]:
    """After the block, the global random generators of PyTorch (CPU), Python and NumPy are as before."""
    plain, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what forwards draw from
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)  # noqa: NPY002


def chance() -> object:
    """The state of the global random generators of Python and NumPy, to be compared with another."""
    _, keys, *more = np.random.get_state()  # noqa: NPY002
    return random.getstate(), keys.tobytes(), more  # type: ignore[attr-defined]


def forget_kept(model: nn.Module) -> None:
    """Let modules drop the tensors that they keep from call to call in evaluation mode, as their own `train` does."""
    with modes_kept(model):
        for module in model.modules():
            containers = [
                x for name, x in vars(module).items() if name[0] != "_" and isinstance(x, dict | list)
            ]
            if type(module).train is not nn.Module.train and any(
                isinstance(x, torch.Tensor) for x in pytree.tree_leaves(containers)
            ):
                module.train()


def device_of(model: nn.Module) -> torch.device:
    """The device of the first tensor; the CPU, if there is none."""
    return next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))


@contextmanager
def few_channels_planar(model: nn.Module) -> Iterator[None]:
    """Inside the block, strided 1 × 1 convolutions of fewer than 8 channels read n c h w on a processor with AVX2.

    In n h w c the gradient of their weights is written outside of its memory there (PyTorch 2.14), and the process
    crashes. So whoever takes gradients of weights does it in here. Afterwards weights have the layout that they had.
    """
    able = torch.backends.cpu.get_cpu_capability() == "AVX2"
    strided = [m for m in model.modules() if able and isinstance(m, nn.Conv2d) and max(m.stride) > 1]
    others = [layer for layer in strided if layer.weight.stride(-1) != 1]
    handles = [layer.register_forward_pre_hook(_planar) for layer in strided]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in others:
            if layer.weight.stride(-1) == 1:
                layer.weight.data = layer.weight.data.clone(memory_format=torch.channels_last)


def _planar(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    if not isinstance(layer, nn.Conv2d) or layer.in_channels >= 8 or max(layer.kernel_size) > 1:
        return None
    if not args or args[0].device.type != "cpu":
        return None
    weight = layer.weight
    if weight.stride(-1) != 1:  # either of the two decides the layout
        weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    return (args[0].contiguous(), *args[1:])
