"""Growth: shapes, attributes and counts; and a refusal that leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn

from secateur import Cost, analyze
from secateur.errors import CutError, PlanError
from secateur.methods.precrop.reset import reset_
from secateur.methods.precrop.widen import widen_
from secateur.recipes.models import build_model
from tests.oracles import counted_macs, counted_params


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, a concatenation, and channels that are split."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.wise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.bn, self.act = nn.BatchNorm2d(10), nn.PReLU(10)
        self.up = nn.Conv2d(10, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.last = nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.bn(self.wise(torch.cat([self.a(x), self.b(x)], 1))))
        first, second = self.last(self.grouped(self.up(x))).chunk(2, 1)
        return self.fc((first * second).mean((2, 3)))


@pytest.mark.parametrize("make", [Grouped, lambda: build_model("resnet8")], ids=["grouped", "resnet8"])
def test_a_wider_network_runs_and_costs_what_the_formula_says(make) -> None:
    model, x = make(), torch.randn(2, 3, 16, 16)
    graph = analyze(model, x)
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    for number in range(len(graph.groups)):
        widths = [g.units + (3 if n == number else 0) for n, g in enumerate(graph.groups)]
        wide = widen_(copy.deepcopy(model), graph, widths)
        assert counted_macs(wide, x) == Cost(graph).macs(widths)
        assert counted_params(wide) == Cost(graph).params(widths)
    wide = widen_(model, graph, [2 * g.units for g in graph.groups])
    assert all(p is q for p, q in zip(wide.parameters(), parameters, strict=True))
    assert [name for name, _ in wide.named_parameters()] == names
    again = analyze(reset_(wide), x)
    assert [(g.name, g.units) for g in again.groups] == [(g.name, 2 * g.units) for g in graph.groups]
    assert wide(x).std() > 0


def test_padded_shortcuts_pad_the_new_channels() -> None:
    model, x = build_model("resnet20"), torch.randn(2, 3, 8, 8)
    graph = analyze(model, x)
    widths = [g.units + (4 if g.name == "layer2.0.conv2" else 0) for g in graph.groups]
    wide = widen_(model, graph, widths)
    assert wide.layer2[0].conv2.out_channels == 36
    assert counted_macs(wide, x) == Cost(graph).macs(widths)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale, self.fc = (
            nn.Conv2d(3, 4, 3),
            nn.Parameter(torch.ones(4, 1, 1)),
            nn.Linear(4, 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc((self.conv(x) * self.scale).mean((2, 3)))


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if x.shape[1] > 4:
            raise RuntimeError("four channels, please")
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("make", "reason"), [(Scaled, "Scaled cannot be widened"), (Fixed, "four channels")])
def test_what_cannot_grow_is_left_as_it_was(make, reason: str) -> None:
    model, x = make(), torch.randn(1, 3, 8, 8)
    graph = analyze(model, x)
    before, state = repr(model), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CutError, match=f"{reason}.*cap=1"):
        widen_(model, graph, [g.units + 1 for g in graph.groups])
    assert repr(model) == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    with pytest.raises(PlanError, match="widen first"):
        widen_(model, graph, [g.units - 1 for g in graph.groups])


def test_fresh_weights_follow_the_new_sizes_and_the_networks_own_manner() -> None:
    model = build_model("resnet8")
    before = model.block3.conv2.weight.std().item()
    graph = analyze(model, torch.zeros(1, 3, 8, 8))
    wide = reset_(widen_(model, graph, [4 * g.units for g in graph.groups]), seed=3)
    weight = wide.block3.conv2.weight  # He's normal distribution by fan-out
    assert weight.std().item() == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.02)
    assert weight.std().item() == pytest.approx(before / 2, rel=0.02)
    assert (wide.conv1.bias == 0).all()
    assert (wide.bn1.weight == 1).all()
    state = torch.random.get_rng_state()
    same = reset_(copy.deepcopy(wide), seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(same.parameters(), wide.parameters(), strict=True))
