"""Time and multiply-adds of single layers."""

import time

import pytest
import torch
from torch import Tensor, nn

from secateur import analyze
from secateur.cost import Cost
from secateur.cost.layers import time_layers
from secateur.recipes.models import build_model


class Sleepy(nn.Module):
    """Sleeps so many milliseconds of its own, before and after the module inside it."""

    def __init__(self, ms: float, inside: nn.Module | None = None) -> None:
        super().__init__()
        self.ms, self.inside = ms, inside

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.ms / 2000)
        x = self.inside(x) if self.inside is not None else x
        time.sleep(self.ms / 2000)
        return x


def test_time_of_its_own_is_without_that_of_modules_inside():
    model = Sleepy(4, nn.Sequential(Sleepy(16), Sleepy(8)))
    rows = {row.layer: row for row in time_layers({"a": model}, torch.zeros(1, 1), warmup=0, passes=3)["a"]}
    assert list(rows) == ["", "inside", "inside.0", "inside.1"]
    assert 4 <= rows[""].ms < rows["inside.0"].ms  # with all inside it would be 28 and more
    assert rows["inside"].ms < rows["inside.1"].ms
    assert 8 <= rows["inside.1"].ms < rows["inside.0"].ms


def test_a_module_that_is_called_twice_counts_twice():
    shared = nn.Linear(4, 4)
    rows = time_layers({"a": nn.Sequential(shared, nn.ReLU(), shared)}, torch.zeros(5, 4), passes=1)["a"]
    assert [(row.layer, row.macs) for row in rows] == [("", 0), ("0", 32), ("1", 0)]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2),
        nn.Sequential(nn.Flatten(), nn.Linear(256, 3)),
    ],
)
def test_multiply_adds_are_those_of_the_graph(layer: nn.Module):
    x = torch.zeros(3, 4, 8, 8)
    rows = time_layers({"a": layer}, x, warmup=0, passes=1)["a"]
    assert sum(row.macs for row in rows) == Cost(analyze(layer, x[:1])).macs()


def test_of_a_whole_network():
    model = build_model("resnet8", classes=10, in_channels=1)
    x = torch.zeros(1, 1, 8, 8)
    rows = time_layers({"a": model}, x, warmup=0, passes=1)["a"]
    assert {row.layer: row.macs for row in rows if row.macs} == Cost(analyze(model, x)).layers()


def test_a_failing_pass_leaves_no_hook_and_no_other_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(3, 3)).train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        time_layers({"a": model}, torch.zeros(1, 4))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
