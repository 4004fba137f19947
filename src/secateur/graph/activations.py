"""The memory of a forward pass: the size of every tensor that it makes, and when the tensor is needed."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, fx

from secateur.graph.axes import Axis, Product
from secateur.graph.labels import Atoms, Value, compress, support
from secateur.graph.operators.site import flatten, module_of
from secateur.graph.trace import Trace

REAL = 4
"""Bytes of a real number: memory is told in float32, whatever the model's own precision."""


@dataclass(frozen=True)
class Buffer:
    """The memory of one tensor and of all views of it.

    Attributes:
        size: bytes for one image; named after the module that makes the tensor.
        first, last: numbers of the operators that make it and that need it last.
    """

    size: Product
    first: int
    last: int


def find_buffers(trace: Trace, units: Sequence[int]) -> tuple[Buffer, ...]:
    """What a forward pass allocates, in the order in which it does.

    The inputs are there from the first operator on, the outputs until the last; all others as long as an operator
    still needs them. Views and in-place operators allocate nothing: the traced tensors say by their storages what they
    are. The model's own parameters, buffers and constants do not count, nor does the work space inside operators. A
    dim that loses units of a group unevenly, so that its width is no linear function of how many are kept, counts as
    if they all stayed. Where a block goes, the sum that it went into still counts as a tensor of its own.

    Args:
        trace: from the analysis.
        units: of every group of channels.
    """
    walk = _Walk(trace, units)
    walk.enter(trace.captured.module)
    return tuple(Buffer(walk.with_blocks(number), *walk.alive[number]) for number in range(len(walk.sizes)))


class _Walk:
    """The operators in the order in which they run, those inside of autocast regions too.

    Attributes:
        sizes: of the buffers found so far.
        alive: the first and the last operator of each, so far.
        home: storage of a traced tensor -> number of its buffer; None: it belongs to the model.
        makers: of each buffer, the node of the outermost graph that makes it.
        ends: node of the outermost graph -> the number of its last operator.
    """

    def __init__(self, trace: Trace, units: Sequence[int]) -> None:
        self.trace = trace
        self.unit = trace.unit
        self.group = np.repeat(np.arange(len(units)), units)
        self.units = units
        self.sizes: list[Product] = []
        self.alive: list[tuple[int, int]] = []
        self.home: dict[int, int | None] = {}
        self.makers: list[str] = []
        self.ends: dict[str, int] = {}
        self.outer = ""
        self.now = 0

    def enter(self, graph: fx.GraphModule) -> None:
        """Go through a graph, and through the bodies of its higher-order operators."""
        captured = self.trace.captured
        owned = captured.tensors.keys() | captured.constants.keys()
        for node in graph.graph.nodes:
            if graph is captured.module:
                self.outer = node.name
            self.ends[self.outer] = self.now
            if node.op == "get_attr" or (node.op == "placeholder" and node.name in owned):
                self.home |= {
                    storage: None for storage, _, _ in self.tensors(node) if storage not in self.home
                }
            elif node.op == "placeholder":
                self.make(node, "")
            elif node.op == "output":
                self.read(node)
            elif body := next((b for b in node.all_input_nodes if _is_graph(graph, b)), None):
                self.enter(getattr(graph, str(body.target)))
            elif node.target is not operator.getitem and any(self.tensors(node)):
                self.read(node)
                self.make(node, module_of(node))
                self.now += 1

    def read(self, node: fx.Node) -> None:
        """Whatever a node reads is still alive."""
        for source in node.all_input_nodes:
            for storage, _, _ in self.tensors(source):
                number = self.home.get(storage)
                if number is not None:
                    self.alive[number] = self.alive[number][0], self.now

    def make(self, node: fx.Node, module: str) -> None:
        """Those tensors of a node that are no views are new."""
        for storage, value, each in self.tensors(node):
            if storage not in self.home:
                self.home[storage] = len(self.sizes)
                self.alive.append((self.now, self.now))
                self.makers.append(self.outer)
                self.sizes.append(self.size(module, value, each))

    def tensors(self, node: fx.Node) -> Iterator[tuple[int, Value, int]]:
        """Storage, labels and bytes per element of every tensor that a node holds."""
        held = node.meta.get("val")
        tensors = [t for t in (held if isinstance(held, list | tuple) else [held]) if isinstance(t, Tensor)]
        values = flatten([self.trace.values.get(node)])
        for number, tensor in enumerate(tensors):
            value = values[number] if number < len(values) else None
            if not isinstance(value, Value) or value.shape != tuple(tensor.shape):
                value = Value(tuple(tensor.shape), data=True, per_image=1.0)
            yield (
                tensor.untyped_storage()._cdata,
                value,
                REAL if tensor.is_floating_point() else tensor.itemsize,
            )

    def size(self, module: str, value: Value, each: int) -> Product:
        """Bytes of a tensor for one image; what does not depend on the images is there once for all."""
        axes: dict[int, Axis] = {}
        for factor in value.factors:
            varies = compress(self.unit[factor])
            dims = support(varies)
            if len(dims) == 1 and not dims & axes.keys():
                axes[min(dims)] = self.axis(varies.ravel())
        rest = [size for dim, size in enumerate(value.shape) if dim not in axes]
        times, images = (value.per_image, self.trace.captured.batch) if value.per_image else (1.0, 1)
        return Product(module, each * float(np.prod(rest)) * times / images, tuple(axes.values()))

    def with_blocks(self, number: int) -> Product:
        """The size of a buffer, nothing where the block goes that it is in and that it does not outlive."""
        size = self.sizes[number]
        inside = tuple(
            Axis(0, ((group, 1),))
            for group, branch in self.trace.blocks.items()
            if self.makers[number] in branch.steps and self.alive[number][1] <= self.ends[branch.sum]
        )
        return replace(size, axes=(*size.axes, *inside)) if inside else size

    def axis(self, units: Atoms) -> Axis:
        """The width of a dim from the unit at each of its positions, -1 where one stays."""
        base, parts = len(units), []
        found, positions = np.unique(units[units >= 0], return_counts=True)
        groups = self.group[found]
        for group in np.unique(groups).tolist():
            counts = positions[groups == group]
            if len(counts) == self.units[group] and (counts == counts[0]).all():
                parts.append((group, int(counts[0])))
                base -= int(counts.sum())
        return Axis(base, tuple(parts))


def _is_graph(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(getattr(graph, str(node.target)), fx.GraphModule)
