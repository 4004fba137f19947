"""Label arrays against full arrays: one label per element, every operation done by NumPy itself."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.graph.join import broadcast, join
from secateur.graph.labels import Labels, Value, along, blocks, compress, first, reshape
from secateur.graph.solve import solve

SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple)


@st.composite
def regrouped(draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of equal size, as `view` takes them."""
    shape = draw(SHAPES)
    factors = [p for size in shape for p in ([2, 2] if size == 4 else [2, 3] if size == 6 else [size])]
    cuts = draw(st.lists(st.booleans(), min_size=len(factors), max_size=len(factors)))
    target: list[int] = []
    for prime, cut in zip(factors, cuts, strict=True):
        if cut or not target:
            target.append(prime)
        else:
            target[-1] *= prime
    return shape, tuple(target)


@given(regrouped(), st.data())
def test_reshaping_a_factor_is_reshaping_the_full_array(shapes, data) -> None:
    shape, target = shapes
    varying = [data.draw(st.booleans()) and size > 1 for size in shape]
    small = tuple(size if vary else 1 for size, vary in zip(shape, varying, strict=True))
    factor = np.arange(math.prod(small)).reshape(small)
    result = reshape(factor, shape, target)
    expected = np.broadcast_to(factor, shape).reshape(target)
    assert (np.broadcast_to(result, target) == expected).all()
    assert (np.broadcast_to(compress(result), target) == expected).all()


@given(regrouped())
def test_blocks_cover_both_shapes_with_equal_products(shapes) -> None:
    shape, target = shapes
    found = blocks(shape, target)
    assert [dim for source, _ in found for dim in source] == list(range(len(shape)))
    assert [dim for _, sink in found for dim in sink] == list(range(len(target)))
    for source, sink in found:
        assert math.prod(shape[d] for d in source) == math.prod(target[d] for d in sink)


def roots(labels: Labels, *atoms: np.ndarray) -> list[list[int]]:
    root = solve(labels).root
    return [root[a].ravel().tolist() for a in atoms]


def test_arithmetic_ties_dims_that_meet_and_leaves_broadcast_ones() -> None:
    labels = Labels()
    channels, gate = labels.fresh(3, unit=True), labels.fresh(3, unit=True)
    x = Value((2, 3, 4), (along(channels, 1, 3),))
    y = Value((3, 1), (along(gate, 0, 2),))
    mask = Value((2, 1, 4))
    out = broadcast(labels, [x, y, mask], (2, 3, 4))
    a, b = roots(labels, channels, gate)
    assert a == b
    assert len(set(a)) == 3
    assert [f.shape for f in out.factors] == [(1, 3, 1)]
    assert solve(labels).removable[channels].all()


def test_a_dim_that_meets_one_without_labels_is_pinned() -> None:
    labels = Labels()
    channels = labels.fresh(3, unit=True)
    broadcast(labels, [Value((2, 3), (along(channels, 1, 2),)), Value((3,))], (2, 3))
    assert not solve(labels).removable.any()


def test_a_grid_that_meets_its_two_axes_is_cut_along_one_of_them() -> None:
    """A (2, 3) grid against labels of its rows and of its columns: the columns are more, so the rows stay."""
    labels = Labels()
    rows, columns, grid = labels.fresh(2, unit=True), labels.fresh(3, unit=True), labels.fresh(6, unit=True)
    both = Value((2, 3), (along(rows, 0, 2), along(columns, 1, 2)))
    broadcast(labels, [both, Value((2, 3), (grid.reshape(2, 3),))], (2, 3))
    found_rows, found_columns, found_grid = roots(labels, rows, columns, grid)
    assert found_grid == found_columns * 2
    assert len(set(found_columns)) == 3
    removable = solve(labels).removable
    assert not removable[found_rows].any()
    assert removable[found_columns].all()


def test_a_single_channel_is_pinned_and_not_forgotten() -> None:
    labels = Labels()
    one = labels.fresh(1, unit=True)
    assert labels.value((2, 1), [along(one, 1, 2)]).factors == ()
    assert not solve(labels).removable.any()


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_the_solver_takes_the_option_that_leaves_most_units(shape: tuple[int, int]) -> None:
    labels = Labels()
    grid = labels.fresh(6, unit=True).reshape(shape)
    labels.choose({"rows": [(grid, grid[:, :1])], "columns": [(grid, grid[:1])]})
    assert solve(labels).removable.sum() == 3
    labels.pin(grid[:, 0], "a column stays")  # every row holds one of its atoms
    assert solve(labels).removable.sum() == shape[1] - 1


@st.composite
def products(draw) -> tuple[list[tuple[list[list[int]], set[int]]], list[int], list[int], bool]:
    """Operands as factors, each a list of dims it varies along, and dims without labels; sizes; dims dropped."""
    sizes = draw(st.lists(st.sampled_from([2, 3]), min_size=2, max_size=4))
    operands = []
    for _ in range(draw(st.integers(1, 3))):
        dims = draw(st.permutations(range(len(sizes))))
        cuts = sorted(draw(st.sets(st.integers(0, len(dims)), max_size=3)))
        factors = [list(dims[a:b]) for a, b in itertools.pairwise([0, *cuts]) if a < b]
        plain = draw(st.sets(st.integers(0, len(sizes) - 1), max_size=1))
        operands.append((factors, plain))
    drop = draw(st.sets(st.integers(0, len(sizes) - 1), max_size=2))
    return operands, sizes, sorted(drop), draw(st.booleans())


@settings(max_examples=300, deadline=None)
@given(products(), st.integers(0, 2**32 - 1))
def test_operands_of_a_product_lose_the_same_positions(product, seed) -> None:
    """Remove any units after solving: along every dim all operands and the result have the same survivors."""
    operands, sizes, drop, attention = product
    labels = Labels()
    values = []
    for factors, plain in operands:
        present = plain.union(*factors)
        shape = [size if dim in present else 1 for dim, size in enumerate(sizes)]
        arrays = []
        for dims in factors:
            small = [size if dim in dims else 1 for dim, size in enumerate(sizes)]
            arrays.append(labels.fresh(math.prod(small), unit=True).reshape(small))
            if len(dims) > 1:  # as `view` does where it splits a dim
                labels.choose({f"axis {dim}": [(arrays[-1], first(arrays[-1], [dim]))] for dim in dims})
        values.append(Value(tuple(shape), tuple(arrays)))
    heads = [dim for dim in range(len(sizes)) if dim not in drop] if attention else []
    result = join(labels, values, drop, heads)
    solution = solve(labels)
    free = np.flatnonzero(solution.removable)
    removed = np.random.default_rng(seed).permutation(free)[: -(-len(free) // 4)]
    dead = np.isin(solution.root, removed)
    shape = tuple(1 if dim in drop else size for dim, size in enumerate(sizes))
    results = Value(shape, tuple(result.factors))
    lines: dict[int, np.ndarray] = {}
    for value in [*values, results]:
        alive = np.ones(value.shape, dtype=bool)
        for factor in value.factors:
            alive &= ~dead[factor]
        if not alive.any():
            return  # everything is gone; groups never lose their last unit
        box = np.ones((), dtype=bool)
        for dim, size in enumerate(value.shape):
            if size > 1 and (value is not results or any(v.shape[dim] > 1 for v in values)):
                line = alive.any(axis=tuple(d for d in range(alive.ndim) if d != dim))
                assert (line == lines.setdefault(dim, line)).all()
                box = box & line.reshape([-1 if d == dim else 1 for d in range(alive.ndim)])
        assert (alive == box).all()
    share = math.prod(np.mean(~dead[axis]) for axis in result.axes)
    assert share == pytest.approx(math.prod(line.mean() for line in lines.values()))
