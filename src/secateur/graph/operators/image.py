"""Operators over image dims, channel by channel: pooling, resizing, patches."""

import re

import numpy as np

from secateur.graph.join import join
from secateur.graph.labels import Atoms, Value, along
from secateur.graph.operators.site import Result, Site, resized
from secateur.graph.operators.step import cut_groups
from secateur.graph.operators.table import FORBIDDEN, PLAIN, Constants, operator


@operator(
    """max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices
    max_pool2d_with_indices max_pool3d_with_indices upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_bilinear2d upsample_linear1d upsample_bicubic2d upsample_trilinear3d _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d""",
    PLAIN,
)
def image_op(site: Site) -> Result:
    """An operator over the last one, two or three dims: its name says how many."""
    x = site.first
    found = re.search(r"(\d)d", site.op)
    assert found is not None
    lead = range(len(x.shape) - int(found[1]))
    return site.values(site.restrict(x, lead, f"{site.op} over a labelled image dim"))


@operator("grid_sampler grid_sampler_2d grid_sampler_3d", PLAIN)
def grid_sampler(site: Site) -> Result:
    x, grid = site.first, site.labels.exposed(site["grid"])
    site.restrict(grid, [], "sampling positions")
    return site.value(site.restrict(x, [0, 1], "sampled over a labelled image dim"))


@operator("max_unpool2d max_unpool3d", PLAIN)
def max_unpool(site: Site) -> Result:
    """Values go back to where a pooling took them from: both lose the same channels."""
    lead = len(site.shape) - int(site.op[-2])
    operands = []
    for value in (site.first, site.labels.exposed(site["indices"])):
        factors = site.restrict(value, range(lead), "places in a labelled image dim")
        operands.append(Value(value.shape[:lead] + (1,) * (len(value.shape) - lead), tuple(factors)))
    return site.value(join(site.labels, operands).factors)


# A file is to load wherever torch alone is installed.
@operator("torchvision.roi_align torchvision.roi_pool", FORBIDDEN)
def roi_pool(site: Site) -> Result:
    """Boxes of every image become the batch; channels pass."""
    x, *boxes = (site.labels.exposed(value) for value in site.operands)
    for box in boxes:
        site.restrict(box, [], "positions of boxes")
    factors = site.restrict(x, [1], "boxes over a labelled image dim")
    return tuple(site.labels.value(shape, factors if len(shape) == 4 else []) for shape in site.shapes)


@operator("im2col", PLAIN)
def im2col(site: Site) -> Result:
    """Every channel becomes as many as the kernel has positions."""
    x = site.first
    rank = len(x.shape)
    each = site.shape[-2] // x.shape[-3]
    factors = site.restrict(x, range(rank - 2), "patches of a labelled image dim")
    keep = list(range(rank - 1))
    return site.value([repeated(resized(factor, keep), rank - 3, each) for factor in factors])


@operator("col2im", PLAIN)
def col2im(site: Site) -> Result:
    x = site.first
    rank = len(x.shape)
    channels = site.shape[-3]
    factors = site.restrict(x, range(rank - 1), "patches of a labelled image dim")
    return site.value([gathered(site, factor, rank - 2, channels)[..., None] for factor in factors])


@operator("pixel_shuffle", PLAIN)
def pixel_shuffle(site: Site) -> Result:
    x = site.first
    rank = len(x.shape)
    factors = site.restrict(x, range(rank - 2), "pixels of a labelled image dim")
    return site.value([gathered(site, factor, rank - 3, site.shape[-3]) for factor in factors])


@operator("pixel_unshuffle", PLAIN)
def pixel_unshuffle(site: Site) -> Result:
    x = site.first
    rank = len(x.shape)
    factors = site.restrict(x, range(rank - 2), "pixels of a labelled image dim")
    return site.value([repeated(factor, rank - 3, site["downscale_factor"] ** 2) for factor in factors])


@operator("channel_shuffle", PLAIN.but(constants=Constants(cut=cut_groups("self", "groups", lambda site: 1))))
def channel_shuffle(site: Site) -> Result:
    x, labels, groups = site.first, site.labels, site["groups"]
    factors = site.restrict(x, [0, 1], "a shuffle of a labelled image dim")
    atoms = labels.axis(Value(x.shape, tuple(factors)), 1).reshape(groups, -1)
    if 1 < groups < x.shape[1]:
        labels.choose({"groups": [(atoms, atoms[:, :1])], "positions": [(atoms, atoms[:1])]})
    return site.value([along(atoms.T.ravel(), 1, len(x.shape))])


def repeated(factor: Atoms, dim: int, each: int) -> Atoms:
    """Every position of a dim `each` times in a row, where the factor varies along it."""
    return np.repeat(factor, each, axis=dim) if factor.shape[dim] > 1 else factor


def gathered(site: Site, factor: Atoms, dim: int, channels: int) -> Atoms:
    """Runs of equal length along a dim become one position each, so they are tied."""
    if factor.shape[dim] == 1:
        return factor
    runs = np.moveaxis(factor, dim, -1)
    runs = runs.reshape(*runs.shape[:-1], channels, -1)
    site.labels.tie(runs, runs[..., :1])
    return np.moveaxis(runs[..., 0], -1, dim)
