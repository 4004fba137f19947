"""What the analysis knows about every tensor of the captured graph, for those who apply a plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, fx

from secateur.errors import CutError
from secateur.graph.branches import Branch
from secateur.graph.capture import Capture
from secateur.graph.labels import Atoms, Value
from secateur.graph.modules import Keep


@dataclass(frozen=True)
class Trace:
    """The evaluation-mode graph with the labels of every node.

    Attributes:
        captured: the graph.
        values: node -> a labelled value, or a tuple of them.
        tensors: (parameter or buffer name, dim) -> one atom per position.
        unit: (atoms,), the number of the unit each atom belongs to, counted over all groups; -1 if it stays.
        blocks: number of a group -> the branch that is its only unit. These groups are the last.
        gone: (atoms,), True for those that earlier cuts removed; None: there were none.
    """

    captured: Capture
    values: dict[fx.Node, Any]
    tensors: dict[tuple[str, int], Atoms]
    unit: Atoms
    blocks: Mapping[int, Branch] = field(default_factory=dict)
    gone: Keep | None = None

    def survivors(self, masks: Sequence[Tensor]) -> "Survivors":
        """What is left of every tensor under a plan's masks, (units,) bool per group, True = keep."""
        removed = np.concatenate([*(~mask.cpu().numpy() for mask in masks), [False]])
        dead = removed[self.unit]
        skipped = tuple(branch for number, branch in self.blocks.items() if not masks[number].all())
        return Survivors(self, dead if self.gone is None else dead | self.gone, skipped)

    def so_far(self) -> "Survivors":
        """What earlier cuts left."""
        return Survivors(self, np.zeros(len(self.unit), dtype=bool) if self.gone is None else self.gone)

    def after(self, masks: Sequence[Tensor]) -> "Trace":
        """The trace for a model that was cut by masks, whose further cuts speak of the units that are left."""
        kept = np.concatenate([*(mask.cpu().numpy() for mask in masks), [True]])
        stays = kept[self.unit]
        number = np.where(stays & (self.unit >= 0), (np.cumsum(kept) - 1)[self.unit], -1)
        return replace(self, unit=number, gone=self.survivors(masks).dead)


@dataclass(frozen=True)
class Survivors:
    """What is left of every tensor of the graph under one plan.

    Attributes:
        dead: (atoms,), True for those that are removed.
        skipped: branches that are left out.
    """

    trace: Trace
    dead: Keep
    skipped: tuple[Branch, ...] = ()

    def keep(self, value: Value) -> dict[int, Keep]:
        """Dim -> mask over its positions, for the dims that lose some.

        Raises:
            CutError: what is left is no box, so that no choice of positions per dim gives it.
        """
        result: dict[int, Keep] = {}
        for alive in self._alive(value):
            dims = [dim for dim, size in enumerate(alive.shape) if size > 1]
            box = np.ones((), dtype=bool)
            for dim in dims:
                line: Keep = alive.any(axis=tuple(d for d in range(alive.ndim) if d != dim))  # type: ignore[assignment]
                box = box & line.reshape([-1 if d == dim else 1 for d in range(alive.ndim)])
                if not line.all():
                    result[dim] = line & result[dim] if dim in result else line
            if not (box == alive).all():
                raise CutError(
                    f"the survivors of a tensor of shape {value.shape} do not form a rectangle in its dims {dims}"
                )
        return result

    def shape(self, value: Value) -> tuple[int, ...]:
        """The shape of what is left."""
        keep = self.keep(value)
        return tuple(int(keep[dim].sum()) if dim in keep else size for dim, size in enumerate(value.shape))

    def _alive(self, value: Value) -> Iterator[Keep]:
        if value.tensor is not None:
            rank = len(value.shape)
            for dim in range(rank):
                atoms = self.trace.tensors.get((value.tensor, dim))
                if atoms is not None and self.dead[atoms].any():
                    yield ~self.dead[atoms].reshape([-1 if d == dim else 1 for d in range(rank)])
            return
        for factor in value.factors:
            dead = self.dead[factor]
            if dead.any():
                yield ~dead


def repeated(keep: Keep, size: int) -> Keep | None:
    """The mask of a dim, such as images × heads, where the dim has another size; None if it cannot be.

    >>> repeated(np.array([True, False, True, False]), 6).tolist()
    [True, False, True, False, True, False]
    """
    lengths = (n for n in range(1, len(keep) + 1) if len(keep) % n == 0)
    part = next(keep[:n] for n in lengths if (keep.reshape(-1, n) == keep[:n]).all())
    return None if size % len(part) else np.tile(part, size // len(part))
