"""Decay and return of units, against the schedule and with planted cases."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import Budget, analyze
from secateur.engine.decay import Decay, Pool, Restore
from secateur.engine.session import Session
from secateur.engine.training_method import TrainingMethod
from secateur.errors import SecateurError
from secateur.methods.gradual import Gradual
from secateur.settings import settings
from tests.methods.examples import INPUTS, STEPS, Residual
from tests.methods.test_training_methods import loop

ALWAYS = Restore(rate=-1.0, length=-1.0, most=1.0)


def pool(decay: Decay, model: nn.Module | None = None) -> tuple[nn.Module, Pool, int, torch.optim.Optimizer]:
    """A pool for the hidden units of the first block of a network, which is number 1 of its groups."""
    model = model or Residual()
    graph = analyze(model, INPUTS)
    number = next(n for n, g in enumerate(graph.groups) if g.name == "blocks.0.conv1")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    return model, Pool(graph, [number], dict(model.named_parameters()), decay), number, optimizer


def step(model: nn.Module, units: Pool, optimizer: torch.optim.Optimizer, number: int) -> None:
    x, y = torch.randn(32, 3, 8, 8), torch.arange(32) % 3
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    units.observe()
    optimizer.step()
    units.advance(number, optimizer)


@pytest.mark.parametrize("parts", ["zig", "full"])
def test_the_length_follows_the_schedule_and_ends_at_zero_for_good(parts: Any) -> None:
    torch.manual_seed(0)
    model, units, number, optimizer = pool(Decay(steps=5, parts=parts))
    for k in range(3):
        step(model, units, optimizer, k)
    chosen = torch.arange(16) % 4 == 0
    start = units.vectors(number).norm(dim=1)
    before = F.normalize(units.vectors(number), dim=1)
    units.start(number, chosen, 3, optimizer)
    for k in range(1, 6):
        length = units.vectors(number).norm(dim=1)[chosen]
        torch.testing.assert_close(length, start[chosen] * (1 - k / 5), rtol=1e-6, atol=1e-7)
        if k < 5:
            assert not units.gone(number).any()
            step(model, units, optimizer, 3 + k)
    assert units.gone(number).tolist() == chosen.tolist()
    assert (units.vectors(number)[chosen] == 0).all()
    for k in range(100):
        step(model, units, optimizer, 9 + k)
    assert (units.vectors(number)[chosen] == 0).all()
    now = F.normalize(units.vectors(number), dim=1)
    assert ((before * now).sum(1)[~chosen] < 0.9999).all()


def test_the_optimizer_still_turns_a_decaying_unit() -> None:
    torch.manual_seed(0)
    model, units, number, optimizer = pool(Decay(steps=10))
    units.start(number, torch.arange(16) < 4, 0, optimizer)
    before = F.normalize(units.vectors(number), dim=1)
    for k in range(6):
        step(model, units, optimizer, k + 1)
    now = F.normalize(units.vectors(number), dim=1)
    assert ((before * now).sum(1)[:4] < 0.999).all()


def test_one_step_is_removal_at_once() -> None:
    model, units, number, optimizer = pool(Decay(steps=1))
    chosen = torch.arange(16) < 4
    others = units.vectors(number)[~chosen]
    units.start(number, chosen, 1, optimizer)
    assert (units.vectors(number)[chosen] == 0).all()
    assert torch.equal(units.vectors(number)[~chosen], others)
    assert units.gone(number).tolist() == chosen.tolist()
    assert model is not None


def test_the_factor_form_multiplies_what_the_optimizer_made() -> None:
    torch.manual_seed(0)
    model, units, number, optimizer = pool(Decay(steps=4, form="factor"))
    chosen = torch.arange(16) < 4
    expected = units.vectors(number)[chosen] * 3 / 4
    units.start(number, chosen, 0, optimizer)
    torch.testing.assert_close(units.vectors(number)[chosen], expected)
    for k in (2, 3, 4):
        F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.arange(8) % 3).backward()
        units.observe()
        optimizer.step()
        expected = units.vectors(number)[chosen] * (4 - k) / (4 - k + 1)
        units.advance(k, optimizer)
        optimizer.zero_grad()
        torch.testing.assert_close(units.vectors(number)[chosen], expected)
    assert (units.vectors(number)[chosen] == 0).all()


def test_a_filter_alone_would_be_rescaled_by_its_norm() -> None:
    """Why x holds the norm's scale and shift too: without them nothing fades."""
    model = Residual()
    x = torch.randn(16, 3, 8, 8)
    before = model(x)
    with torch.no_grad():
        model.blocks[0].conv1.weight[:4] *= 0.2
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model.blocks[0].bn1.weight[:4] *= 0.2
    assert not torch.allclose(model(x), before, rtol=1e-2, atol=1e-2)


def planted() -> nn.Module:
    """Units 0-2 carry the classes and nothing else does; nobody reads units 12-15."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    with torch.no_grad():
        model[0].weight[:3] = torch.eye(3).view(3, 3, 1, 1) * 3
        model[5].weight[:] *= 0.05
        model[5].weight[:, :3] = torch.eye(3) * 4
        model[5].weight[:, 12:] = 0
    return model


@pytest.mark.parametrize("seed", range(3))
def test_planted_units_are_restored_and_dead_ones_never(seed: int) -> None:
    model = planted()
    graph = analyze(model, INPUTS)
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if not n.startswith("5")], lr=0.01)
    restore = Restore(most=0.5)
    units = Pool(graph, [0], dict(model.named_parameters()), Decay(steps=20, restore=restore))
    chosen = torch.zeros(16, dtype=torch.bool)
    chosen[[0, 5, 6, 7, 8, 9, 12, 13]] = True  # one that is essential among many that are not
    torch.manual_seed(seed)
    units.start(0, chosen, 0, optimizer)
    for k in range(1, 25):
        y = torch.arange(48) % 3
        x = 0.1 * torch.randn(48, 3, 8, 8)
        x[torch.arange(48), y] += 1
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        units.observe()
        optimizer.step()
        units.advance(k, optimizer)
    gone = units.gone(0)
    assert not gone[0], "the essential unit was not restored"
    assert gone[[12, 13]].all(), "a dead unit was restored"
    assert not gone[~chosen].any()


def test_no_more_than_the_cap_is_restored_and_none_too_often() -> None:
    torch.manual_seed(0)
    model, units, number, optimizer = pool(Decay(steps=8, restore=replace(ALWAYS, most=0.25, cool_down=3)))
    chosen = torch.arange(16) < 8
    units.start(number, chosen, 0, optimizer)
    restored = 0
    for k in range(1, 9):
        step(model, units, optimizer, k)
    ends = [ending.end for ending in units.endings if ending.restored]
    restored = len(ends)
    assert restored >= 1
    assert len(units.endings) == 8
    assert all(e.start == 0 and e.end == 7 for e in units.endings if not e.restored)
    assert units.gone(number).sum() + restored == 8
    assert min(ends) >= 4  # k >= 0.4 N
    assert restored == 2  # a quarter of those that started, however many steps resist


def test_a_restored_unit_keeps_its_values_and_waits() -> None:
    torch.manual_seed(0)
    model, units, number, optimizer = pool(Decay(steps=4, restore=replace(ALWAYS, cool_down=6)))
    units.start(number, torch.arange(16) < 2, 0, optimizer)
    step(model, units, optimizer, 1)
    assert not units.leaving(number).all()
    length = units.vectors(number).norm(dim=1)[:2]
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    units.observe()
    optimizer.step()
    moved = units.vectors(number)[:2].clone()
    units.advance(2, optimizer)
    assert not units.leaving(number).any()
    assert torch.equal(units.vectors(number)[:2], moved)
    assert (moved.norm(dim=1) > 0.5 * length).all()
    assert not units.free(number, 7)[:2].any()
    assert units.free(number, 8).all()


def test_the_budget_is_met_with_units_that_return() -> None:
    model = Residual()
    restore = replace(ALWAYS, most=0.5, cool_down=1)
    method = Gradual(rounds=4, prune_share=0.9, removal=Decay(steps=5, restore=restore))
    session = method.start(model, INPUTS, budget=Budget(macs=0.5), steps=40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with session.attach(optimizer):
        loop(session, optimizer, 40)
    restored = [ending for ending in session.endings if ending.restored]
    assert restored
    units = {group.name: group.units for group in session.whole.groups}
    assert all(0 <= e.unit < units[e.group] for e in restored)
    assert all(e.rate is not None and e.length is not None for e in restored)
    pruned = session.finish()
    assert pruned.proof.ok
    assert 0.4 < pruned.after["macs"] / pruned.before["macs"] <= 0.5


@settings
class Fading(TrainingMethod):
    """Of a user's own: it says what leaves, and nothing else."""

    name, summary = "fading", "let the smallest filters fade"

    def prepare(self, session: Session[None]) -> None:
        session.aim(least=2, removal=Decay(steps=4))

    def advance(self, session: Session[None]) -> None:
        if session.step == 3:
            norms = [session.pool.vectors(number).norm(dim=1) for number in session.targets]
            session.remove(session.pick(norms, slack=0.0))


def test_what_has_left_is_cut_at_the_end_where_a_method_does_not() -> None:
    session = Fading().start(Residual(), INPUTS, budget=Budget(macs=0.6), steps=8)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
    with session.attach(optimizer):
        loop(session, optimizer, 5)
        assert session.pool.busy()
        loop(session, optimizer, 3)
        assert session.count("macs") == session.dense.macs()  # zeros, not cut
    pruned = session.finish()
    assert pruned.proof.ok
    assert pruned.after["macs"] <= 0.6 * pruned.before["macs"]
    assert all(len(kept) >= 2 for kept in session.kept)
    assert [row["end"] for row in pruned.facts["endings"]] == [6] * len(session.endings)
    assert len(session.endings) == pruned.before["units"] - pruned.after["units"]


def test_rounds_must_fit() -> None:
    with pytest.raises(SecateurError, match="do not fit"):
        Gradual(rounds=5, removal=Decay(steps=10)).start(
            Residual(), INPUTS, budget=Budget(macs=0.5), steps=STEPS
        )
    with pytest.raises(SecateurError, match="steps is 0"):
        Decay(steps=0)
    with pytest.raises(SecateurError, match="criterion is 'x'"):
        Decay(steps=5, restore=Restore(criterion="x"))  # type: ignore[arg-type]
