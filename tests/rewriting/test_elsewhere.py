"""Numbers that only other ways through a module read: a second forward, fusing, training branches."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.models import byobnet
from timm.models.fastvit import FastVit
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.graph.probe import fit_norms_, randomise_
from secateur.rewriting.rewrite import rewritten_modules
from tests.oracles import random_masks


class Split(nn.Module):
    """Halves its channels by `chunk`; exporters take the other forward, by numbers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c = channels
        self.first = nn.Conv2d(3, 2 * channels, 1)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(3 * channels, 4, 1)

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        return self.last(torch.cat((a, b, self.inner(b)), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(*self.first(x).chunk(2, 1))

    def forward_split(self, x: Tensor) -> Tensor:
        return self.joined(*self.first(x).split((self.c, self.c), 1))

    def forward_half(self, x: Tensor) -> Tensor:  # does something else, and is left alone
        return self.first(x)[:, : self.c]


class Tailed(Split):
    """Splits by numbers itself, so that its halves may lose different channels."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split((self.c, self.c), 1)
        return self.joined(a, b)


class Rep(nn.Module):
    """A convolution beside a batch norm of the input, which becomes one convolution."""

    def __init__(self, into: int, out: int, groups: int = 1) -> None:
        super().__init__()
        self.in_chs, self.out_chs, self.groups, self.kernel_size = into, out, groups, 3
        self.conv = nn.Conv2d(into, out, 3, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.identity = nn.BatchNorm2d(into) if groups == into == out else None
        self.one: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.one is not None:
            return self.one(x)
        y = self.norm(self.conv(x))
        return y + self.identity(x) if self.identity is not None else y

    def reparameterize(self) -> None:
        self.one = nn.Conv2d(self.in_chs, self.out_chs, self.kernel_size, padding=1, groups=self.groups)
        weight, bias = folded(self.conv.weight, self.norm)
        if self.identity is not None:
            same = torch.zeros(self.in_chs, self.in_chs // self.groups, self.kernel_size, self.kernel_size)
            same[:, 0, 1, 1] = 1
            more = folded(same, self.identity)
            weight, bias = weight + more[0], bias + more[1]
        with torch.no_grad():
            self.one.weight.copy_(weight)
            self.one.bias.copy_(bias)
        del self.conv, self.norm, self.identity


def folded(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class Uncertain(nn.Module):
    """Two layers of 16 channels; which of them a number means, only the code that reads it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.window_size = 16, 16
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))

    def penalty(self) -> float:
        return self.hidden * self.window_size


def half(model: nn.Module, shares: dict[str, float]) -> tuple[sc.Graph, sc.Plan, nn.Module]:
    """Cut a copy by half, or by another share of what its first layer's name says."""
    graph = sc.analyze(model, torch.randn(1, 3, 8, 8))
    masks = []
    for group in graph.groups:
        kept = round(group.units * shares.get(group.name, 0.5))
        masks.append(torch.arange(group.units) < kept)
    plan = sc.Plan.of(graph, masks)
    return graph, plan, sc.cut_(copy.deepcopy(model), graph, plan)


def test_a_second_forward_gets_its_number() -> None:
    torch.manual_seed(0)
    model = Split(16).eval()
    graph, plan, cut = half(model, {})
    x = torch.randn(2, 3, 8, 8)
    assert cut.c == 8
    assert not rewritten_modules(cut)
    assert torch.equal(cut.forward_split(x), cut(x))
    proof = sc.verify(model, cut, graph, plan)
    assert proof.ok
    assert not proof.stale


def test_the_number_is_saved(tmp_path: Path) -> None:
    model = Split(16).eval()
    _, _, cut = half(model, {})
    sc.save(cut, tmp_path / "cut.safetensors")
    loaded = sc.load(Split(16).eval(), tmp_path / "cut.safetensors")
    x = torch.randn(2, 3, 8, 8)
    assert loaded.c == 8
    assert torch.equal(loaded.forward_split(x), cut(x))


def test_a_rewritten_forward_stands_in_for_the_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tailed(16).eval()
    graph, plan, cut = half(model, {"first": 0.75})
    assert list(rewritten_modules(cut)) == [""]
    x = torch.randn(2, 3, 8, 8)
    cut.forward = cut.forward_split  # what exporters do
    assert torch.equal(copy.deepcopy(cut)(x), cut.forward_split(x))
    del cut.forward
    assert torch.equal(cut.forward_split(x), cut(x))
    assert not sc.verify(model, cut, graph, plan).stale
    sc.save(cut, tmp_path / "cut.safetensors")
    loaded = sc.load(Tailed(16).eval(), tmp_path / "cut.safetensors")
    assert torch.equal(loaded.forward_split(x), cut(x))


def test_reparametrisation_computes_the_same() -> None:
    """Inputs and outputs are 16 channels each and lose different ones, so only a trial tells which number is which."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Rep(16, 16, 16), Rep(16, 16), nn.Conv2d(16, 4, 1)).eval()
    graph, plan, cut = half(model, {"0": 0.25, "2.conv": 0.75})
    assert (cut[1].in_chs, cut[1].out_chs, cut[1].groups, cut[1].kernel_size) == (4, 4, 4, 3)
    assert (cut[2].in_chs, cut[2].out_chs, cut[2].groups) == (4, 12, 1)
    assert not sc.verify(model, cut, graph, plan).stale
    x = torch.randn(2, 3, 8, 8)
    expected = cut(x)
    cut[1].reparameterize()
    cut[2].reparameterize()
    torch.testing.assert_close(cut(x), expected)


def repvgg() -> nn.Module:
    blocks = [byobnet.ByoBlockCfg(type="rep", d=2, c=c, s=2, gs=0, br=1.0) for c in (24, 32)]
    return byobnet.ByobNet(byobnet.ByoModelCfg(blocks, stem_type="rep", stem_chs=16), num_classes=4)


def mobileone() -> nn.Module:
    more = {"br": 1.0, "block_kwargs": {"num_conv_branches": 2}}
    stages = [((16, 1, 2), (32, 0, 1)), ((32, 1, 1), (32, 0, 1))]  # depthwise, then over channels
    blocks = [[byobnet.ByoBlockCfg("one", 1, c, s, gs, **more) for c, gs, s in stage] for stage in stages]
    return byobnet.ByobNet(byobnet.ByoModelCfg(blocks, stem_type="one", stem_chs=16), num_classes=4)


def fastvit() -> nn.Module:
    mixers, options = ("repmixer", "attention"), {"mlp_ratios": (2, 2), "downsamples": (False, True)}
    return FastVit(layers=(1, 1), embed_dims=(16, 32), token_mixers=mixers, num_classes=4, **options)


@pytest.mark.parametrize("make", [repvgg, mobileone, fastvit])
def test_networks_of_timm_reparametrised_after_a_cut(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = randomise_(make().eval(), 0), torch.randn(2, 3, 64, 64)
    fit_norms_(model, (x,), {})
    graph = sc.analyze(model, x[:1])
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    cut = sc.cut_(copy.deepcopy(model), graph, plan)
    proof = sc.verify(model, cut, graph, plan)
    assert proof.ok, proof
    assert all("reset_classifier" in line for line in proof.stale)  # FastViT: any of several widths of 64
    deployed = reparameterize_model(cut)
    assert len(list(deployed.modules())) < len(list(cut.modules()))
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), cut(x), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_known_is_named() -> None:
    torch.manual_seed(0)
    model = Uncertain().eval()
    graph, plan, cut = half(model, {"a": 0.25})
    assert (cut.hidden, cut.window_size) == (16, 16)
    proof = sc.verify(model, cut, graph, plan)
    assert proof.ok
    assert proof.stale == ("hidden = 16, read in penalty",)
    assert "may be stale: hidden = 16, read in penalty" in str(proof)
    graph, plan, cut = half(model, {})
    assert (cut.hidden, cut.window_size) == (8, 16)  # all of its widths say the same
    assert not sc.verify(model, cut, graph, plan).stale


def test_a_change_that_fails_is_named() -> None:
    class Fixed(Rep):
        def reparameterize(self) -> None:
            super().reparameterize()
            self.one.weight.data = self.one.weight.data.reshape(16, 16, 3, 3)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Fixed(16, 16), nn.Conv2d(16, 4, 1)).eval()
    graph, plan, cut = half(model, {})
    assert sc.verify(model, cut, graph, plan).stale == (
        "1: reparameterize() does not keep what forward gives",
    )
