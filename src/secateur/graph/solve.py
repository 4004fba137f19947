"""From ties, pins and choices to classes of atoms that can be removed."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from secateur.graph.labels import PINNED, Atoms, Labels

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Solution:
    """Which atoms form a unit.

    Attributes:
        root: (atoms,), the smallest atom of the class each atom belongs to.
        removable: (atoms,), True at the root of a class that may be removed.
        reasons: root of a class that must stay -> (reason, module).
    """

    root: Atoms
    removable: Flags
    reasons: dict[int, tuple[str, str]]


def solve(labels: Labels, attention: str = "heads") -> Solution:
    """Close the ties, decide the choices one by one, and find what may go.

    Args:
        attention: what attention products prefer to lose, "heads" or "dims" (of every head); the other one is
            taken where nothing could be removed. All other choices take the option that leaves most units.
    """
    first = [a for a, _ in labels.ties]
    second = [b for _, b in labels.ties]
    root = _components(labels.count, np.concatenate([*first, []]), np.concatenate([*second, []]))
    unit = np.zeros(labels.count, dtype=bool)
    pinned = np.zeros(labels.count, dtype=bool)
    for atoms in labels.units:
        unit[root[atoms]] = True
    pinned[root[PINNED]] = True
    for pin in labels.pins:
        pinned[root[pin.atoms]] = True
    for choice in sorted(labels.choices, key=lambda choice: not choice.attention):
        merges = [(name, _merge(root[a], root[b], unit, pinned)) for name, a, b in choice.options]
        liked = [merge for name, merge in merges if name == attention and merge.left > 1]
        best = min(liked or [merge for _, merge in merges], key=lambda merge: merge.lost)
        touched, target = best.touched, best.target
        lookup = np.arange(labels.count)
        lookup[touched] = target
        for flags in (unit, pinned):
            np.logical_or.at(flags, target, flags[touched])
        root = lookup[root]
    reasons: dict[int, tuple[str, str]] = {}
    for pin in labels.pins:
        for index in np.unique(root[pin.atoms]).tolist():
            reasons.setdefault(index, (pin.reason, pin.module))
    reasons.setdefault(int(root[PINNED]), ("tied to channels that are given, such as the model's input", ""))
    is_root = root == np.arange(labels.count)
    return Solution(root, unit & ~pinned & is_root, reasons)


def _components(count: int, a: Atoms, b: Atoms) -> Atoms:
    """The smallest atom of each connected component, per atom."""
    edges = coo_array(
        (np.ones(len(a), dtype=bool), (a.astype(np.int64), b.astype(np.int64))), shape=(count, count)
    )
    components, index = connected_components(edges, directed=False)
    smallest = np.full(components, count, dtype=np.int64)
    np.minimum.at(smallest, index, np.arange(count))
    result: Atoms = smallest[index]
    return result


@dataclass(frozen=True)
class _Merge:
    """What tying two lists of roots does.

    Attributes:
        touched: the roots in the lists.
        target: the root that each of them becomes.
        left: units among these.
        lost: units fewer than before.
    """

    touched: Atoms
    target: Atoms
    left: int
    lost: int


def _merge(a: Atoms, b: Atoms, unit: Flags, pinned: Flags) -> _Merge:
    touched, inverse = np.unique(np.concatenate([a, b]), return_inverse=True)
    local = _components(len(touched), inverse[: len(a)], inverse[len(a) :])
    has_unit = np.zeros(len(touched), dtype=bool)
    has_pin = np.zeros(len(touched), dtype=bool)
    has_unit[local[unit[touched]]] = True
    has_pin[local[pinned[touched]]] = True
    left = int((has_unit & ~has_pin).sum())
    return _Merge(touched, touched[local], left, int((unit & ~pinned)[touched].sum()) - left)
