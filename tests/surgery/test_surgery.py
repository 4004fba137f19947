"""Cutting changes what it should, and nothing when it fails."""

import copy

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import CutError, PlanError
from secateur.graph import Graph
from secateur.graph.probe import fit_norms_
from tests.networks import Network, network
from tests.oracles import random_masks


@pytest.fixture
def case() -> tuple[Network, Graph, sc.Plan]:
    net = network("resnet20", dtype=torch.float32)
    graph = sc.analyze(net.model, net.inputs)
    return net, graph, sc.Plan.of(graph, random_masks(graph, 0))


class FixedView(nn.Module):
    """Its forward has a size written into it, and an operator that no rewritten forward may call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).view(-1, 6, 64).view(-1, 6, 8, 8))
        return y * torch.linalg.det(x[:, 0]).view(-1, 1, 1, 1)


def test_a_failing_cut_leaves_model_and_optimizer_untouched() -> None:
    model = FixedView().train()
    x = torch.randn(2, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    attributes = repr(model)
    graph = sc.analyze(model, x)
    with pytest.raises(CutError, match=r"its forward does not run at the new widths.*freeze=.*unchanged"):
        sc.cut_(model, graph, sc.Plan.of(graph, [torch.arange(6) < 3]), optimizer=optimizer)
    after = model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]
    assert repr(model) == attributes
    assert model.training
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_training_goes_on_with_the_optimizer_state_of_the_survivors(case, kind: str) -> None:
    net, graph, plan = case
    make = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-3),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    }[kind]
    model = net.model.train()
    optimizer = make(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(
            net.inputs.expand(4, -1, -1, -1) + torch.randn(4, *net.inputs.shape[1:])
        ).square().mean().backward()
        optimizer.step()
    momentum = "momentum_buffer" if kind == "sgd" else "exp_avg"
    conv = model.layer1[0].conv1
    whole = optimizer.state[conv.weight][momentum].clone()
    parameters = list(model.parameters())
    sc.cut_(model, graph, plan, optimizer=optimizer)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    masks = dict(zip((g.name for g in graph.groups), plan.masks(graph), strict=True))
    expected = whole[masks["layer1.0.conv1"]][:, masks["conv1"]]
    assert torch.equal(optimizer.state[conv.weight][momentum], expected)
    assert conv.weight.grad.shape == conv.weight.shape
    optimizer.step()
    optimizer.zero_grad()
    model(net.inputs.expand(4, -1, -1, -1)).square().mean().backward()
    optimizer.step()


def test_flags_modes_hooks_and_memory_format_survive(case) -> None:
    net, graph, plan = case
    model = net.model.to(memory_format=torch.channels_last).train()
    model.bn1.eval()
    model.fc.weight.requires_grad_(False)
    calls = []
    model.layer1.register_forward_hook(lambda *_: calls.append(1))
    sc.cut_(model, graph, plan)
    assert model.training
    assert not model.bn1.training
    assert not model.fc.weight.requires_grad
    weight = model.layer2[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    calls.clear()
    model(net.inputs.expand(2, -1, -1, -1))
    assert calls == [1]


def test_cutting_twice_with_the_same_plan_is_refused(case) -> None:
    net, graph, plan = case
    sc.cut_(net.model, graph, plan)
    with pytest.raises(PlanError, match="analyse this model again"):
        sc.cut_(net.model, graph, plan)


def test_verify_sees_a_wrong_cut(case) -> None:
    """The wrong filter kept in one layer: shapes agree, numbers do not."""
    net, graph, plan = case
    good = sc.cut_(copy.deepcopy(net.model), graph, plan)
    assert sc.verify(net.model, good, graph, plan).ok
    mask = plan.masks(graph)[1]
    wrong = [*plan.masks(graph)]
    wrong[1] = mask.roll(1)
    other = sc.Plan.of(graph, wrong)
    bad = sc.cut_(copy.deepcopy(net.model), graph, other)
    verification = sc.verify(net.model, bad, graph, plan)
    assert not verification.ok
    assert verification.max_rel_error > 1e-3
    assert "NOT equal" in str(verification)


def test_verify_tries_random_weights_where_the_models_own_hide_errors() -> None:
    net = network("resnet8", dtype=torch.float32)
    nn.init.zeros_(net.model.fc.weight)
    graph = sc.analyze(net.model, net.inputs)
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    verification = sc.verify(net.model, sc.cut_(copy.deepcopy(net.model), graph, plan), graph, plan)
    assert verification.randomised
    assert verification.sensitivity > 1e-3
    assert verification.ok


def test_verify_only_reads(case) -> None:
    net, graph, plan = case
    cut = sc.cut_(copy.deepcopy(net.model), graph, plan)
    before = copy.deepcopy((net.model.state_dict(), cut.state_dict()))
    state = torch.get_rng_state()
    sc.verify(net.model, cut, graph, plan)
    torch.testing.assert_close((net.model.state_dict(), cut.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cut_that_removes_one_filter_by_hand() -> None:
    """The smallest case, written out."""
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([4.0, 5.0, 6.0]).reshape(1, 3, 1, 1))
    graph = sc.analyze(model, torch.ones(1, 1, 2, 2))
    sc.cut_(model, graph, sc.Plan.of(graph, [torch.tensor([True, False, True])]))
    assert model[0].weight.flatten().tolist() == [1, 3]
    assert model[1].weight.flatten().tolist() == [4, 6]
    assert (model[0].out_channels, model[1].in_channels) == (2, 2)
    assert model(torch.ones(1, 1, 1, 1)).item() == 1 * 4 + 3 * 6


def test_norms_fit_what_they_see_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3)), nn.Dropout()
    )
    model[1].eval()
    with torch.no_grad():
        model[0][0].weight.mul_(1e6)
    before = {name: p.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    x = torch.randn(2, 4, 8, 8)
    fit_norms_(model, (x,), {})
    assert modes == [module.training for module in model.modules()]
    assert all(norm.momentum == 0.1 for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    spread = model.eval()(x).var((0, 2, 3))
    assert ((spread > 0.5) & (spread < 2)).all()
