"""What keeps a capture honest: models it cannot read are refused by name, and nothing in a model changes."""

import contextlib
import dataclasses
import functools
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from secateur.errors import CaptureError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

NOISY = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._subclasses.fake_tensor")
"""Loggers that print what failed in a capture or a trial; the error that is raised says what matters."""

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
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise CaptureError(
                f"{place}: is wrapped in {type(module).__name__}; prune its .module and wrap the result again"
            )
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
    """Keep the exporter's remarks about its own internals off the screen, and keep it from reading lines of code."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    traces = getattr(torch.fx.config, "do_not_emit_stack_traces", None)
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        if traces is not None:  # a sixth of the time of a capture
            torch.fx.config.do_not_emit_stack_traces = True
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if traces is not None:
            torch.fx.config.do_not_emit_stack_traces = traces


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """A function that takes the modules that `torch.compile` made for those they were made from, and compiles none."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        models = [x for x in (*args, *kwargs.values()) if isinstance(x, nn.Module)]
        if not any(map(is_compiled, models)):
            return function(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            given = {name: original(value) for name, value in kwargs.items()}
            return function(*map(original, args), **given)  # type: ignore[arg-type]

    return call


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` would compile any part of a model when it runs."""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def original(x: T) -> T:
    """The module that `torch.compile` was given, where it made this one; anything else as it is."""
    while isinstance(x, nn.Module) and "_orig_mod" in x._modules:
        x = x._modules["_orig_mod"]  # type: ignore[assignment]
    return x


@contextmanager
def written_out() -> Iterator[None]:
    """Inside, torch's transformer layers run as single operators, as in training, and not as one fused kernel.

    Nor do they look at the values of a mask to find out whether it is causal; they add it as it is.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    layers, name = nn.modules.transformer, "_detect_is_causal_mask"
    looks = getattr(layers, name, None)
    torch.backends.mha.set_fastpath_enabled(False)
    if looks is not None:
        setattr(layers, name, lambda mask, is_causal=None, size=None: bool(is_causal))
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        if looks is not None:
            setattr(layers, name, looks)


@contextmanager
def as_exported() -> Iterator[None]:
    """Inside, forwards that ask whether they are being exported are told so, and do what they do in a capture."""
    flags = [name for name in ("_is_compiling_flag", "_is_exporting_flag") if hasattr(torch.compiler, name)]
    before = {name: getattr(torch.compiler, name) for name in flags}
    try:
        for name in flags:
            setattr(torch.compiler, name, True)
        yield
    finally:
        for name, flag in before.items():
            setattr(torch.compiler, name, flag)


@contextmanager
def plain_outputs(model: nn.Module) -> Iterator[None]:
    """Inside, the model returns dicts in place of dataclasses, which the exporter knows only if registered."""
    handle = model.register_forward_hook(lambda module, args, output: plain(output))
    try:
        yield
    finally:
        handle.remove()


def plain(output: Any) -> Any:
    """The output of a model with its dataclasses as dicts.

    Raises:
        CaptureError: it holds an object whose tensors cannot be found.
    """
    output = opened(output)
    for leaf in pytree.tree_leaves(output):
        if leaf is not None and not isinstance(leaf, PLAIN):
            raise CaptureError(
                f"the model returns an object of class {type(leaf).__name__}, whose tensors cannot be found; return "
                f"tensors in tuples, lists, dicts or dataclasses, or wrap the model in a module that does"
            )
    return output


def opened(tree: Any) -> Any:
    """The same tree of containers with a dict in the place of every dataclass that is a leaf."""

    def leaf(x: Any) -> Any:
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return opened({field.name: getattr(x, field.name) for field in dataclasses.fields(x)})
        return x

    return pytree.tree_map(leaf, tree)


def check_deterministic(graph: fx.GraphModule) -> None:
    """Raise CaptureError if an evaluation-mode graph draws random numbers that it uses."""
    for node in graph.graph.nodes:
        target = node.target
        if not (isinstance(target, torch._ops.OpOverload) and node.users):
            continue
        if torch.Tag.nondeterministic_seeded in target.tags and _draws(node, target):
            raise CaptureError(
                f"{_place(node)}: its forward is random in evaluation mode ({target}), so that no cut "
                f"could be compared with the original; let it draw only if self.training"
            )


def unknown_size(graph: fx.GraphModule) -> str:
    """The module and the operator that return a tensor whose size is no number; "" if none does."""
    for node in graph.graph.nodes:
        for x in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(x, Tensor) and not all(isinstance(size, int) for size in x.shape):
                return f"{_place(node)} ({node.target})"
    return ""


def _place(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
    return stack[-1][0] or "the model"


def _draws(node: fx.Node, op: torch._ops.OpOverload) -> bool:
    """Whether an operator that can draw random numbers does so with these arguments."""
    values = {argument.name: argument.default_value for argument in op._schema.arguments}
    values |= dict(zip(values, node.args, strict=False)) | node.kwargs
    if not values.get("train", values.get("training", True)):
        return False
    return values.get("dropout_p", values.get("p")) != 0


def culprit(model: nn.Module, error: BaseException) -> str:
    """Name and class of the innermost module in whose forward an error was raised."""
    name = where_raised(model, error)
    found = model.get_submodule(name)
    return f"{name} ({type(found).__name__})" if name else type(found).__name__


def where_raised(model: nn.Module, error: BaseException) -> str:
    """Name of the innermost module in whose forward an error was raised; "" for the model itself."""
    names = {id(module): name for name, module in model.named_modules()}
    found, current = "", error.__traceback__
    while current is not None:
        owner = current.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = names.get(id(owner), found)
        current = current.tb_next
    return found


@contextmanager
def guarded(
    model: nn.Module, guard: Callable[..., Any], names: Collection[str] | None = None
) -> Iterator[None]:
    """Inside the block, every call of a submodule goes through `guard(name, module, own forward, args, kwargs)`.

    Args:
        model: whose submodules are meant.
        guard: what is called in their place.
        names: of the submodules; None: all.
    """
    modules = {name: module for name, module in model.named_modules() if names is None or name in names}
    before = {module: module.__dict__.get("forward") for module in modules.values()}
    try:
        for name, module in modules.items():

            def forward(
                *args: Any,
                name: str = name,
                module: nn.Module = module,
                own: Any = module.forward,
                **kwargs: Any,
            ) -> Any:
                return guard(name, module, own, args, kwargs)

            module.__dict__["forward"] = functools.wraps(module.forward)(forward)
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward")
            if own is not None:
                module.__dict__["forward"] = own
