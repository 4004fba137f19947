"""Layers whose weight is worked out before each call: weight and spectral normalisation, pruning masks of torch."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import secateur as sc
from secateur.errors import CutError
from secateur.graph import Graph
from secateur.graph.duplicate import duplicate
from secateur.graph.modules import held
from tests.oracles import random_masks

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated in favor of:FutureWarning")

Layer = Callable[[], nn.Module]

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight": parametrizations.weight_norm,
    "weight, by hook": nn.utils.weight_norm,
    "weight, along the inputs": functools.partial(parametrizations.weight_norm, dim=1),
    "weight, all of it": functools.partial(parametrizations.weight_norm, dim=None),
    "weight, all of it, by hook": functools.partial(nn.utils.weight_norm, dim=None),
    "spectral": parametrizations.spectral_norm,
    "spectral, by hook": nn.utils.spectral_norm,
    "masks": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
}

LAYERS: dict[str, tuple[int, Layer]] = {
    "conv": (2, lambda: nn.Conv2d(16, 16, 3)),
    "depthwise": (2, lambda: nn.Conv2d(16, 16, 3, groups=16)),
    "grouped": (2, lambda: nn.Conv2d(16, 16, 3, groups=4)),
    "transposed": (2, lambda: nn.ConvTranspose2d(16, 16, 3)),
    "conv1d": (1, lambda: nn.Conv1d(16, 16, 3)),
    "conv3d": (3, lambda: nn.Conv3d(16, 16, 3)),
    "linear": (0, lambda: nn.Linear(16, 16)),
}

SIZES = ("in_channels", "out_channels", "in_features", "out_features")


def network(layer: str, wrapper: str) -> nn.Module:
    """A wrapped layer between two others."""
    rank, make = LAYERS[layer]
    conv = [nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d][rank]
    kernel = [3] if rank else []
    return nn.Sequential(
        conv(3, 16, *kernel),
        nn.ReLU(),
        WRAPPERS[wrapper](make()),
        nn.ReLU(),
        conv(16, 2, *[1 for _ in kernel]),
    ).eval()


def images(layer: str) -> torch.Tensor:
    return torch.randn(2, 3, *[8] * LAYERS[layer][0])


def cut_down(model: nn.Module, x: torch.Tensor) -> tuple[Graph, sc.Plan, nn.Module]:
    """A random cut of a copy, which `copy.deepcopy` refuses to make of a weight that a hook works out."""
    graph = sc.analyze(model, x)
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    return graph, plan, sc.cut_(duplicate(model), graph, plan)


PAIRS = [
    *((layer, wrapper) for layer in ("conv", "depthwise", "linear") for wrapper in WRAPPERS),
    *((layer, wrapper) for layer in LAYERS for wrapper in ("weight", "spectral")),
]


@pytest.mark.parametrize(("layer", "wrapper"), sorted(set(PAIRS)))
def test_cut_proven_saved_and_trained(layer: str, wrapper: str, tmp_path) -> None:
    torch.manual_seed(0)
    model, x = network(layer, wrapper), images(layer)
    graph, plan, cut = cut_down(model, x)
    assert sc.verify(model, cut, graph, plan).ok
    wrapped = cut[2]
    shape = held(wrapped, "weight")[1].shape
    assert 1 < shape[0] < 16
    plain = LAYERS[layer][1]()
    into, out = (1, 0) if layer != "transposed" else (0, 1)
    groups = getattr(wrapped, "groups", 1)
    sizes = [getattr(wrapped, name) for name in SIZES if hasattr(wrapped, name)]
    assert sizes == [shape[into] * groups, shape[out]]
    assert groups == (sizes[0] if layer == "depthwise" else getattr(plain, "groups", 1))
    assert wrapped.weight.shape == shape

    sc.save(cut, tmp_path / "m.safetensors")
    torch.manual_seed(1)
    loaded = sc.load(network(layer, wrapper), tmp_path / "m.safetensors")
    assert loaded[2].weight.shape == shape
    with torch.no_grad():
        assert torch.equal(loaded(x), cut(x))

    cut.train()
    before = held(wrapped, "weight")[1].detach().clone()
    optimizer = torch.optim.SGD(cut.parameters(), lr=0.1)
    cut(x).square().mean().backward()
    optimizer.step()
    assert cut(x).isfinite().all()
    assert not torch.equal(held(wrapped, "weight")[1], before)


def test_a_failed_cut_leaves_a_worked_out_weight_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network("conv", "weight, by hook"), images("conv")
    weight = model[2].weight
    graph = sc.analyze(model, x)
    keep = [torch.arange(group.units) % 2 == 0 for group in graph.groups]

    def failing(*_: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("secateur.surgery.cut.settle", failing)
    with pytest.raises(CutError, match="cannot be applied"):
        sc.cut_(model, graph, sc.Plan.of(graph, keep))
    assert model[2].weight is weight


def test_spectral_normalisation_learns_nothing_while_it_is_cut() -> None:
    """Its power iteration runs whenever the weight is read in training mode."""
    model, x = network("conv", "spectral").train(), images("conv")
    norm = model[2].parametrizations.weight[0]
    before = norm._u.clone(), norm._v.clone()
    cut_down(model, x)
    assert torch.equal(norm._u, before[0])
    assert torch.equal(norm._v, before[1])


def test_normalised_layers_of_a_rewritten_module_are_called() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = parametrizations.weight_norm(nn.Conv2d(3, 6, 3, padding=1))
            self.b = parametrizations.spectral_norm(nn.Conv2d(6, 4, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).view(-1, 6, 64).view(-1, 6, 8, 8))

    torch.manual_seed(0)
    model, x = Fixed().eval(), torch.randn(2, 3, 8, 8)
    graph, plan, cut = cut_down(model, x)
    assert sc.verify(model, cut, graph, plan).ok
    assert cut.program.calls == {"a", "b"}
    parametrize.remove_parametrizations(cut.a, "weight")
    with torch.no_grad():
        assert cut(x).shape == (2, 4, 8, 8)
