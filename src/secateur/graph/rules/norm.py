"""Normalisation and reduction: operators that compute statistics."""

import numpy as np

from secateur.graph.join import broadcast, join
from secateur.graph.labels import Atoms, Value, along, support
from secateur.graph.rules.site import Result, Site, resized, rule

ROLES = {"weight": "scale", "bias": "shift", "running_mean": "statistic", "running_var": "statistic"}


def per_channel(site: Site, x: Value, dim: int) -> list[Atoms]:
    """Tie what a norm keeps for every position of `dim` to its input; returns the factors of the output."""
    shape = tuple(size if d == dim else 1 for d, size in enumerate(x.shape))
    operands = [x]
    for name, role in ROLES.items():
        if isinstance(site.args.get(name), Value):
            atoms = site.labels.axis(site[name], 0, role)
            operands.append(Value(shape, (along(atoms, dim, len(shape)),)))
    return join(site.labels, operands).factors


@rule("batch_norm", "instance_norm")
def channelwise_norm(site: Site) -> Result:
    x = site.labels.exposed(site["input"])
    if site.args.get("training", site.args.get("use_input_stats")):
        site.statistic(x, [dim for dim in range(len(x.shape)) if dim != 1])
    return site.value(per_channel(site, x, 1))


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(site: Site) -> Result:
    x, labels = site.labels.exposed(site["input"]), site.labels
    rank, over = len(x.shape), len(site["normalized_shape"])
    site.statistic(x, range(rank - over, rank))
    if over == 1:
        return site.values(per_channel(site, x, rank - 1))[: len(site.shapes)]
    operands = [x]
    for name in ("weight", "bias"):
        if isinstance(site.args.get(name), Value):
            value = labels.exposed(site[name])
            lead = (1,) * (rank - over)
            factors = tuple(factor.reshape(lead + factor.shape) for factor in value.factors)
            operands.append(Value(lead + value.shape, factors))
    return site.value(join(labels, operands).factors)


@rule("group_norm")
def group_norm(site: Site) -> Result:
    """A norm over several groups loses whole groups, or the same positions in every group."""
    x, labels, groups = site.labels.exposed(site["input"]), site.labels, site["num_groups"]
    rank = len(x.shape)
    factors = per_channel(site, Value(x.shape, tuple(site.restrict(x, [1], "a norm over image dims"))), 1)
    for factor in factors:
        grid = factor.reshape(groups, -1)
        if 1 < groups < x.shape[1]:
            labels.choose({"groups": [(grid, grid[:, :1])], "positions": [(grid, grid[:1])]})
        site.statistic(Value(grid.shape, (grid,)), [1])
    return labels.value(site.shape, [factor.reshape(along(factor, 1, rank).shape) for factor in factors])


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(site: Site) -> Result:
    """Every slice along `dim` of a kernel is divided by its norm and multiplied by its gain."""
    kernel, gain = site.labels.exposed(site["v"]), site.labels.exposed(site["g"])
    dim = site["dim"] % len(kernel.shape)
    rest = [d for d in range(len(kernel.shape)) if d != dim]
    site.statistic(kernel, rest)
    factors = join(site.labels, [kernel, gain]).factors
    norms = [factor for factor in factors if not support(factor) & set(rest)]
    parts = [norms] * (len(site.shapes) - 1)  # the norms that the filters had may be a second output
    return tuple(site.labels.value(shape, f) for shape, f in zip(site.shapes, [factors, *parts], strict=True))


@rule(
    *"mean sum amax amin max min var std var_mean std_mean linalg_vector_norm norm logsumexp".split(),
    *"median nansum prod all any".split(),
)
def reduction(site: Site) -> Result:
    if isinstance(site.args.get("other"), Value):  # the larger of two tensors
        return broadcast(site.labels, site.operands, site.shape)
    x, labels = site.first, site.labels
    reduced = site.dims()
    site.statistic(x, reduced)
    factors = join(labels, [x], reduced).factors
    if not site.args.get("keepdim", False):
        keep = [dim for dim in range(len(x.shape)) if dim not in reduced]
        factors = [resized(factor, keep) for factor in factors]
    return site.values(factors)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(site: Site) -> Result:
    x = site.first
    site.statistic(x, site.dims())
    return site.value(x.factors)


@rule("argmax", "argmin")
def position(site: Site) -> Result:
    """Positions along a cut dim would be counted anew, so it stays."""
    x = site.first
    reduced = site.dims()
    keep = [dim for dim in range(len(x.shape)) if dim not in reduced]
    factors = site.restrict(x, keep, f"{site.op} over channels")
    return site.value(factors if site["keepdim"] else [resized(factor, keep) for factor in factors])


@rule(*"cumsum cumprod topk sort argsort cummax cummin kthvalue roll flip fft_fft2 fft_rfft2".split())
def along_dims(site: Site) -> Result:
    """Operators that mix positions of some dims: those stay, all others pass."""
    x = site.first
    mixed = site.dims("dims" if "dims" in site.args else "dim")
    keep = [dim for dim in range(len(x.shape)) if dim not in mixed]
    return site.values(site.restrict(x, keep, f"{site.op} over channels"))


@rule("glu")
def glu(site: Site) -> Result:
    """The halves of a dim are multiplied, so they lose the same positions."""
    x = site.first
    dim = site.dims()[0]
    halves = []
    for factor in x.factors:
        if factor.shape[dim] > 1:
            factor, other = np.split(factor, 2, axis=dim)
            site.labels.tie(factor, other)
        halves.append(factor)
    return site.value(halves)
