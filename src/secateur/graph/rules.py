"""One table: ATen operator -> what it does to labels.

A rule gets a `Site` (the operator with its arguments by name) and returns the labelled outputs. It may tie,
pin and choose, mint labels on parameters, and count multiply-adds. An operator that is not in the table pins
everything it reads, with its name as the reason.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.graph.labels import Atoms, Contraction, Labels, Pad, Value, along, reshape


@dataclass(frozen=True)
class Site:
    """One operator of the graph, as a rule sees it.

    Attributes:
        op: name such as "aten.conv2d".
        args: argument name -> value; tensors are `Value`, missing ones have the schema's default.
        shapes: shape of each output tensor.
        labels: where the rule writes.
        pad_attributes: names of the enclosing module's (before, after) attributes, where they can be edited.
    """

    op: str
    args: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    labels: Labels
    pad_attributes: tuple[str, str] | None = None

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    @property
    def operands(self) -> list[Value]:
        return [value for value in flatten(list(self.args.values())) if isinstance(value, Value)]

    def count(self, macs: int, *axes: Atoms) -> None:
        """This operator performs `macs` multiply-adds, in proportion to what is kept of each axis."""
        self.labels.contractions.append(Contraction(self.labels.module, macs, axes))


Result = Value | tuple[Value, ...]
Rule = Callable[[Site], Result]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Enter a rule in the table under each operator name."""

    def enter(function: Rule) -> Rule:
        for op in ops:
            RULES[f"aten.{op}"] = function
        return function

    return enter


def flatten(items: Sequence[Any]) -> list[Any]:
    """Arguments with lists of tensors opened."""
    return [x for item in items for x in (flatten(item) if isinstance(item, list | tuple) else [item])]


def without_rule(site: Site) -> Result:
    """Freeze what the operator reads; its outputs carry no labels."""
    pin_all(site, f"no rule for {site.op}")
    return tuple(Value(shape) for shape in site.shapes)


def pin_all(site: Site, reason: str) -> None:
    for operand in site.operands:
        for factor in site.labels.exposed(operand).factors:
            site.labels.pin(factor, reason)


def pin_others(site: Site, value: Value, keep: Sequence[int], reason: str) -> list[Atoms]:
    """The factors that vary along the `keep` dims only; those that vary along any other dim are pinned."""
    kept = []
    for factor in value.factors:
        if all(size == 1 for dim, size in enumerate(factor.shape) if dim not in keep):
            kept.append(factor)
        else:
            site.labels.pin(factor, reason)
    return kept


# --- contractions ------------------------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d")
def convolution(site: Site) -> Result:
    x, weight = site["input"], site["weight"]
    labels, groups = site.labels, site["groups"]
    channel = len(x.shape) - len(weight.shape) + 1  # 0 for an unbatched input
    pin_others(site, x, [channel], "a convolution over a labelled image or batch dim")
    depthwise = groups > 1 and weight.shape[1] == 1
    # A depthwise filter belongs to the channel it reads: it makes no new unit.
    out = labels.axis(weight, 0, "depthwise" if depthwise else "out", unit=not depthwise)
    into = labels.axis(weight, 1, "in")
    connect(site, labels.axis(x, channel), out, into, groups)
    add_bias(site, out)
    site.count(math.prod(site.shape) // site.shape[channel] * math.prod(weight.shape), out, into)
    return labels.value(site.shape, [along(out, channel, len(site.shape))])


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(site: Site) -> Result:
    x, weight = site["input"], site["weight"]
    labels, groups = site.labels, site["groups"]
    channel = len(x.shape) - len(weight.shape) + 1
    pin_others(site, x, [channel], "a convolution over a labelled image or batch dim")
    into = labels.axis(weight, 0, "in")
    out = labels.axis(weight, 1, "out", unit=True)
    labels.tie(into, labels.axis(x, channel))
    if groups > 1:  # every group shares the positions of dim 1, so whole groups stay
        labels.pin(into, "grouped transposed convolution")
    add_bias(site, np.tile(out, groups))
    site.count(math.prod(x.shape) // x.shape[channel] * math.prod(weight.shape), into, out)
    return labels.value(site.shape, [along(np.tile(out, groups), channel, len(site.shape))])


@rule("linear")
def linear(site: Site) -> Result:
    x, weight = site["input"], site["weight"]
    labels, last = site.labels, len(x.shape) - 1
    rest = [factor for factor in x.factors if factor.shape[last] == 1]
    out = labels.axis(weight, 0, "out", unit=True)
    into = labels.axis(weight, 1, "in")
    labels.tie(into, labels.axis(x, last))
    add_bias(site, out)
    site.count(math.prod(x.shape) * weight.shape[0], out, into)
    return labels.value(site.shape, [*rest, along(out, last, len(site.shape))])


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
    labels.choose(
        {
            "groups": [(source, source[:, :1]), (sink, source[:, :1])],
            "positions": [(source, into[None]), (sink, sink[:1])],
        }
    )


def add_bias(site: Site, out: Atoms) -> None:
    if isinstance(site["bias"], Value):
        site.labels.tie(site.labels.axis(site["bias"], 0, "bias"), out)


@rule("matmul", "mm", "bmm")
def matmul(site: Site) -> Result:
    site.count(math.prod(site.shape) * site.operands[0].shape[-1])
    return without_rule(site)


@rule("addmm", "baddbmm")
def add_matmul(site: Site) -> Result:
    site.count(math.prod(site.shape) * site.operands[1].shape[-1])
    return without_rule(site)


@rule("scaled_dot_product_attention")
def attention(site: Site) -> Result:
    query, key, value = site["query"], site["key"], site["value"]
    rows = math.prod(query.shape[:-1]) * key.shape[-2]
    site.count(rows * (query.shape[-1] + value.shape[-1]))
    return without_rule(site)


# --- normalisation -----------------------------------------------------------------------------------------


@rule("batch_norm", "instance_norm")
def channelwise_norm(site: Site) -> Result:
    x, labels = site["input"], site.labels
    channels = labels.axis(x, 1)
    roles = {"weight": "scale", "bias": "shift", "running_mean": "statistic", "running_var": "statistic"}
    for name, role in roles.items():
        if isinstance(site[name], Value):
            labels.tie(labels.axis(site[name], 0, role), channels)
    return labels.value(site.shape, pin_others(site, x, [0, 1], f"{site.op} over a labelled image dim"))


# --- elementwise -------------------------------------------------------------------------------------------


@rule(
    *"abs alias celu clamp clamp_ clamp_min clamp_max clone contiguous cos detach detach_ dropout".split(),
    *"dropout_ feature_dropout elu elu_ erf exp gelu hardsigmoid hardsigmoid_ hardswish hardswish_".split(),
    *"hardtanh hardtanh_ leaky_relu leaky_relu_ lift_fresh_copy log mish mish_ neg reciprocal".split(),
    *"relu relu_ relu6 relu6_ round rsqrt selu selu_ sigmoid sigmoid_ silu silu_ sin softplus sqrt".split(),
    *"square tanh tanh_ to type_as _to_copy threshold floor log1p logit sign".split(),
)
def unary(site: Site) -> Result:
    value = site.labels.exposed(site.operands[0])
    return site.labels.value(site.shape, value.factors)


@rule(
    *"add add_ pow sub sub_ rsub mul mul_ div div_ maximum minimum where addcmul lerp atan2 fmod".split(),
    *"remainder eq ne lt le gt ge logical_and logical_or masked_fill masked_fill_".split(),
)
def elementwise(site: Site) -> Result:
    return site.labels.elementwise(site.operands, site.shape)


@rule("prelu")
def prelu(site: Site) -> Result:
    x, weight = site["self"], site["weight"]
    if weight.shape != (1,):
        site.labels.tie(site.labels.axis(weight, 0), site.labels.axis(x, 1))
    return site.labels.value(site.shape, x.factors)


@rule("_assert_tensor_metadata")
def nothing(site: Site) -> Result:
    return ()


# --- image dims --------------------------------------------------------------------------------------------


@rule(
    *"max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d".split(),
    *"adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d".split(),
    *"upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d".split(),
    *"upsample_bicubic2d".split(),
)
def image_op(site: Site) -> Result:
    """An operator over the last one, two or three dims (its name says how many), channel by channel."""
    x = site.operands[0]
    lead = range(len(x.shape) - int(site.op[-2]))
    factors = pin_others(site, x, lead, f"{site.op} over a labelled image dim")
    return tuple(site.labels.value(shape, factors) for shape in site.shapes)


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm")
def reduction(site: Site) -> Result:
    x = site.labels.exposed(site.operands[0])
    rank = len(x.shape)
    dims = site.args.get("dim")
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {dim % rank for dim in dims} if rank else set()
    keep = [dim for dim in range(rank) if dim not in reduced]
    factors = pin_others(site, x, keep, f"{site.op} over channels")
    if not site.args.get("keepdim", False):
        factors = [f.reshape([f.shape[dim] for dim in keep]) for f in factors]
    return tuple(site.labels.value(shape, factors) for shape in site.shapes)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(site: Site) -> Result:
    x = site.operands[0]
    dim = site["dim"] % len(x.shape)
    keep = [d for d in range(len(x.shape)) if d != dim]
    return site.labels.value(site.shape, pin_others(site, x, keep, f"{site.op} over channels"))


# --- shape -------------------------------------------------------------------------------------------------


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "reshape_as", "view_as")
def view(site: Site) -> Result:
    x = site.labels.exposed(site.operands[0])
    factors = [reshape(factor, x.shape, site.shape) for factor in x.factors]
    result = site.labels.value(site.shape, factors)
    for factor in result.factors:
        varying = [dim for dim, size in enumerate(factor.shape) if size > 1]
        if len(varying) > 1:  # a split dim: what survives must be a box, so one of its axes is cut
            site.labels.choose({f"axis {dim}": [(factor, factor_row(factor, dim))] for dim in varying})
    return result


def factor_row(factor: Atoms, dim: int) -> Atoms:
    """The first entry of every slice along `dim`: tying a factor to it leaves one atom per slice."""
    return factor[tuple(slice(None) if d == dim else slice(1) for d in range(factor.ndim))]


@rule("permute")
def permute(site: Site) -> Result:
    return move(site, site["dims"])


@rule("transpose", "swapaxes")
def transpose(site: Site) -> Result:
    order = list(range(len(site.shape)))
    first, second = [value for value in site.args.values() if isinstance(value, int)]
    order[first], order[second] = order[second], order[first]
    return move(site, order)


@rule("t", "numpy_T")
def reverse(site: Site) -> Result:
    return move(site, list(range(len(site.shape)))[::-1])


def move(site: Site, order: Sequence[int]) -> Result:
    x = site.labels.exposed(site.operands[0])
    return site.labels.value(site.shape, [factor.transpose(order) for factor in x.factors])


@rule("unsqueeze")
def unsqueeze(site: Site) -> Result:
    x = site.labels.exposed(site["self"])
    dim = site["dim"] % len(site.shape)
    return site.labels.value(site.shape, [np.expand_dims(factor, dim) for factor in x.factors])


@rule("squeeze")
def squeeze(site: Site) -> Result:
    x = site.labels.exposed(site["self"])
    return site.labels.value(site.shape, [reshape(factor, x.shape, site.shape) for factor in x.factors])


@rule("expand", "expand_as", "broadcast_to")
def expand(site: Site) -> Result:
    x = site.labels.exposed(site.operands[0])
    lead = (1,) * (len(site.shape) - len(x.shape))
    return site.labels.value(site.shape, [factor.reshape(lead + factor.shape) for factor in x.factors])


@rule("cat", "concat", "concatenate")
def cat(site: Site) -> Result:
    labels = site.labels
    dim = site["dim"] % len(site.shape)
    operands = [labels.exposed(value) for value in site["tensors"] if value.shape != (0,)]
    joined = np.concatenate([labels.axis(operand, dim) for operand in operands])
    return labels.value(site.shape, [*labels.unify(operands, skip=dim), along(joined, dim, len(site.shape))])


@rule("index_add", "index_add_", "index_copy", "index_copy_")
def scatter(site: Site) -> Result:
    """Channels put at written positions: they leave with their entry in the index; the target keeps its width."""
    labels, x, source = site.labels, site["self"], site["source"]
    dim = site["dim"] % len(x.shape)
    labels.pin(labels.axis(x, dim), f"{site.op} at written positions")
    labels.tie(labels.axis(source, dim), labels.axis(site["index"], 0))
    others = [d for d in range(len(x.shape)) if d != dim]
    pin_others(site, source, [dim], f"{site.op} of labelled rows")
    return labels.value(site.shape, pin_others(site, x, others, f"{site.op} at written positions"))


@rule("chunk", "split", "split_with_sizes", "unbind")
def split(site: Site) -> Result:
    """Parts of equal size lose the same positions, so that `chunk` finds its parts again in the cut network.

    Sizes written as numbers into `forward` cannot follow a cut: unequal parts stay as they are.
    """
    labels = site.labels
    x = labels.exposed(site["self"])
    dim = site["dim"] % len(x.shape)
    unbound = site.op == "aten.unbind"
    sizes = [1] * x.shape[dim] if unbound else [shape[dim] for shape in site.shapes]
    parts: list[list[Atoms]] = [[] for _ in sizes]
    for factor in x.factors:
        if factor.shape[dim] == 1:
            pieces = [factor] * len(sizes)
        else:
            pieces = np.split(factor, np.cumsum(sizes)[:-1], axis=dim)
            if site.op != "aten.chunk" or len(set(sizes)) > 1:
                labels.pin(factor, "split at sizes written into forward")
            for piece in pieces[1:]:
                if piece.shape == pieces[0].shape:
                    labels.tie(piece, pieces[0])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece.squeeze(dim) if unbound else piece)
    return tuple(labels.value(shape, part) for shape, part in zip(site.shapes, parts, strict=True))


@rule("slice")
def slice_(site: Site) -> Result:
    labels = site.labels
    x = labels.exposed(site["self"])
    dim = site["dim"] % len(x.shape)
    if site.shape == x.shape:
        return labels.value(site.shape, x.factors)
    keep = [d for d in range(len(x.shape)) if d != dim]
    return labels.value(site.shape, pin_others(site, x, keep, "sliced at positions written into forward"))


@rule("select")
def select(site: Site) -> Result:
    x = site.labels.exposed(site["self"])
    dim = site["dim"] % len(x.shape)
    keep = [d for d in range(len(x.shape)) if d != dim]
    factors = pin_others(site, x, keep, "one channel is selected by its number")
    return site.labels.value(site.shape, [factor.squeeze(dim) for factor in factors])


@rule("pad", "constant_pad_nd")
def pad(site: Site) -> Result:
    """Zeros around an image leave channels alone; zeros around channels are units of their own.

    Padded channels always hold zero, so they may go wherever the tensor they are added to goes, provided
    the enclosing module says in two attributes how many there are.
    """
    labels, x = site.labels, site.labels.exposed(site["self"])
    rank = len(x.shape)
    widths = {rank - 1 - i // 2: site["pad"][i : i + 2] for i in range(0, len(site["pad"]), 2)}
    padded = [dim for dim, (before, after) in widths.items() if before or after]
    zeros = site.args.get("mode", "constant") == "constant" and not site["value"]
    factors = [f for f in x.factors if all(f.shape[dim] == 1 for dim in padded)]
    for dim in padded:
        if all(factor.shape[dim] == 1 for factor in x.factors):
            continue
        before, after = widths[dim]
        atoms = labels.axis(x, dim)
        if zeros and before >= 0 and after >= 0 and site.pad_attributes is not None:
            front, back = labels.fresh(before), labels.fresh(after)
            labels.pads.append(Pad(labels.module, front, back))
        elif before >= 0 and after >= 0:
            front, back = np.zeros(before, dtype=np.int64), np.zeros(after, dtype=np.int64)
        else:
            labels.pin(atoms, "channels are cropped by numbers written into forward")
            continue
        factors.append(along(np.concatenate([front, atoms, back]), dim, rank))
    return labels.value(site.shape, factors)
