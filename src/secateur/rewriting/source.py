"""A program as readable Python: a module of plain PyTorch layers that needs nothing of Secateur.

Layers of `torch.nn` are called, with their settings written out; all else of the forward pass is written between them.
"""

import ast
import inspect
import keyword
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.rewriting.calls import leaves_of
from secateur.rewriting.program import (
    ANYTHING,
    Call,
    Dim,
    Given,
    Made,
    Named,
    Op,
    Program,
    Ref,
    Size,
    Training,
    refs,
    sizes_in_words,
)

INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "matmul": "@"}
"""Operators that are written between two operands."""

FUNCTIONS = {
    **dict.fromkeys(
        "abs amax amin arange batch_norm bmm cat chunk clamp clone conv1d conv2d conv3d conv_transpose2d cos cumsum "
        "dropout einsum exp flatten group_norm index_select layer_norm log max_pool2d mean narrow permute pow relu "
        "relu_ reshape rms_norm roll rsqrt sigmoid sin softmax split_with_sizes sqrt squeeze stack sum tanh transpose "
        "unbind unsqueeze where".split(),
        "torch",
    ),
    **dict.fromkeys(
        "adaptive_avg_pool2d avg_pool2d gelu hardsigmoid hardswish leaky_relu linear pad "
        "scaled_dot_product_attention silu".split(),
        "F",
    ),
}
"""Operators that have a function with the same arguments in the same order: where."""

_END = 2**63 - 1
"""How a slice says that it goes on to the end."""

METHODS = frozenset("contiguous expand view".split())
"""Operators that are written as a method of their first argument."""


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a layer of `torch.nn` without submodules that its own settings make again."""
    if type(module) is not getattr(nn, type(module).__name__, None) or any(module.children()):
        return False
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    try:
        with torch.device("meta"):
            again = eval(_construction(module), {"nn": nn})  # the text of PyTorch's own `repr`
    except Exception:  # a layer whose `repr` does not make it
        return False
    shapes, settings = (
        ({n: x.shape for n, x in one.state_dict().items()} for one in (again, module)),
        vars(module),
    )
    own = {name: x for name, x in vars(again).items() if not name.startswith("_") and name != "training"}
    return (
        type(again) is type(module)
        and next(shapes) == next(shapes)
        and all(name in settings and repr(settings[name]) == repr(x) for name, x in own.items())
    )


def _construction(module: nn.Module) -> str:
    """What makes a layer: its `repr`, without what is the default anyway.

    >>> _construction(nn.Conv2d(3, 8, 3, padding=1)), _construction(nn.Linear(8, 2, bias=False))
    ('nn.Conv2d(3, 8, kernel_size=3, padding=1)', 'nn.Linear(8, 2, bias=False)')
    """
    made = ast.parse(f"nn.{module!r}", mode="eval").body
    assert isinstance(made, ast.Call)
    known = inspect.signature(type(module)).parameters
    keywords = []
    for argument in made.keywords:
        value = ast.literal_eval(argument.value)
        if type(value) is tuple and len({*value}) == 1 and argument.arg in _PER_DIM:
            value = value[0]  # the same along every dim
        assert argument.arg is not None
        if argument.arg not in known or value != known[argument.arg].default:
            keywords.append(ast.keyword(argument.arg, ast.Constant(value)))
    first = list(known)[len(made.args) : 2]
    while keywords and first and keywords[0].arg == first[0]:
        made.args.append(keywords.pop(0).value)
        first.pop(0)
    made.keywords = keywords
    return ast.unparse(made)


_PER_DIM = {"kernel_size", "stride", "padding", "output_padding", "dilation"}


@dataclass
class Source:
    """The text of one module.

    Args:
        model: whose forward the program is; only read.
        program: the forward; what it calls are plain layers.
        constants: tensors that the program reads and the model has no name for.
        lost: what the model does in training mode and the program does not, in words.
    """

    model: nn.Module
    program: Program
    constants: Mapping[str, Tensor]
    lost: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What `text` reads from the weights file, by the names it has there."""
    _attributes: dict[Any, str] = field(default_factory=dict)
    _imports: set[tuple[str, str]] = field(default_factory=set)

    def text(self, weights: str, title: str) -> str:
        """The file.

        Args:
            weights: name of the file with `tensors`, which lies beside it.
            title: its first line.
        Raises:
            ExportError: something of the program has no plain form.
        """
        name = type(self.model).__name__.removeprefix("Rewritten")
        forward = self._forward()
        layers = self._layers()
        used = "\n".join(forward)
        limits = [sizes_in_words(limit) for limit in self.program.limits if any(limit[1:])]
        told = [f"Takes {' and '.join(dict.fromkeys(limits))}."] if limits else []
        told += [f"Leaves out {self.lost}."] if self.lost else []
        about = " ".join(told)
        imports = ["import torch"] if "torch." in used + "\n".join(layers) else []
        imports += ["import torch.nn.functional as F"] if "F." in used else []
        imports += [f"from {module} import {names}" for module, names in sorted(self._imports)]
        lines = [
            f'"""{title}',
            "",
            f"{name}() has random weights; load() has those of {weights}, which lies beside this file.",
            '"""',
            "",
            "from pathlib import Path",
            "",
            *imports,
            "from safetensors.torch import load_file",
            "from torch import nn",
            "",
            "",
            f"class {name}(nn.Module):",
            *([f'    """{about}"""', ""] if about else []),
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in layers),
            "",
            f"    def forward(self, {', '.join(self._parameters())}):",
            *(f"        {line}".rstrip() for line in forward),
            "",
            "",
            f"def load(path=Path(__file__).with_name({weights!r})):",
            f"    model = {name}()",
            "    model.load_state_dict(load_file(path), assign=True)",
            "    return model.eval()",
            "",
        ]
        return "\n".join(lines)

    def _parameters(self) -> list[str]:
        return [name if _reads(part) else f"{name}=None" for name, part in self.program.arguments.items()]

    def _layers(self) -> list[str]:
        """What makes the layers and tensors, in the order in which they are first used."""
        lines = []
        for found, attribute in self._attributes.items():
            if isinstance(found, nn.Module):
                lines.append(f"self.{attribute} = {_construction(found)}")
                self.tensors |= {f"{attribute}.{name}": x for name, x in found.state_dict().items()}
                continue
            tensor = self._tensor(found)
            dtype = "" if tensor.dtype is torch.float32 else f", dtype={tensor.dtype}"
            empty = f"torch.empty({tuple(tensor.shape)}{dtype})"
            is_parameter = isinstance(tensor, nn.Parameter)
            made = f"{attribute} = nn.Parameter({empty})" if is_parameter else ""
            lines.append(f"self.{made}" if made else f"self.register_buffer({attribute!r}, {empty})")
            self.tensors[attribute] = tensor.detach()
        return lines

    def _tensor(self, name: str) -> Tensor:
        if name in self.constants:
            return self.constants[name]
        owner, _, last = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(owner), last)
        return found

    def _attribute(self, key: Any, name: str) -> str:
        """The attribute that holds a layer, or a tensor of this name."""
        if key not in self._attributes:
            wanted = _identifier(name)
            taken = {*self._attributes.values(), *dir(nn.Module)}
            while wanted in taken:
                wanted += "_"
            self._attributes[key] = wanted
        return self._attributes[key]

    def _forward(self) -> list[str]:
        program = self.program
        texts: dict[int, str] = {}
        paths: dict[int, str] = {}  # of numbers among the arguments
        for path, leaf in leaves_of(program.arguments):
            text = str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])
            if isinstance(leaf, Ref):
                texts[leaf.index] = text
            elif isinstance(leaf, Given):
                paths[leaf.index] = text
        lines = []
        simple = {name for name, part in program.arguments.items() if isinstance(part, Ref)}
        reserved = {*program.arguments} - simple
        if any(
            isinstance(leaf, Named) and leaf.name == "same" for op in program.ops for _, leaf in _leaves(op)
        ):
            named = range(program.inputs, program.inputs + len(program.tensors))
            first = next(
                (i for i in named if self._tensor(program.tensors[i - program.inputs]).is_floating_point()), 0
            )
            lines.append(f"like = {self._register(first, texts)}")
        write = _Writer(texts, paths, self._register)
        last = {index: n for n, op in enumerate(program.ops) for index in refs((op.args, op.kwargs))}
        last |= dict.fromkeys(refs(program.output), len(program.ops))
        names = {i: text for i, text in texts.items() if text in simple}
        block = None
        for number, op in enumerate(program.ops):
            register = program.inputs + len(program.tensors) + number
            if isinstance(op, Call):
                layer = self.model.get_submodule(op.module)
                called = f"self.{self._attribute(layer, op.module)}"
                if (parent := op.module.rpartition(".")[0]) != block:
                    lines += ["", f"# {parent}"] if parent else [""] * (block is not None)
                    block = parent
                text = write.call(called, op.args, op.kwargs)
            else:
                text = write.operator(op)
            names = {i: name for i, name in names.items() if last.get(i, -1) > number}
            if register not in last:
                lines.append(text)  # done for what it does, not for what it returns
                continue
            name = next(n for n in _names() if n not in {*names.values(), *reserved})
            names[register] = texts[register] = name
            lines.append(f"{name} = {text}")
        lines.append(f"return {self._output(write)}")
        return lines

    def _output(self, write: "_Writer") -> str:
        for _, leaf in leaves_of(self.program.output):
            if leaf == ANYTHING:
                raise ExportError(f"{type(self.model).__name__} returns something else than tensors")
        for made in _mades(self.program.output):
            self._imports.add((made.cls.__module__, made.cls.__qualname__))
        return write.value(self.program.output)

    def _register(self, index: int, texts: Mapping[int, str]) -> str:
        """What stands for a register: a variable, or a tensor of the module."""
        if index in texts:
            return texts[index]
        name = self.program.tensors[index - self.program.inputs]
        return f"self.{self._attribute(name, name)}"


@dataclass
class _Writer:
    """Writes values and operators.

    Args:
        texts: variables by register.
        paths: the arguments that are numbers, by their index.
        register: what stands for a register.
    """

    texts: Mapping[int, str]
    paths: Mapping[int, str]
    register: Callable[[int, Mapping[int, str]], str]

    def value(self, x: Any) -> str:
        if isinstance(x, Ref):
            return self.register(x.index, self.texts)
        if isinstance(x, Dim):
            return (
                self.paths[x.dim]
                if x.register < 0
                else f"{self.register(x.register, self.texts)}.shape[{x.dim}]"
            )
        if isinstance(x, Size):
            return f"({self.value(x.left)} {x.op} {self.value(x.right)})"
        if isinstance(x, Training):
            return f"({self.value(x.yes)} if self.training else {self.value(x.no)})"
        if isinstance(x, Named):
            return f"like.{x.kind}" if x.name == "same" else f"torch.{x.name}"
        if isinstance(x, Made):
            entries = ", ".join(f"{name}={self.value(part)}" for name, part in x.entries.items())
            return f"{x.cls.__qualname__}({entries})"
        if isinstance(x, dict):
            return "{" + ", ".join(f"{name!r}: {self.value(part)}" for name, part in x.items()) + "}"
        if isinstance(x, list):
            return "[" + ", ".join(self.value(part) for part in x) + "]"
        if isinstance(x, tuple):
            return "(" + "".join(f"{self.value(part)}, " for part in x).strip() + ")"
        if isinstance(x, float) and not math.isfinite(x):
            return f'float("{x}")'
        return repr(x)

    def call(self, function: str, args: Sequence[Any], kwargs: Sequence[tuple[str, Any]]) -> str:
        given = [*map(self.value, args), *(f"{name}={self.value(x)}" for name, x in kwargs)]
        return f"{function}({', '.join(given)})"

    def operator(self, op: Op) -> str:
        if op.target == "getitem":
            items, key = op.args
            return f"{self.value(items)}[{key!r}]"
        _, name, overload = op.target.split(".")
        if name in ("slice", "select") and len(op.args) > 2 and type(op.args[1]) is int and op.args[1] >= 0:
            return self.part(name == "slice", *op.args)
        if name in INFIX and len(op.args) == 2 and not op.kwargs and "mode" not in overload:
            return f"{self.value(op.args[0])} {INFIX[name]} {self.value(op.args[1])}"
        if name in FUNCTIONS:
            return self.call(f"{FUNCTIONS[name]}.{name}", op.args, op.kwargs)
        if name in METHODS and isinstance(op.args[0], Ref):
            return self.call(f"{self.value(op.args[0])}.{name}", op.args[1:], op.kwargs)
        return self.call(f"torch.ops.{op.target}", op.args, op.kwargs)

    def part(self, several: bool, of: Ref, dim: int, start: Any, end: Any = None, step: Any = 1) -> str:
        """Positions along a dim: several, or one."""
        index = self.value(start)
        if several:
            least, most, every = (
                "" if x in open_ends else self.value(x)
                for x, open_ends in (
                    (start, (0, None)),
                    (end, (Dim(of.index, dim), _END, None)),
                    (step, (1,)),
                )
            )
            index = f"{least}:{most}" + (f":{every}" if every else "")
        return f"{self.value(of)}[{':, ' * dim}{index}]"


def _leaves(op: Op | Call) -> list[tuple[Any, Any]]:
    return [*leaves_of(list(op.args)), *leaves_of(dict(op.kwargs))]


def _reads(part: Any) -> bool:
    return any(isinstance(leaf, Ref | Given) for _, leaf in leaves_of(part))


def _mades(tree: Any) -> list[Made]:
    if isinstance(tree, Made):
        return [tree, *(made for part in tree.entries.values() for made in _mades(part))]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [made for part in parts for made in _mades(part)]


def _names() -> Iterator[str]:
    """x, x1, x2, …"""
    yield "x"
    number = 0
    while True:
        number += 1
        yield f"x{number}"


def _identifier(name: str) -> str:
    """A name as a Python identifier.

    >>> _identifier("layer1.0.conv-1"), _identifier("0.weight"), _identifier("class")
    ('layer1_0_conv_1', 'layer_0_weight', 'class_')
    """
    text = re.sub(r"\W", "_", name)
    text = f"layer_{text}" if not text or text[0].isdigit() else text
    return f"{text}_" if keyword.iskeyword(text) else text
