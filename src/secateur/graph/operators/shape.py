"""Operators that arrange the same elements in another shape."""

from collections.abc import Sequence

import numpy as np

from secateur.graph.join import INSTEAD
from secateur.graph.labels import Alternatives, Atoms, Value, along, first, reshape, support
from secateur.graph.operators.site import Result, Site, missing, resized, without_rule
from secateur.graph.operators.step import CutSite, Step, cut_shape, with_shape
from secateur.graph.operators.table import PLAIN, Constants, operator


def as_reshape(step: Step) -> Step:
    args = {"self": step.args["self"], "shape": list(step.shapes[0])}
    return Step(step.node, "aten.reshape.default", args, step.shapes)


def write_unflatten(step: Step) -> Step:
    rank = len(step.shape_of("self"))
    dim = step.args["dim"] = step.args["dim"] % rank
    step.args["sizes"] = list(step.shapes[0][dim : len(step.shapes[0]) - rank + dim + 1])
    return step


def cut_unflatten(site: CutSite) -> None:
    dim, count = site.step.args["dim"], len(site.step.args["sizes"])
    site.step.args["sizes"] = list(site.shapes[0][dim : dim + count])


@operator(
    "view reshape _unsafe_view reshape_as view_as view_copy",
    PLAIN.but(constants=Constants(as_reshape, cut_shape("shape"))),
)
@operator("unflatten", PLAIN.but(constants=Constants(write_unflatten, cut_unflatten)))
@operator("flatten ravel", PLAIN)
def view(site: Site) -> Result:
    x = site.first
    factors: list[Atoms] = []
    sources: list[frozenset[int]] = []
    for factor in x.factors:
        result = reshape(factor, x.shape, site.shape)
        dims = support(result)
        if len(dims) > 1 and not np.array_equal(result.squeeze(), factor.squeeze()):
            # a split dim: what survives must be a box, so one of its axes is cut
            site.labels.choose({f"axis {dim}": [(result, first(result, [dim]))] for dim in sorted(dims)})
        for number, other in enumerate(factors):
            if dims & support(other) and not support(factor) & sources[number]:
                nested = (other, result) if min(sources[number]) < min(support(factor)) else (result, other)
                factors[number] = merged(site, *nested)
                sources[number] |= support(factor)
                break
        else:
            factors.append(result)
            sources.append(support(factor))
    return site.value(factors)


def merged(site: Site, outer: Atoms, inner: Atoms) -> Atoms:
    """Two labelled dims (heads and their width) that become one: positions of it follow one of them."""
    labels = site.labels
    both = labels.fresh(int(np.prod(np.broadcast_shapes(outer.shape, inner.shape))))
    both = both.reshape(np.broadcast_shapes(outer.shape, inner.shape))
    options = (
        labels.option("heads", [(both, outer)], [inner], INSTEAD["heads"]),
        labels.option("dims", [(both, inner)], [outer], INSTEAD["dims"]),
    )
    labels.alternatives.append(Alternatives(options, attention=True))
    return both


@operator("permute", PLAIN)
def permute(site: Site) -> Result:
    return move(site, [dim % len(site.shape) for dim in site["dims"]])


@operator("transpose swapaxes swapdims transpose_ mT mH adjoint", PLAIN)
def transpose(site: Site) -> Result:
    order = list(range(len(site.shape)))
    a, b = [value for value in site.args.values() if isinstance(value, int)] or [-1, -2]
    order[a], order[b] = order[b], order[a]
    return move(site, order)


@operator("t numpy_T", PLAIN)
def reverse(site: Site) -> Result:
    return move(site, list(range(len(site.shape)))[::-1])


@operator("movedim moveaxis", PLAIN)
def movedim(site: Site) -> Result:
    rank = len(site.shape)
    source, sink = site.dims("source"), site.dims("destination")
    rest = iter(missing(rank, source))
    return move(site, [source[sink.index(dim)] if dim in sink else next(rest) for dim in range(rank)])


def move(site: Site, order: Sequence[int]) -> Result:
    return site.value([factor.transpose(order) for factor in site.first.factors])


@operator("unsqueeze unsqueeze_", PLAIN)
def unsqueeze(site: Site) -> Result:
    dim = site["dim"] % len(site.shape)
    return site.value([np.expand_dims(factor, dim) for factor in site.first.factors])


@operator("squeeze squeeze_", PLAIN)
def squeeze(site: Site) -> Result:
    x = site.first
    return site.value([reshape(factor, x.shape, site.shape) for factor in x.factors])


@operator(
    "expand broadcast_to", PLAIN.but(constants=Constants(with_shape("size"), cut_shape("size")), repeats=True)
)
def expand(site: Site) -> Result:
    x = site.first
    lead = (1,) * (len(site.shape) - len(x.shape))
    return site.value([*copies(site), *(factor.reshape(lead + factor.shape) for factor in x.factors)])


def copies(site: Site) -> list[Atoms]:
    """Labels for the dims along which an index was copied: there are as many copies as what it picks from is wide."""
    if not site.indexes:
        return []
    rank = len(site.shape)
    source = (1,) * (rank - len(site.operands[0].shape)) + site.operands[0].shape
    made = [dim for dim in range(rank) if source[dim] == 1 < site.shape[dim]]
    return [along(site.labels.fresh(site.shape[dim]), dim, rank) for dim in made]


def cut_repeats(site: CutSite) -> None:
    """As many copies as positions are left, along the dims that had one position."""
    name = "repeats" if "repeats" in site.step.args else "dims"
    times, shape = list(site.step.args[name]), site.step.shape_of("self")
    rank = len(site.shapes[0])
    for dim, keep in site.results[0].items():
        own = dim - rank + len(shape)
        if own < 0 or shape[own] == 1:
            times[dim - rank + len(times)] = int(keep.sum())
    site.step.args[name] = times


@operator("repeat tile", PLAIN.but(constants=Constants(cut=cut_repeats), repeats=True))
def repeat(site: Site) -> Result:
    x = site.first
    rank = len(site.shape)
    times = site.args.get("repeats") or site.args.get("dims") or []
    times = [1] * (rank - len(times)) + list(times)
    lead = (1,) * (rank - len(x.shape))

    def tiled(factor: Atoms) -> Atoms:
        factor = factor.reshape(lead + factor.shape)
        return np.tile(factor, [n if size > 1 else 1 for n, size in zip(times, factor.shape, strict=True)])

    return site.value([*copies(site), *(tiled(factor) for factor in x.factors)])


@operator("repeat_interleave", PLAIN)
def repeat_interleave(site: Site) -> Result:
    x, times = site.first, site.args.get("repeats")
    if not isinstance(times, int) or site["dim"] is None:
        return site.value(site.restrict(x, [], "channels are repeated by numbers"))
    dim = site.dims()[0]
    return site.value([np.repeat(f, times, axis=dim) if f.shape[dim] > 1 else f for f in x.factors])


@operator("unfold", PLAIN)
def unfold(site: Site) -> Result:
    """Windows along one dim; their positions become a new last dim."""
    x = site.first
    dim = site["dimension"] % len(x.shape)
    keep = [d for d in range(len(x.shape)) if d != dim]
    factors = site.restrict(x, keep, "windows over a labelled dim")
    return site.value([resized(factor, [*range(len(x.shape)), None]) for factor in factors])


@operator("diagonal", PLAIN)
def diagonal(site: Site) -> Result:
    """Positions that two dims share become a new last dim."""
    x = site.first
    rank = len(x.shape)
    keep = [dim for dim in range(rank) if dim not in (site["dim1"] % rank, site["dim2"] % rank)]
    factors = site.restrict(x, keep, "a diagonal of channels")
    return site.value([resized(factor, [*keep, None]) for factor in factors])


@operator("meshgrid", PLAIN)
def grids(site: Site) -> Result:
    return without_rule(site)


def without(value: Value, dim: int) -> Value:
    """A value as it is along the other dims."""
    shape = tuple(1 if d == dim else size for d, size in enumerate(value.shape))
    return Value(shape, tuple(factor for factor in value.factors if factor.shape[dim] == 1))
