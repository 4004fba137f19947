"""Widths that a forward reads from its module's configuration follow a cut."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.rewriting.rewrite import rewritten_modules
from tests.surgery.fixed_sizes import cut_down


class Pooled(nn.Module):
    """A classifier that takes its tokens apart by a number of its configuration, with a loss of its own."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.trunk = nn.Sequential(nn.Conv2d(3, config.hidden_sizes[0], 3), nn.ReLU())
        self.deep = nn.Conv2d(*config.hidden_sizes, 3)
        self.head = nn.Linear(config.hidden_sizes[-1], 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        tokens = self.deep(self.trunk(x)).permute(0, 2, 3, 1)
        logits = self.head(tokens.reshape(len(x), -1, self.config.hidden_sizes[-1]).mean(1))
        return logits if labels is None else nn.functional.cross_entropy(logits, labels)


def pooled() -> tuple[Pooled, SimpleNamespace]:
    torch.manual_seed(0)
    config = SimpleNamespace(hidden_sizes=[6, 10], hidden_act="relu")
    return Pooled(config).eval(), config


def test_the_model_keeps_its_forward_and_its_loss(tmp_path: Path) -> None:
    model, config = pooled()
    x = torch.randn(2, 3, 9, 9)
    graph, plan, cut = cut_down(model, x)
    assert sc.verify(model, cut, graph, plan).ok
    assert not rewritten_modules(cut)
    assert cut.config.hidden_sizes == [6, cut.head.in_features]
    assert config.hidden_sizes == [6, 10]
    assert model.config is config
    cut(x, labels=torch.tensor([1, 2])).backward()
    sc.save(cut, tmp_path / "cut.safetensors")
    loaded = sc.load(pooled()[0], tmp_path / "cut.safetensors")
    assert torch.equal(loaded(x), cut(x))
    assert loaded.config.hidden_sizes == cut.config.hidden_sizes


def test_a_cut_that_fails_gives_the_configuration_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = pooled()
    graph = sc.analyze(model, torch.randn(2, 3, 9, 9))
    plan = sc.Plan.of(graph, [torch.arange(group.units) > 1 for group in graph.groups])

    def fail(*args: object) -> None:
        raise sc.errors.CutError("no")

    monkeypatch.setattr("secateur.surgery.cut.settle", fail)
    whole = copy.copy(config.hidden_sizes)
    with pytest.raises(sc.errors.CutError):
        sc.cut_(model, graph, plan)
    assert model.config is config
    assert config.hidden_sizes == whole
