"""Networks with sizes written into their forward, and a random cut of each."""

import copy
import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.graph import Graph
from secateur.proof.verify import randomise_
from tests.oracles import random_masks


class Attention(nn.Module):
    """Its widths per head are worked out from the width of the input, and its scale from that."""

    def __init__(self, width: int, heads: int, drop: float = 0.0) -> None:
        super().__init__()
        self.count = heads  # no name that attention classes use
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = drop
        self.register_buffer("table", torch.linspace(0, 1, heads))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.count, c // self.count).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(F.dropout(y.transpose(1, 2).reshape(b, n, c), self.drop, self.training))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, drop)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, 24))
        self.blocks = nn.Sequential(Block(24, 4, drop), Block(24, 4, drop))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class Splits(nn.Module):
    """Splits channels at numbers, unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(4, 8, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).relu().split([4, 8], dim=1)
        return self.c(torch.cat([self.b(left) + right, right[:, 0:8]], 1))


class Slices(nn.Module):
    """Takes channels by number, and pads some on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y[:, 2:8]) + y.mean((1, 2, 3), keepdim=True)


class Partial(nn.Module):
    """Convolves some of its channels; which forward it runs, the instance decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.forward = self.forward_split

    def forward_split(self, features: Tensor) -> Tensor:
        left, right = features.split([4, 8], dim=1)
        return torch.cat([self.conv(left), right], 1)


class Chosen(nn.Module):
    """A submodule has its forward as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.partial, self.b = nn.Conv2d(3, 12, 3), Partial(), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.partial(features=self.a(x).relu()))


class Grouped(nn.Module):
    """GroupNorm called by number of groups, and a channel shuffle with all its sizes written out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)
        self.scale, self.shift = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(self.a(x), 4, self.scale, self.shift).relu()
        y = y.view(-1, 4, 4, 6, 6).transpose(1, 2).reshape(-1, 16, 6, 6)
        return self.c(self.b(y).sigmoid())


class FixedView(nn.Module):
    """Its forward has a size written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 6, 64).view(-1, 6, 8, 8))


NETWORKS = {
    "vit": (TinyViT, 16),
    "splits": (Splits, 8),
    "slices": (Slices, 8),
    "chosen": (Chosen, 8),
    "grouped": (Grouped, 8),
    "view": (FixedView, 8),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    cls, size = NETWORKS[name]
    torch.manual_seed(0)
    return randomise_(cls(), 0).eval(), torch.randn(2, 3, size, size)


def cut_down(model: nn.Module, x: Tensor, seed: int = 0, **options: str) -> tuple[Graph, sc.Plan, nn.Module]:
    graph = sc.analyze(model, x, **options)
    assert graph.groups
    plan = sc.Plan.of(graph, random_masks(graph, seed))
    return graph, plan, sc.cut_(copy.deepcopy(model), graph, plan)


@functools.cache
def cut_once(name: str, seed: int = 0) -> tuple[nn.Module, Tensor, Graph, sc.Plan, nn.Module]:
    """A network of the list, its images, its analysis, a plan and the cut; tests only read them."""
    model, x = make(name)
    return model, x, *cut_down(model, x, seed)
