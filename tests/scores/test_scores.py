"""Every score in the table keeps one contract; the known ones equal their formulas."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import ScoreError
from secateur.scores import SCORES, score_groups
from tests.networks import network

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
    )  # fmt: skip


@pytest.mark.parametrize("score", SCORES)
def test_contract(score: str) -> None:
    model = small().train()
    model[0].weight.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    graph = sc.analyze(model, X)
    data = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    scores = score_groups(model, graph, score, seed=3, data=data)
    again = score_groups(model, graph, score, seed=3, data=data)
    assert [s.shape for s in scores] == [(6,), (5,)]
    for s, t in zip(scores, again, strict=True):
        assert s.dtype == torch.float32
        assert (s >= 0).all()
        assert torch.equal(s, t)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 9
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_norms_of_a_residual_stream_cover_all_layers_that_write_to_it() -> None:
    net = network("resnet20_b", dtype=torch.float32)
    graph = sc.analyze(net.model, net.inputs)
    stream = next(number for number, g in enumerate(graph.groups) if g.name == "conv1")
    weights = [net.model.conv1.weight] + [block.conv2.weight for block in net.model.layer1]
    rows = torch.cat([w.detach().flatten(1) for w in weights], dim=1)
    torch.testing.assert_close(score_groups(net.model, graph, "l1")[stream], rows.abs().sum(1))
    torch.testing.assert_close(score_groups(net.model, graph, "l2")[stream], rows.norm(dim=1))


def test_taylor_is_the_first_order_change_of_the_loss() -> None:
    """Against the loss with each unit faded by a small factor, at the norm that follows it."""
    model = small().double().eval()
    for norm in (model[1], model[4]):
        norm.bias.data.normal_()
    graph = sc.analyze(model, X.double())
    scores = score_groups(model, graph, "taylor", data=[(X.double(), Y)])
    loss = lambda: nn.functional.cross_entropy(model(X.double()), Y).item()  # noqa: E731
    step = 1e-6
    for score, norm in zip(scores, (model[1], model[4]), strict=True):
        for unit in range(len(score)):
            kept = norm.weight.data[unit].clone(), norm.bias.data[unit].clone()
            values = []
            for factor in (1 + step, 1 - step):
                norm.weight.data[unit], norm.bias.data[unit] = kept[0] * factor, kept[1] * factor
                values.append(loss())
            norm.weight.data[unit], norm.bias.data[unit] = kept
            assert score[unit].item() == pytest.approx(
                abs(values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8
            )


def test_random_depends_on_the_seed_only() -> None:
    model = small()
    graph = sc.analyze(model, X)
    a, b = (torch.cat(score_groups(model, graph, "random", seed=seed)) for seed in (0, 1))
    assert not torch.equal(a, b)


def test_errors() -> None:
    model = small()
    graph = sc.analyze(model, X)
    with pytest.raises(
        ScoreError, match="unknown score 'l3'; choose one of: bn-scale, group-l2, l1, l2, random, taylor"
    ):
        score_groups(model, graph, "l3")
    with pytest.raises(ScoreError, match="needs gradients on data: pass data="):
        score_groups(model, graph, "taylor")
    with pytest.raises(ScoreError, match="calibration data is empty"):
        score_groups(model, graph, "taylor", data=[])
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    with pytest.raises(ScoreError, match="group '0': no batch-norm follows"):
        score_groups(plain, sc.analyze(plain, X), "bn-scale")
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    with pytest.raises(ScoreError, match="not finite"):
        score_groups(model, graph, "l2")
