"""One step of each host of Decay Pruning against its equations, written out by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import Budget
from secateur.methods.depgraph import DepGraph
from secateur.methods.gate_decorator import GatedBatchNorm2d, GateDecorator, gate_, melt_
from secateur.methods.oto import HESSO, OTO
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


def one_step(method: object, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 5) -> None:
    torch.manual_seed(seed)
    loss = F.cross_entropy(model(torch.randn(16, 3, 8, 8)), torch.arange(16) % 3)
    if method is not None:
        loss = loss + method.penalty()  # type: ignore[attr-defined]
    optimizer.zero_grad()
    loss.backward()
    if method is not None:
        method.before_step()  # type: ignore[attr-defined]
    optimizer.step()
    if method is not None:
        method.after_step()  # type: ignore[attr-defined]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_penalised_step_of_oto(kind: str) -> None:
    model = Residual()
    method = OTO(model, INPUTS, budget=BUDGET, steps=30, start_share=0.1, half_space=0.0, strength=1e-2)
    plain, twin = copy.deepcopy(model), None
    optimizer, other = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](plain.parameters())
    with method.attach(optimizer):
        for k in range(2):
            one_step(method, model, optimizer, k)
            one_step(None, plain, other, k)
        x = unit_vectors(plain, "blocks.0")
        one_step(None, plain, other)
        lr = other.param_groups[0]["lr"]
        v = (x - unit_vectors(plain, "blocks.0")) / lr
        one_step(method, model, optimizer)  # step 3 = 10 % of 30: partition, then the first penalised step
    number = next(n for n, g in enumerate(method.whole.groups) if g.name == "blocks.0.conv1")
    penalised = method.penalised[number]
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


def test_projection_sets_what_crosses_over_to_zero() -> None:
    model = Residual()
    method = OTO(
        model, INPUTS, budget=BUDGET, steps=30, start_share=0.1, half_space=0.99, strength=30.0, most=1.0
    )
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with method.attach(optimizer):
        loop(method, optimizer, 2)
        assert all(len(kept) == g.units for kept, g in zip(method.kept, method.whole.groups, strict=True))
        partition = method._partition
        chosen: list[torch.Tensor] = []

        def watch() -> None:
            partition()
            chosen.extend(mask.clone() for mask in method.penalised)

        method._partition = watch  # type: ignore[method-assign]
        loop(
            method, optimizer, 1
        )  # chosen, pushed across, projected, and so many of them cut as the budget asks for
    assert method.met()
    for kept, group, penalised in zip(method.kept, method.whole.groups, chosen, strict=True):
        left = torch.ones(group.units, dtype=torch.bool)
        left[kept] = False
        assert not (left & ~penalised).any()


def test_the_redundancy_of_oto() -> None:
    model = Residual()
    method = OTO(model, INPUTS, budget=BUDGET, steps=30)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with method.attach(optimizer):
        method.remember()
        xs = {n: method.pool.vectors(n) for n in method.targets}
        one_step(None, model, optimizer)
        found = method.redundancy()
        vs = {n: (xs[n] - method.pool.vectors(n)) / 0.1 for n in method.targets}
    cos = {n: [float(x @ v / (x.norm() * v.norm())) for x, v in zip(xs[n], vs[n], strict=True)] for n in xs}
    size = {n: [1 / (float(x.norm()) / len(x) + 1e-6) for x in xs[n]] for n in xs}
    norms = [math.sqrt(sum(c * c for row in table.values() for c in row)) for table in (cos, size)]
    for n, s in zip(method.targets, found, strict=True):
        for u in range(len(s)):
            assert s[u].item() == pytest.approx(
                0.5 * cos[n][u] / norms[0] + 0.5 * size[n][u] / norms[1], rel=1e-4
            )


def test_the_scores_of_hesso() -> None:
    model = Residual()
    method = HESSO(model, INPUTS, budget=BUDGET, steps=30, periods=2)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with method.attach(optimizer):
        method.remember()
        xs = {n: method.pool.vectors(n) for n in method.targets}
        one_step(None, model, optimizer)
        found = method.rank()
        vs = {n: (xs[n] - method.pool.vectors(n)) / 0.1 for n in method.targets}
    terms = {
        (n, u): (
            x.norm(),
            x.norm() / len(x),
            x @ v / (x.norm() * v.norm()) + 1,
            (x @ v).abs(),
            0.5 * (x @ v) ** 2,
        )
        for n in method.targets
        for u, (x, v) in enumerate(zip(xs[n], vs[n], strict=True))
    }
    norms = [math.sqrt(sum(float(t[i]) ** 2 for t in terms.values())) for i in range(5)]
    for place, n in enumerate(method.targets):
        for u in range(len(found[place])):
            expected = sum(0.2 * float(terms[n, u][i]) / norms[i] for i in range(5))
            assert found[place][u].item() == pytest.approx(expected, rel=1e-4)


def test_the_sparse_step_of_depgraph() -> None:
    model = Residual()
    method = DepGraph(model, INPUTS, budget=BUDGET, steps=30, sparse_share=0.3, strength=0.1)
    plain = copy.deepcopy(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with method.attach(optimizer):
        assert optimizer.param_groups[0]["weight_decay"] == 0
        torch.manual_seed(0)
        x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(plain(x), y).backward()
        method.before_step()
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
    method = GateDecorator(model, INPUTS, budget=BUDGET, steps=40, ticks=2, ticks_per_tock=1, prune_share=0.8)
    assert method.plan_of_steps[: 2 * method.tick_steps] == ["tock"] * 8 + ["tick"] * 7 + ["close"]
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with method.attach(optimizer):
        assert method.penalty().item() == pytest.approx(1e-3 * (8 + 16 + 8 + 16 + 8))
        loop(method, optimizer, 8)
        before = copy.deepcopy(model)
        assert method.penalty().item() == 0
        torch.manual_seed(0)
        x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
        F.cross_entropy(before(x), y).backward()
        loop(method, optimizer, 1)
        for number in method.targets:
            gates = {m.tensor for m in method.graph.groups[number].members if m.role == "scale"}
            expected = sum(
                (before.get_parameter(t).detach() * before.get_parameter(t).grad).abs() for t in gates
            )
            torch.testing.assert_close(method.worth[number], expected)
        for name, p in model.named_parameters():
            if "conv" in name or name == "stem.0.weight":
                assert torch.equal(p, before.get_parameter(name)), name
        stream = next(g for g in method.graph.groups if g.name == "stem.0")
        assert sum(m.role == "scale" for m in stream.members) == 3  # one fate for all that is added


@pytest.mark.parametrize("kind", [OTO, HESSO, DepGraph, GateDecorator])
def test_every_host_lands_within_one_unit(kind: type) -> None:
    options = {"ticks": 4, "ticks_per_tock": 2} if kind is GateDecorator else {}
    for macs in (0.8, 0.45):
        model = Residual()
        method = kind(model, INPUTS, budget=Budget(macs=macs), steps=60, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with method.attach(optimizer):
            loop(method, optimizer, 60)
        pruned = method.finish()
        counts = pruned.plan.kept(pruned.graph)
        dearest = max(
            method.cost.macs(counts) - method.cost.macs([k - (n == g) for n, k in enumerate(counts)])
            for g in range(len(counts))
        )
        assert method.limits["macs"] - dearest < pruned.after["macs"] <= method.limits["macs"]
