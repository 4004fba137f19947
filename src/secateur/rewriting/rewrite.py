"""Modules whose forward is replaced by a program, because their own cannot express the widths of a cut.

A rewritten module keeps everything of the original: parameters, buffers, submodules, attributes, hooks, and
its class as a base. Only `forward` is another.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, fx, nn

from secateur.errors import CutError
from secateur.graph.labels import Value
from secateur.graph.operators import Shape
from secateur.graph.trace import Survivors, Trace
from secateur.rewriting.calls import entries_in
from secateur.rewriting.listing import Listing, as_op, cut_step, is_call, list_operators
from secateur.rewriting.program import ANYTHING, NAMES, Given, Made, Named, Program, Ref
from secateur.rewriting.without import sums_of, without

CONSTANT = "rewritten_constant_"
"""Prefix of the buffers that hold the tensors a rewritten forward reads and that had no name."""


class Rewritten(nn.Module):
    """A module that runs a program in place of its class's forward; see `rewrite_`."""

    program: Program
    others: tuple[Program, ...] = ()
    """What it runs for calls with other arguments, such as a mask."""
    lost: str
    """What the original forward does and this one does not, in words."""
    tied: str
    """What image sizes it takes, where the original took more, and why, in words."""
    own_forward: Callable[..., Any] | None
    """The forward that the instance had in place of its class's."""
    owners: dict[str, type[nn.Module]]
    """Submodules whose tensors the program reads itself, and their classes."""
    stands_in: tuple[str, ...] = ()
    """Other methods that did what the original forward does, and run the program too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original forward computes, at other widths."""
        for name, cls in self.owners.items():
            found = self.get_submodule(name)
            if original_class(found) is not cls:
                raise CutError(
                    f"{type(self).__name__}: its forward was rewritten for a cut and reads the tensors of {name!r} "
                    f"itself, so that a {type(found).__name__} in the place of the {cls.__name__} would do nothing. "
                    f"Replace this layer before the cut."
                )
        return run_program(self, (self.program, *self.others), args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (original_class(self),), self.__dict__


def run_program(module: nn.Module, programs: Sequence[Program], args: Any, kwargs: Any) -> Any:
    """What the first program that was written for such arguments computes with the tensors of `module`."""
    program, inputs, numbers = fitting(programs, module, args, kwargs)
    if taken := program.exceeded(inputs):
        raise CutError(
            f"{type(module).__name__}: its forward was rewritten for a cut, and now takes {taken} only; got "
            f"{' and '.join(' × '.join(map(str, x.shape)) for x in inputs)}. Analyse and cut the model at the size "
            f"it is to be used with."
        )
    tensors = [tensor_named(module, name) for name in program.tensors]
    return program.run(inputs, tensors, module, numbers=numbers)


def fitting(
    programs: Sequence[Program], module: nn.Module, args: Any, kwargs: Any
) -> tuple[Program, list[Tensor], dict[int, int]]:
    """The first program that was written for such arguments, and what it reads from them.

    Raises:
        CutError: there is none; the message is that of the first.
    """
    for program in programs:
        with suppress(CutError):
            inputs, numbers = inputs_of(program, module, args, kwargs)
            if program.takes(inputs):
                return program, inputs, numbers
    return programs[0], *inputs_of(programs[0], module, args, kwargs)


def inputs_of(
    program: Program, module: nn.Module, args: Any, kwargs: Any
) -> tuple[list[Tensor], dict[int, int]]:
    """The tensors and the numbers that a program reads from a call.

    Raises:
        CutError: the other arguments are not those it was written for.
    """
    inputs: list[Tensor] = [None] * program.inputs  # type: ignore[list-item]
    numbers: dict[int, int] = {}
    given = arguments_of(module, args, kwargs).arguments
    _collect(program.arguments, given, inputs, numbers, type(module).__name__)
    return inputs, numbers


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was rewritten."""
    return type(module).__mro__[2] if isinstance(module, Rewritten) else type(module)


_CLASSES: dict[type[nn.Module], type[Rewritten]] = {}


def rewritten_class(cls: type[nn.Module]) -> type[Rewritten]:
    """The class of rewritten modules of one class."""
    if cls not in _CLASSES:

        @functools.wraps(cls.forward)
        def forward(self: Rewritten, *args: Any, **kwargs: Any) -> Any:
            return Rewritten.forward(self, *args, **kwargs)

        namespace = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
        namespace |= {name: _other(name, getattr(cls, name)) for name in other_forwards(cls)}
        _CLASSES[cls] = type(f"Rewritten{cls.__name__}", (Rewritten, cls), namespace)
    return _CLASSES[cls]


def _other(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(self: Rewritten, *args: Any, **kwargs: Any) -> Any:
        return (
            Rewritten.forward(self, *args, **kwargs) if name in self.stands_in else own(self, *args, **kwargs)
        )

    return method


def other_forwards(cls: type[nn.Module]) -> list[str]:
    """Methods of a class that take what forward takes and are named like it, such as `forward_split`."""
    taken = len(inspect.signature(cls.forward).parameters)
    named = [
        name for name in dir(cls) if name.startswith("forward_") and inspect.isfunction(getattr(cls, name))
    ]
    return [name for name in named if len(inspect.signature(getattr(cls, name)).parameters) == taken]


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    made = rewritten_class(cls)
    return made.__new__(made)


def rewrite_(
    module: nn.Module,
    programs: Sequence[Program],
    constants: Mapping[str, Tensor],
    lost: str = "",
    tied: str = "",
) -> Callable[[], None]:
    """Let a module run programs instead of its own forward.

    Args:
        module: keeps its tensors, submodules, attributes and hooks.
        programs: what it runs, the others for calls with other arguments than the first.
        constants: tensors that they read and that become buffers, outside of the state dict.
        lost: what the first leaves out, in words.
        tied: what image sizes it takes and why no others, in words.
    Returns:
        takes the change back.
    """
    before = (
        dict(module.__dict__),
        type(module),
        dict(module._buffers),
        set(module._non_persistent_buffers_set),
    )

    def undo() -> None:
        module.__class__ = before[1]
        module.__dict__.clear()
        module.__dict__.update(before[0])
        module._buffers, module._non_persistent_buffers_set = before[2], before[3]

    for name, tensor in constants.items():
        module.register_buffer(name, tensor, persistent=False)
    module.__class__ = rewritten_class(original_class(module))
    module.program, module.lost, module.tied = programs[0], lost, tied  # type: ignore[assignment]
    module.others = tuple(programs[1:])  # type: ignore[assignment]
    names = {name.rpartition(".")[0] for program in programs for name in program.tensors} - {""}
    module.owners = {n: original_class(module.get_submodule(n)) for n in sorted(names)}  # type: ignore[assignment]
    module.own_forward = module.__dict__.pop("forward", module.__dict__.get("own_forward"))
    return undo


def rewritten_modules(model: nn.Module) -> dict[str, Rewritten]:
    """Name -> module, for all that were rewritten."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Rewritten)}


def arguments_of(module: nn.Module, args: Any, kwargs: Any) -> inspect.BoundArguments:
    """The arguments of a call of `module` by name, those at their default included."""
    forward = module.__dict__.get("own_forward") or module.forward
    bound = inspect.signature(forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def tensor_named(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    result: Tensor | None = owner._parameters.get(last)
    if result is None:
        result = owner._buffers.get(last)
    if result is None:
        raise CutError(
            f"{type(module).__name__}: its forward was rewritten for a cut and reads {name!r} itself, which is no "
            f"parameter or buffer any more. Change this layer before the cut."
        )
    return result


def _collect(pattern: Any, given: Any, inputs: list[Tensor], numbers: dict[int, int], where: str) -> None:
    """Find the tensors and numbers of a call; everything else must be as it was when the module was rewritten."""
    if isinstance(pattern, Ref) and isinstance(given, Tensor):
        if inputs[pattern.index] is None or inputs[pattern.index] is given:
            inputs[pattern.index] = given
            return
        pattern = "one tensor in several places"
    elif isinstance(pattern, Given) and isinstance(given, int) and not isinstance(given, bool):
        numbers[pattern.index] = given
        return
    elif isinstance(pattern, dict) and isinstance(given, Mapping) and pattern.keys() == given.keys():
        for name, part in pattern.items():
            _collect(part, given[name], inputs, numbers, where)
        return
    elif isinstance(pattern, list | tuple) and isinstance(given, list | tuple) and len(pattern) == len(given):
        for part, one in zip(pattern, given, strict=True):
            _collect(part, one, inputs, numbers, where)
        return
    elif isinstance(pattern, Made) and type(given) is pattern.cls:
        entries = entries_in(given) or {}
        _collect(dict(pattern.entries), {n: entries.get(n) for n in pattern.entries}, inputs, numbers, where)
        return
    elif pattern == ANYTHING or (type(pattern) is type(given) and pattern == given):
        return
    raise CutError(
        f"{where}: its forward was rewritten for a cut, for other arguments: expected {_words(pattern)}, got "
        f"{_words(given)}. Analyse and cut the model with the inputs it is to be used with."
    )


def _words(x: Any) -> str:
    if isinstance(x, Given):
        return "a number"
    return "a tensor" if isinstance(x, Tensor | Ref) else repr(x)[:60]


# --- one program for the whole graph, at fixed sizes -------------------------------------------------------


def cut_listing(trace: Trace, survivors: Survivors) -> tuple[Listing, list[tuple[Shape, ...]]]:
    """The captured graph as a cut leaves it, and the shapes of every step's results."""
    lines = list_operators(trace.captured)
    lines, _ = without(lines, sums_of(lines, survivors.skipped))
    return lines, cut_steps(lines, trace.values, survivors)


def fixed_program(lines: Listing, *, named: bool = False) -> Program:
    """A captured graph as a program for the sizes it was captured at.

    Args:
        lines: of the graph.
        named: the precisions that forward names stay; else they become that of the tensors.
    """
    for step in lines.steps if not named else ():
        step.args = _widen(step.args)
    ops = tuple(as_op(step) for step in lines.steps)
    return Program(None, len(lines.inputs), tuple(lines.names), ops, lines.output)


def tensors_of(lines: Listing, named: Mapping[str, Tensor], *, own: bool = False) -> list[Tensor]:
    """What a fixed program reads: named tensors, and the graph's constants in their precision, or in its own."""
    like = next((t for t in named.values() if t.is_floating_point()), None)

    def constant(t: Tensor) -> Tensor:
        return (
            t
            if like is None
            else t.to(like.device, like.dtype if t.is_floating_point() and not own else None)
        )

    constants = lines.captured.constants
    return [named[name] if name in named else constant(constants[name]) for name in lines.names]


def cut_steps(lines: Listing, values: Mapping[fx.Node, Any], survivors: Survivors) -> list[tuple[Shape, ...]]:
    """Let every operator follow a cut; returns the shapes of their results."""

    def value_of(ref: Ref) -> Value | None:
        value = values.get(lines.nodes[ref.index])
        return value if isinstance(value, Value) else None

    steps = [step for step in lines.steps if not is_call(step)]
    return [cut_step(step, value_of, values.get(step.node), survivors) for step in steps]


def _widen(arg: Any) -> Any:
    if isinstance(arg, Named) and arg.kind == "dtype" and NAMES["dtype"][arg.name].is_floating_point:
        return Named("dtype", "same")
    if isinstance(arg, list):
        return [_widen(part) for part in arg]
    if isinstance(arg, dict):
        return {name: _widen(part) for name, part in arg.items()}
    return arg
