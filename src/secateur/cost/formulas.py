"""What widths cost: one formula per measure, for dense, masked and cut models alike.

A formula takes a graph and gives a function of the units kept: a float64 tensor (groups,), in the order of
`graph.groups`, -> a scalar with a gradient. Every width is linear in the units kept, so sums of products of widths go a
long way.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from secateur.graph import Axis, Buffer, Graph, Product

Formula: TypeAlias = Callable[[Tensor], Tensor]


class Sum:
    """A sum of products of widths.

        cost(k) = sum over terms of factor * product over axes of (base + sum of each * k[group])

    Attributes:
        products: its terms.
    """

    def __init__(self, products: Sequence[Product], groups: int) -> None:
        self.products = tuple(products)
        number: dict[Axis, int] = {Axis(1): 0}
        for product in products:
            for axis in product.axes:
                number.setdefault(axis, len(number))
        depth = max((len(product.axes) for product in products), default=0)
        rows = [[number[a] for a in p.axes] + [0] * (depth - len(p.axes)) for p in products]
        self.factor = torch.tensor([product.factor for product in products], dtype=torch.float64)
        self.axes = torch.tensor(rows, dtype=torch.long).reshape(len(products), depth)
        self.base = torch.tensor([axis.base for axis in number], dtype=torch.float64)
        self.slope = torch.zeros(len(number), groups, dtype=torch.float64)
        for axis, row in number.items():
            for group, positions in axis.parts:
                self.slope[row, group] = positions

    def each(self, kept: Tensor) -> Tensor:
        """Every term, (terms,)."""
        kept = kept.to(device=self.slope.device, dtype=torch.float64)
        return self.factor * (self.base + self.slope @ kept)[self.axes].prod(dim=1)

    def __call__(self, kept: Tensor) -> Tensor:
        return self.each(kept).sum()


class Peak:
    """The largest sum of all buffers that are alive at one operator.

        cost(k) = max over operators t of the sum over buffers with first <= t <= last of size(k)

    Its gradient is that of the operator where the peak is; of several such operators, their mean.
    """

    def __init__(self, buffers: Sequence[Buffer], groups: int) -> None:
        self.sizes = Sum([buffer.size for buffer in buffers], groups)
        self.first = torch.tensor([buffer.first for buffer in buffers], dtype=torch.long)
        self.after = torch.tensor([buffer.last + 1 for buffer in buffers], dtype=torch.long)
        self.operators = max((buffer.last + 1 for buffer in buffers), default=0)

    def each(self, kept: Tensor) -> Tensor:
        """What is alive at every operator, (operators + 1,); the last entry is what is left in the end, zero."""
        sizes = self.sizes.each(kept)
        change = torch.zeros(self.operators + 1, dtype=torch.float64)
        return change.index_add(0, self.first, sizes).index_add(0, self.after, -sizes).cumsum(0)

    def __call__(self, kept: Tensor) -> Tensor:
        return self.each(kept).max()


def macs(graph: Graph) -> Sum:
    """Multiply-adds for one image."""
    return Sum(graph.macs, len(graph.groups))


def params(graph: Graph) -> Sum:
    """Parameters."""
    return Sum(graph.params, len(graph.groups))


def units(graph: Graph) -> Sum:
    """Units kept over all groups."""
    terms = [Product(group.name, 1.0, (Axis(0, ((n, 1),)),)) for n, group in enumerate(graph.groups)]
    return Sum(terms, len(graph.groups))


def activations(graph: Graph) -> Peak:
    """Peak activation memory: bytes for one image in float32; see `secateur.graph.activations` for what counts."""
    return Peak(graph.activations, len(graph.groups))
