"""Copies of models, made without touching them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.errors import CutError, first_line


class _WithoutHistory(TorchFunctionMode):
    """Inside, a deep copy of a tensor that has a history is one that has none, wherever the tensor is kept."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **kwargs or {})


def duplicate(model: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy; tensors that a forward left behind as attributes lose their history.

    Args:
        model: any module.
        share: the copy's parameters refer to the contents of the model's as they are now.
    Raises:
        CutError: something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters() if share else []:  # not the buffers: a forward may write to them
        memo[id(parameter)] = type(parameter)(parameter.detach(), parameter.requires_grad)
    try:
        with _WithoutHistory():
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise CutError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}); remove what cannot be copied "
            f"from its attributes"
        ) from error


def converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose floating-point tensors have a precision; every tensor is copied once.

    Raises:
        CutError: something in the model cannot be copied.
    """

    def convert(t: Tensor) -> Tensor:
        return t.to(dtype, copy=True) if t.is_floating_point() else t.clone()

    copied = duplicate(model, share=True)
    copied._apply(convert)  # type: ignore[no-untyped-call]
    return copied


def cloned(tree: Any) -> Any:
    """The tree with a copy of every tensor; one that stands in several places stays one."""
    known: dict[int, Tensor] = {}
    return pytree.tree_map(lambda x: known.setdefault(id(x), x.clone()) if isinstance(x, Tensor) else x, tree)
