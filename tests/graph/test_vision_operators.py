"""Operators of segmentation and detection that read or write by place: unpooling, deformable convolutions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.rewriting.rewrite import rewritten_modules
from tests.graph.nets import Net, conv
from tests.oracles import proven_cut, random_masks

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def segnet(dims: int) -> Net:
    """An encoder whose pooling tells the decoder where its maxima were."""
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    pool = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims]
    unpool = {1: nn.MaxUnpool1d, 2: nn.MaxUnpool2d, 3: nn.MaxUnpool3d}[dims]

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y, first = m.p(m.a(x))
        z, second = m.p(m.b(y).relu())
        y = m.u(m.c(z), second, output_size=y.shape)
        return m.e(m.u(m.d(y.relu()), first))

    return Net(forward, a=layer(3, 6, 1), b=layer(6, 7, 1), c=layer(7, 7, 1), d=layer(7, 6, 1), e=layer(6, 4, 1),
               p=pool(2, return_indices=True), u=unpool(2))  # fmt: skip


def written_out(m: nn.Module, x: Tensor) -> Tensor:
    y, places = F.max_pool2d(m.a(x).view(-1, 6, 8, 8), 2, return_indices=True)
    return m.e(F.max_unpool2d(y.relu(), places, 2))


def deformable(groups: int = 1, runs: int = 1, *, modulated: bool = True) -> nn.Module:
    ops = pytest.importorskip("torchvision.ops")

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        offset = m.offset(y)
        return m.e(m.d(y, offset, m.mask(y).sigmoid() if modulated else None).relu())

    return Net(
        forward, a=conv(3, 8), e=conv(12, 4), d=ops.DeformConv2d(8, 12, 3, padding=1, groups=groups),
        offset=conv(8, 18 * runs, 3), mask=conv(8, 9 * runs, 3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, int]]] = {
    "unpool": (lambda: segnet(2), X, {"a": 6, "b": 7}),
    "unpool, 1d": (lambda: segnet(1), X[..., 0], {"a": 6, "b": 7}),
    "unpool, 3d": (lambda: segnet(3), X[..., None, :].repeat(1, 1, 1, 4, 1), {"a": 6, "b": 7}),
    "unpool, written out": (lambda: Net(written_out, a=conv(3, 6), e=conv(6, 4)), X, {"a": 6}),
    "deformable": (deformable, X, {"a": 8, "d": 12}),
    "deformable, without mask": (lambda: deformable(modulated=False), X, {"a": 8, "d": 12}),
    "deformable, in groups": (lambda: deformable(2), X, {"a": 4, "d": 6}),
    "deformable, in runs": (lambda: deformable(1, 2), X, {"a": 4, "d": 12}),
    "deformable, in groups and runs": (lambda: deformable(2, 4), X, {"a": 2, "d": 6}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_and_masked_network_agree(name: str) -> None:
    torch.manual_seed(0)
    make, x, expected = NETWORKS[name]
    model = make().eval()
    graph = sc.analyze(model, x)
    assert {group.name: group.units for group in graph.groups} == expected, str(graph)
    for seed in range(3):
        cut, _ = proven_cut(model, graph, random_masks(graph, seed))
        assert bool(rewritten_modules(cut)) == ("written" in name)
        if "deformable" in name:
            out, into, *_ = cut.d.weight.shape
            assert (cut.d.out_channels, cut.d.in_channels) == (out, into * cut.d.groups)
            assert out < 12
