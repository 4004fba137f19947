"""PAAM against its equations and the traps of a reconstruction."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import Budget
from secateur.engine.session import Session
from secateur.errors import SecateurError
from secateur.methods.paam import PAAM, Activation, Scorer, State
from secateur.recipes.models import build_model
from tests.methods.examples import STEPS, Residual, paam
from tests.methods.test_training_methods import loop

SCORERS = ["attention", "additive", "dot", "linear", "free"]


def make(model: nn.Module | None = None, **options: Any) -> Session[State]:
    return paam(**options)(model or Residual())


def attached(session: Session[State]) -> Session[State]:
    return session.attach(torch.optim.SGD(session.model.parameters(), lr=0.05))


def stirred(session: Session[State]) -> Session[State]:
    """Scorers that say something, and norms in which a misplaced factor would show."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in session.own.scorers.parameters():
            p.add_(0.5 * torch.randn_like(p))
        for module in session.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return session


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("regime", ["alternate", "joint"])
def test_at_the_start_it_is_the_dense_network(scorer: str, regime: str) -> None:
    model = Residual().eval()
    x = torch.randn(4, 3, 8, 8)
    before = model(x)
    session = make(model, scorer=scorer, regime=regime)
    with attached(session):
        assert all(torch.equal(s, torch.ones_like(s)) for s in session.method.score(session))
        assert torch.equal(model(x), before)


def test_the_leaky_exponential() -> None:
    """Positive, at most 1, 1 at 0, and a gradient everywhere: the paper's three requirements."""
    x = torch.linspace(-30, 20, 501, requires_grad=True)
    y = Activation.apply(x, 0.01)
    y.sum().backward()
    assert ((y > 0) & (y <= 1)).all()
    assert Activation.apply(torch.zeros(1), 0.01).item() == 1
    assert (x.grad > 0).all()
    inside = (x.detach() > -20) & (x.detach() <= 0)
    torch.testing.assert_close(x.grad[inside], x.detach()[inside].exp())
    assert (x.grad[x.detach() > 0] == 0.01).all()


@pytest.mark.parametrize("scorer", ["attention", "additive", "dot"])
def test_scorers_equal_their_formulas(scorer: str) -> None:
    torch.manual_seed(0)
    net = Scorer(5, 7, scorer, 3)
    for p in net.parameters():
        nn.init.normal_(p)
    filters = torch.randn(5, 7)
    rows = (filters - filters.mean(1, keepdim=True)) / (
        filters.var(1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    q, k = rows @ net.query.weight.T, rows @ net.key.weight.T
    for i in range(5):
        if scorer == "attention":
            share = torch.stack([(q[i] @ k[j]) / 3**0.5 for j in range(5)]).softmax(0)
            mixed = sum(share[j] * (net.value.weight @ rows[j]) for j in range(5))
            expected = mixed @ net.out + net.shift
        elif scorer == "additive":
            expected = torch.stack([torch.tanh(q[i] + k[j]) @ net.out for j in range(5)]).mean() + net.shift
        else:
            expected = net.out * torch.stack([q[i] @ k[j] for j in range(5)]).mean() / 3**0.5 + net.shift
        torch.testing.assert_close(net(filters)[i], expected[0])


def test_gradients_go_only_where_they_should() -> None:
    session = make(scorer_every=2)
    model = session.model
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    with attached(session):
        F.cross_entropy(model(x), y).backward()  # step 0 trains weights
        assert session.penalty().item() == 0
        session.before_step()
        assert all(p.grad is not None for p in model.parameters())
        assert all(p.grad is None for p in session.parameters())
        model.zero_grad()
        session.step = 1  # trains scorers
        (F.cross_entropy(model(x), y) + session.penalty()).backward()
        session.before_step()
        assert all(p.grad is None for p in model.parameters())
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in session.parameters())


def test_scores_see_no_weight_through_the_filters() -> None:
    session = stirred(make())
    torch.cat(session.method.score(session)).sum().backward()
    assert all(p.grad is None for p in session.model.parameters())


def test_a_scorers_step_leaves_the_weights_and_their_statistics_alone() -> None:
    session = stirred(make(scorer_every=2))
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    with session.attach(optimizer):
        loop(session, optimizer, 1)
        before = copy.deepcopy(session.model.state_dict())
        scores = [s.detach().clone() for s in session.method.score(session)]
        loop(session, optimizer, 1)
        for name, tensor in session.model.state_dict().items():
            if "num_batches" not in name:
                assert torch.equal(tensor, before[name]), name
        assert any(not torch.equal(a, b) for a, b in zip(scores, session.method.score(session), strict=True))


def test_a_factor_before_a_batch_norm_would_be_lost() -> None:
    """Why scores stand behind the norm, and in mobile networks behind the last norm of the hidden width."""
    conv, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    x = torch.randn(64, 3, 4, 4)
    factor = torch.tensor([0.1, 0.5, 1.0, 1.0]).view(1, -1, 1, 1)
    before = norm(conv(x))
    torch.testing.assert_close(norm(factor * conv(x)), before, rtol=1e-2, atol=1e-2)
    session = PAAM(regime="alternate").start(
        build_model("mobilenet_v2_cifar"), torch.zeros(1, 3, 32, 32), budget=Budget(macs=0.7), steps=10
    )
    with attached(session):
        analog, _ = session.gates
        kinds = {type(session.model.get_submodule(name)) for name in analog.names}
        assert kinds == {nn.BatchNorm2d}
        x = torch.randn(8, 3, 32, 32)
        session.model.train()
        with torch.no_grad():
            session.method.before_forward(session)
            plain = session.model(x)
            session.step = 4
            for scorer in session.own.scorers:
                scorer.shift.fill_(-1.0)
            assert not torch.allclose(session.model(x), plain, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2_cifar", "shufflenet_v2_x0_5_cifar"])
def test_folded_and_cut_equals_gated(name: str) -> None:
    model = build_model(name).eval()
    session = stirred(PAAM().start(model, torch.zeros(1, 3, 32, 32), budget=Budget(macs=0.7), steps=10))
    x = torch.randn(2, 3, 32, 32)
    with attached(session), torch.no_grad():
        keep = session.choose(session.method.rank(session))
        session.own.selected = [keep[number] for number in session.targets]
        gated = model(x)
        scale = gated.abs().max()
        session.method.select(session, last=True)
    assert session.count("macs") <= session.limits["macs"]
    torch.testing.assert_close(model(x) / scale, gated / scale, rtol=0, atol=1e-5)


def test_a_common_factor_of_scores_is_hidden_by_the_next_norm() -> None:
    """So nothing but the weight's smallness keeps all scores of a group from falling together, where the mean costs."""
    x = torch.randn(16, 3, 8, 8)
    for cost, factor in (("mean", math.exp(-1)), ("widths", 1.0)):
        session = stirred(make(regime="joint", scorer="free", cost=cost))
        with attached(session):
            session.step = STEPS - 1
            session.model.train()
            for p in session.own.scorers.parameters():
                p.data = -p.data.abs()
            before, penalty = session.model(x), session.penalty()
            for p in session.own.scorers.parameters():
                p.data -= 1
            assert torch.allclose(session.model(x), before, rtol=1e-2, atol=1e-2)
            assert penalty > 0
            assert (session.penalty() / penalty).item() == pytest.approx(factor, rel=1e-4)


def test_the_cost_is_of_the_widths_that_scores_are_spread_over() -> None:
    session = make(regime="joint", scorer="free", cost="widths", ramp_share=0.1)
    with attached(session):
        session.step = STEPS - 1  # the target is the budget by now
        kept = [group.units for group in session.whole.groups]
        for number, scorer in zip(session.targets, session.own.scorers, strict=True):
            kept[number] = 10
            scorer.shift.data[10:] = -20.0
        share = session.cost.macs(kept) / session.dense.macs()
        session.model(torch.zeros(2, 3, 8, 8))
        assert session.penalty().item() == pytest.approx(4 * max(0, share - 0.6), abs=1e-4)
        assert 0.6 < share < 1
        session.method.select(session, last=True)
    for number in session.targets:
        assert set(session.kept[number].tolist()) <= set(range(10))


def test_mean_score_falls_with_the_weight() -> None:
    means = []
    for weight in (0.0, 1.0, 10.0):
        session = make(weight=weight, scorer_every=2, return_share=1.0, lr=0.05)
        optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
        with session.attach(optimizer):
            loop(session, optimizer, STEPS - 1)
        means.append(torch.cat(session.method.score(session)).mean().item())
    assert means[0] > means[1] > means[2]
    assert means[0] > 0.9


def test_selection_by_score_mass() -> None:
    session = make(budget=None, mass=0.6, scorer="free", lr=0.3, weight=5.0)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
    with session.attach(optimizer):
        loop(session, optimizer, STEPS)
    pruned = session.finish()
    assert pruned.proof.ok
    scores = torch.cat([session.scores[n] for n in session.targets]).sort(descending=True).values
    kept = sum(len(session.kept[n]) for n in session.targets)
    share = scores.cumsum(0) / scores.sum()
    assert share[kept - 1] >= 0.6 - 1e-6
    assert kept == 1 or share[kept - 2] < 0.6 + 1e-6


def test_streams_share_one_score_vector() -> None:
    session = make(streams=True)
    stream = next(n for n in session.targets if session.whole.groups[n].name == "stem.0")
    members = [m.module for m in session.whole.groups[stream].members if m.role == "out"]
    assert members == ["stem.0", "blocks.0.conv2", "blocks.1.conv2"]
    features = session.own.scorers[session.targets.index(stream)].query.in_features
    assert features == 3 * 9 + 2 * 16 * 9


def test_overhead_is_reported() -> None:
    session = make(scorer="attention", hidden=4)
    own = sum(p.numel() for p in session.own.scorers.parameters())
    cost = session.method.measure_overhead(session)
    assert cost["params"] == own
    assert cost["ms"] > 0
    assert all(p.grad is None for p in session.parameters())


def test_the_size_of_the_attention_networks() -> None:
    """ResNet-56, internal convolutions: 0.42, 0.83 and 1.66 million parameters for h = 16, 32, 64."""
    for hidden, expected in ((16, 0.42e6), (64, 1.66e6)):
        session = PAAM(hidden=hidden).start(
            build_model("resnet56"), torch.zeros(1, 3, 32, 32), budget=Budget(params=0.477), steps=10
        )
        assert sum(p.numel() for p in session.parameters()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "options",
    [{"regime": "both"}, {"scorer": "deep"}, {"leak": 0}, {"scorer_every": 1}, {"mass": 2}, {"hidden": "x"}],
)
def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(SecateurError, match=next(iter(options))):
        make(**options)


def test_budget_or_mass() -> None:
    for options in ({"budget": None}, {"mass": 0.5}):
        with pytest.raises(SecateurError, match="either a budget or mass"):
            make(**options)


def test_every_combination_runs_a_few_steps() -> None:
    for scorer, regime in itertools.product(SCORERS, ["alternate", "joint"]):
        session = make(scorer=scorer, regime=regime)
        optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
        with session.attach(optimizer):
            loop(session, optimizer, 4)
        assert session.step == 4
        assert all(torch.isfinite(s).all() for s in session.method.score(session))
