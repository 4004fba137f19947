"""Where a model is, and modes that are given back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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


def device_of(model: nn.Module) -> torch.device:
    """The device of the first tensor; the CPU, if there is none."""
    return next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
