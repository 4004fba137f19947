"""Programs as JSON, and back from a file that nobody vouches for.

Reading builds nothing but literals and the kinds of argument a program knows, and checks every name
against a list: operators, precisions, the module's own tensors and submodules, and classes of what it may return.
"""

import dataclasses
import math
import sys
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from secateur.rewriting.calls import leaves_of
from secateur.rewriting.program import (
    ANYTHING,
    ARITHMETIC,
    LARGEST,
    LARGEST_TENSOR,
    LONGEST,
    NAMES,
    Call,
    Dim,
    Given,
    Limit,
    Made,
    Named,
    Number,
    Op,
    Program,
    Ref,
    Size,
    Training,
    entries_of,
    operator_named,
)

DEEPEST = 16
"""Most levels of lists within lists."""

DEEPEST_SIZE = 8
"""Most levels of arithmetic in one number."""

KINDS = ("bool", "int", "float")
"""What an input may hold."""

MOST_DIMS, MOST_NUMBERS = 16, 64
"""Most dims of a tensor, and most numbers among the arguments."""


def to_json(program: Program) -> dict[str, Any]:
    """The program as plain JSON data."""
    return {
        "arguments": encode(program.arguments),
        "inputs": program.inputs,
        "tensors": list(program.tensors),
        "ops": [_line(op) for op in program.ops],
        "output": encode(program.output),
        "limits": [[limit and list(limit) for limit in limits] for limits in program.limits],
        **({"kinds": list(program.kinds)} if program.kinds else {}),
    }


def _line(op: Op | Call) -> Any:
    if isinstance(op, Call):
        return {"call": [op.module, encode(list(op.args)), encode(dict(op.kwargs))]}
    return [op.target, encode(list(op.args)), encode(dict(op.kwargs))]


def encode(arg: Any) -> Any:
    """One argument."""
    if isinstance(arg, Ref):
        return {"ref": arg.index}
    if isinstance(arg, Given):
        return {"given": arg.index}
    if isinstance(arg, Dim):
        return {"dim": [arg.register, arg.dim]}
    if isinstance(arg, Size):
        return {"size": [arg.op, encode(arg.left), encode(arg.right)]}
    if isinstance(arg, Training):
        return {"training": [arg.module, encode(arg.yes), encode(arg.no)]}
    if isinstance(arg, Named):
        return {"named": [arg.kind, arg.name]}
    if isinstance(arg, tuple):
        return {"tuple": [encode(part) for part in arg]}
    if isinstance(arg, list):
        return [encode(part) for part in arg]
    if isinstance(arg, dict):
        return {"dict": {name: encode(part) for name, part in arg.items()}}
    if isinstance(arg, Made):
        return {"made": [f"{arg.cls.__module__}:{arg.cls.__qualname__}", encode(dict(arg.entries))]}
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": str(arg)}
    return arg


class ProgramReader:
    """Reads a program for one module.

    Args:
        tensors: names of the parameters and buffers that the program may read.
        modules: names of the submodules that it may call and whose mode it may ask for; "", the module itself, is
            never called.
        packages: names of packages whose dataclasses and named tuples it may return.
    """

    def __init__(
        self, tensors: Collection[str], modules: Collection[str], packages: Collection[str] = ()
    ) -> None:
        self._tensors = set(tensors)
        self._modules = set(modules)
        self._packages = set(packages)

    def read(self, data: Any) -> Program:
        """The program.

        Raises:
            ValueError: the data is no program for this module; the message says why.
        """
        fields = {"arguments", "inputs", "tensors", "ops", "output"}
        if not isinstance(data, dict) or data.keys() - {"limits", "kinds"} != fields:
            raise ValueError(f"a program has exactly the fields {sorted(fields)}")
        inputs, names, ops = data["inputs"], data["tensors"], data["ops"]
        if type(inputs) is not int or not 0 <= inputs <= 1000:
            raise ValueError(f"inputs is {inputs!r}, expected a number in 0…1000")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("tensors must be a list of names")
        unknown = [name for name in names if name not in self._tensors]
        if unknown:
            raise ValueError(f"it reads tensors that the module does not have: {unknown[:3]}")
        if not isinstance(ops, list) or len(ops) > LONGEST:
            raise ValueError(f"ops must be a list of at most {LONGEST:,} operators")
        steps = []
        for number, op in enumerate(ops):
            steps.append(self._op(op, inputs, inputs + len(names) + number))
        return Program(
            arguments=self._arg(data["arguments"], inputs, inputs),
            inputs=inputs,
            tensors=tuple(names),
            ops=tuple(steps),
            output=self._arg(data["output"], inputs, inputs + len(names) + len(ops)),
            limits=self._limits(data.get("limits", []), inputs),
            kinds=self._kinds(data.get("kinds", []), inputs),
        )

    @staticmethod
    def _kinds(data: Any, inputs: int) -> tuple[str, ...]:
        if (
            not isinstance(data, list)
            or len(data) not in (0, inputs)
            or not all(kind in KINDS for kind in data)
        ):
            raise ValueError(f"kinds must be a list with one of {', '.join(KINDS)} for every input")
        return tuple(data)

    def _limits(self, data: Any, inputs: int) -> tuple[tuple[Limit, ...], ...]:
        if not isinstance(data, list) or len(data) not in (0, inputs):
            raise ValueError("limits must be a list with an entry for every input")
        found = []
        for limits in data:
            if not isinstance(limits, list) or len(limits) > MOST_DIMS:
                raise ValueError(f"limits of an input cannot be {str(limits)[:60]!r}")
            for limit in limits:
                if limit is not None and not (isinstance(limit, list) and len(limit) == 2):
                    raise ValueError(f"a limit is a least and a most size, found {str(limit)[:60]!r}")
            found.append(
                tuple(limit and (self._number(limit[0]), self._number(limit[1])) for limit in limits)
            )
        return tuple(found)

    def _op(self, data: Any, inputs: int, registers: int) -> Op | Call:
        if isinstance(data, dict) and data.keys() == {"call"}:
            return self._call(data["call"], inputs, registers)
        if not isinstance(data, list) or len(data) != 3 or not isinstance(data[0], str):
            raise ValueError(
                f"an operator is a name, arguments and keyword arguments; found {str(data)[:60]!r}"
            )
        target, *rest = data
        args, kwargs = (self._arg(part, inputs, registers) for part in rest)
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ValueError(f"{target}: arguments must be a list, keyword arguments a dict")
        schema = getattr(operator_named(target), "_schema", None)
        known = {argument.name for argument in schema.arguments} if schema else set()
        if kwargs.keys() - known or (len(args) > len(known) if schema else len(args) != 2):
            raise ValueError(f"{target}: takes other arguments")
        if not has_tensor(
            [args, kwargs]
        ):  # made of numbers alone, such as arange(n), or eye(n) of n² elements
            numbers = [bulk(part) for part in [*args, *kwargs.values()] if is_number(part)]
            self._check_sizes([max(numbers, default=0)] * (2 if target.startswith("aten.eye") else 1))
        return Op(target, tuple(args), tuple(kwargs.items()))

    def _call(self, data: Any, inputs: int, registers: int) -> Call:
        if not isinstance(data, list) or len(data) != 3 or not isinstance(data[0], str):
            raise ValueError(
                f"a call is a submodule, arguments and keyword arguments; found {str(data)[:60]!r}"
            )
        module, *rest = data
        if not module or module not in self._modules:
            raise ValueError(f"it calls {module[:60]!r}, which is no submodule of the module")
        args, kwargs = (self._arg(part, inputs, registers) for part in rest)
        if not isinstance(args, list) or not isinstance(kwargs, dict):
            raise ValueError(f"{module}: arguments must be a list, keyword arguments a dict")
        given = [leaf for _, leaf in leaves_of([args, kwargs])]
        if not all(leaf is None or isinstance(leaf, Ref | Dim | Size | bool | int | float) for leaf in given):
            raise ValueError(f"{module}: may be given tensors and numbers only")
        self._check_sizes([bulk(leaf) for leaf in given if is_number(leaf)])
        return Call(module, tuple(args), tuple(kwargs.items()))

    def _made(self, name: Any, data: Any, inputs: int, registers: int, depth: int) -> Made:
        """An object of a class that is there already and does nothing but hold what it is given."""
        entries = self._arg(data, inputs, registers, depth)
        if not isinstance(name, str) or not isinstance(entries, dict):
            raise ValueError(f"no object can be made of {str(name)[:60]!r}")
        if any(isinstance(leaf, str) for _, leaf in leaves_of(entries)):
            raise ValueError(f"an object of {name[:60]!r} may hold tensors and numbers only")
        module, _, qualified = name.partition(":")
        if name == "collections:OrderedDict":
            return Made(OrderedDict, entries)
        cls: Any = vars(sys.modules[module]).get(qualified) if module in sys.modules else None
        if not isinstance(cls, type) or module.partition(".")[0] not in self._packages:
            raise ValueError(f"{name[:60]!r} is no class of the package that the model is from")
        if not (dataclasses.is_dataclass(cls) or issubclass(cls, tuple)) or not {*entries} <= {
            *entries_of(cls)
        }:
            raise ValueError(
                f"{name[:60]!r} is no dataclass or named tuple with entries {sorted(entries)[:5]}"
            )
        return Made(cls, entries)

    def _arg(self, data: Any, inputs: int, registers: int, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise ValueError("an argument is nested too deeply")
        if data is None or isinstance(data, bool | float):
            return data
        if isinstance(data, int):
            return self._number(data)
        if isinstance(data, str):
            if len(data) > 100:
                raise ValueError(f"a text of {len(data)} letters")
            return data
        if isinstance(data, list):
            parts = [self._arg(part, inputs, registers, depth + 1) for part in data]
            if depth:  # not the arguments themselves
                self._check_sizes([bulk(part) for part in parts if is_number(part)])
            return parts
        if not isinstance(data, dict) or len(data) != 1:
            raise ValueError(f"an argument cannot be {str(data)[:60]!r}")
        kind, value = next(iter(data.items()))
        if kind == "ref" and type(value) is int and 0 <= value < registers:
            return Ref(value)
        if kind == "named" and isinstance(value, list) and len(value) == 2:
            return self._named(*value)
        if kind == "float" and value in ("inf", "-inf", "nan"):
            return float(value)
        if kind == "tuple" and isinstance(value, list):
            return tuple(self._arg(part, inputs, registers, depth + 1) for part in value)
        if kind == "made" and isinstance(value, list) and len(value) == 2:
            return self._made(value[0], value[1], inputs, registers, depth + 1)
        if kind == "dict" and isinstance(value, dict):
            return {name: self._arg(part, inputs, registers, depth + 1) for name, part in value.items()}
        if kind == "training" and isinstance(value, list) and len(value) == 3 and value[0] in self._modules:
            yes, no = (self._arg(part, inputs, registers, DEEPEST) for part in value[1:])
            return Training(value[0], yes, no)
        if kind == "given" and type(value) is int and 0 <= value < MOST_NUMBERS:
            return Given(value)
        if kind in ("dim", "size"):
            return self._size(data, inputs, registers)
        raise ValueError(f"an argument cannot be {str(data)[:60]!r}")

    @staticmethod
    def _check_sizes(sizes: list[int]) -> None:
        if math.prod(max(1, abs(size)) for size in sizes) > LARGEST_TENSOR:
            raise ValueError(f"sizes {sizes} are larger than any a vision network needs")

    @staticmethod
    def _number(value: Any) -> int:
        if type(value) is not int or (abs(value) > LARGEST and value != 2**63 - 1):
            raise ValueError(f"{value!r} is no number a program may hold")
        return value

    @staticmethod
    def _named(kind: Any, name: Any) -> Named:
        result = Named(str(kind), str(name))
        allowed = name in NAMES.get(result.kind, {}) or (
            result.kind in ("dtype", "device") and name == "same"
        )
        if not allowed and result != ANYTHING:
            raise ValueError(f"{result.kind} {result.name!r} is not known")
        return result

    def _size(self, data: Any, inputs: int, registers: int, depth: int = 0) -> Number:
        """A number, as literals, sizes and arithmetic."""
        if type(data) is int:
            return self._number(data)
        kind, value = next(iter(data.items())) if isinstance(data, dict) and len(data) == 1 else ("", None)
        if not isinstance(value, list) or depth > DEEPEST_SIZE:
            raise ValueError(f"a size cannot be {str(data)[:60]!r}")
        if kind == "dim" and len(value) == 2 and all(type(n) is int for n in value):
            if not -1 <= value[0] < registers or not 0 <= value[1] < (
                MOST_DIMS if value[0] >= 0 else MOST_NUMBERS
            ):
                raise ValueError(f"there is no dim {value}")
            return Dim(*value)
        if kind == "size" and len(value) == 3 and isinstance(value[2], list):
            return self._product(*value, inputs=inputs)
        if kind == "size" and len(value) == 3 and isinstance(value[0], str) and value[0] in ARITHMETIC:
            left, right = (self._size(part, inputs, registers, depth + 1) for part in value[1:])
            if value[0] in ("//", "%") and not (type(right) is int and right >= 1):
                raise ValueError("a size is divided by a positive number only")
            return Size(value[0], left, right)
        raise ValueError(f"a size cannot be {str(data)[:60]!r}")

    def _product(self, count: Any, per: Any, dims: list[Any], *, inputs: int) -> Number:
        """A number times some sizes of inputs, over a number: how files of version 0.1.0 have them."""
        if self._number(per) < 1 or not 1 <= len(dims) <= 4:
            raise ValueError("a size is a number times 1…4 dims, over a positive number")
        pairs = [{"dim": pair} for pair in dims]
        first, *rest = (self._size(pair, inputs, inputs) for pair in pairs)
        for dim in rest:
            first = Size("*", first, dim)
        return Size("//", Size("*", first, self._number(count)), per)


def is_number(x: Any) -> bool:
    """Whether this is a whole number, written out or as arithmetic."""
    return type(x) is int or isinstance(x, Dim | Size)


def bulk(number: Number) -> int:
    """How large a number is, at most, if all sizes were 1: what literals alone may ask for."""
    if isinstance(number, Dim):
        return 1
    if isinstance(number, Size):
        left, right = bulk(number.left), bulk(number.right)
        return left + right if number.op == "+" else left * right if number.op == "*" else left
    return abs(number)


def has_tensor(arg: Any) -> bool:
    """Whether an argument holds a tensor."""
    if isinstance(arg, list | tuple | dict):
        return any(map(has_tensor, arg.values() if isinstance(arg, dict) else arg))
    return isinstance(arg, Ref)
