"""Every fault in a cut model is found, whatever sizes it is compared at, and nothing but faults is."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import CutError
from secateur.graph import Graph
from secateur.proof.verify import randomise_
from secateur.rewriting.rewrite import rewritten_modules
from tests.oracles import random_masks
from tests.surgery.fixed_sizes import TinyViT


class Convolutions(nn.Module):
    """No statistic is taken over channels, and any image size is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16)
        self.grouped, self.last = nn.Conv2d(16, 16, 3, 2, 1, groups=4), nn.Conv2d(16, 16, 3, 2, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(F.relu(self.grouped(F.relu(self.norm(self.stem(x))))))
        return self.head(x.mean((2, 3)))


class Normalised(Convolutions):
    """A statistic is."""

    def __init__(self) -> None:
        super().__init__()
        self.over = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.over(F.relu(self.norm(self.stem(x))).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.last(F.relu(self.grouped(x))).mean((2, 3)))


CASES: dict[str, tuple[type[nn.Module], int, str]] = {
    "small images": (Convolutions, 32, "3 × 3 × 83 × 35"),
    "large images": (Convolutions, 160, "3 × 3 × 46 × 69"),
    "small images, statistics": (Normalised, 32, "1 × 3 × 83 × 35"),
    "large images, statistics": (Normalised, 160, "1 × 3 × 115 × 91"),
    "one image size": (TinyViT, 16, "1 × 3 × 16 × 16"),
}


@functools.cache
def case(name: str) -> tuple[nn.Module, Graph, sc.Plan, nn.Module]:
    cls, size, _ = CASES[name]
    torch.manual_seed(0)
    model = randomise_(cls(), 0).eval()
    graph = sc.analyze(model, torch.randn(1, 3, size, size))
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    return model, graph, plan, sc.cut_(copy.deepcopy(model), graph, plan)


def tensors(model: nn.Module, kind: type[nn.Module], name: str) -> list[Tensor]:
    found = [getattr(module, name) for module in model.modules() if isinstance(module, kind)]
    assert all(len(t) > 1 for t in found)
    return found


def swapped_channels(model: nn.Module) -> None:
    for weight in tensors(model, nn.Conv2d, "weight")[:1]:
        weight.copy_(weight[[1, 0, *range(2, len(weight))]])


def wrong_slice_of_a_norm(model: nn.Module) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
    found = norms[0].running_mean if isinstance(norms[0], nn.BatchNorm2d) else norms[0].bias
    found.copy_(found.roll(1))


def scale_off_by_a_thousandth(model: nn.Module) -> None:
    tensors(model, nn.Conv2d, "weight")[-1].mul_(1.001)


def one_weight_off_by_a_millionth(model: nn.Module) -> None:
    weight = tensors(model, nn.Linear, "weight")[-1]
    weight[0, 0] += 1e-6 * weight.abs().max()


def wrong_columns(model: nn.Module) -> None:
    weight = tensors(model, nn.Linear, "weight")[-1]
    weight.copy_(weight.roll(1, 1))


def stale_epsilon(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)).eps = 2e-5


FAULTS: list[Callable[[nn.Module], None]] = [
    swapped_channels,
    wrong_slice_of_a_norm,
    scale_off_by_a_thousandth,
    one_weight_off_by_a_millionth,
    wrong_columns,
    stale_epsilon,
]


@pytest.mark.parametrize("name", CASES)
def test_every_fault_is_found_at_every_kind_of_size(name: str) -> None:
    model, graph, plan, cut = case(name)
    proof = sc.verify(model, cut, graph, plan)
    assert proof.ok, proof
    assert proof.sizes == CASES[name][2]
    assert not proof.randomised
    assert bool(proof.statistics) == (CASES[name][0] is not Convolutions)
    for fault in FAULTS:
        spoilt = copy.deepcopy(cut)
        with torch.no_grad():
            fault(spoilt)
        assert not sc.verify(model, spoilt, graph, plan).ok, fault.__name__


@pytest.mark.parametrize("name", ["small images", "large images, statistics"])
def test_a_stale_attribute_is_found(name: str) -> None:
    model, graph, plan, cut = case(name)
    stale = copy.deepcopy(cut)
    stale.grouped.groups = 2 if stale.grouped.groups != 2 else 1
    with pytest.raises(CutError, match="does not run"):
        sc.verify(model, stale, graph, plan)


class OneSize(Convolutions):
    """Wrong at any other size or number of images than those of the analysis, and only once it is cut."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        whole = self.stem.out_channels == 16 or x.shape[2:] == (160, 160)
        return y if whole else y * 1.01


class LongSides(Convolutions):
    """Wrong, once it is cut, where a side is longer than in all that the analysis records."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        whole = self.stem.out_channels == 16 or max(x.shape[2:]) <= 2.2 * 32
        return y if whole else y * 1.01


def test_what_is_wrong_beyond_the_sizes_of_the_analysis_is_found() -> None:
    model, graph, plan, cut = case("small images")
    model, cut = copy.deepcopy(model), copy.deepcopy(cut)
    model.__class__ = cut.__class__ = LongSides
    assert cut.stem.out_channels < 16
    assert sc.verify(model, cut, graph, plan).elsewhere == pytest.approx(0.01, rel=0.01)


def test_what_is_wrong_at_another_size_is_found() -> None:
    model, graph, plan, cut = case("large images")
    model, cut = copy.deepcopy(model), copy.deepcopy(cut)
    model.__class__ = cut.__class__ = OneSize
    assert cut.stem.out_channels < 16
    proof = sc.verify(model, cut, graph, plan)
    assert not proof.ok
    assert proof.elsewhere == pytest.approx(0.01, rel=0.01)
    assert proof.max_rel_error_float32 < 1e-5  # at the size of the analysis all is well


class OtherSizes(Convolutions):
    """Wrong at the size of the analysis."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        whole = self.stem.out_channels == 16 or x.shape[2:] != (160, 160)
        return y if whole else y * 1.01


def test_what_is_wrong_at_the_size_of_the_analysis_is_found() -> None:
    model, graph, plan, cut = case("large images")
    model, cut = copy.deepcopy(model), copy.deepcopy(cut)
    model.__class__ = cut.__class__ = OtherSizes
    proof = sc.verify(model, cut, graph, plan)
    assert not proof.ok
    assert proof.max_rel_error < 1e-9
    assert proof.max_rel_error_float32 == pytest.approx(0.01, rel=0.01)


def test_images_that_change_one_another_are_compared_all_the_same() -> None:
    class Mixed(TinyViT):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y - y.mean(0)

    torch.manual_seed(0)
    model = randomise_(Mixed(), 0).eval()
    graph = sc.analyze(model, torch.randn(2, 3, 16, 16))
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    cut = sc.cut_(copy.deepcopy(model), graph, plan)
    proof = sc.verify(model, cut, graph, plan)
    assert proof.ok, proof
    with torch.no_grad():
        cut.head.weight.mul_(1.01)
    assert not sc.verify(model, cut, graph, plan).ok


class Scaled(nn.Module):
    """The width stands in its forward, and does little."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * (1 + 1e-5 / y.shape[-1]))


def test_the_judge_finds_what_is_a_ten_millionth_wrong() -> None:
    torch.manual_seed(0)
    model = randomise_(Scaled(), 0).eval()
    graph = sc.analyze(model, torch.randn(2, 6))
    keep = [torch.arange(group.units) < 6 for group in graph.groups]
    cut = sc.cut_(copy.deepcopy(model), graph, sc.Plan.of(graph, keep))
    assert list(rewritten_modules(cut)) == [""]
    assert sc.verify(model, cut, graph, sc.Plan.of(graph, keep)).ok
