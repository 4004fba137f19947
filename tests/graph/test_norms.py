"""Statistics over channels: who loses what, which sites are reported, and what they are computed over then."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import secateur as sc
from secateur.proof.verify import randomise_
from tests.graph.nets import Net, conv
from tests.oracles import counted_macs, random_masks, tensors_of, without_units

INPUT = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def standardised(weight: Tensor) -> Tensor:
    """Every filter shifted and scaled to mean 0 and variance 1."""
    flat = weight.reshape(1, len(weight), -1)
    return F.batch_norm(flat, None, None, training=True).reshape_as(weight)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, standardised(self.weight), self.bias)


def after(norm: nn.Module, width: int = 12) -> Net:
    return Net(lambda m, x: m.c(m.n(m.a(x))), a=conv(3, width), n=norm, c=conv(width, 4))


NORMS = {
    # name: (network, {group: units}, sites)
    "layer norm": (
        Net(lambda m, x: m.c(m.n(m.a(x).movedim(1, -1)).movedim(-1, 1)), a=conv(3, 12), n=nn.LayerNorm(12),
            c=conv(12, 4)), {"a": 12}, {"n (layer_norm)"}),
    "rms norm": (
        Net(lambda m, x: m.c(m.n(m.a(x).movedim(1, -1)).movedim(-1, 1)), a=conv(3, 12), n=nn.RMSNorm(12),
            c=conv(12, 4)), {"a": 12}, {"n (rms_norm)"}),
    "one group": (after(nn.GroupNorm(1, 12)), {"a": 12}, {"n (group_norm)"}),
    "few wide groups": (after(nn.GroupNorm(2, 12)), {"a": 6}, {"n (group_norm)"}),
    "many narrow groups": (after(nn.GroupNorm(4, 12)), {"a": 4}, set()),
    "a group per channel": (after(nn.GroupNorm(12, 12)), {"a": 12}, set()),
    "instance norm": (after(nn.InstanceNorm2d(12, affine=True)), {"a": 12}, set()),
    "batch norm": (after(nn.BatchNorm2d(12)), {"a": 12}, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_norms_freeze_no_channels_and_the_cut_equals_absent_units(name: str) -> None:
    model, groups, sites = NORMS[name]
    model = randomise_(copy.deepcopy(model), 0).double().eval()
    graph = sc.analyze(model, INPUT)
    assert {group.name: group.units for group in graph.groups} == groups
    assert set(graph.statistics) == sites
    for seed in range(2):
        plan = sc.Plan.of(graph, random_masks(graph, seed))
        cut = sc.cut_(copy.deepcopy(model), graph, plan)
        with torch.no_grad():
            expected = without_units(model, graph, plan, INPUT)
            torch.testing.assert_close(tensors_of(cut(INPUT)), expected, rtol=1e-10, atol=1e-10)
        assert sc.Cost(graph).macs(plan.kept(graph)) == counted_macs(cut, INPUT)
        assert type(cut.n) is type(model.n)  # the user's own layer, with its attributes set


OVER = {
    "softmax": lambda y: y.softmax(1),
    "log softmax": lambda y: y.log_softmax(1),
    "mean": lambda y: y - y.mean(1, keepdim=True),
    "sum": lambda y: y * y.sigmoid().sum(1, keepdim=True),
    "max": lambda y: y + y.amax(1, keepdim=True) + y.max(1, keepdim=True).values,
    "variance": lambda y: y / (1 + y.var(1, keepdim=True)),
    "norm": lambda y: F.normalize(y, dim=1),
    "logsumexp": lambda y: y - y.logsumexp(1, keepdim=True),
    "over everything": lambda y: (y - y.mean((1, 2, 3), keepdim=True)) / y.std((1, 2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", OVER)
def test_statistics_are_computed_over_the_survivors(name: str) -> None:
    """By hand: the same operator on the surviving channels only."""
    op = OVER[name]
    model = Net(lambda m, x: m.c(op(m.a(x))), a=conv(3, 12), c=conv(12, 4))
    model = randomise_(model, 0).double().eval()
    graph = sc.analyze(model, INPUT)
    assert [group.units for group in graph.groups] == [12]
    assert len(graph.statistics) >= 1
    keep = random_masks(graph, 0)[0]
    cut = sc.cut_(copy.deepcopy(model), graph, sc.Plan.of(graph, [keep]))
    with torch.no_grad():
        left = op(F.conv2d(INPUT, model.a.weight[keep], model.a.bias[keep]))
        expected = F.conv2d(left, model.c.weight[:, keep], model.c.bias)
        torch.testing.assert_close(cut(INPUT), expected, rtol=1e-12, atol=1e-12)


def test_filters_are_standardised_over_what_they_still_read() -> None:
    model = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 12), b=Standardised(12, 5, 1), c=conv(5, 4))
    model = randomise_(model, 0).double().eval()
    graph = sc.analyze(model, INPUT)
    assert {group.name: group.units for group in graph.groups} == {"a": 12, "b": 5}
    assert graph.statistics == ("b (batch_norm)",)
    read, made = random_masks(graph, 0)
    cut = sc.cut_(copy.deepcopy(model), graph, sc.Plan.of(graph, [read, made]))
    with torch.no_grad():
        x = F.conv2d(INPUT, model.a.weight[read], model.a.bias[read])
        x = F.conv2d(x, standardised(model.b.weight[made][:, read]), model.b.bias[made])
        torch.testing.assert_close(cut(INPUT), F.conv2d(x, model.c.weight[:, made], model.c.bias))


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_weight_norm_follows_its_filters(wrap) -> None:
    model = randomise_(
        Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 6), b=wrap(conv(6, 5)), c=conv(5, 4)), 0
    ).double()
    graph = sc.analyze(model, INPUT)
    assert [group.units for group in graph.groups] == [6, 5]
    plan = sc.Plan.of(graph, [torch.ones(6, dtype=torch.bool), torch.arange(5) < 2])
    cut = sc.cut_(model, graph, plan)
    with torch.no_grad():
        assert cut(INPUT).shape == (1, 4, 8, 8)
    assert cut.b.weight.shape == (2, 6, 1, 1)


def test_a_statistic_over_whole_channels_is_no_site() -> None:
    model = Net(lambda m, x: m.c(m.a(x).mean((2, 3), keepdim=True)), a=conv(3, 6), c=conv(6, 4))
    assert sc.analyze(model, INPUT.float()).statistics == ()
