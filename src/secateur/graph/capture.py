"""Read a model's graph once, without touching the model."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    unknown_size,
    untouched,
    written_out,
)
from secateur.graph.modes import chance, chance_kept, forget_kept

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Example inputs: one tensor, a list of images (c, h, w), a tuple of positional arguments, or a mapping of keyword
arguments."""

SLICE = re.compile(r"slice\((-?\d+|None), (-?\d+|None), (-?\d+|None)\)")
"""How the exporter names the part of a container that a forward takes (`self.layers[:-1]`)."""

BATCH = 2
"""Images in the traced batch: at 1, a batch dimension looks like a broadcast one."""


@dataclass(frozen=True)
class Batching:
    """Which of the example inputs hold something for every image.

    Attributes:
        images: in the inputs as they were given.
        rows: of every leaf of the inputs, its first dim if that grows with the images; None: it stays.
        per_image: of every leaf, how many rows an image really has for each row of it, 0 if it holds none for an
            image; empty: one for those that grow.
        fixed: they can hold no other number of images, such as where each is a tensor of its own.
    """

    images: int
    rows: tuple[int | None, ...]
    per_image: tuple[float, ...] = ()
    fixed: bool = False

    def allows(self, images: int) -> bool:
        """Whether the inputs can hold this many images."""
        if self.fixed:
            return images == self.images
        return all(rows is None or rows * images % self.images == 0 for rows in self.rows)

    def count(self, inputs: Inputs) -> int:
        """Images in inputs like these."""
        if self.fixed:
            return self.images
        leaves = zip(pytree.tree_leaves(as_call(inputs)), self.rows, strict=True)
        return next((len(x) * self.images // rows for x, rows in leaves if rows), self.images)

    def resized(self, inputs: Inputs, images: int) -> Inputs:
        """The same inputs with this many images: the first ones, repeated if there are too few."""
        leaves, tree = pytree.tree_flatten(as_call(inputs))
        for i, rows in enumerate(self.rows):
            if rows is not None:
                leaves[i] = with_length(leaves[i], 0, rows * images // self.images)
        args, kwargs = pytree.tree_unflatten(leaves, tree)
        return as_inputs(args, kwargs, inputs)


@dataclass(frozen=True)
class Capture:
    """The ATen graph of one forward pass, in which a convolution is still one node.

    Attributes:
        module: the graph and, as submodules, the bodies of its higher-order operators.
        tensors: placeholder name -> name of the parameter or buffer it stands for.
        constants: placeholder name -> a tensor that `forward` reads and that is neither of these.
        batching: how the example inputs were read.
        batch: images in the traced batch; totals over the graph are divided by it.
        borders: see `Parted`.
        drawn: forward drew random numbers of Python or NumPy, which the graph holds as any other number.
    """

    module: fx.GraphModule
    tensors: dict[str, str]
    constants: dict[str, Tensor]
    batching: Batching
    batch: int
    borders: tuple[fx.Node, ...] = ()
    drawn: bool = False

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders of the example inputs' leaves, in order."""
        given = self.tensors.keys() | self.constants.keys()
        return [n for n in self.module.graph.find_nodes(op="placeholder") if n.name not in given]

    @property
    def per_image(self) -> dict[fx.Node, float]:
        """Of those inputs that hold something for every image: how many rows an image has for each of theirs."""
        grown = tuple(float(rows is not None) for rows in self.batching.rows)
        return dict(zip(self.inputs, self.batching.per_image or grown, strict=True))


class Parted(nn.Module):
    """Parts of a model that are called one after the other, as if that were its forward; see parts.py.

    Attributes:
        batching: how its inputs hold images.
        outputs: how many of the tensors that it returns while it is captured are its outputs. The others are seen at
            the borders of its parts: they become `Capture.borders`.
    """

    batching: Batching
    outputs: int


class WholeError(CaptureError):
    """The model runs, but its graph cannot be captured as a whole."""


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments of `forward`."""
    if isinstance(inputs, Tensor) or are_images(inputs):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    raise CaptureError(
        f"example inputs: got {type(inputs).__name__}; expected a tensor, a list of images (c, h, w), a tuple of "
        f"arguments or a dict of keyword arguments. Pass for example torch.randn(1, 3, 224, 224)."
    )


def as_inputs(args: tuple[Any, ...], kwargs: dict[str, Any], like: Inputs) -> Inputs:
    """Arguments of `forward` in the form of some example inputs."""
    single = isinstance(like, Tensor) or are_images(like)
    result: Inputs = args[0] if single else kwargs if isinstance(like, Mapping) else args
    return result


def are_images(x: Any) -> bool:
    """Whether this is a list of images, each a tensor (c, h, w): one argument, such as detectors take."""
    return isinstance(x, list) and bool(x) and all(isinstance(t, Tensor) and t.ndim == 3 for t in x)


def batchings(inputs: Inputs) -> list[Batching]:
    """The ways to read example inputs, the likeliest first.

    The first dim of the first tensor counts the images. A tensor with as many rows (class labels, time steps) grows
    with them. One with a multiple of them (frames folded into the batch), or a part, may do so, or may be a table.
    """
    leaves = pytree.tree_leaves(as_call(inputs))
    first = [x.shape[0] if isinstance(x, Tensor) and x.ndim else None for x in leaves]
    images = max(1, batch_of(inputs))
    if list_of_images(inputs) is not None:
        return [Batching(images, tuple(first), fixed=True)]
    equal = Batching(images, tuple(rows if rows == images else None for rows in first))
    related = Batching(
        images,
        tuple(
            rows if rows and (rows % images == 0 or (rows > 1 and images % rows == 0)) else None
            for rows in first
        ),
    )
    both = [equal, related] if images == 1 else [related, equal]
    return both if equal != related else [equal]


def with_length(x: Tensor, dim: int, size: int) -> Tensor:
    """The tensor with its first positions along a dim, repeated if there are too few."""
    return x.index_select(dim, torch.arange(size, device=x.device) % x.shape[dim])


def batch_of(inputs: Inputs) -> int:
    """Images in the inputs: of a list of them, or the first dim of the first tensor of several dims, or else of one."""
    images = list_of_images(inputs)
    if images is not None:
        return len(images)
    tensors = [x for x in pytree.tree_leaves(as_call(inputs)) if isinstance(x, Tensor) and x.ndim]
    return next((len(x) for x in sorted(tensors, key=lambda x: x.ndim == 1)), 1)


def list_of_images(inputs: Inputs) -> list[Tensor] | None:
    """The first argument that is a list of images; None: there is none."""
    args, kwargs = as_call(inputs)
    return next((x for x in (*args, *kwargs.values()) if are_images(x)), None)


def with_images(inputs: Inputs, images: int) -> Inputs:
    """The inputs with this many images; as they are, if they cannot hold so many."""
    batching = batchings(inputs)[0]
    return batching.resized(inputs, images) if batching.allows(images) else inputs


def _candidates(read: Sequence[Batching]) -> list[tuple[Batching, int]]:
    """What to trace: few images, or a multiple of those given, or the inputs as they are.

    Where tensors may or may not grow with the images, only the inputs as they are show how much work an image is.
    """
    given = read[0].images
    if given > 1 and len(read) > 1:
        return [(read[0], given)]
    return [(way, n) for n in dict.fromkeys((BATCH, BATCH * given, given)) for way in read if way.allows(n)]


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
    with untouched(model), written_out(), chance_kept():
        forget_kept(model)
        model.train(training)
        read = [model.batching] if isinstance(model, Parted) else batchings(inputs)
        ways = [(read[0], read[0].count(inputs))] if exact else _candidates(read)
        before = chance()
        captured = _export(model, inputs, ways, any_batch)
        captured = replace(captured, drawn=chance() != before)
    if not training:
        check_deterministic(captured.module)
    return captured


def _export(
    model: nn.Module, inputs: Inputs, ways: Sequence[tuple[Batching, int]], any_batch: bool
) -> Capture:
    failure: Exception | None = None
    for batching, images in ways:  # some models accept only the batch they were given
        as_given = images == batching.images
        args, kwargs = as_call(inputs if as_given else batching.resized(inputs, images))
        free = pytree.tree_map(_free_batch, kwargs or args) if any_batch else None
        try:
            with quiet(), plain_outputs(model):
                program = torch.export.export(model, args, kwargs, dynamic_shapes=free, strict=False)
        except Exception as error:
            failure = error  # the last candidate is the user's own
            continue
        if not any_batch and (where := unknown_size(program.graph_module)):
            raise WholeError(
                f"{where}: runs, but how much it returns depends on the values in a tensor, so that its graph cannot "
                f"be captured. Name the submodules to prune in scope=, or move this out of the module that is pruned."
            )
        signature = program.graph_signature
        tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = {
            name: program.constants[key] for name, key in signature.inputs_to_lifted_tensor_constants.items()
        }
        borders = _take_borders(program.graph_module, model.outputs) if isinstance(model, Parted) else ()
        _name_modules(program.graph_module, model)
        return Capture(program.graph_module, tensors, constants, batching, images, borders)
    assert failure is not None
    _check_runs(model, inputs)
    if isinstance(failure, CaptureError):
        raise WholeError(str(failure)) from failure
    raise WholeError(
        f"{culprit(model, failure)}: runs, but its graph cannot be captured: {first_line(failure)}. Control flow "
        f"that depends on tensor values must be replaced by torch.where, or moved out of the module that is pruned."
    ) from failure


def _take_borders(module: fx.GraphModule, outputs: int) -> tuple[fx.Node, ...]:
    """Take from a graph the outputs behind the first ones."""
    node = next(iter(module.graph.find_nodes(op="output")))
    every: tuple[Any, ...] = tuple(node.args[0])
    node.args = (every[:outputs],)
    return every[outputs:]


def _name_modules(graph: fx.GraphModule, model: nn.Module) -> None:
    """Let every node name the modules it ran in as the model does.

    Where modules are shared, the exporter names those that a forward takes from a slice of a container after the slice.
    """
    for part in graph.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            stack = node.meta.get("nn_module_stack") or {}
            if any("slice(" in name for name, _ in stack.values()):
                named = {key: (_unsliced(model, name), cls) for key, (name, cls) in stack.items()}
                node.meta["nn_module_stack"] = {
                    key: entry for key, entry in named.items() if entry[0] is not None
                }


def _unsliced(model: nn.Module, name: str) -> str | None:
    """The name of a module without slices of containers; None for such a slice, which is no module of the model."""
    module, path, keys, sliced = model, list[str](), list(model._modules), False
    for part in name.split(".") if name else ():
        bounds = SLICE.fullmatch(part)
        sliced = bounds is not None
        if bounds:
            keys = keys[slice(*(None if n == "None" else int(n) for n in bounds.groups()))]
            continue
        path.append(keys[int(part)] if isinstance(module, nn.ModuleList) else part)
        module = module.get_submodule(path[-1])
        keys = list(module._modules)
    return None if sliced else ".".join(path)


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
