"""One formula per measure for dense, masked and cut models: equal to what torch counts, with a gradient."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.errors import BudgetError
from secateur.graph import Graph
from secateur.recipes.models import build_model
from tests.networks import TORCHVISION, network
from tests.oracles import random_masks


@functools.cache
def full_size(name: str) -> tuple[nn.Module, Graph]:
    """A network of torchvision and its analysis at 224×224; tests only read them."""
    model = build_model(f"torchvision/{name}").eval()
    return model, sc.analyze(model, torch.empty(1, 3, 224, 224))


one_process_each = [pytest.param(name, marks=pytest.mark.xdist_group(f"full {name}")) for name in TORCHVISION]


@pytest.mark.parametrize("name", one_process_each)
def test_macs_at_full_size_equal_the_flop_counter(name: str) -> None:
    """At 224×224, on the meta device: counting needs shapes only."""
    model, graph = full_size(name)
    macs = sc.Cost(graph).macs()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta")(torch.empty(1, 3, 224, 224, device="meta"))
    assert 2 * macs == counter.get_total_flops()


def test_macs_do_not_depend_on_the_batch() -> None:
    net = network("resnet8", dtype=torch.float32)
    one, five = (sc.Cost(sc.analyze(net.model, torch.randn(n, 3, 32, 32))).macs() for n in (1, 5))
    assert one == five


class Positions(nn.Module):
    """Adds a table of positions that it works out anew, for every image or once for all."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.each, self.a, self.table = each, nn.Conv2d(3, 8, 1), nn.Conv2d(1, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.ones(len(x) if self.each else 1, 1, x.shape[2], x.shape[3]).cumsum(3)
        return self.a(x) + self.table(grid)


@pytest.mark.parametrize("each", [True, False])
def test_tables_of_positions_count_as_often_as_they_are_made(each: bool) -> None:
    model, x = nn.Sequential(Positions(each), nn.Conv2d(8, 2, 1)), torch.zeros(1, 3, 4, 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert 2 * sc.Cost(sc.analyze(model, x)).macs() == counter.get_total_flops()


class Sequence(nn.Module):
    """Reads an image row by row, in both directions."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Linear(10, 4)
        self.rnn = kind(6, 5, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x).mean(3).transpose(1, 2)
        return self.head(self.rnn(rows)[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_count_whole_and_cut(kind: type[nn.RNNBase]) -> None:
    model, x = Sequence(kind), torch.zeros(1, 3, 7, 7)
    graph = sc.analyze(model, x)
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    for kept in (None, plan.kept(graph)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(model).to("meta")(x.to("meta"))
        assert 2 * sc.Cost(graph).macs(kept) == counter.get_total_flops()
        sc.cut_(model, graph, plan) if kept is None else None
    assert model.rnn.hidden_size < 5


def test_known_counts_of_resnet20() -> None:
    """He et al. 2016: 0.27 M parameters; MACs by hand: 432 + 18 convolutions + head."""
    cost = sc.Cost(sc.analyze(build_model("resnet20"), torch.zeros(1, 3, 32, 32)))
    stem = 32 * 32 * 9 * 3 * 16
    stages = 6 * 32**2 * 9 * 16**2 + 16**2 * 9 * (16 * 32 + 5 * 32**2) + 8**2 * 9 * (32 * 64 + 5 * 64**2)
    assert cost.macs() == stem + stages + 64 * 10
    assert cost.params() == 269_722


@pytest.mark.parametrize("name", ["resnet20", "torchvision/regnet_y_400mf", "shufflenet_v2_x0_5_cifar"])
def test_the_soft_cost_meets_the_exact_one_and_its_gradient_is_the_slope(name: str) -> None:
    net = network(name, dtype=torch.float32)
    graph = sc.analyze(net.model, net.inputs)
    cost = sc.Cost(graph)
    kept = torch.tensor([float(mask.sum()) for mask in random_masks(graph, 0)], requires_grad=True)
    for measure in ("macs", "params"):
        (gradient,) = torch.autograd.grad(cost.soft(measure, kept), kept)
        counts = [int(k) for k in kept]
        assert cost.soft(measure, kept).item() == cost.of(measure, counts)
        for group in range(0, len(counts), 5):
            up, down = ([*counts[:group], counts[group] + d, *counts[group + 1 :]] for d in (1, -1))
            central = (
                cost.of(measure, up) - cost.of(measure, down)
            ) / 2  # exact for products of at most two cut widths
            assert gradient[group].item() == pytest.approx(central, rel=1e-9)


@pytest.mark.xdist_group("full googlenet")
def test_layers_add_up() -> None:
    _, graph = full_size("googlenet")
    cost = sc.Cost(graph)
    layers = cost.layers()
    assert sum(layers.values()) == cost.macs()
    assert not any(name.startswith("aux") for name in layers)


@pytest.mark.parametrize("bound", [0, -1, 1, 1.2, True, float("nan")])
def test_a_bound_is_a_share_or_a_count(bound: float) -> None:
    with pytest.raises(BudgetError):
        sc.Budget(macs=bound)
