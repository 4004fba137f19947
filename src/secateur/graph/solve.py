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


def solve(labels: Labels, attention: str = "heads", going: Flags | None = None) -> Solution:
    """Close the ties, decide the choices one by one, and find what may go.

    Args:
        attention: what attention products prefer to lose, "heads" or "dims" (of every head); the other one is
            taken where nothing could be removed. All other choices take the option that leaves most units.
        going: (atoms,), True for some that are about to be removed while all others of their tensors stay: options
            that allow this come first.
    """
    first, second = zip(*labels.ties, strict=True) if labels.ties else ((), ())
    none = np.zeros(0, dtype=np.int64)
    start = _components(labels.count, np.concatenate([none, *first]), np.concatenate([none, *second]))
    smallest, index = np.unique(start, return_inverse=True)  # from here on, classes of atoms by number
    classes = np.arange(len(smallest))
    unit = np.zeros(len(smallest), dtype=bool)
    pinned = np.zeros(len(smallest), dtype=bool)
    for atoms in labels.units:
        unit[index[atoms]] = True
    pinned[index[PINNED]] = True
    goes, stays = np.zeros((2, len(smallest)), dtype=bool)
    if going is not None:
        of_tensors = np.concatenate([*labels.tensors.values(), none])
        goes[index[going]] = True
        stays[index[of_tensors[~going[of_tensors]]]] = True
    pins = list(labels.pins)
    for pin in pins:
        pinned[index[pin.atoms]] = True
    for found in sorted(labels.alternatives, key=lambda found: not found.attention):
        now = classes[index]
        merges = []
        for option in found.options:
            a, b, stay = now[option.ties[0]], now[option.ties[1]], now[option.pin.atoms]
            merges.append((option, _merge(a, b, stay, unit, pinned)))
        merges = [merge for merge in merges if merge[1].allows(goes, stays)] or merges
        liked = [merge for merge in merges if merge[0].name == attention and merge[1].left > 1]
        option, best = min(liked or merges, key=lambda merge: merge[1].lost)
        for flags in (goes, stays):
            np.logical_or.at(flags, best.target, flags[best.touched])
        np.logical_or.at(unit, best.target, unit[best.touched])
        np.logical_or.at(pinned, best.target, pinned[best.touched])
        pinned[now[option.pin.atoms]] = True
        pinned[best.target[np.isin(best.touched, now[option.pin.atoms])]] = True
        lookup = np.arange(len(smallest))
        lookup[best.touched] = best.target
        classes = lookup[classes]
        pins.append(option.pin)
    root = smallest[classes][index]
    reasons: dict[int, tuple[str, str]] = {}
    for pin in pins:
        for number in np.unique(root[pin.atoms]).tolist():
            reasons.setdefault(number, (pin.reason, pin.module))
    reasons.setdefault(int(root[PINNED]), ("tied to channels that are given, such as the model's input", ""))
    is_root = root == np.arange(labels.count)
    removable = (unit & ~pinned)[classes][index] & is_root
    return Solution(root, removable, reasons)


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
        local: number of the class that each of the roots comes into.
        pinned: per class, whether it must stay.
    """

    touched: Atoms
    target: Atoms
    left: int
    lost: int
    local: Atoms
    pinned: Flags

    def allows(self, goes: Flags, stays: Flags) -> bool:
        """Whether no root that goes comes into one class with one that stays."""
        kept = self.pinned.copy()
        kept[self.local[stays[self.touched]]] = True
        return not kept[self.local[goes[self.touched]]].any()


def _merge(a: Atoms, b: Atoms, pins: Atoms, unit: Flags, pinned: Flags) -> _Merge:
    touched, inverse = np.unique(np.concatenate([a, b, pins]), return_inverse=True)
    local = _components(len(touched), inverse[: len(a)], inverse[len(a) : 2 * len(a)])
    has_unit = np.zeros(len(touched), dtype=bool)
    has_pin = np.zeros(len(touched), dtype=bool)
    has_unit[local[unit[touched]]] = True
    has_pin[local[pinned[touched]]] = True
    has_pin[local[inverse[2 * len(a) :]]] = True
    left = int((has_unit & ~has_pin).sum())
    lost = int((unit & ~pinned)[touched].sum()) - left
    return _Merge(touched, touched[local], left, lost, local, has_pin)
