"""What keeps a capture honest: models it cannot read are refused by name, and nothing in a model changes."""

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from secateur.errors import CaptureError

NOISY = ("torch.fx.experimental.symbolic_shapes", "torch.export")
"""Loggers that print the graph of a failed capture; the error that is raised says what matters."""

PLAIN = (Tensor, bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)
"""What an output may hold besides containers."""


def check_readable(model: nn.Module) -> None:
    """Raise CaptureError for what is not a plain module with tensors of its own."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
    for name, module in model.named_modules():
        place = name or type(model).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(f"{place}: is compiled by TorchScript; pass the module it was made from")
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise CaptureError(f"{place}: {type(module).__name__} is quantised; prune before quantisation")
        for local, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if is_lazy(tensor):
                raise CaptureError(
                    f"{place}: {local} of this {type(module).__name__} has no shape yet; run the model once first"
                )
            if tensor.is_inference():
                raise CaptureError(
                    f"{place}: {local} was made under torch.inference_mode(), where nothing can be traced; "
                    f"build the model outside it"
                )


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, also those that hooks and forwards set or fill in between."""
    before = []
    for module in model.modules():
        attributes = dict(vars(module))
        containers = [(x, x.copy()) for x in attributes.values() if isinstance(x, dict | list | set)]
        before.append((module, attributes, containers))
    try:
        yield
    finally:
        for module, attributes, containers in before:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in containers:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's remarks about its own internals off the screen."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Inside, the model returns dicts in place of dataclasses, which the exporter knows only if registered."""
    handle = model.register_forward_hook(lambda module, args, output: opened(output))
    try:
        yield
    finally:
        handle.remove()


def opened(output: Any) -> Any:
    """An output with its dataclasses as dicts.

    Raises:
        CaptureError: it holds an object whose tensors cannot be found.
    """

    def leaf(x: Any) -> Any:
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return opened({field.name: getattr(x, field.name) for field in dataclasses.fields(x)})
        if x is None or isinstance(x, PLAIN):
            return x
        raise CaptureError(
            f"the model returns an object of class {type(x).__name__}, whose tensors cannot be found; return tensors "
            f"in tuples, lists, dicts or dataclasses, or wrap the model in a module that does"
        )

    return pytree.tree_map(leaf, output)


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output, without single numbers."""
    leaves = pytree.tree_leaves(opened(output))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim]


def culprit(model: nn.Module, error: BaseException) -> str:
    """Name and class of the innermost module in whose forward an error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found, current = model, error.__traceback__
    while current is not None:
        owner = current.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = owner
        current = current.tb_next
    name = names[id(found)]
    return f"{name} ({type(found).__name__})" if name else type(found).__name__
