"""A forward pass as data: a list of ATen operators that can be run, saved and checked.

A program knows no Python of the model it came from. What it reads by name are parameters and buffers of the
module that runs it; what it calls are the operators of one fixed list; its numbers are literals, or products
of its inputs' sizes.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

OPERATORS = frozenset(
    """
    abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d add add_ addcdiv addcmul addcmul_ addmm adjoint alias all
    alpha_dropout amax amin any arange argmax argmin argsort atan2 avg_pool1d avg_pool2d avg_pool3d
    baddbmm batch_norm bitwise_and bitwise_not bitwise_or bitwise_xor bmm broadcast_to cat cdist ceil celu
    channel_shuffle chunk clamp clamp_ clamp_max clamp_max_ clamp_min clamp_min_ clone col2im complex
    concat concatenate constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d copy_ cos cummax cummin cumprod cumsum detach detach_ diagonal div div_ divide dot
    dropout dropout_ einsum elu elu_ embedding empty empty_like eq erf erf_ exp exp_ expand expand_as
    expm1 eye feature_alpha_dropout feature_dropout fft_fft2 fft_ifft2 fft_irfft2 fft_rfft2 fill fill_
    flatten flip floor floor_divide fmod frac full full_like gather ge gelu gelu_ getitem glu grid_sampler
    grid_sampler_2d group_norm gt hardshrink hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh
    hardtanh_ hypot im2col imag index index_add index_copy index_put index_select instance_norm isinf
    isnan kthvalue layer_norm le leaky_relu leaky_relu_ lerp lerp_ lift_fresh_copy linalg_norm
    linalg_vector_norm linear linspace log log1p log2 log_ log_sigmoid log_softmax logical_and logical_not
    logical_or logical_xor logit logsumexp lt mH mT masked_fill masked_fill_ matmul max
    max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d
    max_pool3d_with_indices maximum mean median meshgrid min minimum mish mish_ mm moveaxis movedim mul
    mul_ multiply mv nan_to_num narrow ne neg neg_ new_empty new_full new_ones new_zeros norm numpy_T ones
    ones_like outer pad permute pixel_shuffle pixel_unshuffle positive pow pow_ prelu prod ravel real
    reciprocal reflection_pad1d reflection_pad2d relu relu6 relu6_ relu_ remainder repeat
    repeat_interleave replication_pad1d replication_pad2d reshape reshape_as rms_norm roll rot90 round
    rsqrt rsub scaled_dot_product_attention scatter select selu selu_ sigmoid sigmoid_ sign silu silu_ sin
    slice softmax softplus softshrink sort split_with_sizes sqrt square squeeze squeeze_ stack
    std std_mean sub sub_ subtract sum swapaxes swapdims t take_along_dim tan tanh tanh_
    threshold threshold_ tile to topk transpose transpose_ tril triu true_divide trunc type_as unbind
    unflatten unfold unsqueeze unsqueeze_ upsample_bicubic2d upsample_bilinear2d upsample_linear1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d var var_mean view
    view_as view_as_complex view_as_real view_copy where zero_ zeros zeros_like _fused_rms_norm
    _log_softmax _softmax _to_copy _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm
    _weight_norm_interface
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


Around = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""Runs one operator in place of the program: (its number, arguments, keyword arguments) -> its result."""


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
            result = around(number, args, kwargs) if around else operator_named(op.target)(*args, **kwargs)
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
        return operator.getitem
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    if namespace != "aten" or name not in OPERATORS:
        raise ValueError(f"operator {target!r} is not one that a rewritten forward may call")
    packet = getattr(torch.ops.aten, name)
    if overload not in packet.overloads() or "out" in overload:
        raise ValueError(f"operator {target!r} does not exist")
    function: Callable[..., Any] = getattr(packet, overload)
    return function


def refs(arg: Any) -> list[int]:
    """The registers that an argument reads."""
    if isinstance(arg, Ref):
        return [arg.index]
    if isinstance(arg, list | tuple):
        return [index for part in arg for index in refs(part)]
    if isinstance(arg, dict):
        return refs(list(arg.values()))
    return []
