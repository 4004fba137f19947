"""The layers whose gradients crash in n h w c: who takes gradients of weights avoids it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from secateur import analyze
from secateur.graph import Graph
from secateur.graph.modes import few_channels_planar
from secateur.proof.verify import step_fails
from secateur.scores import score_groups
from secateur.scores.at_init import grasp, snip

X, Y = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last), torch.arange(4) % 3


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """In n h w c, on what says that it is such a processor."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    layers = [nn.Conv2d(3, 5, 1), nn.Conv2d(5, 12, 1, stride=2), nn.Conv2d(12, 3, 1, stride=2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(memory_format=torch.channels_last)


GRADIENTS: dict[str, Callable[[nn.Module, Graph], object]] = {
    "a score of units": lambda m, graph: score_groups(m, graph, "taylor", data=[(X, Y)]),
    "SNIP": lambda m, _: snip(m, ["1.weight"], [(X, Y)]),
    "GraSP": lambda m, _: grasp(m, ["1.weight"], [(X, Y)]),
    "the proof that it trains": lambda m, _: step_fails(m, ((X,), {}), 0),
}


@pytest.mark.parametrize("take", GRADIENTS.values(), ids=GRADIENTS)
def test_strided_1x1_convolutions_of_few_channels_read_n_c_h_w(
    model: nn.Module, take: Callable[[nn.Module, Graph], object]
) -> None:
    seen: list[tuple[bool, bool]] = []

    def look(layer: nn.Module, args: tuple[torch.Tensor], _: object) -> None:
        if args[0].requires_grad:
            weight = layer.get_parameter("weight")
            seen.append((args[0].is_contiguous(), weight.stride(-1) == 1))

    graph = analyze(model, X)
    model[1].register_forward_hook(look)
    take(model, graph)
    assert seen
    assert all(all(planar) for planar in seen)


def test_weights_lie_as_before_afterwards(model: nn.Module) -> None:
    before = {name: (p.stride(), p.detach().clone()) for name, p in model.named_parameters()}
    with few_channels_planar(model):
        model(X)
        assert model[1].weight.stride() != before["1.weight"][0]
    for name, p in model.named_parameters():
        stride, values = before[name]
        assert p.stride() == stride
        assert torch.equal(p, values)
    assert not model[1]._forward_pre_hooks


def test_a_layer_may_be_cut_in_between(model: nn.Module) -> None:
    with few_channels_planar(model):
        model(X)
        model[1].weight.data = model[1].weight.data[:4].clone()
    whole = torch.empty(4, 5, 1, 1).clone(memory_format=torch.channels_last)
    assert model[1].weight.stride() == whole.stride()
