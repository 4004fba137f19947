"""Example inputs at other sizes: more images, and images of another height and width."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils import _pytree as pytree

from secateur.graph.capture import Batching, Inputs, as_call, as_inputs, with_length
from secateur.graph.guard import quiet, untouched, written_out
from secateur.graph.modes import chance_kept, evaluating

SMALL = 128
"""Images below this many pixels are tried larger, those above mostly smaller, which costs less."""

FEW = 2**17
"""Numbers in inputs that are small: some images of 128 × 128."""

STEPS = (1, 8, 32)
"""Sizes tried are multiples of these: many a network takes only multiples of its strides."""

GROWN = ((1.62, 1.31), (1.27, 1.9), (2.13, 1.55), (0.79, 1.21), (0.3, 0.4))
SHRUNK = ((0.72, 0.57), (0.51, 0.89), (0.87, 0.66), (1.19, 0.79), (0.12, 0.1))
"""Heights and widths to try, as shares of those given; none is square, or a multiple of another.

The last is where windows and pools no longer fit into the image.
"""

UNSEEN = ((2.6, 1.1), (1.43, 1.75))
"""Sizes for the proof of small images: no rule of a rewritten module was read from them, and one side is longer."""

SMALLEST = (2 / 7, 3 / 7)
"""An eighth of the pixels: as few as leave several positions to a network that divides by 32."""

AXES: dict[int, tuple[tuple[int, ...], ...]] = {
    5: ((3, 4), (2, 3)),
    4: ((2, 3), (1, 2)),
    3: ((1,), (2,)),
    2: ((1,),),
}
"""Rank of the inputs -> dims that may be height and width, or the length of a sequence; the likeliest first."""


Size = tuple[int, ...]


def main_leaf(inputs: Inputs) -> Tensor | None:
    """The first tensor of most dims, which is taken for the images."""
    tensors = [x for x in pytree.tree_leaves(as_call(inputs)) if isinstance(x, Tensor)]
    return max(tensors, key=lambda x: x.ndim, default=None)


def at_size(inputs: Inputs, dims: tuple[int, ...], size: tuple[int, ...]) -> Inputs | None:
    """The inputs with dims of the main tensor at other sizes, and the same dims of those like it in proportion.

    Returns:
        None: some tensor cannot follow.
    """
    main = main_leaf(inputs)
    assert main is not None
    leaves, tree = pytree.tree_flatten(as_call(inputs))
    for i, x in enumerate(leaves):
        if not isinstance(x, Tensor) or x.ndim != main.ndim:
            continue
        for dim, new in zip(dims, size, strict=True):
            if x.shape[dim] == 1 != main.shape[dim]:
                continue
            if x.shape[dim] * new % main.shape[dim]:
                return None
            x = with_length(x, dim, x.shape[dim] * new // main.shape[dim])
        leaves[i] = x
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    return as_inputs(args, kwargs, inputs)


def by_length(
    inputs: Inputs, batching: Batching, dims: tuple[int, ...], sizes: Mapping[Size, Size]
) -> Inputs:
    """The inputs with these dims at other sizes, where each tensor like the main one may have sizes of its own.

    In tensors of more or fewer dims, such as the mask of a sequence, a dim follows that is as long as one of them.

    Args:
        inputs: at the sizes given.
        batching: how they hold images, which stay as many.
        dims: of the main tensor, and of those with as many dims.
        sizes: what these dims are -> what they become.
    """
    main = main_leaf(inputs)
    assert main is not None
    leaves, tree = pytree.tree_flatten(as_call(inputs))
    lengths = [pair for old, new in sizes.items() for pair in zip(old, new, strict=True)]
    for i, (x, rows) in enumerate(zip(leaves, batching.rows, strict=True)):
        if not isinstance(x, Tensor):
            continue
        if x.ndim == main.ndim:
            new = sizes[tuple(x.shape[dim] for dim in dims)]
            changes: Iterable[tuple[int, int]] = zip(dims, new, strict=True)
        else:
            changes = following(x.shape, lengths, 0 if rows is None else 1)
        for dim, size in changes:
            x = with_length(x, dim, size)
        leaves[i] = x
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    return as_inputs(args, kwargs, inputs)


def following(shape: Size, lengths: Sequence[tuple[int, int]], start: int) -> Iterator[tuple[int, int]]:
    """(dim, new size) of every dim from `start` that is as long as one that changes; of equal ones in their order.

    >>> list(following((2, 8, 8), [(8, 12), (8, 10)], 1)), list(following((6, 6), [(6, 9)], 0))
    ([(1, 12), (2, 10)], [(0, 9), (1, 9)])
    """
    free = list(lengths)
    for dim in range(start, len(shape)):
        found = next((pair for pair in (*free, *lengths) if pair[0] == shape[dim] > 1), None)
        if found:
            free = [pair for pair in free if pair is not found]
            yield dim, found[1]


def random_floats(inputs: Inputs, seed: int, dtype: torch.dtype | None = None) -> Inputs:
    """The inputs with random numbers (normal) in place of floating-point ones."""
    generator = torch.Generator().manual_seed(seed)

    def random(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, dtype or x.dtype)

    return pytree.tree_map(random, inputs)  # type: ignore[no-any-return]


USUAL = (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512, 640, 768, 1024)
"""Sides of images that networks are made for."""


Shares = Sequence[tuple[float, float]]
"""Heights and widths, as shares of those given."""


def other_sizes(
    inputs: Inputs, batching: Batching, grown: Shares = GROWN, shrunk: Shares = SHRUNK
) -> Iterator[Iterator[list[Inputs]]]:
    """The inputs at other image sizes: several series, the next for models that take none of the one before.

    Args:
        inputs: at the size given.
        batching: how they hold images.
        grown: what to try for small images.
        shrunk: what to try for others.
    Yields:
        series of sizes, and for every size the ways in which the inputs may have it.
    """
    main = main_leaf(inputs)
    if main is None:
        return
    alike = [x for x in pytree.tree_leaves(as_call(inputs)) if isinstance(x, Tensor) and x.ndim == main.ndim]
    for dims in AXES.get(main.ndim, ()):
        given = dict.fromkeys(tuple(x.shape[dim] for dim in dims) for x in (main, *alike))
        shares = grown if max(next(iter(given))) < SMALL else shrunk
        for step in STEPS:
            yield (ways_at(inputs, batching, dims, given, shares, step, n) for n in range(len(shares)))


def ways_at(
    inputs: Inputs,
    batching: Batching,
    dims: tuple[int, ...],
    given: Iterable[Size],
    shares: Shares,
    step: int,
    number: int,
) -> list[Inputs]:
    """The ways in which inputs may have the size of a share; none that leaves them as they are."""
    sizes = {size: scaled(size, shares[(number + i) % len(shares)], step) for i, size in enumerate(given)}
    ways = (
        at_size(inputs, dims, next(iter(sizes.values()))),
        by_length(inputs, batching, dims, sizes),
    )
    tried = {shapes_of(way): way for way in ways if way is not None}
    tried.pop(shapes_of(inputs), None)
    return list(tried.values())[:: -1 if number % 2 else 1]


def scaled(size: Size, share: Sequence[float], step: int) -> Size:
    """Sizes near a share of those given, as multiples of a step."""
    return tuple(max(step, round(n * s / step) * step) for n, s in zip(size, share, strict=False))


def shapes_of(inputs: Inputs) -> tuple[Size, ...]:
    """The shapes of all tensors in the inputs."""
    return tuple(tuple(x.shape) for x in pytree.tree_leaves(as_call(inputs)) if isinstance(x, Tensor))


def sampled(
    inputs: Inputs, batching: Batching, batch: int, runs: Callable[[Inputs], bool], most: int = 5
) -> tuple[list[Inputs], list[Inputs]]:
    """Random inputs that a model takes, at several sizes.

    Args:
        inputs: example inputs.
        batching: how they hold images.
        batch: images in the analysis.
        runs: runs the model, and says whether it takes the inputs; the first are as in the analysis.
        most: how many other image sizes are enough.
    Returns:
        with the image size given: first as in the analysis, then, if the model takes them, with more images and with
        one; and at other image sizes, with different numbers of images.
    """
    seeds = itertools.count()
    base = batching.resized(inputs, batch)

    def first(ways: Sequence[Inputs], *counts: int) -> list[Inputs]:
        for way, count in itertools.product(ways, dict.fromkeys(counts)):
            if batching.allows(count):
                changed = random_floats(batching.resized(way, count), next(seeds))
                if runs(changed):
                    return [changed]
        return []

    same = first([base], batch)
    more = first([base], batch + 1, batch + batching.images, 2 * batch)
    same += more + (first([base], 1) if batch != 1 else [])  # one is how most networks are used in the end
    for series in other_sizes(base, batching):
        others: dict[tuple[Size, ...], Inputs] = {}
        for number, ways in enumerate(series):
            new = [way for way in ways if shapes_of(way) not in others]
            found = first(new, (3, 2, 1, 1, 2)[number] if more else batch, batch)
            others |= {shapes_of(batching.resized(x, batch)): x for x in found}
            if len(others) == most or (number == 1 and not others):
                break
        if others:
            return same, list(others.values())
    return same, []


def elsewhere(inputs: Inputs, batching: Batching, counts: Sequence[int], shrunk: Shares) -> Iterator[Inputs]:
    """Random inputs of other sizes, which a model may take or not.

    Args:
        inputs: as in the analysis, with random images.
        batching: how they hold images.
        counts: numbers of images to try, the first that the inputs can hold first.
        shrunk: sizes to try for large images.
    Yields:
        at other image sizes; then the first images at the size given.
    """
    counts = [count for count in counts if batching.allows(count)]
    tried = set()
    for series in other_sizes(inputs, batching, UNSEEN, shrunk):
        for way, count in itertools.product(itertools.chain.from_iterable(series), counts):
            changed = batching.resized(way, count)
            if shapes_of(changed) not in tried:
                tried.add(shapes_of(changed))
                yield random_floats(changed, count)
    yield from (batching.resized(inputs, count) for count in sorted(counts))


def nearest_size(model: nn.Module, inputs: Inputs) -> tuple[int, ...] | None:
    """The shape of images of another size at which a model runs, the nearest of the usual ones; None if it takes none.

    Args:
        inputs: example inputs that it does not take.
    """
    main = main_leaf(inputs)
    if main is None or main.ndim not in (4, 5) or not main.numel():
        return None
    dims = AXES[main.ndim][0]
    given = [main.shape[dim] for dim in dims]
    sizes = {(n, n) for n in USUAL} | {tuple(factor * n for n in given) for factor in (2, 4, 8)}
    for size in sorted(sizes, key=lambda size: (abs(math.log(math.prod(size) / math.prod(given))), size)):
        candidate = at_size(inputs, dims, size)
        if candidate is not None and takes(model, candidate):
            found = main_leaf(candidate)
            return None if found is None else tuple(found.shape)
    return None


def takes(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model in evaluation mode runs on inputs of these shapes.

    Small inputs are run, which is quicker than going through the shapes alone; for larger ones nothing is computed.
    """
    leaves = [x for x in pytree.tree_leaves(as_call(inputs)) if isinstance(x, Tensor)]
    small = sum(x.numel() for x in leaves) <= FEW
    with (
        quiet(),
        untouched(model),
        written_out(),
        evaluating(model),
        torch.no_grad(),
        chance_kept(),
    ):
        try:
            with nullcontext() if small else FakeTensorMode(allow_non_fake_inputs=True) as mode:
                copied = mode.from_tensor if mode else Tensor.clone
                args, kwargs = pytree.tree_map(
                    lambda x: copied(x) if isinstance(x, Tensor) else x, as_call(inputs)
                )
                buffers: dict[str, Tensor] = {
                    name: copied(t) for name, t in model.named_buffers()
                }  # may be written to
                functional_call(model, buffers, args, kwargs)
        except Exception:  # whatever the model's own code raises
            return False
    return True
