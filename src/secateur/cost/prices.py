"""What widths and blocks cost in milliseconds, as a sum that a choice of them can be made by.

    ms(k) = dense - per_mac (MACs(dense) - MACs(k)) - sum over blocks that go of extra_block

A block that goes saves its multiply-adds, and what its operators take however little they compute. Both numbers are
measured on a few cuts of the model; what comes of the choice is measured again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.cost.cost import Cost
from secateur.cost.formulas import Sum
from secateur.graph import Axis, Graph, Product, named_tensors

NANOSECONDS = "nanoseconds"
"""The measure: of one pass, as these prices tell it."""


@dataclass(frozen=True)
class Prices:
    """Milliseconds of one pass.

    Attributes:
        dense: of the whole model.
        per_mac: of one multiply-add that goes because a width shrinks.
        extra: block -> what goes with it, besides its multiply-adds.
    """

    dense: float
    per_mac: float
    extra: Mapping[str, float]

    def formula(self, graph: Graph) -> Sum:
        """Nanoseconds as a function of the units kept."""
        macs = [Product(p.name, 1e6 * self.per_mac * p.factor, p.axes) for p in graph.macs]
        blocks = [
            Product(group.name, 1e6 * self.extra[group.name], (Axis(0, ((number, 1),)),))
            for number, group in enumerate(graph.groups)
            if group.branch
        ]
        total = Cost(graph).macs() * self.per_mac + sum(self.extra.values())
        rest = Product("", 1e6 * (self.dense - total), ())
        return Sum([*macs, *blocks, rest], len(graph.groups))


def measure_prices(
    model: nn.Module,
    graph: Graph,
    cut: Callable[[list[Tensor]], nn.Module],
    clock: Callable[[nn.Module], float],
) -> Prices:
    """Time the model, the model at half of all widths, and the model without all blocks of one kind, for every kind.

    Args:
        model: the dense one.
        graph: of it, with blocks.
        cut: a copy of the model, from masks.
        clock: measures the milliseconds of a model.
    """
    cost = Cost(graph)
    shapes = {name: tuple(t.shape) for name, t in named_tensors(model)}
    kinds: dict[object, list[int]] = {}
    for number, group in enumerate(graph.groups):
        if group.branch:
            without = [group.units - (i == number) for i, group in enumerate(graph.groups)]
            alike = tuple(shapes[member.tensor] for member in group.members)
            kinds.setdefault((cost.macs(without), alike), []).append(number)
    dense = clock(model)

    def saved(kept: list[int]) -> tuple[float, int]:
        masks = [torch.arange(group.units) < k for group, k in zip(graph.groups, kept, strict=True)]
        return dense - clock(cut(masks)), cost.macs() - cost.macs(kept)

    channels = [group for group in graph.groups if not group.branch]
    per_mac = dense / cost.macs() if not channels else 0.0
    if channels:
        ms, macs = saved([g.units if g.branch else (g.units + 1) // 2 for g in graph.groups])
        per_mac = max(0.0, ms) / macs
    extra: dict[str, float] = {}
    for numbers in kinds.values():
        ms, macs = saved([g.units - (i in numbers) for i, g in enumerate(graph.groups)])
        each = max(0.0, ms - per_mac * macs) / len(numbers)
        extra |= {graph.groups[number].name: each for number in numbers}
    return Prices(dense, per_mac, extra)
