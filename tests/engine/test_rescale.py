"""Weights keep their size across a cut, and the network computes what it did."""

from typing import Any

import torch
import torch.nn.functional as F

from secateur.engine.gates import norms_after
from secateur.engine.rescale import norms_kept
from secateur.engine.session import Session
from secateur.graph.duplicate import duplicate
from tests.methods.examples import INPUTS, Residual, lapp


def trained() -> tuple[Session[Any], torch.optim.Optimizer]:
    """A session after three steps with momentum."""
    session = lapp(bypass="none")(Residual())
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(session.model(torch.randn(16, 3, 8, 8)), torch.arange(16) % 3).backward()
        optimizer.step()
    return session, optimizer


def test_norms_are_kept_and_outputs_too() -> None:
    (session, optimizer), (plain, its_optimizer) = trained(), trained()
    keep = [torch.arange(g.units) % 3 < 2 for g in session.graph.groups]
    norms, average = norms_after(session.model, INPUTS), duplicate(session.model)
    before = {name: session.model.get_submodule(name).weight.norm() for name in norms}
    with plain.attach(its_optimizer):
        plain.cut(keep)
    with session.attach(optimizer, followers=[average]):
        with norms_kept(session.model, norms, optimizer, session.followers):
            session.cut(keep)

    for name in norms:
        ours, theirs = (s.model.get_submodule(name).weight for s in (session, plain))
        torch.testing.assert_close(ours.norm(), before[name])
        factor = before[name] / theirs.norm()
        assert factor > 1.05
        torch.testing.assert_close(average.get_submodule(name).weight, ours)
        torch.testing.assert_close(
            optimizer.state[ours]["momentum_buffer"] * factor, its_optimizer.state[theirs]["momentum_buffer"]
        )
    x = torch.randn(8, 3, 8, 8)
    for training in (False, True):
        expected = plain.model.train(training)(x)
        for model in (session.model, average):
            torch.testing.assert_close(model.train(training)(x), expected, rtol=1e-3, atol=1e-3)
