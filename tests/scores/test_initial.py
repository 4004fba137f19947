"""Scores of fresh weights against their equations, and the laws of SynFlow."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from secateur import analyze
from secateur.allocate.density import Layer, list_layers
from secateur.engine.method import Context
from secateur.errors import ScoreError
from secateur.methods.at_init import choose_weights, densities_of
from secateur.scores.at_init import Synflow, grasp, snip


def chain(depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(3 if i == 0 else 6 + i, 7 + i, 3, padding=1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6 + depth, 5, bias=False))


def weights(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.ndim > 1]


def test_synflow_is_conserved_from_layer_to_layer() -> None:
    model, x = chain(), torch.zeros(1, 3, 8, 8)
    masks = {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters()}
    flow = Synflow(model, x, weights(model))
    for scores in (flow(), flow(masks)):
        sums = torch.stack([s.sum() for s in scores.values()])
        assert (sums / sums[0] - 1).abs().max() < 1e-12
        assert sums[0] > 0


def test_synflow_is_its_definition() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    a, b = (model[i].weight.detach().double().abs() for i in (0, 2))
    scores = Synflow(model, torch.zeros(1, 2), ["0.weight", "2.weight"])()
    assert torch.allclose(scores["0.weight"], a * b.sum(0)[:, None], atol=1e-14)
    assert torch.allclose(scores["2.weight"], b * a.sum(1)[None], atol=1e-14)


def test_synflow_leaves_the_model_as_it_was() -> None:
    model = chain()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    Synflow(model, torch.zeros(1, 3, 8, 8), weights(model))()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def long_chain() -> tuple[nn.Module, torch.Tensor, tuple[Layer, ...]]:
    torch.manual_seed(0)
    widths = [3, 8, 64, 64, 16, 64, 64, 8]
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x = torch.zeros(1, 3, 4, 4)
    return model, x, list_layers(analyze(model, x), classifier=True)


def test_synflow_never_empties_a_layer() -> None:
    model, x, layers = long_chain()
    total = sum(layer.weights for layer in layers)
    masks = choose_weights(model, x, layers, {"params": 0.001 * total}, "synflow", Context())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == int(0.001 * total)
    assert min(densities_of(layers, masks).values()) > 0


def test_one_round_would_empty_one() -> None:
    model, x, layers = long_chain()
    bounds = {"params": 0.001 * sum(layer.weights for layer in layers)}
    masks = choose_weights(model, x, layers, bounds, "synflow", Context(), rounds=1)
    assert min(densities_of(layers, masks).values()) == 0


def test_synflow_survives_an_overflow() -> None:
    layers = [m for _ in range(40) for m in (nn.Linear(8, 8, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e9)
    flow = Synflow(model, torch.zeros(1, 8), weights(model))
    huge = flow()
    with torch.no_grad():
        for p in model.parameters():
            p.div_(1e9)
    small = Synflow(model, torch.zeros(1, 8), weights(model))()
    for name in huge:  # on a chain the ranking is the same
        ratio = (huge[name] / small[name]).flatten()
        assert (ratio / ratio[0] - 1).abs().max() < 1e-4
    assert torch.stack([s.sum() for s in huge.values()]).std() < 1e-6 * huge["0.weight"].sum()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, 8, 8, generator=g, dtype=torch.float64), torch.randint(5, (6,), generator=g)


def test_snip_is_gradient_times_weight() -> None:
    model, (x, y) = chain().double(), batch()
    scores = snip(model, weights(model), [(x, y), (x, y)])
    nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(scores[name], (2 * p.grad * p).abs(), atol=1e-14)


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient() -> None:
    model, (x, y) = chain(2).double(), batch()
    own = dict(model.named_parameters())
    point = {n: p.detach().clone() for n, p in own.items()}

    def gradient(step: float, along: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for n, p in own.items():
                p.copy_(point[n] + step * along[n] if along else point[n])
        halves = [nn.functional.cross_entropy(model(a) / 200, b) for a, b in ((x[:3], y[:3]), (x[3:], y[3:]))]
        return dict(zip(own, torch.autograd.grad(sum(halves), list(own.values())), strict=True))

    g = gradient(0.0, {})
    scores = grasp(model, list(own), [(x, y)])
    h = 1e-3
    up, down = gradient(h, g), gradient(-h, g)
    for name, p in point.items():
        expected = p * (up[name] - down[name]) / (2 * h)
        assert torch.allclose(scores[name], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
        assert scores[name].abs().max() > 0


def test_scores_that_need_data_say_so() -> None:
    model = chain()
    for score in (snip, grasp):
        with pytest.raises(ScoreError, match="needs data"):
            score(model, weights(model), [])
    with pytest.raises(ScoreError, match="grasp, magnitude, random, snip, synflow"):
        choose_weights(model, torch.zeros(1, 3, 8, 8), (), {}, "best", Context())


def test_a_score_of_your_own_is_a_function() -> None:
    model, x, layers = long_chain()
    bounds = {"params": 0.5 * sum(layer.weights for layer in layers)}
    by_table = choose_weights(model, x, layers, bounds, "magnitude", Context())
    own = choose_weights(
        model, x, layers, bounds, lambda seen: {n: w.abs() for n, w in seen.values.items()}, Context()
    )
    assert all(torch.equal(own[name], mask) for name, mask in by_table.items())
