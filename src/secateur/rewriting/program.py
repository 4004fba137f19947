"""A forward pass as data: a list of ATen operators and of calls of submodules that can be run, saved and checked.

A program knows no Python of the model it came from. What it reads by name are parameters and buffers of the
module that runs it; what it calls are submodules of that module, and operators that the table of operators allows;
its numbers are literals, or arithmetic of sizes.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.operators import OPERATORS

TENSORS = ("Tensor", "List[Tensor]")
"""Types of what a program's operators return."""

LARGEST = 2**31
"""Largest number a program may hold, in absolute value."""

LARGEST_TENSOR = 2**28
"""Most elements that a list of literal sizes may ask for."""

LONGEST = 100_000
"""Most operators a program may have."""

NAMES: Mapping[str, Mapping[str, Any]] = {
    "dtype": {
        str(dtype).removeprefix("torch."): dtype
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        )
    },
    "memory_format": {
        str(form).removeprefix("torch."): form
        for form in (torch.contiguous_format, torch.channels_last, torch.preserve_format)
    },
    "layout": {"strided": torch.strided},
}


@dataclass(frozen=True)
class Ref:
    """What a register holds: first come the inputs, then the tensors, then each operator's result."""

    index: int


@dataclass(frozen=True)
class Given:
    """In place of an argument that is a number: it is the one of this index."""

    index: int


@dataclass(frozen=True)
class Dim:
    """The size of one dim of what a register holds; register -1: the number given as an argument, by its index."""

    register: int
    dim: int


@dataclass(frozen=True)
class Size:
    """Arithmetic of whole numbers: `op` is one of + * // and %."""

    op: str
    left: "Number"
    right: "Number"


Number = int | Dim | Size
ARITHMETIC: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}

Limit = tuple[int, int] | None
"""Least and most that a size may be; None: anything."""


@dataclass(frozen=True)
class Training:
    """One literal while the submodule of this name is in training mode, and another otherwise."""

    module: str
    yes: Any = True
    no: Any = False


@dataclass(frozen=True)
class Named:
    """A constant of torch by kind and name; the dtype and device "same" are those of the module's tensors."""

    kind: str
    name: str


DEVICE = Named("device", "same")
ANYTHING = Named("object", "any")
"""In place of an argument that the program does not depend on."""


@dataclass(frozen=True)
class Made:
    """An object that forward returns: an ordered dict, a named tuple or a dataclass, with its entries by name."""

    cls: type
    entries: Mapping[str, Any]

    def __call__(self, entries: Mapping[str, Any]) -> Any:
        """Such an object with other entries."""
        return self.cls(**entries) if entries_of(self.cls) else self.cls(entries)


@dataclass(frozen=True)
class Op:
    """One operator, such as "aten.relu.default", with its arguments; `getitem` takes one of several results."""

    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Call:
    """One call of a submodule, by its name."""

    module: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


Around = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""Runs one operator in place of the program: (its number, arguments, keyword arguments) -> its result."""


@dataclass(frozen=True)
class Program:
    """A forward pass.

    Attributes:
        arguments: the arguments of forward by name, with `Ref` in place of each tensor.
        inputs: how many tensors are among them.
        tensors: names of the parameters and buffers it reads.
        ops: the operators and calls, in order.
        output: what forward returns, with `Ref` in place of each tensor.
        limits: what the dims of each input may be; empty: not known.
        kinds: what each input holds, "bool", "int" or "float"; empty: not known.
    """

    arguments: Any
    inputs: int
    tensors: tuple[str, ...]
    ops: tuple[Op | Call, ...]
    output: Any
    limits: tuple[tuple[Limit, ...], ...] = ()
    kinds: tuple[str, ...] = ()

    @functools.cached_property
    def calls(self) -> frozenset[str]:
        """Names of the submodules it calls."""
        return frozenset(op.module for op in self.ops if isinstance(op, Call))

    def run(
        self,
        inputs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        module: nn.Module | None = None,
        around: Around | None = None,
        numbers: Mapping[int, int] = MappingProxyType({}),
    ) -> Any:
        """The output, for the tensors and numbers among the arguments, the tensors read by name, and the module."""
        *_, last = self.steps(inputs, tensors, module, around, numbers)
        return last

    def exceeded(self, inputs: Sequence[Tensor]) -> str:
        """What sizes the program takes, in words, if these inputs have others; "" if they fit."""
        for x, limits in zip(inputs, self.limits, strict=False):
            if x.ndim != len(limits) or any(
                limit and not limit[0] <= size <= limit[1]
                for size, limit in zip(x.shape, limits, strict=True)
            ):
                return sizes_in_words(limits)
        return ""

    def takes(self, inputs: Sequence[Tensor]) -> bool:
        """Whether these inputs hold what the program was written for."""
        return not self.kinds or self.kinds == tuple(map(kind_of, inputs))

    def steps(
        self,
        inputs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        module: nn.Module | None = None,
        around: Around | None = None,
        numbers: Mapping[int, int] = MappingProxyType({}),
    ) -> Iterator[Any]:
        """The result of each operator as soon as it is computed, and at the end the output."""
        registers: list[Any] = [*inputs, *tensors]
        like = next((t for t in (*tensors, *inputs) if t.is_floating_point()), None)
        resolve = functools.partial(_resolve, registers=registers, like=like, numbers=numbers, module=module)
        for number, op in enumerate(self.ops):
            args = tuple(resolve(arg) for arg in op.args)
            kwargs = {name: resolve(arg) for name, arg in op.kwargs}
            if isinstance(op, Call):
                assert module is not None
                result = module.get_submodule(op.module)(*args, **kwargs)
            elif around:
                result = around(number, args, kwargs)
            else:
                result = function_of(op.target)(*args, **kwargs)
            registers.append(result)
            for spent in self._spent[number]:
                registers[spent] = None
            yield result
        yield resolve(self.output)

    @functools.cached_property
    def _spent(self) -> list[list[int]]:
        """For every operator, the registers that nothing reads any more once it has run."""
        last = {index: number for number, op in enumerate(self.ops) for index in refs((op.args, op.kwargs))}
        kept = set(refs(self.output))
        spent: list[list[int]] = [[] for _ in self.ops]
        for index, number in last.items():
            if index not in kept:
                spent[number].append(index)
        return spent


def _resolve(
    arg: Any,
    *,
    registers: list[Any],
    like: Tensor | None,
    numbers: Mapping[int, int],
    module: nn.Module | None,
) -> Any:
    if isinstance(arg, Ref):
        return registers[arg.index]
    if isinstance(arg, Dim | Size):
        return value_of(arg, registers, numbers)
    if isinstance(arg, Training):
        return arg.yes if module is not None and module.get_submodule(arg.module).training else arg.no
    if isinstance(arg, Named):
        if arg.name == "same":
            return like.device if like is not None and arg.kind == "device" else getattr(like, arg.kind, None)
        return NAMES[arg.kind][arg.name]
    again = functools.partial(_resolve, registers=registers, like=like, numbers=numbers, module=module)
    if isinstance(arg, list | tuple):
        parts = [again(a) for a in arg]
        return parts if isinstance(arg, list) else tuple(parts)
    if isinstance(arg, dict):
        return {name: again(a) for name, a in arg.items()}
    if isinstance(arg, Made):
        return arg({name: again(a) for name, a in arg.entries.items()})
    return arg


def kind_of(x: Tensor) -> str:
    """What a tensor holds: "bool", "int" or "float"."""
    return "bool" if x.dtype is torch.bool else "float" if x.is_floating_point() else "int"


def entries_of(cls: type) -> tuple[str, ...]:
    """Names of the entries of a dataclass or named tuple; none for other classes."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls) if field.init)
    return tuple(getattr(cls, "_fields", ())) if issubclass(cls, tuple) else ()


def item(of: Any, key: Any) -> Any:
    """One of several results: of a tuple, a list, a dict, or by name of a dataclass."""
    return getattr(of, key) if isinstance(key, str) and key in entries_of(type(of)) else of[key]


def function_of(target: str) -> Callable[..., Any]:
    """The operator of a program's line; its name was checked when the program was written or read."""
    if target == "getitem":
        return item
    _, name, overload = target.split(".")
    return getattr(getattr(torch.ops.aten, name), overload)  # type: ignore[no-any-return]


def value_of(number: Number, registers: Sequence[Any], numbers: Mapping[int, int]) -> int:
    """What a number is for the tensors in the registers and the numbers among the arguments."""
    if isinstance(number, Dim):
        return numbers[number.dim] if number.register < 0 else registers[number.register].shape[number.dim]
    if isinstance(number, Size):
        left, right = (value_of(part, registers, numbers) for part in (number.left, number.right))
        return ARITHMETIC[number.op](left, right)
    return number


def sizes_in_words(limits: Sequence[Limit]) -> str:
    """What the dims of an input may be.

    >>> sizes_in_words([None, (3, 3), (7, 14), (7, LARGEST), (0, 7)])
    'any × 3 × 7…14 × 7 or more × at most 7'
    """
    words = []
    for limit in limits:
        least, most = limit or (0, LARGEST)
        if (least, most) == (0, LARGEST):
            words.append("any")
        elif least == most:
            words.append(str(least))
        elif most == LARGEST:
            words.append(f"{least} or more")
        else:
            words.append(f"{least}…{most}" if least else f"at most {most}")
    return " × ".join(words)


@functools.cache
def operator_named(target: str) -> Callable[..., Any]:
    """The operator of this name, if a program may call it.

    Raises:
        ValueError: it is not one that a program may call.

    >>> operator_named("aten.relu.default")(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    if target == "getitem":
        return item
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    if namespace != "aten" or name not in OPERATORS or not OPERATORS[name].program:
        raise ValueError(f"operator {target!r} is not one that a rewritten forward may call")
    packet = getattr(torch.ops.aten, name)
    if overload not in packet.overloads():
        raise ValueError(f"operator {target!r} does not exist")
    function: Callable[..., Any] = getattr(packet, overload)
    schema = function._schema  # type: ignore[attr-defined]
    if any(str(result.type) not in TENSORS for result in schema.returns):
        raise ValueError(f"operator {target!r} computes no tensors")  # but repeats a list 2³¹ times, for one
    if any(a.kwarg_only and a.alias_info and a.alias_info.is_write for a in schema.arguments):
        raise ValueError(f"operator {target!r} does not exist for programs: it writes into a given tensor")
    return function


def refs(arg: Any) -> list[int]:
    """The registers that an argument reads."""
    if isinstance(arg, Ref):
        return [arg.index]
    if isinstance(arg, Dim):
        return [arg.register] if arg.register >= 0 else []
    if isinstance(arg, Size):
        return [*refs(arg.left), *refs(arg.right)]
    if isinstance(arg, list | tuple):
        return [index for part in arg for index in refs(part)]
    if isinstance(arg, dict):
        return refs([arg[name] for name in sorted(arg)])
    return refs(dict(arg.entries)) if isinstance(arg, Made) else []
