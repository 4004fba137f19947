"""Normalisation and reduction: operators that compute statistics."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.graph.join import broadcast, join
from secateur.graph.labels import Atoms, Value, along, support
from secateur.graph.operators.site import Result, Site, resized, without_rule
from secateur.graph.operators.step import (
    CutSite,
    LiveSite,
    cut_groups,
    moments,
    scaled,
    varies,
    without_removed,
)
from secateur.graph.operators.table import PLAIN, Constants, operator

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


def norm_over_images(site: LiveSite) -> Any:
    """With statistics of the input, such as standardised weights, which are normalised like an image."""
    x, mask = site.args["input"], site.mask("input")
    per_image = site.step.op == "instance_norm"
    dims = list(range(2, x.ndim)) if per_image else [0, *range(2, x.ndim)]
    of_input = site.args["use_input_stats" if per_image else "training"]
    if mask is None or not of_input or not varies(mask, dims):
        return site.call()
    site.touched = True
    mean, spread, _ = moments(x, mask, dims)
    return scaled((x - mean) * (spread + site.args["eps"]).rsqrt(), mask, *per_channel_affine(site, x))


def per_channel_affine(site: LiveSite, x: Tensor) -> list[Tensor | None]:
    """Weight and bias of a norm, shaped to broadcast over (n, c, …)."""
    channel = [1, -1] + [1] * (x.ndim - 2)
    return [
        None if site.args.get(name) is None else site.args[name].reshape(channel)
        for name in ("weight", "bias")
    ]


@operator("batch_norm", PLAIN.but(survivors=norm_over_images, trains="training"))
@operator("instance_norm", PLAIN.but(survivors=norm_over_images))
def channelwise_norm(site: Site) -> Result:
    x = site.labels.exposed(site["input"])
    if site.args.get("training", site.args.get("use_input_stats")):
        site.statistic(x, [dim for dim in range(len(x.shape)) if dim != 1])
    return site.value(per_channel(site, x, 1))


def cut_normalized_shape(site: CutSite) -> None:
    count = len(site.step.args["normalized_shape"])
    site.step.args["normalized_shape"] = list(site.shapes[0][-count:])


def norm_over_last_dims(site: LiveSite) -> Any:
    x, mask, op = site.args["input"], site.mask("input"), site.step.op
    dims = list(range(x.ndim - len(site.args["normalized_shape"]), x.ndim))
    if mask is None or not varies(mask, dims):
        return site.call()
    site.touched = True
    eps = site.args.get("eps")
    if op == "layer_norm":
        mean, spread, _ = moments(x, mask, dims)
        eps = 1e-5 if eps is None else eps
    else:
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        mean, spread = torch.zeros_like(x), moments(x.square(), mask, dims)[0]
    scale = (spread + eps).rsqrt()
    result = scaled((x - mean) * scale, mask, site.args.get("weight"), site.args.get("bias"))
    return (result, scale) if op == "_fused_rms_norm" else result


@operator(
    "layer_norm rms_norm _fused_rms_norm",
    PLAIN.but(constants=Constants(cut=cut_normalized_shape), survivors=norm_over_last_dims),
)
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


def norm_over_groups(site: LiveSite) -> Any:
    x, mask = site.args["input"], site.mask("input")
    if mask is None:
        return site.call()
    site.touched = True
    shape = (x.shape[0], site.args["num_groups"], -1)
    mean, spread, _ = moments(x.reshape(shape), mask.reshape(shape), [2])
    normal = ((x.reshape(shape) - mean) * (spread + site.args.get("eps", 1e-5)).rsqrt()).reshape(x.shape)
    return scaled(normal, mask, *per_channel_affine(site, x))


@operator(
    "group_norm",
    PLAIN.but(
        constants=Constants(cut=cut_groups("input", "num_groups", lambda site: 1)), survivors=norm_over_groups
    ),
)
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


@operator("_weight_norm _weight_norm_interface", PLAIN)
def weight_norm(site: Site) -> Result:
    """Every slice along `dim` of a kernel is divided by its norm and multiplied by its gain; at -1, all of it."""
    kernel, gain = site.labels.exposed(site["v"]), site.labels.exposed(site["g"])
    rest = [d for d in range(len(kernel.shape)) if d != site["dim"]]
    site.statistic(kernel, rest)
    factors = join(site.labels, [kernel, gain]).factors if gain.shape else kernel.factors
    norms = [factor for factor in factors if not support(factor) & set(rest)]
    parts = [norms] * (len(site.shapes) - 1)  # the norms that the filters had may be a second output
    return tuple(site.labels.value(shape, f) for shape, f in zip(site.shapes, [factors, *parts], strict=True))


def average(site: LiveSite) -> Any:
    x, mask = site.args["self"], site.mask("self")
    dims = site.reduced(x.ndim)
    if mask is None or not varies(mask, dims):
        return site.call()
    site.touched = True
    mean, spread, count = moments(x, mask, dims)
    correction = site.args.get("correction", 1)
    if site.args.get("unbiased") is not None:
        correction = int(site.args["unbiased"])
    spread = spread * count / (count - (1 if correction is None else correction)).clamp(min=1)
    spread = spread.sqrt() if site.step.op.startswith("std") else spread
    mean, spread = (t if site.args.get("keepdim") else t.squeeze(tuple(dims)) for t in (mean, spread))
    if site.step.op == "mean":
        return mean
    return (spread, mean) if site.step.op.endswith("_mean") else spread


def middle(site: LiveSite) -> Any:
    x, mask = site.args["self"], site.mask("self")
    if mask is None or not varies(mask, site.reduced(x.ndim)):
        return site.call()
    site.touched = True
    given = {name: value for name, value in site.args.items() if name != "self"}
    return torch.nanmedian(torch.where(mask, x, float("nan")), **given)


def total(site: LiveSite) -> Any:
    """Zeros for the removed positions, which may hold something else."""
    x, mask = site.args["self"], site.mask("self")
    if mask is None:
        return site.call()
    zeroed = torch.where(mask, x, 0)
    site.touched = varies(mask, site.reduced(x.ndim)) and not torch.equal(zeroed, x)
    return site.call(self=zeroed)


@operator("mean var std var_mean std_mean", PLAIN.but(survivors=average))
@operator("sum nansum linalg_vector_norm linalg_norm norm", PLAIN.but(survivors=total))
@operator("amax max logsumexp", PLAIN.but(survivors=without_removed(float("-inf"))))
@operator("amin min", PLAIN.but(survivors=without_removed(float("inf"))))
@operator("prod", PLAIN.but(survivors=without_removed(1)))
@operator("all", PLAIN.but(survivors=without_removed(True)))
@operator("any", PLAIN.but(survivors=without_removed(False)))
@operator("median", PLAIN.but(survivors=middle))
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


def softmax_of_survivors(site: LiveSite) -> Any:
    x, mask = site.args["self"], site.mask("self")
    if mask is None or not varies(mask, [site.args["dim"] % x.ndim]):
        return site.call()
    site.touched = True
    return torch.where(mask, site.call(self=torch.where(mask, x, float("-inf"))), 0)


@operator("softmax log_softmax _softmax _log_softmax", PLAIN.but(survivors=softmax_of_survivors))
def softmax(site: Site) -> Result:
    x = site.first
    site.statistic(x, site.dims())
    return site.value(x.factors)


@operator("argmax argmin", PLAIN)
def position(site: Site) -> Result:
    """Positions along a cut dim would be counted anew, so it stays."""
    x = site.first
    reduced = site.dims()
    keep = [dim for dim in range(len(x.shape)) if dim not in reduced]
    factors = site.restrict(x, keep, f"{site.op} over channels")
    return site.value(factors if site["keepdim"] else [resized(factor, keep) for factor in factors])


@operator(
    """cumsum cumprod topk sort argsort cummax cummin kthvalue roll flip rot90 fft_fft2 fft_ifft2 fft_rfft2
    fft_irfft2""",
    PLAIN,
)
def along_dims(site: Site) -> Result:
    """Operators that mix positions of some dims: those stay, all others pass."""
    x = site.first
    mixed = site.dims("dims" if "dims" in site.args else "dim")
    keep = [dim for dim in range(len(x.shape)) if dim not in mixed]
    return site.values(site.restrict(x, keep, f"{site.op} over channels"))


@operator("glu", PLAIN)
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


@operator("tril triu", PLAIN)
def triangle(site: Site) -> Result:
    """Zeros above or below a diagonal of the last two dims, which stay."""
    x = site.first
    return site.value(site.restrict(x, range(len(x.shape) - 2), f"{site.op} over channels"))


@operator("cdist", PLAIN)
def distances(site: Site) -> Result:
    return without_rule(site)
