"""The contract of methods that prune while the model trains, for each of them."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import Budget, analyze, cut_
from secateur.engine.training import TrainingMethod
from secateur.errors import BudgetError, TrainingError
from secateur.files import read_tensors
from secateur.recipes.train import fit
from tests.methods.examples import CONFIG, INPUTS, METHODS, STEPS, Make, Residual, lapp, train
from tests.recipes.test_train import toy_data

every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def loop(method: TrainingMethod, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The loop of the documentation."""
    torch.manual_seed(0)
    for _ in range(steps):
        x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
        loss = F.cross_entropy(method.model(x), y) + method.penalty()
        loss.backward()
        method.before_step()
        optimizer.step()
        method.after_step()
        optimizer.zero_grad()


@every_method
def test_beside_the_users_own_loop(make: Make) -> None:
    model = Residual()
    before = hooks(model)
    method = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with method.attach(optimizer):
        loop(method, optimizer, STEPS)
    assert hooks(model) == before
    pruned = method.finish()
    assert pruned.model is model
    assert pruned.proof.ok
    assert pruned.after["macs"] <= 0.6 * pruned.before["macs"]
    for p in model.parameters():  # the momentum was cut along, so that training can go on
        slot = optimizer.state.get(p, {}).get("momentum_buffer")
        assert slot is None or slot.shape == p.shape
    loss = F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4) % 3)
    loss.backward()


@every_method
def test_the_budget_is_met_within_one_unit(make: Make, tmp_path: Path) -> None:
    method, _ = train(make, tmp_path)
    pruned = method.finish()
    counts = pruned.plan.kept(pruned.graph)
    assert any(kept < group.units for kept, group in zip(counts, pruned.graph.groups, strict=True))
    limit, macs = method.limits["macs"], method.cost.macs(counts)
    one = [[kept - (n == number) for n, kept in enumerate(counts)] for number in method.targets]
    assert limit - max(macs - method.cost.macs(fewer) for fewer in one) < macs <= limit


@every_method
def test_a_resumed_run_equals_an_uninterrupted_one(make: Make, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    for stop in (4, 9, 13):  # while thresholds move, at the end of pruning, after it
        model = Residual()
        method = make(model)
        advance = method.advance

        def kill(method: TrainingMethod = method, advance: object = advance, stop: int = stop) -> None:
            advance()  # type: ignore[operator]
            if method.step == stop:
                raise Killed

        method.advance = kill  # type: ignore[method-assign]
        with pytest.raises(Killed):
            fit(model, toy_data(), CONFIG, tmp_path / str(stop), method=method, progress=False)
        assert hooks(model) == 0
        again, resumed = train(make, tmp_path / str(stop), resume=True, seed=1)
        whole, expected = train(make, tmp_path / "whole")
        assert [e.loss for e in resumed.history] == [e.loss for e in expected.history]
        for (name, a), b in zip(
            again.model.state_dict().items(), whole.model.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
        assert again.plan() == whole.plan()


@every_method
def test_a_moving_average_is_cut_along(make: Make, tmp_path: Path) -> None:
    method, result = train(make, tmp_path, replace(CONFIG, ema=0.5))
    assert method.finish().proof.ok
    assert 0 <= result.accuracy <= 1


@every_method
def test_a_skipped_step_does_not_count(make: Make) -> None:
    model = Residual()
    method = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with method.attach(optimizer):
        loop(method, optimizer, 1)
        state, _ = method.state()
        before = {name: tensor.clone() for name, tensor in state.items()}
        F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4) % 3).backward()
        method.before_step()
        method.after_step()  # without optimizer.step(), as a gradient scaler does
        assert method.step == 1
        for name, tensor in method.state()[0].items():
            assert torch.equal(tensor, before[name]), name


def test_training_cut_short_is_an_error() -> None:
    model = Residual()
    method = lapp()(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with method.attach(optimizer):
        loop(method, optimizer, 2)
    with pytest.raises(TrainingError, match=f"after 2 of {STEPS} steps"):
        method.finish()


@every_method
def test_the_end_comes_after_the_block(make: Make) -> None:
    model = Residual()
    method = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with method.attach(optimizer):
        loop(method, optimizer, STEPS)
        with pytest.raises(TrainingError, match="after the block"):
            method.finish()
    first, second = method.finish(), method.finish()
    assert first.proof.ok
    assert second.proof.ok
    assert first.after == second.after


def test_the_optimizer_must_know_the_bypass() -> None:
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = lapp()(model)
    with pytest.raises(TrainingError, match="does not know"):
        method.attach(optimizer)


def test_the_method_must_be_for_this_training(tmp_path: Path) -> None:
    model = Residual()
    with pytest.raises(TrainingError, match="another model"):
        fit(Residual(), toy_data(), CONFIG, tmp_path, method=lapp()(model), progress=False)
    with pytest.raises(TrainingError, match=f"expected this model and {STEPS} steps"):
        fit(model, toy_data(), CONFIG, tmp_path, method=lapp(steps=7)(model), progress=False)


def test_an_unreachable_budget_says_what_can_be_reached() -> None:
    with pytest.raises(BudgetError, match="stay"):
        lapp(budget=Budget(macs=0.01))(Residual())


def test_a_cut_while_an_old_loss_is_alive() -> None:
    """Autograd keeps a node for a parameter as long as a graph does; it must not remember the old shape."""
    model = Residual()
    graph = analyze(model, INPUTS)
    loss = model(torch.randn(2, 3, 8, 8)).sum()
    loss.backward()
    from secateur import Plan

    masks = [torch.arange(group.units) > 1 for group in graph.groups]
    cut_(model, graph, Plan.of(graph, masks))
    model.zero_grad()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert loss.requires_grad


def test_shrink_equals_a_second_analysis() -> None:
    from secateur import Plan
    from secateur.cost import Cost
    from secateur.graph.shrink import shrink

    model = Residual()
    graph = analyze(model, INPUTS)
    masks = [
        torch.rand(group.units, generator=torch.Generator().manual_seed(n)) > 0.4
        for n, group in enumerate(graph.groups)
    ]
    whole = copy.deepcopy(model)
    cut_(model, graph, Plan.of(graph, masks))
    ours, theirs = shrink(graph, model, masks), analyze(model, INPUTS)
    assert ours.fingerprint == theirs.fingerprint
    for a, b in zip(ours.groups, theirs.groups, strict=True):
        assert (a.name, a.units) == (b.name, b.units)
        for m, n in zip(a.members, b.members, strict=True):
            assert (m.tensor, m.dim, m.role) == (n.tensor, n.dim, n.role)
            assert m.index.tolist() == n.index.tolist()
    assert Cost(theirs).macs() == Cost(ours).macs([g.units for g in ours.groups])
    assert whole.stem[0].out_channels == 8


TWO = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.methods.examples import METHODS, train

for number, (name, make) in enumerate(METHODS.items()):
    if name not in {ties!r}:
        train(make, Path({folder!r}) / str(number), seed=number)
"""

TIES = {"paam, free, streams"}
"""Adam's first step moves all free scores by ±lr, so that rounding decides which of them are selected."""


@pytest.mark.slow
def test_two_processes_take_the_same_decisions_as_one(tmp_path: Path) -> None:
    """For every method: the same units go, and the weights agree as far as sums in another order allow."""
    script = tmp_path / "two.py"
    script.write_text(
        TWO.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path / "two"), ties=TIES)
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(launch, capture_output=True, text=True, timeout=600, env=environment)
    assert run.returncode == 0, run.stderr
    for number, (name, make) in enumerate(METHODS.items()):
        if name in TIES:
            continue
        train(make, tmp_path / "one" / str(number), seed=number)
        ours, theirs = (
            read_tensors(tmp_path / processes / str(number) / "train.checkpoint.safetensors")[0]
            for processes in ("two", "one")
        )
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}, name
        for key, tensor in ours.items():
            if ".kept." in key:
                assert torch.equal(tensor, theirs[key]), (name, key)
            if key.startswith("model."):
                torch.testing.assert_close(tensor, theirs[key], rtol=0.01, atol=2e-3, msg=f"{name}: {key}")
