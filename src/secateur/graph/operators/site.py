"""What a rule sees of an operator and may do with it: a `Site` has the arguments by name and labels the outputs.

A rule may tie, pin and choose, mint labels on parameters, and count multiply-adds.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from secateur.graph.labels import Atoms, Contraction, Labels, Statistic, Value, first, support


@dataclass(frozen=True)
class Site:
    """One operator of the graph, as a rule sees it.

    Attributes:
        op: name such as "aten.conv2d".
        args: argument name -> value; tensors are `Value`, missing ones have the schema's default.
        shapes: shape of each output tensor.
        labels: where the rule writes.
        pad_attributes: names of the enclosing module's (before, after) attributes, where they can be edited.
        indexes: its result is the index of a gather, which needs as many copies of it as there are channels.
    """

    op: str
    args: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    labels: Labels
    pad_attributes: tuple[str, str] | None = None
    indexes: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    @property
    def operands(self) -> list[Value]:
        return [value for value in flatten(list(self.args.values())) if isinstance(value, Value)]

    @property
    def first(self) -> Value:
        """The tensor the operator works on."""
        return self.labels.exposed(self.operands[0])

    def dims(self, name: str = "dim") -> list[int]:
        """Dims of the first operand that an argument names, counted from the front; all if it names none."""
        rank = len(self.operands[0].shape)
        dims = self.args.get(name)
        if dims is None or dims == []:
            return list(range(rank))
        return [dim % rank for dim in ([dims] if isinstance(dims, int) else dims)] if rank else []

    def value(self, factors: Iterable[Atoms]) -> Value:
        """The only output."""
        return self.labels.value(self.shape, factors)

    def values(self, factors: Sequence[Atoms]) -> tuple[Value, ...]:
        """All outputs, labelled alike."""
        return tuple(self.labels.value(shape, factors) for shape in self.shapes)

    def count(self, macs: int, *axes: Atoms, batched: bool = False) -> None:
        """This operator performs `macs` multiply-adds, in proportion to what is kept of each axis.

        They are done as often for every image as an operand has parts for it, or once if `batched`.
        """
        per_image = max((float(batched), *(value.per_image for value in self.operands)))
        self.labels.contractions.append(
            Contraction(self.labels.module, macs, axes, per_image, self.labels.node)
        )

    def statistic(self, value: Value, dims: Collection[int]) -> None:
        """This operator computes statistics over these dims."""
        for factor in value.factors:
            over = support(factor) & set(dims)
            if over:
                self.labels.statistics.append(
                    Statistic(self.op, self.labels.module, factor, tuple(sorted(over)))
                )

    def restrict(self, value: Value, keep: Collection[int], reason: str) -> list[Atoms]:
        """Factors of `value` such that nothing is cut along any dim but the `keep` ones.

        What varies along other dims only is pinned. What varies along both (heads × width) stays whole along
        the others.
        """
        kept = []
        for factor in value.factors:
            if support(factor) <= set(keep):
                kept.append(factor)
            elif support(factor) & set(keep):
                row = first(factor, keep)
                self.labels.tie(factor, row)
                kept.append(row)
            else:
                self.labels.pin(factor, reason)
        return kept


Result = Value | tuple[Value, ...]


def short_name(op: str) -> str:
    """Name in the table of operators.

    >>> short_name("aten.conv2d"), short_name("torchvision.roi_align")
    ('conv2d', 'torchvision.roi_align')
    """
    return op.removeprefix("aten.")


def shapes_of(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    """The shapes of the tensors that a node holds."""
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    return tuple(tuple(part.shape) for part in parts if isinstance(part, Tensor))


def module_of(node: fx.Node) -> str:
    """Name of the innermost module in whose forward the operator ran."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


GATHERING = ("gather", "take_along_dim")
"""Operators that take an index of the shape of their result."""

CONVERTING = ("to", "_to_copy", "clone", "contiguous", "alias", "detach")
"""Operators that leave an index as it is."""


def is_index(node: fx.Node) -> bool:
    """Whether what a node gives is read as the index of a gather, and nowhere else."""

    def reads(user: fx.Node) -> bool:
        op = short_name(str(user.target).rpartition(".")[0])
        if op in CONVERTING:
            return is_index(user)
        given = (user.kwargs.get("index"), user.kwargs.get("indices"), *user.args[1:])
        return op in GATHERING and user.args[:1] != (node,) and node in given

    users = [user for user in node.users if "_assert" not in str(user.target)]
    return bool(users) and all(map(reads, users))


def flatten(items: Sequence[Any]) -> list[Any]:
    """Arguments with lists of tensors opened."""
    return [x for item in items for x in (flatten(item) if isinstance(item, list | tuple) else [item])]


def without_rule(site: Site) -> Result:
    """Freeze what the operator reads; its outputs carry no labels."""
    pin_all(site, f"no rule for {site.op}")
    return tuple(Value(shape) for shape in site.shapes)


def pin_all(site: Site, reason: str) -> None:
    """Freeze what the operator reads."""
    for operand in site.operands:
        for factor in site.labels.exposed(operand).factors:
            site.labels.pin(factor, reason)


def resized(factor: Atoms, dims: Sequence[int | None]) -> Atoms:
    """A factor with its dims in a new order, `None` for a new dim; dims left out have size 1."""
    moved = factor.transpose([*[d for d in dims if d is not None], *missing(factor.ndim, dims)])
    sizes = iter(moved.shape)
    return moved.reshape([1 if dim is None else next(sizes) for dim in dims])


def missing(rank: int, dims: Collection[int | None]) -> list[int]:
    """The dims of a tensor of this rank that are not among `dims`."""
    return [dim for dim in range(rank) if dim not in dims]
