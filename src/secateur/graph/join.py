"""Arithmetic on labels: what several operands that share dims say about each other.

All operands are aligned to one *joint* index space, a dim per letter of an einsum. Broadcasting arithmetic
keeps all its dims, a reduction drops some, a matrix product drops the one it sums over. Along a shared dim
operands lose the same positions. Where a factor varies along several dims (heads × width), it can be cut
along one of them only; which one must agree wherever factors meet, and that is a choice.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from secateur.graph.labels import Alternatives, Atoms, Labels, Value, along, first, support

FIXED = "meets a tensor whose channels are fixed"
OTHER = "its channels are cut along another dim"
INSTEAD = {"heads": "whole heads are removed instead", "dims": "dims of every head are removed instead"}


@dataclass(frozen=True)
class Joint:
    """What is left of the operands' labels.

    Attributes:
        factors: of the result, in the joint space; dropped dims have size 1.
        axes: independent axes of the joint space; the survivors of the space are the product of theirs.
    """

    factors: list[Atoms]
    axes: list[Atoms]


@dataclass(frozen=True)
class Part:
    """One factor of one operand."""

    operand: int
    factor: Atoms
    dims: frozenset[int]


def join(
    labels: Labels,
    operands: Sequence[Value],
    drop: Collection[int] = (),
    heads: Collection[int] = (),
) -> Joint:
    """Tie the factors of aligned operands where they meet, and label the result.

    Args:
        operands: values of one rank, with size 1 where an operand does not have the dim.
        drop: dims that the result does not have (summed over).
        heads: batch dims of a product of two activations; a choice between cutting along one of them and
            cutting the dims inside is left to the user's preference.
    """
    joint = Joint([], [])
    parts = [
        Part(number, factor, support(factor))
        for number, operand in enumerate(operands)
        for factor in operand.factors
    ]
    for family in _families(parts):
        _merge(labels, operands, family, frozenset(drop), frozenset(heads), joint)
    return joint


def broadcast(labels: Labels, operands: Sequence[Value], shape: Sequence[int]) -> Value:
    """Broadcasting arithmetic: labelled dims that meet are tied, and pinned where one has no label."""
    rank = len(shape)
    aligned = []
    for operand in map(labels.exposed, operands):
        lead = (1,) * (rank - len(operand.shape))
        factors = tuple(factor.reshape(lead + factor.shape) for factor in operand.factors)
        aligned.append(Value(lead + operand.shape, factors))
    return labels.value(shape, join(labels, aligned).factors)


def _families(parts: list[Part]) -> Iterator[list[Part]]:
    """Parts that meet: they vary along a common dim and belong to different operands."""
    rest = list(parts)
    while rest:
        family, queue = [], [rest.pop(0)]
        while queue:
            part = queue.pop()
            family.append(part)
            met = [p for p in rest if p.operand != part.operand and p.dims & part.dims]
            rest = [p for p in rest if all(p is not m for m in met)]
            queue += met
        yield family


def _merge(
    labels: Labels,
    operands: Sequence[Value],
    family: list[Part],
    drop: frozenset[int],
    heads: frozenset[int],
    joint: Joint,
) -> None:
    every = frozenset().union(*(part.dims for part in family))
    fixed = {
        dim
        for dim in every
        for number, operand in enumerate(operands)
        if operand.shape[dim] > 1 and not any(p.operand == number and dim in p.dims for p in family)
    }
    one = family[0]
    alike = all(part.dims == one.dims for part in family)
    if alike and not fixed and (one.dims <= drop or not one.dims & drop):
        for part in family[1:]:
            labels.tie(part.factor, one.factor)
        joint.axes.append(one.factor.ravel())
        if not one.dims & drop:
            joint.factors.append(one.factor)
        return
    ways = _ways([part.dims for part in family], every - fixed)
    if len(ways) > 1:
        _choose(labels, family, ways, drop, heads, joint)
        return
    taken: dict[int, Atoms] = {}
    for part in family:
        dim = next(iter(part.dims & ways[0]), None) if ways else None
        if dim is None:
            labels.pin(part.factor, FIXED)
            continue
        row = first(part.factor, [dim])
        labels.tie(part.factor, row)
        labels.tie(row, taken.setdefault(dim, row))
    joint.axes.extend(row.ravel() for row in taken.values())
    joint.factors.extend(row for dim, row in taken.items() if dim not in drop)


def _ways(supports: Sequence[frozenset[int]], dims: Collection[int]) -> list[frozenset[int]]:
    """The largest sets of dims to cut along with at most one in every support.

    >>> [sorted(way) for way in _ways([frozenset({0, 1}), frozenset({0, 2})], [0, 1, 2])]
    [[1, 2], [0]]
    """
    found: list[frozenset[int]] = []
    for size in range(len(dims), 0, -1):
        for way in map(frozenset, combinations(sorted(dims), size)):
            if all(len(way & dims) <= 1 for dims in supports) and not any(way < other for other in found):
                found.append(way)
    return found


def _choose(
    labels: Labels,
    family: list[Part],
    ways: list[frozenset[int]],
    drop: frozenset[int],
    heads: frozenset[int],
    joint: Joint,
) -> None:
    """Record one option per way; atoms of the result are new and follow the option that is taken."""
    rank = family[0].factor.ndim
    ties: list[list[tuple[Atoms, Atoms]]] = [[] for _ in ways]
    pinned: list[list[Atoms]] = [[] for _ in ways]
    rows: dict[int, Atoms] = {}

    def follow(atoms: Atoms, dims: frozenset[int]) -> None:
        """Atoms are those of the dim that is cut, and stay where none of these is."""
        for number, way in enumerate(ways):
            cut = next(iter(dims & way), None)
            if cut is None:
                pinned[number].append(atoms)
            else:
                ties[number].append((atoms, rows[cut]))

    for dim in sorted(frozenset().union(*ways)):
        vectors = [first(part.factor, [dim]).ravel() for part in family if dim in part.dims]
        rows[dim] = along(_like(labels, np.stack(vectors)), dim, rank)
        follow(rows[dim], frozenset({dim}))
    results: dict[frozenset[int], Atoms] = {}
    for part in sorted(family, key=lambda part: len(part.dims & drop)):
        kept = part.dims - drop
        result = part.factor
        follow(part.factor, part.dims)
        if kept and kept != part.dims:
            pattern = first(part.factor, kept)
            result = _like(labels, pattern.reshape(1, -1)).reshape(pattern.shape)
            follow(result, kept)
        if kept:
            results.setdefault(kept, result)
    names = ["heads" if way & heads else "dims" for way in ways]
    options = (
        labels.option(name, tie, pin, INSTEAD[name] if heads else OTHER)
        for name, tie, pin in zip(names, ties, pinned, strict=True)
    )
    labels.alternatives.append(Alternatives(tuple(options), attention=bool(heads)))
    joint.axes.extend(row.ravel() for row in rows.values())
    # A factor whose dims another one has too adds nothing: every option ties the two.
    joint.factors.extend(f for dims, f in results.items() if not any(dims < other for other in results))


def _like(labels: Labels, vectors: Atoms) -> Atoms:
    """New atoms, (n,), equal where the columns of (k, n) are: what a batch dim repeats stays repeated."""
    _, inverse = np.unique(vectors, axis=1, return_inverse=True)
    inverse = inverse.ravel()
    return labels.fresh(int(inverse.max()) + 1)[inverse]
