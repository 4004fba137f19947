"""Widths of tensor dims, and the counts that are products of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Width of a dim: `base` positions that stay, plus some per kept unit of each group.

    Attributes:
        parts: (group number, positions per unit).
    """

    base: int
    parts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Product:
    """A count that is a constant times the widths of some axes: the MACs of a layer, the size of a tensor."""

    name: str
    factor: float
    axes: tuple[Axis, ...]
