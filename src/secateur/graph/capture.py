"""Read a model's graph once, without touching the model."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateur.errors import CaptureError, first_line
from secateur.graph.duplicate import duplicate
from secateur.graph.guard import (
    check_deterministic,
    check_readable,
    culprit,
    plain_outputs,
    quiet,
    untouched,
    written_out,
)

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Example inputs: one tensor, a tuple of positional arguments, or a mapping of keyword arguments."""

BATCH = 2
"""Images in the traced batch: at 1, a batch dimension looks like a broadcast one."""


@dataclass(frozen=True)
class Capture:
    """The ATen graph of one forward pass, in which a convolution is still one node.

    Attributes:
        module: the graph and, as submodules, the bodies of its higher-order operators.
        tensors: placeholder name -> name of the parameter or buffer it stands for.
        constants: placeholder name -> a tensor that `forward` reads and that is neither of these.
        batch: images in the traced batch; totals over the graph are divided by it.
    """

    module: fx.GraphModule
    tensors: dict[str, str]
    constants: dict[str, Tensor]
    batch: int

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders of the example inputs' leaves, in order."""
        given = self.tensors.keys() | self.constants.keys()
        return [n for n in self.module.graph.find_nodes(op="placeholder") if n.name not in given]


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments of `forward`."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise CaptureError(
        f"example inputs: got {type(inputs).__name__}; expected a tensor, a tuple of arguments or a dict of "
        f"keyword arguments. Pass for example torch.randn(1, 3, 224, 224)."
    )


def with_batch(inputs: Inputs, batch: int) -> Inputs:
    """The same inputs with `batch` images: the first image of every tensor, repeated."""

    def repeat(x: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim > 1:
            return x[:1].expand(batch, *x.shape[1:]).contiguous()
        return x

    return pytree.tree_map(repeat, inputs)  # type: ignore[no-any-return]


def batch_of(inputs: Inputs) -> int:
    """Images in the inputs: the first dimension of the first tensor that has more than one."""
    for leaf in pytree.tree_leaves(as_call(inputs)):
        if isinstance(leaf, Tensor) and leaf.ndim > 1:
            return leaf.shape[0]
    return 1


def capture(
    model: nn.Module,
    inputs: Inputs,
    *,
    training: bool = False,
    exact: bool = False,
    any_batch: bool = False,
) -> Capture:
    """Trace `model` on `inputs`; parameters, buffers, modes and hooks stay as they are.

    Args:
        model: any module that `torch.export` can read.
        inputs: example inputs; only shapes, dtypes and devices matter.
        training: trace the training-mode forward pass instead of the evaluation-mode one.
        exact: trace the inputs as they are, instead of a batch of two.
        any_batch: let the first dim of every input be of any size in the graph, as far as `forward` does.
    Raises:
        CaptureError: the inputs do not fit the model, or `forward` depends on the data or on chance.
    """
    check_readable(model)
    if not batch_of(inputs):
        raise CaptureError("example inputs: the batch is empty; pass at least one image")
    with untouched(model), written_out():
        model.train(training)
        captured = _export(model, (inputs,) if exact else (with_batch(inputs, BATCH), inputs), any_batch)
    if not training:
        check_deterministic(captured.module)
    return captured


def _export(model: nn.Module, candidates: Sequence[Inputs], any_batch: bool) -> Capture:
    failure: Exception | None = None
    for candidate in candidates:  # some models accept only the batch they were given
        args, kwargs = as_call(candidate)
        free = pytree.tree_map(_free_batch, kwargs or args) if any_batch else None
        try:
            with quiet(), plain_outputs(model):
                program = torch.export.export(model, args, kwargs, dynamic_shapes=free, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            failure = error  # the last candidate is the user's own
            continue
        signature = program.graph_signature
        tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = {
            name: program.constants[key] for name, key in signature.inputs_to_lifted_tensor_constants.items()
        }
        return Capture(program.graph_module, tensors, constants, batch_of(candidate))
    assert failure is not None
    _check_runs(model, candidates[-1])
    raise CaptureError(
        f"{culprit(model, failure)}: runs, but its graph cannot be captured: {first_line(failure)}. Control flow "
        f"that depends on tensor values must be replaced by torch.where, or moved out of the module that is pruned."
    ) from failure


def _free_batch(x: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.ndim else None


def _check_runs(model: nn.Module, inputs: Inputs) -> None:
    args, kwargs = as_call(inputs)
    with contextlib.suppress(Exception):  # a forward may count its calls in a buffer
        model = duplicate(model)
    try:
        with torch.no_grad():
            model.eval()(*args, **kwargs)
    except Exception as error:
        found = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        shapes = [f"{tuple(x.shape)} {x.dtype} on {x.device}".replace("torch.", "") for x in found]
        raise CaptureError(
            f"{culprit(model, error)}: does not run on the example inputs [{', '.join(shapes)}]: "
            f"{first_line(error)}. Pass inputs of the shape, dtype and device the model expects."
        ) from error
