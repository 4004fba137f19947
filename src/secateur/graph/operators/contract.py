"""Convolutions, matrix products and attention: operators that multiply and add."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from secateur.graph.join import Joint, broadcast, join
from secateur.graph.labels import Alternatives, Atoms, Value, along
from secateur.graph.operators.site import Result, Site, pin_all, resized, without_rule
from secateur.graph.operators.step import CutSite, LiveSite, Step, cut_groups, varies
from secateur.graph.operators.table import FORBIDDEN, PLAIN, Constants, operator

OVER_IMAGE = "a convolution over a labelled image or batch dim"


SUMMED = {
    **dict.fromkeys(("self", "mat1", "batch1", "query", "key", "vec", "tensor"), -1),
    **dict.fromkeys(("mat2", "other", "batch2", "value"), -2),
}
"""Operand of a product -> the dim that it sums over.

Those of layers are left out: what is removed of their inputs meets weights that are zero.
"""


def product_of_survivors(site: LiveSite) -> Any:
    """Removed positions count as zero, and removed keys get no attention."""
    changed: dict[str, Any] = {}
    for key in site.alive:
        name, _, number = key.partition(".")
        mask = site.mask(key)
        assert mask is not None
        tensor = site.args[name][int(number)] if number else site.args[name]
        zeroed = torch.where(mask, tensor, 0)
        summed = site.step.op == "einsum" or (
            key in SUMMED and varies(mask, [mask.ndim + SUMMED[key] if mask.ndim > 1 else 0])
        )
        site.touched = site.touched or (summed and not torch.equal(zeroed, tensor))
        if number:
            changed.setdefault(name, list(site.args[name]))[int(number)] = zeroed
        else:
            changed[name] = zeroed
    keys = site.mask("key") if "key" in site.alive else None
    if keys is not None and varies(keys, [keys.ndim - 2]):
        site.touched = True
        alive = keys.any(-1).unsqueeze(-2)
        scores = site.args.get("attn_mask")
        if scores is None or scores.dtype == torch.bool:
            changed["attn_mask"] = alive if scores is None else alive & scores
        else:
            changed["attn_mask"] = torch.where(alive, scores, float("-inf"))
    return site.call(**changed)


def channel_dim(site: CutSite) -> int:
    """The dim of the channels; 0 without a batch."""
    return len(site.shapes[0]) - len(site.step.shape_of("weight")) + 1


CONVOLUTION = Constants(cut=cut_groups("input", "groups", channel_dim))


@operator("conv1d conv2d conv3d", PLAIN.but(constants=CONVOLUTION, survivors=product_of_survivors))
def convolution(site: Site) -> Result:
    x, weight = site.labels.exposed(site["input"]), site["weight"]
    labels, groups, rank = site.labels, site["groups"], len(site.shape)
    channel = len(x.shape) - len(weight.shape) + 1  # 0 for an unbatched input
    each = [
        dim for dim in range(rank) if dim < channel or (dim > channel and _pointwise(site, dim - channel - 1))
    ]
    factors = site.restrict(x, [*each, channel], OVER_IMAGE)
    rest = [factor for factor in factors if factor.shape[channel] == 1]
    site.restrict(weight, [0, 1], "positions of a convolution kernel")
    depthwise = groups > 1 and weight.shape[1] == 1
    # A depthwise filter belongs to the channel it reads: it makes no new unit.
    out = labels.axis(weight, 0, "depthwise" if depthwise else "out", unit=not depthwise)
    into = labels.axis(weight, 1, "in")
    connect(site, labels.axis(Value(x.shape, tuple(factors)), channel), out, into, groups)
    add_bias(site, out)
    macs = math.prod(site.shape) // site.shape[channel] * math.prod(weight.shape)
    # A table of positions that is made for every image again does not depend on any, but has their number.
    site.count(macs, out, into, *(factor.ravel() for factor in rest), batched=channel > 0 and x.shape[0] > 1)
    return site.value([*rest, along(out, channel, rank)])


# A file is to load wherever torch alone is installed.
@operator("torchvision.deform_conv2d", FORBIDDEN.but(constants=CONVOLUTION, survivors=product_of_survivors))
def deformable_convolution(site: Site) -> Result:
    """A convolution that reads from places which two more tensors give, for each of some equal runs of channels."""
    labels, groups, runs = site.labels, site["groups"], site["offset_groups"]
    for name in ("offset", "mask"):
        site.restrict(labels.exposed(site[name]), [], "places that a deformable convolution reads from")
    x, weight = labels.exposed(site["input"]), site["weight"]
    site.restrict(weight, [0, 1], "positions of a convolution kernel")
    read = labels.axis(Value(x.shape, tuple(site.restrict(x, [1], OVER_IMAGE))), 1)
    if runs > 1:
        labels.tie(read.reshape(runs, -1), read.reshape(runs, -1)[:1])
    depthwise = groups > 1 and weight.shape[1] == 1
    out = labels.axis(weight, 0, "depthwise" if depthwise else "out", unit=not depthwise)
    into = labels.axis(weight, 1, "in")
    connect(site, read, out, into, groups)
    add_bias(site, out)
    site.count(math.prod(site.shape) // site.shape[1] * math.prod(weight.shape), out, into)
    return site.value([along(out, 1, 4)])


def _pointwise(site: Site, number: int) -> bool:
    """Whether an image dim is neither summed over nor resized."""
    stride, padding = site["stride"], site["padding"]
    return (
        site["weight"].shape[number + 2] == 1
        and stride[min(number, len(stride) - 1)] == 1
        and (isinstance(padding, str) or padding[min(number, len(padding) - 1)] == 0)
    )


@operator(
    "conv_transpose1d conv_transpose2d conv_transpose3d",
    PLAIN.but(constants=CONVOLUTION, survivors=product_of_survivors),
)
def transposed_convolution(site: Site) -> Result:
    x, weight = site.labels.exposed(site["input"]), site["weight"]
    labels, groups = site.labels, site["groups"]
    channel = len(x.shape) - len(weight.shape) + 1
    x = Value(x.shape, tuple(site.restrict(x, [channel], OVER_IMAGE)))
    site.restrict(weight, [0, 1], "positions of a convolution kernel")
    depthwise = groups == weight.shape[0] and weight.shape[1] == 1
    into = labels.axis(weight, 0, "depthwise" if depthwise else "in")
    out = labels.axis(weight, 1, "other" if depthwise else "out", unit=not depthwise)
    labels.tie(into, labels.axis(x, channel))
    site.count(math.prod(x.shape) // x.shape[channel] * math.prod(weight.shape), into, out)
    made = np.tile(out, groups)
    if depthwise:
        made = into
    elif groups > 1:  # every group makes the same positions, so all of them stay and lose equally many inputs
        positions = into.reshape(groups, -1)
        labels.tie(positions, positions[:1])
    add_bias(site, made)
    return site.value([along(made, channel, len(site.shape))])


def connect(site: Site, x: Atoms, out: Atoms, into: Atoms, groups: int) -> None:
    """Tie the channels a convolution reads to its weight; `groups` > 1 leaves a choice."""
    labels = site.labels
    if groups == 1:
        labels.tie(x, into)
        return
    source, sink = x.reshape(groups, -1), out.reshape(groups, -1)
    if source.shape[1] == 1:
        labels.tie(source, sink)
        return
    whole = labels.option(
        "groups",
        [(source, source[:, :1]), (sink, source[:, :1])],
        [into],  # every group has the same positions
        "whole groups are removed instead",
    )
    positions = labels.option("positions", [(source, into[None]), (sink, sink[:1])])
    labels.alternatives.append(Alternatives((whole, positions)))


def add_bias(site: Site, out: Atoms) -> None:
    if isinstance(site["bias"], Value):
        site.labels.tie(site.labels.axis(site["bias"], 0, "bias"), out)


@operator("linear", PLAIN.but(survivors=product_of_survivors))
def linear(site: Site) -> Result:
    lead = [("x", dim) for dim in range(len(site["input"].shape) - 1)]
    of = ["out", "in"] if len(site["weight"].shape) == 2 else ["in"]  # a vector gives one number
    result = contract(site, [(site["input"], [*lead, "in"]), (site["weight"], of)], [*lead, *of[:-1]])
    if len(of) == 2:
        add_bias(site, site.labels.axis(site["weight"], 0, "out"))
    return result


@operator("matmul mm bmm mv dot vdot", PLAIN.but(survivors=product_of_survivors))
def matmul(site: Site) -> Result:
    return product(site, *site.operands)


@operator("outer", PLAIN)
def outer(site: Site) -> Result:
    a, b = site.operands
    return contract(site, [(a, ["row"]), (b, ["column"])], ["row", "column"])


@operator("addmm baddbmm", PLAIN.but(survivors=product_of_survivors))
def add_matmul(site: Site) -> Result:
    bias, *factors = site.operands
    result = product(site, *factors)
    return site.value(broadcast(site.labels, [result, bias], site.shape).factors)


def product(site: Site, a: Value, b: Value) -> Value:
    """A (batched) matrix product."""
    left: tuple[Hashable, ...] = ("row", "in")[2 - min(len(a.shape), 2) :]
    right: tuple[Hashable, ...] = ("in", "column")[: min(len(b.shape), 2)]
    batch: list[Hashable] = list(range(max(len(a.shape), len(b.shape), 2) - 2))
    out = [*batch, *left[:-1], *right[1:]]
    return contract(
        site,
        [
            (a, [*batch[len(batch) - max(len(a.shape) - 2, 0) :], *left]),
            (b, [*batch[len(batch) - max(len(b.shape) - 2, 0) :], *right]),
        ],
        out,
        batch,
    )


@operator("einsum", PLAIN.but(survivors=product_of_survivors))
def einsum(site: Site) -> Result:
    """Summed pair by pair from the left, as torch does it."""
    inputs, _, out = site["equation"].replace(" ", "").partition("->")
    terms: list[list[Hashable]] = []
    for term, operand in zip(inputs.split(","), site["tensors"], strict=True):
        front, dots, back = term.partition("...")
        lead = len(operand.shape) - len(front) - len(back)
        terms.append([*front, *range(-lead, 0), *back] if dots else list(term))
    front, dots, back = out.partition("...")
    lead = max((sum(isinstance(letter, int) for letter in term) for term in terms), default=0)
    target: list[Hashable] = [*front, *(range(-lead, 0) if dots else []), *back]
    if "->" not in site["equation"] or any(len(set(term)) < len(term) for term in terms):
        return without_rule(site)
    value: Value = site["tensors"][0]
    letters = terms[0]
    for number, (operand, term) in enumerate(zip(site["tensors"][1:], terms[1:], strict=True), start=2):
        needed = {letter for later in [target, *terms[number:]] for letter in later}
        both = [letter for letter in letters if letter in term and letter in needed]
        keep = [letter for letter in dict.fromkeys([*letters, *term]) if letter in needed]
        if number == len(terms):
            keep = target
        value, letters = contract(site, [(value, letters), (operand, term)], keep, both), keep
    if len(terms) == 1:
        value = contract(site, [(value, letters)], target)
    return value


def write_scale(step: Step) -> Step:
    if step.args.get("scale") is None:
        step.args["scale"] = step.shape_of("query")[-1] ** -0.5
    return step


@operator(
    "scaled_dot_product_attention",
    PLAIN.but(constants=Constants(write_scale), survivors=product_of_survivors),
)
def attention(site: Site) -> Result:
    """Heads are the last batch dim; rows × columns of the map in between are counted but never stored."""
    labels = site.labels
    query, key, value, mask = site["query"], site["key"], site["value"], site["attn_mask"]
    batch: list[Hashable] = list(range(len(query.shape) - 2))
    if site["enable_gqa"] and query.shape[:-2] != key.shape[:-2]:
        pin_all(site, "attention with fewer keys than queries")
        return site.value([])
    scores = contract(
        site,
        [(query, [*batch, "row", "in"]), (key, [*batch, "column", "in"])],
        [*batch, "row", "column"],
        batch,
    )
    if isinstance(mask, Value):
        scores = broadcast(labels, [scores, mask], scores.shape)
    site.statistic(scores, [len(scores.shape) - 1])
    return contract(
        site,
        [(scores, [*batch, "row", "column"]), (value, [*batch, "column", "out"])],
        [*batch, "row", "out"],
        batch,
    )


def contract(
    site: Site,
    operands: Sequence[tuple[Value, Sequence[Hashable]]],
    out: Sequence[Hashable],
    batch: Sequence[Hashable] = (),
) -> Value:
    """The value of an einsum: every operand with its letters; letters not in `out` are summed over.

    A parameter's dims make new units where they go to the output, and read those of the other operand where
    they are summed over. Two activations whose `batch` dims are labelled are an attention product.
    """
    labels = site.labels
    made = [value.weight or value.tensor in labels.parameters for value, _ in operands]
    letters = list(dict.fromkeys([*out, *(letter for _, term in operands for letter in term)]))
    sizes: dict[Hashable, int] = {}
    aligned = []
    for number, (value, term) in enumerate(operands):
        for dim, letter in enumerate(term):
            sizes[letter] = max(sizes.get(letter, 1), value.shape[dim])
            if made[number] and not all(made):
                alone = not any(letter in other for n, (_, other) in enumerate(operands) if n != number)
                if letter not in out:
                    labels.axis(value, dim, "in")
                elif alone:
                    units = labels.axis(value, dim, "out", unit=True)
                    if len(units) == 1:
                        labels.pin(units, "a single channel is used on its own")
        aligned.append(_align(labels.exposed(value), term, letters))
    shared = [letters.index(letter) for letter in batch] if not any(made) else []
    joint: Joint = join(labels, aligned, [n for n, letter in enumerate(letters) if letter not in out], shared)
    if len(operands) > 1:
        site.count(math.prod(sizes.values()), *joint.axes)
    factors = [resized(factor, [letters.index(letter) for letter in out]) for factor in joint.factors]
    return labels.value([sizes[letter] for letter in out], factors)


def _align(value: Value, term: Sequence[Hashable], letters: Sequence[Hashable]) -> Value:
    order = [term.index(letter) if letter in term else None for letter in letters]
    shape = [1 if dim is None else value.shape[dim] for dim in order]
    return Value(tuple(shape), tuple(resized(factor, order) for factor in value.factors))
