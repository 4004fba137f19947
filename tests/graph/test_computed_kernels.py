"""Kernels that are computed from the image: modulated and dynamic convolutions, in every number of dims."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from tests.graph.nets import Net, conv
from tests.oracles import counted_macs, proven_cut, random_masks

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TURNED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
LAYER = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def pooled(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)))


def modulated(dims: int, turned: bool = False, demodulated: bool = False) -> Net:
    """StyleGAN2: every image has a kernel of its own, and all are run as the groups of one convolution."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.i(x)
        (n, c), size = y.shape[:2], y.shape[2:]
        k = m.w * m.m(pooled(x)).view(
            n, *((c, 1) if turned else (1, c)), *[1] * dims
        )  # n, o, c, … or n, c, o, …
        if demodulated:
            k = k * (k.square().sum((2, *range(3, 3 + dims)), keepdim=True) + 1e-8).rsqrt()
        k = k.reshape(-1, *k.shape[2:])
        run = (TURNED if turned else CONV)[dims]
        y = run(y.reshape(1, n * c, *size), k, padding=1, groups=n)
        return m.o(y.view(n, -1, *size).relu())

    layer = LAYER[dims]
    shape = (1, 8, 12) if turned else (1, 12, 8)
    return Net(
        forward,
        i=layer(3, 8, 3, padding=1),
        m=nn.Linear(3, 8),
        w=nn.Parameter(torch.randn(*shape, *[3] * dims)),
        o=layer(12, 4, 1),
    )


def mixed(m: nn.Module, x: Tensor) -> Tensor:
    """Dynamic convolution: a mix of expert kernels for every image."""
    y = m.i(x)
    n, c, h, w = y.shape
    share = m.m(pooled(x)).softmax(1)  # n, experts
    k = torch.einsum("ne,eoikl->noikl", share, m.w)
    return m.o(F.conv2d(y.reshape(1, n * c, h, w), k.flatten(0, 1), padding=1, groups=n).view(n, -1, h, w))


def depthwise(m: nn.Module, x: Tensor) -> Tensor:
    """A filter per channel, made by a layer."""
    y = m.i(x)
    n, c, h, w = y.shape
    k = m.m(pooled(x)).view(n * c, 1, 3, 3)
    return m.o(F.conv2d(y.reshape(1, n * c, h, w), k, padding=1, groups=n * c).view(n, c, h, w))


def scaled(m: nn.Module, x: Tensor) -> Tensor:
    """One kernel for all images, its inputs scaled by a layer of a constant, in two groups."""
    k = m.w * m.m(m.z).view(1, 4, 1, 1)
    return m.o(F.conv2d(m.i(x), k, padding=1, groups=2))


def made_whole(m: nn.Module, x: Tensor) -> Tensor:
    """A hypernetwork makes the whole kernel."""
    y = m.i(x)
    n, c, h, w = y.shape
    k = m.m(pooled(x)).view(n * 6, c, 1, 1)
    return m.o(F.conv2d(y.reshape(1, n * c, h, w), k, groups=n).view(n, 6, h, w))


def linear(m: nn.Module, x: Tensor) -> Tensor:
    """A linear layer with weights of its own for every image."""
    y = pooled(m.i(x))
    k = m.w * m.m(pooled(x))[:, None]  # n, o, c
    return m.o(torch.einsum("noc,nc->no", k, y).relu())


def batched(m: nn.Module, x: Tensor) -> Tensor:
    """The same as a batched product."""
    y = pooled(m.i(x))
    return m.o(torch.bmm(m.w * m.m(pooled(x))[:, None], y[:, :, None])[:, :, 0].relu())


def turned_groups() -> Net:
    return Net(lambda m, x: m.o(m.t(m.i(x)).relu()), i=conv(3, 8), t=nn.ConvTranspose2d(8, 12, 3, padding=1, groups=2),
               o=conv(12, 4))  # fmt: skip


def experts() -> Net:
    return Net(
        mixed, i=conv(3, 8), m=nn.Linear(3, 2), w=nn.Parameter(torch.randn(2, 12, 8, 3, 3)), o=conv(12, 4)
    )


def parts(forward: Callable[..., Tensor], rows: int, o: nn.Module, *shape: int) -> Net:
    weight = {"w": nn.Parameter(torch.randn(*shape))} if shape else {}
    return Net(forward, i=conv(3, 8), m=nn.Linear(3, rows), o=o, **weight)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    # name: (network, image dims, {group: units})
    "modulated": (lambda: modulated(2), 2, {"i": 8, "": 12}),
    "modulated, 1d": (lambda: modulated(1), 1, {"i": 8, "": 12}),
    "modulated, 3d": (lambda: modulated(3), 3, {"i": 8, "": 12}),
    "demodulated": (lambda: modulated(2, demodulated=True), 2, {"i": 8, "": 12}),
    "transposed": (lambda: modulated(2, turned=True), 2, {"i": 8, "": 12}),
    "transposed, 1d": (lambda: modulated(1, turned=True), 1, {"i": 8, "": 12}),
    "transposed, 3d": (lambda: modulated(3, turned=True), 3, {"i": 8, "": 12}),
    "mixed": (experts, 2, {"i": 8, "m": 2, "": 12}),
    "depthwise": (lambda: parts(depthwise, 72, conv(8, 4)), 2, {"i": 8}),
    "two groups": (
        lambda: Net(scaled, i=conv(3, 8), m=nn.Linear(3, 4), z=torch.randn(3), o=conv(12, 4),
                    w=nn.Parameter(torch.randn(12, 4, 3, 3))), 2, {"m": 4, "": 6}),
    "made whole": (lambda: parts(made_whole, 48, conv(6, 4)), 2, {}),
    "linear": (lambda: parts(linear, 8, nn.Linear(12, 4), 12, 8), 2, {"i": 8}),
    "batched product": (lambda: parts(batched, 8, nn.Linear(12, 4), 12, 8), 2, {"i": 8}),
    "transposed groups": (turned_groups, 2, {"i": 4, "t": 6}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(2))
def test_kernel_and_input_are_cut_together(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    make, dims, expected = NETWORKS[name]
    model, x = make().eval(), torch.randn(2, 3, *[5] * dims)
    graph = sc.analyze(model, x)
    assert {group.name: group.units for group in graph.groups} == expected, str(graph)
    for share in (0.4, 0.9) if expected else ():
        cut, plan = proven_cut(model, graph, random_masks(graph, seed, share))
        if (
            dims == 2 and min(plan.kept(graph)) > 1
        ):  # torch does not count a product that sums over one position
            assert round(sc.Cost(graph).macs(plan.kept(graph))) == counted_macs(cut, x[:1])
