"""Example inputs at other sizes: more images, and images of another height and width."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.graph.capture import Batching, Inputs, as_call, as_inputs, with_length

SMALL = 128
"""Images below this many pixels are tried larger, those above mostly smaller, which costs less."""

STEPS = (1, 8, 32)
"""Sizes tried are multiples of these: many a network takes only multiples of its strides."""

GROWN = ((1.62, 1.31), (1.27, 1.9), (2.13, 1.55), (0.79, 1.21), (0.3, 0.4))
SHRUNK = ((0.72, 0.57), (0.51, 0.89), (0.87, 0.66), (1.19, 0.79), (0.12, 0.1))
"""Heights and widths to try, as shares of those given; none is square, or a multiple of another.

The last is where windows and pools no longer fit into the image.
"""

SMALLEST = (2 / 7, 3 / 7)
"""An eighth of the pixels: as few as leave several positions to a network that divides by 32."""

AXES: dict[int, tuple[tuple[int, ...], ...]] = {
    5: ((3, 4), (2, 3)),
    4: ((2, 3), (1, 2)),
    3: ((1,), (2,)),
    2: ((1,),),
}
"""Rank of the inputs -> dims that may be height and width, or the length of a sequence; the likeliest first."""


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


def random_floats(inputs: Inputs, seed: int, dtype: torch.dtype | None = None) -> Inputs:
    """The inputs with random numbers (normal) in place of floating-point ones."""
    generator = torch.Generator().manual_seed(seed)

    def random(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, dtype or x.dtype)

    return pytree.tree_map(random, inputs)  # type: ignore[no-any-return]


Shares = Sequence[tuple[float, float]]
"""Heights and widths, as shares of those given."""


def other_sizes(inputs: Inputs, grown: Shares = GROWN, shrunk: Shares = SHRUNK) -> Iterator[Iterator[Inputs]]:
    """The inputs at other image sizes: several series, the next for models that take none of the one before.

    Args:
        inputs: at the size given.
        grown: what to try for small images.
        shrunk: what to try for others.
    """
    main = main_leaf(inputs)
    for dims in AXES.get(main.ndim, ()) if main is not None else ():
        given = tuple(main.shape[dim] for dim in dims)  # type: ignore[union-attr]
        for step in STEPS:
            sizes = (
                tuple(max(step, round(n * s / step) * step) for n, s in zip(given, share, strict=False))
                for share in (grown if max(given) < SMALL else shrunk)
            )
            found = (at_size(inputs, dims, size) for size in dict.fromkeys(sizes) if size != given)
            yield (changed for changed in found if changed is not None)


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
        with the image size given: first as in the analysis, then, if the model takes them, with more images; and at
        other image sizes, with different numbers of images.
    """
    seeds = itertools.count()

    def first(given: Inputs, *counts: int) -> list[Inputs]:
        for count in dict.fromkeys(counts):
            if batching.allows(count):
                changed = random_floats(batching.resized(given, count), next(seeds))
                if runs(changed):
                    return [changed]
        return []

    same = first(inputs, batch) + first(inputs, batch + 1, batch + batching.images, 2 * batch)
    for series in other_sizes(inputs):
        others: list[Inputs] = []
        for number, changed in enumerate(series):
            count = (3, 2, 1, 1, 2)[number] if len(same) > 1 else batch
            others += first(changed, count, batch)
            if len(others) == most or (number == 1 and not others):
                break
        if others:
            return same, others
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
    for series in other_sizes(inputs, GROWN[:2], shrunk):
        for changed in series:
            yield from (random_floats(batching.resized(changed, count), count) for count in counts)
    yield from (batching.resized(inputs, count) for count in sorted(counts))
