"""One step of each host of Decay Pruning against its equations, written out by hand."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import Budget
from secateur.engine.directions import remember
from secateur.engine.session import Session
from secateur.methods.depgraph import DepGraph
from secateur.methods.gate_decorator import GatedBatchNorm2d, GateDecorator, gate_, melt_
from secateur.methods.hesso import HESSO
from secateur.methods.oto import OTO
from tests.methods.examples import INPUTS, Residual
from tests.methods.test_training_methods import loop

BUDGET = Budget(macs=0.6)


def unit_vectors(model: Residual, group: str) -> torch.Tensor:
    """x of the hidden units of a block: filter, scale and shift."""
    block = model.get_submodule(group)
    return (
        torch.cat([block.conv1.weight.flatten(1), block.bn1.weight[:, None], block.bn1.bias[:, None]], 1)
        .detach()
        .double()
    )


def one_step(
    session: Session[Any] | None, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 5
) -> None:
    torch.manual_seed(seed)
    loss = F.cross_entropy(model(torch.randn(16, 3, 8, 8)), torch.arange(16) % 3)
    if session is not None:
        loss = loss + session.penalty()
    optimizer.zero_grad()
    loss.backward()
    if session is not None:
        session.before_step()
    optimizer.step()
    if session is not None:
        session.after_step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_penalised_step_of_oto(kind: str) -> None:
    model = Residual()
    session = OTO(start_share=0.1, half_space=0.0, strength=1e-2, score="published", round_to=1).start(
        model, INPUTS, budget=BUDGET, steps=30
    )
    plain, twin = copy.deepcopy(model), None
    optimizer, other = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](plain.parameters())
    with session.attach(optimizer):
        for k in range(2):
            one_step(session, model, optimizer, k)
            one_step(None, plain, other, k)
        x = unit_vectors(plain, "blocks.0")
        one_step(None, plain, other)
        lr = other.param_groups[0]["lr"]
        v = (x - unit_vectors(plain, "blocks.0")) / lr
        one_step(session, model, optimizer)  # step 3 = 10 % of 30: partition, then the first penalised step
    number = next(n for n, g in enumerate(session.whole.groups) if g.name == "blocks.0.conv1")
    penalised = session.own.penalised[number]
    assert 0 < penalised.sum() < 16
    for u in range(16):
        expected = x[u] - lr * v[u]
        if penalised[u]:
            product, length = x[u] @ v[u], x[u].norm()
            strength = 1e-2
            if product < 0:
                low, up = -product / length, -(v[u] @ v[u]) * length / product
                strength = float(min(max(2 * low, torch.tensor(1e-2)), torch.tensor(1e-1)))
                if strength >= up:
                    strength = float((low + up) / 2)
            expected = expected - lr * strength * x[u] / length
        torch.testing.assert_close(unit_vectors(model, "blocks.0")[u], expected, rtol=1e-4, atol=1e-6)
    assert twin is None


def test_projection_sets_what_crosses_over_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Residual()
    session = OTO(start_share=0.1, half_space=0.99, strength=30.0, most=1.0, round_to=1).start(
        model, INPUTS, budget=BUDGET, steps=30
    )
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with session.attach(optimizer):
        loop(session, optimizer, 2)
        assert all(len(kept) == g.units for kept, g in zip(session.kept, session.whole.groups, strict=True))
        penalise = OTO._penalise
        chosen: list[torch.Tensor] = []

        def watch(self: OTO, session: Session[Any]) -> None:
            penalise(self, session)
            chosen.extend(mask.clone() for mask in session.own.penalised)

        monkeypatch.setattr(OTO, "_penalise", watch)
        loop(
            session, optimizer, 1
        )  # chosen, pushed across, projected, and so many of them cut as the budget asks for
    assert session.method.met(session)
    for kept, group, penalised in zip(session.kept, session.whole.groups, chosen, strict=True):
        left = torch.ones(group.units, dtype=torch.bool)
        left[kept] = False
        assert not (left & ~penalised).any()


def test_the_redundancy_of_oto() -> None:
    model = Residual()
    session = OTO(score="published").start(model, INPUTS, budget=BUDGET, steps=30)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with session.attach(optimizer):
        session.own.x = remember(session)
        xs = {n: session.pool.vectors(n) for n in session.targets}
        one_step(None, model, optimizer)
        found = session.method.redundancy(session)
        vs = {n: (xs[n] - session.pool.vectors(n)) / 0.1 for n in session.targets}
    cos = {n: [float(x @ v / (x.norm() * v.norm())) for x, v in zip(xs[n], vs[n], strict=True)] for n in xs}
    size = {n: [1 / (float(x.norm()) / len(x) + 1e-6) for x in xs[n]] for n in xs}
    norms = [math.sqrt(sum(c * c for row in table.values() for c in row)) for table in (cos, size)]
    for n, s in zip(session.targets, found, strict=True):
        for u in range(len(s)):
            assert s[u].item() == pytest.approx(
                0.5 * cos[n][u] / norms[0] + 0.5 * size[n][u] / norms[1], rel=1e-4
            )


def test_the_scores_of_hesso() -> None:
    model = Residual()
    session = HESSO(periods=2, scale="network").start(model, INPUTS, budget=BUDGET, steps=30)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with session.attach(optimizer):
        session.own.x = remember(session)
        xs = {n: session.pool.vectors(n) for n in session.targets}
        one_step(None, model, optimizer)
        found = session.method.rank(session)
        vs = {n: (xs[n] - session.pool.vectors(n)) / 0.1 for n in session.targets}
    terms = {
        (n, u): (
            x.norm(),
            x.norm() / len(x),
            x @ v / (x.norm() * v.norm()) + 1,
            (x @ v).abs(),
            0.5 * (x @ v) ** 2,
        )
        for n in session.targets
        for u, (x, v) in enumerate(zip(xs[n], vs[n], strict=True))
    }
    norms = [math.sqrt(sum(float(t[i]) ** 2 for t in terms.values())) for i in range(5)]
    for place, n in enumerate(session.targets):
        for u in range(len(found[place])):
            expected = sum(0.2 * float(terms[n, u][i]) / norms[i] for i in range(5))
            assert found[place][u].item() == pytest.approx(expected, rel=1e-4)


def test_the_sparse_step_of_depgraph() -> None:
    model = Residual()
    session = DepGraph(sparse_share=0.3, strength=0.1).start(model, INPUTS, budget=BUDGET, steps=30)
    plain = copy.deepcopy(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with session.attach(optimizer):
        assert optimizer.param_groups[0]["weight_decay"] == 0
        torch.manual_seed(0)
        x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(plain(x), y).backward()
        session.before_step()
    assert optimizer.param_groups[0]["weight_decay"] == 1e-3
    block, same = model.blocks[0], plain.blocks[0]
    rows, columns = block.conv1.weight.flatten(1), block.conv2.weight.transpose(0, 1).flatten(1)
    energy = (rows.square().sum(1) + columns.square().sum(1) + block.bn1.weight.square()) / 3
    size = energy.sqrt()
    gamma = (2 ** (4 * (size.max() - size) / (size.max() - size.min()))).detach()
    assert gamma.min() == 1
    assert gamma.max() == pytest.approx(16)
    norm_grad = same.bn1.weight.grad + 0.1 * gamma * block.bn1.weight
    torch.testing.assert_close(block.bn1.weight.grad, norm_grad.detach())
    assert torch.equal(block.bn1.bias.grad, same.bn1.bias.grad)
    # rows of conv1 also carry the penalty of the stream they read
    own = same.conv1.weight.grad + 0.1 * gamma.view(-1, 1, 1, 1) * block.conv1.weight
    stream = block.conv1.weight.grad - own.detach()
    ratio = (stream / (0.1 * block.conv1.weight)).detach()
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-2, atol=1e-2)
    assert (ratio > 0.99).all()


def test_gated_norms_compute_what_they_did_and_melt_back_exactly() -> None:
    model = Residual().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for mode in (True, False):
        model.train(mode)
        twin = copy.deepcopy(model)
        gate_(twin)
        assert any(isinstance(m, GatedBatchNorm2d) for m in twin.modules())
        torch.testing.assert_close(twin(x), model(x), rtol=1e-12, atol=1e-12)
        melt_(twin)
        assert all(type(m) is not GatedBatchNorm2d for m in twin.modules())
        torch.testing.assert_close(twin(x), model(x), rtol=1e-12, atol=1e-12)
        for name, tensor in twin.state_dict().items():
            if "num_batches" not in name and "running" not in name:
                torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-12, atol=1e-12)


def test_a_closed_gate_shuts_the_shift_out_too() -> None:
    norm = nn.BatchNorm2d(4)
    nn.init.constant_(norm.bias, 3.0)
    model = nn.Sequential(norm)
    gate_(model)
    with torch.no_grad():
        norm.weight[1] = 0
    assert (model(torch.randn(2, 4, 3, 3))[:, 1] == 0).all()


def test_ticks_add_up_what_gates_are_worth_and_leave_convolutions_alone() -> None:
    model = Residual()
    session = GateDecorator(ticks=2, ticks_per_tock=1, prune_share=0.8).start(
        model, INPUTS, budget=BUDGET, steps=40
    )
    assert session.own.phases[:16] == ["tock"] * 8 + ["tick"] * 7 + ["close"]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with session.attach(optimizer):
        assert session.penalty().item() == pytest.approx(1e-3 * (8 + 16 + 8 + 16 + 8))
        loop(session, optimizer, 8)
        before = copy.deepcopy(model)
        assert session.penalty().item() == 0
        torch.manual_seed(0)
        x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
        F.cross_entropy(before(x), y).backward()
        loop(session, optimizer, 1)
        for number in session.targets:
            gates = {m.tensor for m in session.graph.groups[number].members if m.role == "scale"}
            expected = sum(
                (before.get_parameter(t).detach() * before.get_parameter(t).grad).abs() for t in gates
            )
            torch.testing.assert_close(session.own.worth[number], expected)
        for name, p in model.named_parameters():
            if "conv" in name or name == "stem.0.weight":
                assert torch.equal(p, before.get_parameter(name)), name
        stream = next(g for g in session.graph.groups if g.name == "stem.0")
        assert sum(m.role == "scale" for m in stream.members) == 3  # one fate for all that is added


@pytest.mark.parametrize("kind", [OTO, HESSO, DepGraph, GateDecorator])
def test_every_host_lands_within_one_unit(kind: type) -> None:
    options = {"round_to": 1} | ({"ticks": 4, "ticks_per_tock": 2} if kind is GateDecorator else {})
    for macs in (0.8, 0.45):
        model = Residual()
        session = kind(**options).start(model, INPUTS, budget=Budget(macs=macs), steps=60)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with session.attach(optimizer):
            loop(session, optimizer, 60)
        pruned = session.finish()
        counts = pruned.plan.kept(pruned.graph)
        dearest = max(
            session.cost.macs(counts) - session.cost.macs([k - (n == g) for n, k in enumerate(counts)])
            for g in range(len(counts))
        )
        assert session.limits["macs"] - dearest < pruned.after["macs"] <= session.limits["macs"]
