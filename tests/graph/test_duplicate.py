"""A forward may keep a tensor with history on its module; whoever copies the model copes with that."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.cost.training import compare_training, time_layers
from secateur.export import export_onnx, export_program
from secateur.graph.duplicate import duplicate
from secateur.recipes.data import Dataset, Normalisation, Split
from secateur.recipes.train import TrainConfig, fit
from secateur.rewriting.rewrite import rewritten_modules
from secateur.scores.at_init import Synflow, grasp, snip
from secateur.surgery import embed
from tests.oracles import random_masks

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4) % 3
WEIGHTS = ["conv.weight", "head.weight"]


class Keeps(nn.Module):
    """Keeps its features as an attribute, as networks do whose features are looked at or distilled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).reshape(-1, 8, 8, 8).relu()  # written out, so that a cut rewrites it
        if self.training:
            self.last = y
        return self.head(y.mean((2, 3)))


@pytest.fixture
def model() -> Keeps:
    torch.manual_seed(0)
    model = Keeps()
    model(X)
    assert model.last is not None
    assert model.last.grad_fn is not None
    return model


def average(model: nn.Module, tmp_path: Path) -> None:
    images = torch.randint(0, 255, (12, 3, 8, 8), dtype=torch.uint8)
    split = Split(images, torch.arange(12) % 3)
    data = Dataset("toy", split, split, ("r", "g", "b"), Normalisation((0.4,) * 3, (0.25,) * 3), "shift+flip")
    fit(model, data, TrainConfig(epochs=1, batch_size=4, lr=0.01, ema=0.5), tmp_path)


def there_and_back(model: nn.Module, tmp_path: Path) -> None:
    graph = sc.analyze(model, X)
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    cut = sc.cut_(duplicate(model), graph, plan)
    assert rewritten_modules(cut)
    assert sc.verify(model, cut, graph, plan).ok
    wide = embed(model, cut, graph, plan)
    assert wide.conv.weight.shape == model.conv.weight.shape


def prune_by(method: str, **options: object) -> Callable[[nn.Module, Path], object]:
    def prune(model: nn.Module, tmp_path: Path) -> None:
        data = [(X, Y)]
        result = sc.prune(model, X, budget=sc.Budget(macs=0.6), method=method, data=data, **options)
        assert result.proof.ok

    return prune


def train_with(method: sc.methods.TrainingMethod) -> Callable[[nn.Module, Path], object]:
    def train(model: nn.Module, tmp_path: Path) -> None:
        model = duplicate(model)
        session = method.start(model, X, budget=sc.Budget(macs=0.6), steps=6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with session.attach(optimizer):
            for _ in range(6):
                (nn.functional.cross_entropy(model(X), Y) + session.penalty()).backward()
                session.before_step()
                optimizer.step()
                session.after_step()
                optimizer.zero_grad()
        assert session.finish().proof.ok

    return train


USERS: dict[str, Callable[[nn.Module, Path], object]] = {
    "export": lambda model, path: export_program(model, X, path / "model.pt2"),
    "onnx": lambda model, path: export_onnx(model, X, path / "model.onnx"),
    "one shot": prune_by("oneshot", score="taylor"),
    "rd": prune_by("rd", levels=3),
    "rounds": train_with(sc.methods.Gradual(rounds=1)),
    "depgraph": train_with(sc.methods.DepGraph(rounds=1)),
    "oto": train_with(sc.methods.OTO()),
    "score by paths": lambda model, path: Synflow(model, X, WEIGHTS)(),
    "score by gradients": lambda model, path: snip(model, WEIGHTS, [(X, Y)]),
    "score by curvature": lambda model, path: grasp(model, WEIGHTS, [(X, Y)]),
    "training cost": lambda model, path: compare_training({"model": model}, (X, Y), steps=1, warmup=1),
    "layer times": lambda model, path: time_layers(model, X, ["conv"], repeats=1),
    "moving average": average,
    "cut, proof and embedding": there_and_back,
}


@pytest.mark.parametrize("user", USERS)
def test_a_tensor_with_history_is_no_obstacle(user: str, model: Keeps, tmp_path: Path) -> None:
    kept = model.last
    USERS[user](model, tmp_path)
    assert user == "moving average" or model.last is kept


def test_a_copy_shares_nothing_and_keeps_the_value(model: Keeps) -> None:
    copied = duplicate(model)
    assert copied.last.grad_fn is None
    assert torch.equal(copied.last, model.last)
    model.cache = SimpleNamespace(feature=(model.last,))
    again = duplicate(model)
    assert again.cache.feature[0] is again.last
    assert again.last.grad_fn is None
    with torch.no_grad():
        copied.conv.weight.zero_()
    assert model.conv.weight.abs().sum() > 0
