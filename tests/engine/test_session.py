"""Hooks of a session in loops whose loss, scaler or wrapper is not ours."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.engine.rounds import importance, relative
from secateur.engine.session import Session
from secateur.errors import TrainingError
from tests.methods.examples import METHODS, STEPS, Make, Residual, lapp

with_penalty = pytest.mark.parametrize(
    "name", ["lapp, full bypass", "lapp, decay", "paam, alternating", "paam, joint, linear", "gate decorator"]
)


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 3) for _ in range(steps)]


def train(session: Session[Any], optimizer: torch.optim.Optimizer, steps: int, penalty: bool = False) -> None:
    """The loop of the documentation, with the penalty in the loss or in `before_step`."""
    for x, y in batches(steps):
        loss = F.cross_entropy(session.model(x), y)
        (loss if penalty else loss + session.penalty()).backward()
        session.before_step(penalty=penalty)
        optimizer.step()
        session.after_step()
        optimizer.zero_grad()


@with_penalty
def test_the_penalty_may_be_left_to_the_step(name: str) -> None:
    """Its gradient is the same wherever it is added, but for rounding."""
    found = []
    for penalty in (False, True):
        session = METHODS[name](Residual())
        optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
        with session.attach(optimizer):
            train(session, optimizer, 3, penalty)
        found.append([*session.parameters(), *session.model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def scaled(make: Make, fused: bool, overflows: int = 0) -> tuple[Session[Any], list[int]]:
    """A loop as in timm's scripts: the scaler calls the optimizer, and the optimizer calls the hook."""
    session = make(Residual())
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    handle = optimizer.register_step_pre_hook(lambda *_: session.before_step(penalty=True))
    steps = []
    with session.attach(optimizer, scaler=scaler):
        for number, (x, y) in enumerate(batches(STEPS)):
            scaler.scale(F.cross_entropy(session.model(x), y)).backward()
            if number < overflows:
                session.model.head.bias.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
            session.after_step()
            steps.append(session.step)
            optimizer.zero_grad()
    handle.remove()
    return session, steps


@pytest.mark.parametrize("name", ["depgraph", "lapp, no bypass"])
def test_a_fused_optimizer_with_a_scaler(name: str) -> None:
    """It would unscale gradients and skip steps by itself, where no hook can see it."""
    plain, steps = scaled(METHODS[name], fused=False)
    fused, theirs = scaled(METHODS[name], fused=True)
    assert steps == theirs == list(range(1, STEPS + 1))
    assert fused.plan() == plain.plan()
    for ours, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, other)
    _, steps = scaled(METHODS[name], fused=True, overflows=2)
    assert steps == [0, 0, *range(1, STEPS - 1)]


def test_a_wrapper_that_is_none() -> None:
    model = Residual()
    session = lapp()(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(TrainingError, match="in DataParallel; expected DistributedDataParallel"):
        session.attach(optimizer, wrapped=nn.DataParallel(model))


def test_weight_decay_comes_back_to_a_resumed_optimizer() -> None:
    """The sparse phase takes it away; a checkpoint of the optimizer holds that, and the session what it was."""
    make = METHODS["depgraph, decay of everything"]
    session = make(Residual())
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05, weight_decay=1e-3)
    with session.attach(optimizer):
        train(session, optimizer, 1)
        saved, state = optimizer.state_dict(), session.state()
    assert saved["param_groups"][0]["weight_decay"] == 0

    session = make(Residual())
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05, weight_decay=1e-3)
    session.restore(*state)
    optimizer.load_state_dict(saved)
    with session.attach(optimizer):
        train(session, optimizer, STEPS - 1)
        assert optimizer.param_groups[0]["weight_decay"] == 1e-3


@pytest.mark.parametrize("name", ["gradual, l2", "depgraph"])
def test_a_group_that_lost_its_lowest_units_does_not_look_worse(name: str) -> None:
    """Of weights that stay as they are, the same units rank the same in the next round."""
    session = METHODS[name](Residual())
    with session.attach(torch.optim.SGD(session.model.parameters(), lr=0.0)):
        sizes = [importance(session, number, session.tensors) for number in session.targets]
        first = relative(session, sizes)
        assert all(float(score.mean()) == pytest.approx(1, rel=1e-5) for score in first)
        session.remove(session.pick(first, 0.3))
        standing = [~session.pool.leaving(number) for number in session.targets]
        session.cut_gone()
        assert session.count("macs") < session.cost.macs()
        again = relative(session, [s[stays] for s, stays in zip(sizes, standing, strict=True)])
        for a, b, stays in zip(again, first, standing, strict=True):
            torch.testing.assert_close(a, b[stays])
        own = relative(session, [s[stays] for s, stays in zip(sizes, standing, strict=True)], anchored=False)
        assert all(float(score.mean()) == pytest.approx(1, rel=1e-5) for score in own)
