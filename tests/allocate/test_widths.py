"""From densities to widths: the rules for known blocks, and budgets met within one step."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from secateur import Cost, analyze
from secateur.allocate import list_widths
from secateur.allocate.density import list_layers, solve_densities
from secateur.allocate.widths import Widths, fit_shares, meet_budget
from secateur.errors import BudgetError
from secateur.graph import Graph
from secateur.measures import closed
from secateur.recipes.models import build_model
from secateur.recipes.models.mobilenet import InvertedResidual
from secateur.recipes.models.resnet import BasicBlock


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


def convs(*widths: int) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(
        *[m for i, o in pairs for m in (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.ReLU())]
    )


class Residual(nn.Module):
    """A stem, a body that is added to the stream, and a classifier."""

    def __init__(self, body: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, width, 3, padding=1), body, nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.fc((x + self.body(x)).mean((2, 3)))


def seen(model: nn.Module) -> Widths:
    graph = analyze(model, torch.zeros(1, 3, 8, 8))
    return Widths(graph, list_layers(graph))


def shares(widths: Widths, p: dict[str, float], **options) -> dict[str, float]:
    found = fit_shares(widths, p, streams=widths.streams(), **options)
    return {group.name: float(x) for group, x in zip(widths.graph.groups, found, strict=True)}


def test_the_hidden_width_of_a_basic_block_costs_just_what_was_asked() -> None:
    found = shares(seen(Residual(BasicBlock(8, 8, 1, "A"))), {"body.conv1": 0.9, "body.conv2": 0.3})
    assert found["body.conv1"] == pytest.approx(0.6)  # both convolutions have as many weights
    assert found["stem"] == 1


def test_the_hidden_width_of_an_inverted_residual_costs_just_what_was_asked() -> None:
    widths = seen(Residual(InvertedResidual(8, 8, 1, 6)))
    names = ["body.conv.0.0", "body.conv.1.0", "body.conv.2"]
    p = dict(zip(names, (0.2, 0.9, 0.4), strict=True))
    sizes = {layer.name: layer.weights for layer in widths.layers}
    asked = sum(p[n] * sizes[n] for n in names) / sum(sizes[n] for n in names)
    assert shares(widths, p)["body.conv.0.0"] == pytest.approx(asked)


def test_a_depthwise_convolution_is_linear_in_its_channels() -> None:
    body = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1))
    widths = seen(Residual(body))
    assert shares(widths, dict.fromkeys(("body.0", "body.1", "body.2"), 0.3))["body.0"] == pytest.approx(0.3)


def test_squeeze_excitation_follows_what_it_squeezes() -> None:
    body = nn.Sequential(nn.Conv2d(8, 32, 1), SqueezeExcite(32, 8), nn.Conv2d(32, 8, 1))
    widths = seen(Residual(body))
    found = shares(widths, {"body.0": 0.5, "body.2": 0.5, "body.1.fc1": 0.01, "body.1.fc2": 1.0})
    assert found["body.0"] == found["body.1.fc1"] == pytest.approx(0.5)
    stream = Residual(nn.Sequential(convs(8, 8), SqueezeExcite(8, 4)))
    assert shares(seen(stream), {"body.1.fc1": 0.1})["body.1.fc1"] == 1  # and so keeps a kept stream's


def test_a_bottleneck_is_the_least_squares_solution() -> None:
    body = nn.Sequential(
        nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1)
    )
    widths = seen(Residual(body))
    p = {"body.0": 0.9, "body.2": 0.2, "body.4": 0.7}
    a = np.array([32.0, 144.0, 32.0]) / sum(layer.weights for layer in widths.layers)
    logs = np.log(list(p.values()))
    roots = np.array([0.9, 0.2**0.5, 0.2**0.5, 0.7])  # what each layer asks of each of its two sides
    ask = np.log([(roots[:2] @ a[:2]) / a[:2].sum(), (roots[2:] @ a[1:]) / a[1:].sum()])
    rows = np.vstack(
        [np.sqrt(a)[:, None] * [[1, 0], [1, 1], [0, 1]], np.diag(np.sqrt([a[:2].sum(), a[1:].sum()]))]
    )
    target = np.concatenate([np.sqrt(a) * logs, np.diag(rows[3:]) * ask])
    expected = np.exp(np.linalg.lstsq(rows, target, rcond=None)[0])
    found = shares(widths, p)
    assert [found["body.0"], found["body.2"]] == pytest.approx(expected, rel=1e-5)


def test_equal_densities_in_a_chain_give_the_square_root() -> None:
    widths = seen(convs(3, 16, 16, 16, 16, 16, 5))
    p = {layer.name: 0.25 for layer in widths.layers} | {"0": 0.5, "10": 0.5}
    for rule in ("fit", "sqrt"):
        assert list(shares(widths, p, rule=rule).values()) == pytest.approx([0.5] * 5, rel=1e-4)


def test_widths_do_not_zigzag() -> None:
    widths = seen(convs(3, *[32] * 9, 5))
    p = {layer.name: 0.2 for layer in widths.layers} | {"0": 1.0}
    found = list(shares(widths, p).values())
    steps = np.diff(np.log(found[1:-1]))
    assert np.abs(steps).max() < 0.15  # an exact fit alternates between 1 and 0.2


@cache
def graph_of(name: str, side: int) -> Graph:
    return analyze(build_model(name), torch.zeros(1, 3, side, side))


@pytest.mark.parametrize("name", ["resnet8", "vgg16_bn_cifar"])
@settings(max_examples=10, deadline=None)
@given(
    keep=st.floats(0.3, 0.9),
    measure=st.sampled_from(closed()),
    step=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 99),
)
def test_every_budget_is_met_within_one_step(
    name: str, keep: float, measure: str, step: int, seed: int
) -> None:
    graph = graph_of(name, 32)
    cost, rng = Cost(graph), np.random.default_rng(seed)
    wish = rng.uniform(0.2, 1.0, len(cost.full))
    limits = {measure: int(keep * cost.of(measure))}
    assume(cost.of(measure, [list_widths(n, 1, step)[0] for n in cost.full]) <= limits[measure])
    kept = meet_budget(cost, wish, limits, round_to=step)
    assert cost.of(measure, kept) <= limits[measure]
    assert all(k % step == 0 or k == n for k, n in zip(kept, cost.full, strict=True))
    more = [
        [*kept[:i], min(n, k + step), *kept[i + 1 :]]
        for i, (k, n) in enumerate(zip(kept, cost.full, strict=True))
    ]
    assert any(cost.of(measure, m) > limits[measure] for m in more)


def test_a_peak_at_several_operators_is_lowered_by_all_of_them() -> None:
    """Both activations hold twice their width: no step of one of them lowers the larger of the two."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    cost = Cost(analyze(model, torch.zeros(1, 3, 4, 4)))
    assert meet_budget(cost, [1.0, 1.0], {"activations": int(4.6 * 2 * 16 * 4)}) == [4, 4]


def test_widths_grow_up_to_the_cap() -> None:
    graph = graph_of("vgg16_bn_cifar", 32)
    cost = Cost(graph)
    limits = {"macs": cost.macs(), "params": int(0.5 * cost.params())}
    layers = list_layers(graph)
    costs = {m: [layer.costs[m] for layer in layers] for m in limits}
    p = solve_densities(costs, {m: float(limit) for m, limit in limits.items()}, cap=1.5)
    widths = Widths(graph, layers)
    found = fit_shares(widths, {layer.name: q for layer, q in zip(layers, p, strict=True)}, cap=1.5)
    kept = meet_budget(cost, found, limits, cap=1.5, round_to=8)
    assert any(k > n for k, n in zip(kept, cost.full, strict=True))
    assert all(k <= 1.5 * n for k, n in zip(kept, cost.full, strict=True))
    assert all(cost.of(m, kept) <= limit for m, limit in limits.items())


def test_a_further_cost_is_met_too() -> None:
    cost = Cost(graph_of("resnet8", 32))
    free = meet_budget(cost, np.ones(len(cost.full)), {"macs": cost.macs() // 2})
    total = float(sum(free)) * 0.8
    bound = meet_budget(
        cost,
        np.ones(len(cost.full)),
        {"macs": cost.macs() // 2},
        extra={"ms": (lambda n: float(n.sum()), total)},
    )
    assert total - 1 <= sum(bound) <= total


def test_out_of_reach_names_the_range_and_the_way_out() -> None:
    cost = Cost(graph_of("resnet8", 32))
    with pytest.raises(BudgetError, match=r"reachable.*streams="):
        meet_budget(cost, np.ones(len(cost.full)), {"macs": 1000}, keep=[0])
    with pytest.raises(BudgetError, match="fit, sqrt"):
        fit_shares(Widths(cost.graph, list_layers(cost.graph)), {}, rule="best")
