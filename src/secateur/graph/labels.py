"""Label arrays: which positions of which tensors live and die together.

Every tensor carries *factors*: small int64 arrays of its own rank whose dims are either full or 1
("uniform along this dim"). The entries are *atoms*; an element is dead when the atom of any of its factors
is dead. Atom 0 is pinned: it never dies. A shape operation is the same NumPy operation on the small arrays,
and arithmetic only *ties* atoms of its operands (join.py). Nothing here knows an operator by name.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Atoms = npt.NDArray[np.int64]
PINNED = 0


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Attributes:
        shape: its shape at capture.
        factors: see the top of the file.
        tensor: name, if it is a parameter or buffer.
        weight: it is computed from parameters and constants alone, such as a standardised kernel.
        data: it depends on the model's inputs.
        per_image: parts it has for every image; 0: it is there once. Mostly 1; more where the capture holds fewer
            rows than an image really has.
    """

    shape: tuple[int, ...]
    factors: tuple[Atoms, ...] = ()
    tensor: str | None = None
    weight: bool = False
    data: bool = False
    per_image: float = 0.0


@dataclass(frozen=True)
class Pin:
    """Atoms that must stay, and why."""

    atoms: Atoms
    reason: str
    module: str


@dataclass(frozen=True)
class Option:
    """One way to keep an operation valid.

    Attributes:
        name: what is cut then; several options may share a name.
        ties: atoms that die together, as two lists.
        pin: atoms that stay, and why.
    """

    name: str
    ties: tuple[Atoms, Atoms]
    pin: Pin


@dataclass(frozen=True)
class Alternatives:
    """Ways to keep an operation valid: one of them must hold.

    Attributes:
        attention: the options are "heads" and "dims" of an attention product; these are decided first.
    """

    options: tuple[Option, ...]
    attention: bool = False


@dataclass(frozen=True)
class Statistic:
    """A value computed over whole dims: it changes when part of a dim goes, and not because of a zero.

    Attributes:
        op: the operation, such as "aten.layer_norm".
        factor: a factor of what it reads.
        dims: the dims it is computed over.
    """

    op: str
    module: str
    factor: Atoms
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Contraction:
    """Multiply-adds of one operation: `macs` times the share of every axis that is kept.

    Attributes:
        per_image: how often it is done for every image; 0 for what a forward pass computes once (a table of positions).
        node: name of the operator in the captured graph.
    """

    module: str
    macs: int
    axes: tuple[Atoms, ...]
    per_image: float = 1.0
    node: str = ""


@dataclass(frozen=True)
class Pad:
    """Zeros put before and after the channels by a module whose attributes say how many."""

    module: str
    before: Atoms
    after: Atoms


@dataclass
class Labels:
    """All atoms of a model and what is known about them; rules add to it, the solver reads it.

    Attributes:
        tensors: (parameter or buffer name, dim) -> one atom per position.
        roles: (name, dim) -> what the dim is for the operation that uses it; the first use decides.
        parameters: names of the parameters; other named tensors are buffers.
        images: in the traced batch.
    """

    parameters: frozenset[str] = frozenset()
    images: int = 1
    tensors: dict[tuple[str, int], Atoms] = field(default_factory=dict)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    ties: list[tuple[Atoms, Atoms]] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    pads: list[Pad] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    units: list[Atoms] = field(default_factory=list)
    count: int = 1
    module: str = ""
    node: str = ""
    _starts: list[int] = field(default_factory=list)
    _keys: list[tuple[str, int]] = field(default_factory=list)

    def fresh(self, count: int, *, unit: bool = False) -> Atoms:
        """New atoms; `unit` marks those that may be removed (the outputs of a layer)."""
        atoms = np.arange(self.count, self.count + count, dtype=np.int64)
        self.count += count
        if unit:
            self.units.append(atoms)
        return atoms

    def tie(self, a: Atoms, b: Atoms) -> None:
        """Atoms of `a` and `b`, broadcast against each other, die together."""
        a, b = np.broadcast_arrays(a, b)
        self.ties.append((a.ravel(), b.ravel()))

    def pin(self, atoms: Atoms, reason: str) -> None:
        """These atoms stay, for a reason that the report shows."""
        self.pins.append(Pin(np.unique(atoms), reason, self.module))

    def choose(
        self,
        options: Mapping[str, Sequence[tuple[Atoms, Atoms]]],
    ) -> None:
        """One of the options must hold; the solver takes the one that leaves most units."""
        self.alternatives.append(
            Alternatives(tuple(self.option(name, ties) for name, ties in options.items()))
        )

    def option(
        self,
        name: str,
        ties: Sequence[tuple[Atoms, Atoms]],
        pinned: Sequence[Atoms] = (),
        reason: str = "",
    ) -> Option:
        """One option, from ties of arrays that broadcast and arrays of atoms that stay."""
        pairs = [np.broadcast_arrays(a, b) for a, b in ties]
        return Option(
            name,
            (_joined([a for a, _ in pairs]), _joined([b for _, b in pairs])),
            Pin(np.unique(_joined(pinned)), reason, self.module),
        )

    def value(self, shape: Iterable[int], factors: Iterable[Atoms] = ()) -> Value:
        """A value with its factors reduced to the dims along which they vary.

        A factor that varies along no dim would be lost from view (one channel taken out of many), so its
        atom is pinned: dropping it instead would let a tensor be cut to nothing.
        """
        kept = []
        for factor in map(compress, factors):
            if factor.size > 1:
                kept.append(factor)
            elif factor.item() != PINNED:
                self.pin(factor, "a single channel is used on its own")
        return Value(tuple(shape), tuple(kept))

    def tensor_axis(self, name: str, dim: int, size: int, role: str, *, unit: bool = False) -> Atoms:
        """The atoms along one dim of a parameter or buffer, minted at first use."""
        if (name, dim) not in self.tensors:
            self.tensors[name, dim] = self.fresh(size)
            self._starts.append(int(self.tensors[name, dim][0]) if size else self.count)
            self._keys.append((name, dim))
        if self.roles.setdefault((name, dim), role) == "other":
            self.roles[name, dim] = role
        if unit:
            self.units.append(self.tensors[name, dim])
        return self.tensors[name, dim]

    def axis(self, value: Value, dim: int, role: str = "other", *, unit: bool = False) -> Atoms:
        """The atoms along one dim, (size,); all pinned where the value carries none.

        Where a factor varies along other dims too (heads × width), those are tied first.

        Args:
            role: what the dim is for, if the value is a parameter or computed from parameters.
            unit: these atoms may be removed: they are the outputs of a layer.
        """
        size = value.shape[dim]
        if value.tensor is not None:
            return self.tensor_axis(value.tensor, dim, size, role, unit=unit)
        found: Atoms | None = None
        for factor in value.factors:
            if factor.shape[dim] == 1:
                continue
            rows = np.moveaxis(factor, dim, 0).reshape(size, -1)
            if rows.shape[1] > 1:
                self.tie(rows, rows[:, :1])
            if found is None:
                found = rows[:, 0]
            else:
                self.tie(found, rows[:, 0])
        if found is None:
            return np.zeros(size, dtype=np.int64)
        if unit:
            self.units.append(found)
        if role != "other":
            self._assign(found, role)
        return found

    def _assign(self, atoms: Atoms, role: str) -> None:
        """Give the parameter dim that these atoms belong to, if it is one, its role."""
        owner = bisect_right(self._starts, int(atoms[0])) - 1
        if owner < 0 or not np.isin(atoms, self.tensors[self._keys[owner]]).all():
            return
        if self.roles[self._keys[owner]] == "other":
            self.roles[self._keys[owner]] = role

    def exposed(self, value: Value) -> Value:
        """A parameter as an operand of general arithmetic: every dim gets atoms that can be tied."""
        if value.tensor is None:
            return value
        rank = len(value.shape)
        factors = [
            along(self.tensor_axis(value.tensor, dim, size, "other"), dim, rank)
            for dim, size in enumerate(value.shape)
            if size > 1
        ]
        return Value(value.shape, tuple(factors), weight=value.tensor in self.parameters)


def _joined(arrays: Iterable[Atoms]) -> Atoms:
    return np.concatenate([np.zeros(0, dtype=np.int64), *(array.ravel() for array in arrays)])


def along(atoms: Atoms, dim: int, rank: int) -> Atoms:
    """Atoms of one dim as a factor of a tensor of the given rank.

    >>> along(np.array([1, 2, 3]), 1, 4).shape
    (1, 3, 1, 1)
    """
    shape = [1] * rank
    shape[dim] = atoms.size
    return atoms.reshape(shape)


def compress(factor: Atoms) -> Atoms:
    """Drop the dims along which a factor does not vary.

    >>> compress(np.array([[1, 1], [2, 2]])).shape
    (2, 1)
    """
    for dim, size in enumerate(factor.shape):
        if size > 1:
            row = factor.take([0], axis=dim)
            if (factor == row).all():
                factor = row
    return factor


def support(factor: Atoms) -> frozenset[int]:
    """The dims along which a factor varies."""
    return frozenset(dim for dim, size in enumerate(factor.shape) if size > 1)


def first(factor: Atoms, keep: Collection[int]) -> Atoms:
    """The first entry along every dim not in `keep`: tying a factor to it leaves one atom per slice.

    >>> first(np.arange(6).reshape(2, 3), [1])
    array([[0, 1, 2]])
    """
    return factor[tuple(slice(None) if dim in keep else slice(1) for dim in range(factor.ndim))]


def reshape(factor: Atoms, shape: Sequence[int], target: Sequence[int]) -> Atoms:
    """The factor of a tensor of `shape` after `view(target)`.

    Dims are matched in the smallest blocks of equal size; only blocks in which the factor varies are
    written out, so batch and image dims stay at size 1.

    >>> reshape(np.arange(4).reshape(1, 4, 1, 1), (8, 4, 7, 7), (8, 196)).shape
    (1, 196)
    >>> reshape(np.arange(4).reshape(1, 4, 1, 1), (8, 4, 7, 7), (8, 2, 2, 7, 7)).shape
    (1, 2, 2, 1, 1)
    """
    full: list[int] = []
    out: list[int] = []
    for source, sink in blocks(shape, target):
        if any(factor.shape[dim] > 1 for dim in source):
            full += [shape[dim] for dim in source]
            out += [target[dim] for dim in sink]
        else:
            full += [1] * len(source)
            out += [1] * len(sink)
    return np.broadcast_to(factor, full).reshape(out)


def blocks(shape: Sequence[int], target: Sequence[int]) -> list[tuple[range, range]]:
    """Split two shapes of equal size into the shortest runs of dims with equal products.

    >>> blocks((8, 4, 7, 7), (8, 196))
    [(range(0, 1), range(0, 1)), (range(1, 4), range(1, 2))]
    """
    result = []
    i = j = 0
    while i < len(shape) or j < len(target):
        start = i, j
        left = right = 1
        if i < len(shape):
            left, i = shape[i], i + 1
        if j < len(target):
            right, j = target[j], j + 1
        while left != right:
            if left < right:
                left, i = left * shape[i], i + 1
            else:
                right, j = right * target[j], j + 1
        result.append((range(start[0], i), range(start[1], j)))
    return result
