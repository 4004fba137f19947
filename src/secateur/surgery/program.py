"""A forward pass as data: a list of ATen operators that can be run, saved and checked.

A program knows no Python of the model it came from. What it reads by name are parameters and buffers of the
module that runs it; what it calls are the operators of one fixed list; its numbers are literals, or products
of its inputs' sizes.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPERATORS = frozenset(
    """
    abs add add_ addcmul addmm adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d alias alpha_dropout amax amin arange argmax atan2 avg_pool1d avg_pool2d avg_pool3d
    baddbmm batch_norm bitwise_and bitwise_not bitwise_or bmm broadcast_to cat celu channel_shuffle chunk clamp
    clamp_ clamp_max clamp_min clone col2im constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d cos cumsum detach detach_ div div_ dropout dropout_ einsum elu elu_ empty
    eq erf exp expand expand_as expm1 feature_alpha_dropout feature_dropout fill fill_ flatten flip floor
    floor_divide fmod full full_like gather ge gelu getitem glu group_norm gt hardsigmoid hardsigmoid_ hardswish
    hardswish_ hardtanh hardtanh_ im2col index index_select instance_norm layer_norm le leaky_relu leaky_relu_
    lerp lift_fresh_copy linalg_vector_norm linear linspace log log1p log_softmax logical_and logical_not
    logical_or logsigmoid logsumexp lt masked_fill masked_fill_ matmul max max_pool1d max_pool2d max_pool3d
    maximum mean meshgrid min minimum mish mish_ mm movedim mul mul_ ne neg new_empty new_full new_ones
    new_zeros norm ones ones_like outer pad permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal
    relu relu6 relu6_ relu_ remainder repeat repeat_interleave reshape reshape_as rms_norm roll round rsqrt rsub
    scaled_dot_product_attention select selu selu_ sigmoid sigmoid_ sign silu silu_ sin slice softmax softplus
    split_with_sizes sqrt square squeeze stack std std_mean sub sub_ sum t tan tanh tanh_ tile to transpose tril
    triu type_as unbind unflatten unfold unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d var var_mean view view_as
    where zeros zeros_like _softmax _log_softmax _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _weight_norm _to_copy
    """.split()
)
"""Operators that compute tensors from tensors and numbers, and do nothing else."""

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
class Size:
    """`count` times some sizes of the inputs, (input, dim), divided by `per`."""

    count: int
    per: int
    dims: tuple[tuple[int, int], ...]


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
class Op:
    """One operator, such as "aten.relu.default", with its arguments; `getitem` takes one of several results."""

    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


Around = Callable[[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Runs one operator: (its number, the operator, arguments, keyword arguments) -> its result."""


@dataclass(frozen=True)
class Program:
    """A forward pass.

    Attributes:
        arguments: the arguments of forward by name, with `Ref` in place of each tensor.
        inputs: how many tensors are among them.
        tensors: names of the parameters and buffers it reads.
        ops: the operators, in order.
        output: what forward returns, with `Ref` in place of each tensor.
    """

    arguments: Any
    inputs: int
    tensors: tuple[str, ...]
    ops: tuple[Op, ...]
    output: Any

    def run(
        self,
        inputs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        training: Callable[[str], bool] = lambda _: False,
        around: Around | None = None,
    ) -> Any:
        """The output, for the tensors among the arguments and the tensors read by name."""
        *_, last = self.steps(inputs, tensors, training, around)
        return last

    def steps(
        self,
        inputs: Sequence[Tensor],
        tensors: Sequence[Tensor],
        training: Callable[[str], bool] = lambda _: False,
        around: Around | None = None,
    ) -> Iterator[Any]:
        """The result of each operator as soon as it is computed, and at the end the output."""
        registers: list[Any] = [*inputs, *tensors]
        like = next((t for t in (*tensors, *inputs) if t.is_floating_point()), None)
        resolve = functools.partial(
            _resolve, registers=registers, like=like, inputs=inputs, training=training
        )
        for number, op in enumerate(self.ops):
            args = tuple(resolve(arg) for arg in op.args)
            kwargs = {name: resolve(arg) for name, arg in op.kwargs}
            function = operator_named(op.target)
            result = around(number, function, args, kwargs) if around else function(*args, **kwargs)
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
    inputs: Sequence[Tensor],
    training: Callable[[str], bool],
) -> Any:
    if isinstance(arg, Ref):
        return registers[arg.index]
    if isinstance(arg, Size):
        return arg.count * math.prod(inputs[i].shape[d] for i, d in arg.dims) // arg.per
    if isinstance(arg, Training):
        return arg.yes if training(arg.module) else arg.no
    if isinstance(arg, Named):
        if arg.name == "same":
            return like.device if like is not None and arg.kind == "device" else getattr(like, arg.kind, None)
        return NAMES[arg.kind][arg.name]
    if isinstance(arg, list | tuple):
        parts = [_resolve(a, registers=registers, like=like, inputs=inputs, training=training) for a in arg]
        return parts if isinstance(arg, list) else tuple(parts)
    if isinstance(arg, dict):
        return {
            name: _resolve(a, registers=registers, like=like, inputs=inputs, training=training)
            for name, a in arg.items()
        }
    return arg


@functools.cache
def operator_named(target: str) -> Callable[..., Any]:
    """The operator of this name.

    Raises:
        ValueError: it is not one that a program may call.

    >>> operator_named("aten.relu.default")(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    if target == "getitem":
        return _take
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    if namespace != "aten" or name not in OPERATORS:
        raise ValueError(f"operator {target!r} is not one that a rewritten forward may call")
    packet = getattr(torch.ops.aten, name)
    if overload not in packet.overloads() or "out" in overload:
        raise ValueError(f"operator {target!r} does not exist")
    function: Callable[..., Any] = getattr(packet, overload)
    return function


def _take(items: Sequence[Any], index: int) -> Any:
    return items[index]


def refs(arg: Any) -> list[int]:
    """The registers that an argument reads."""
    if isinstance(arg, Ref):
        return [arg.index]
    if isinstance(arg, list | tuple):
        return [index for part in arg for index in refs(part)]
    if isinstance(arg, dict):
        return refs(list(arg.values()))
    return []
