"""Models that `torch.compile` wrapped are taken for what they were made from, and nothing is compiled."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.export import export_program

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
B = sc.Budget(macs=0.5)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), body, nn.Conv2d(16, 2, 1)).eval()


def inner(model: nn.Sequential) -> nn.Module:
    model[2] = torch.compile(model[2], backend=refuse)
    return model


def in_place(model: nn.Sequential) -> nn.Module:
    model.compile(backend=refuse)
    model[2].compile(backend=refuse)
    return model


def refuse(*_: object) -> None:
    raise AssertionError("it was compiled")


FORMS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "whole": lambda model: torch.compile(model, backend=refuse),
    "in place": in_place,
    "a part": inner,
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("form", FORMS)
def test_it_is_pruned_as_if_it_were_not_compiled(form: str, tmp_path: Path) -> None:
    expected = sc.prune(plain(), X, budget=B)
    model = FORMS[form](plain())
    result = sc.prune(model, X, budget=B)
    assert result.proof.ok
    assert result.after == expected.after
    pairs = zip(result.model.parameters(), expected.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    if form != "a part":
        assert type(result.model) is nn.Sequential
        assert list(result.model.state_dict()) == list(expected.model.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_step_by_step(form: str, tmp_path: Path) -> None:
    model = FORMS[form](plain())
    graph = sc.analyze(model, X)
    plan = sc.Plan.of(graph, [torch.arange(group.units) < 8 for group in graph.groups])
    whole = FORMS[form](plain())
    cut = sc.cut_(model, graph, plan)
    assert sc.verify(whole, cut, graph, plan).ok
    sc.save(cut, tmp_path / "cut.safetensors")
    loaded = sc.load(FORMS[form](plain()), tmp_path / "cut.safetensors")
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in model.parameters()]
    if form != "a part":
        export_program(cut, X, tmp_path / "cut.pt2")


def test_a_session_prunes_what_was_compiled() -> None:
    model = plain().train()
    session = sc.methods.Gradual(rounds=2).start(torch.compile(model, backend="eager"), X, budget=B, steps=6)
    assert session.model is model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with session.attach(optimizer):
        for _ in range(6):
            model(X).square().mean().backward()
            session.before_step()
            optimizer.step()
            session.after_step()
            optimizer.zero_grad()
    assert session.finish().proof.ok
