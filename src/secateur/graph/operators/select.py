"""Operators that join tensors, take them apart or pick positions."""

import numpy as np

from secateur.graph.join import join
from secateur.graph.labels import Atoms, Pad, Value, along, support
from secateur.graph.operators.shape import without
from secateur.graph.operators.site import Result, Site, resized, without_rule
from secateur.graph.operators.step import CutSite, Step
from secateur.graph.operators.table import PLAIN, Constants, operator

PICKED = "channels are picked by an index"
CROPPED = "channels are cropped by numbers written into forward"


@operator("cat concat concatenate", PLAIN)
def cat(site: Site) -> Result:
    labels = site.labels
    dim = site["dim"] % len(site.shape)
    operands = [labels.exposed(value) for value in site["tensors"] if value.shape != (0,)]
    joined = np.concatenate([labels.axis(operand, dim) for operand in operands])
    rest = join(labels, [without(operand, dim) for operand in operands]).factors
    return site.value([*rest, along(joined, dim, len(site.shape))])


@operator("stack", PLAIN)
def stack(site: Site) -> Result:
    dim = site["dim"] % len(site.shape)
    operands = [site.labels.exposed(value) for value in site["tensors"]]
    lifted = [
        Value(
            (*value.shape[:dim], 1, *value.shape[dim:]),
            tuple(np.expand_dims(factor, dim) for factor in value.factors),
        )
        for value in operands
    ]
    return site.value(join(site.labels, lifted).factors)


def write_split(step: Step) -> Step:
    dim = step.args.get("dim", 0) % len(step.shape_of("self"))
    args = {"self": step.args["self"], "split_sizes": [shape[dim] for shape in step.shapes], "dim": dim}
    return Step(step.node, "aten.split_with_sizes.default", args, step.shapes)


def cut_split(site: CutSite) -> None:
    dim = site.step.args["dim"]
    site.step.args["split_sizes"] = [shape[dim] for shape in site.shapes]


@operator(
    "chunk split split_with_sizes unsafe_chunk unsafe_split tensor_split",
    PLAIN.but(constants=Constants(write_split, cut_split)),
)
def split(site: Site) -> Result:
    """The equal parts that `chunk` makes lose the same positions, so that it finds them again after a cut."""
    x = site.first
    dim = site.dims()[0]
    ends = np.cumsum([shape[dim] for shape in site.shapes])[:-1]
    even = site.op == "aten.chunk" and len({shape[dim] for shape in site.shapes}) == 1
    parts: list[list[Atoms]] = [[] for _ in site.shapes]
    for factor in x.factors:
        whole = factor.shape[dim] == 1
        pieces = [factor] * len(parts) if whole else np.split(factor, ends, axis=dim)
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
            if even and not whole:
                site.labels.tie(piece, pieces[0])
    return tuple(site.labels.value(shape, part) for shape, part in zip(site.shapes, parts, strict=True))


@operator("unbind", PLAIN)
def unbind(site: Site) -> Result:
    x = site.first
    dim = site.dims()[0]
    keep = [d for d in range(len(x.shape)) if d != dim]
    factors = site.restrict(x, keep, "channels are taken apart one by one")
    return site.values([resized(factor, keep) for factor in factors])


def write_slice(step: Step) -> Step:
    shape = step.shape_of("self")
    dim = step.args.get("dim", 0) % len(shape)
    every = step.args.get("step", 1)
    start, end, every = slice(step.args.get("start"), step.args.get("end"), every).indices(shape[dim])
    step.args |= {"dim": dim, "start": start, "end": max(start, end), "step": every}
    return step


def write_narrow(step: Step) -> Step:
    dim, start = step.args["dim"], step.args["start"]
    if not isinstance(start, int):
        return step
    size = step.shape_of("self")[dim]
    first = start % size if start < 0 else start
    args = {"self": step.args["self"], "dim": dim, "start": first, "end": first + step.args["length"]}
    return write_slice(Step(step.node, "aten.slice.Tensor", args, step.shapes))


def cut_slice(site: CutSite) -> None:
    args = site.step.args
    keep = site.operands.get("self", {}).get(args["dim"])
    if keep is not None:
        args["start"], args["end"] = int(keep[: args["start"]].sum()), int(keep[: args["end"]].sum())


@operator("slice", PLAIN.but(constants=Constants(write_slice, cut_slice)))
@operator("narrow", PLAIN.but(constants=Constants(write_narrow)))
def slice_(site: Site) -> Result:
    x = site.first
    dim = site.dims()[0]
    size = x.shape[dim]
    if site.shape == x.shape:
        return site.value(x.factors)
    start = site["start"] or 0
    start = min(start + size if start < 0 else start, size)
    factors = x.factors
    if site.args.get("step", 1) != 1 or not isinstance(start, int):
        keep = [d for d in range(len(x.shape)) if d != dim]
        factors = tuple(site.restrict(x, keep, "every other channel is taken"))
    taken = np.arange(start, start + site.shape[dim])
    return site.value([f.take(taken, axis=dim) if f.shape[dim] > 1 else f for f in factors])


def write_select(step: Step) -> Step:
    shape = step.shape_of("self")
    dim = step.args["dim"] % len(shape)
    step.args |= {"dim": dim, "index": step.args["index"] % shape[dim]}
    return step


@operator("select", PLAIN.but(constants=Constants(write_select)))
def select(site: Site) -> Result:
    x = site.first
    dim = site.dims()[0]
    keep = [d for d in range(len(x.shape)) if d != dim]
    factors = site.restrict(x, keep, "one channel is selected by its number")
    return site.value([resized(factor, keep) for factor in factors])


@operator("index index_select embedding take_along_dim gather", PLAIN)
def index(site: Site) -> Result:
    """Dims that are indexed stay; the others pass."""
    labels = site.labels
    if site.op == "aten.embedding":
        labels.axis(site["weight"], 1, "out", unit=True)
        table = labels.exposed(site["weight"])
        factors = site.restrict(table, [1], "rows of a table")
        lead = [None] * (len(site.shape) - 1)
        return site.value([resized(factor, [*lead, 1]) for factor in factors])
    x = site.first
    rank = len(x.shape)
    if site.op == "aten.index":
        indexed = [dim for dim, value in enumerate(site["indices"]) if value is not None]
    else:
        indexed = site.dims()
    keep = [dim for dim in range(rank) if dim not in indexed]
    if site.op in ("aten.gather", "aten.take_along_dim"):
        return gather(site, keep)
    factors = site.restrict(x, keep, PICKED)
    if site.op == "aten.index_select":
        entries = labels.axis(site["index"], 0, unit=True)
        return site.value([*factors, along(entries, indexed[0], rank)])
    new = [None] * (len(site.shape) - len(keep))
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    front = indexed[0] if together else 0
    order = [*keep[:front], *new, *keep[front:]]
    return site.value([resized(factor, order) for factor in factors])


def gather(site: Site, keep: list[int]) -> Result:
    """The index has the shape of the result; where it is shorter than the tensor, the rest is left out."""
    x, index = site.first, site.labels.exposed(site["index" if "index" in site.args else "indices"])
    keep = [dim for dim in keep if x.shape[dim] == index.shape[dim]]
    operands = []
    for value in (x, index):
        shape = tuple(size if dim in keep else 1 for dim, size in enumerate(value.shape))
        operands.append(Value(shape, tuple(site.restrict(value, keep, PICKED))))
    return site.value(join(site.labels, operands).factors)


@operator("index_add index_add_ index_copy index_copy_", PLAIN)
def index_add(site: Site) -> Result:
    """A source channel and the entry of the index that says where it goes leave together."""
    labels, x, source = site.labels, site.first, site.labels.exposed(site["source"])
    dim = site.dims()[0]
    keep = [d for d in range(len(x.shape)) if d != dim]
    if len(site["index"].shape) == 1:
        labels.tie(labels.axis(source, dim), labels.axis(site["index"], 0))
    whole = Value(x.shape, tuple(site.restrict(x, keep, "positions are written in an index")))
    return site.value(join(labels, [without(whole, dim), without(source, dim)]).factors)


def cut_pad(site: CutSite) -> None:
    widths = list(site.step.args["pad"])
    rank = len(site.shapes[0])
    for dim, keep in site.results[0].items():
        i = 2 * (rank - 1 - dim)
        if i < len(widths) and (widths[i] or widths[i + 1]):
            before, after = widths[i], widths[i + 1]
            widths[i] = int(keep[:before].sum())
            widths[i + 1] = int(keep[len(keep) - after :].sum())
    site.step.args["pad"] = widths


@operator("pad constant_pad_nd", PLAIN.but(constants=Constants(cut=cut_pad)))
def pad(site: Site) -> Result:
    """Zeros around an image leave channels alone; zeros around channels are units of their own.

    Padded channels always hold zero, so they may go wherever the tensor they are added to goes, provided
    the enclosing module says in two attributes how many there are.
    """
    labels, x = site.labels, site.first
    rank = len(x.shape)
    widths = {rank - 1 - i // 2: site["pad"][i : i + 2] for i in range(0, len(site["pad"]), 2)}
    padded = {dim for dim, (before, after) in widths.items() if before or after}
    zeros = site.args.get("mode", "constant") == "constant" and not site["value"]
    factors = [factor for factor in x.factors if not support(factor) & padded]
    for dim in sorted(padded):
        if all(factor.shape[dim] == 1 for factor in x.factors):
            continue
        before, after = widths[dim]
        atoms = labels.axis(x, dim)
        if before < 0 or after < 0 or site.args.get("mode", "constant") != "constant":
            labels.pin(atoms, CROPPED)
            continue
        if zeros and site.pad_attributes is not None:
            front, back = labels.fresh(before), labels.fresh(after)
            labels.pads.append(Pad(labels.module, front, back))
        else:
            front, back = np.zeros(before, dtype=np.int64), np.zeros(after, dtype=np.int64)
        factors.append(along(np.concatenate([front, atoms, back]), dim, rank))
    return site.value(factors)


@operator("index_put scatter", PLAIN)
def written_by_index(site: Site) -> Result:
    return without_rule(site)
