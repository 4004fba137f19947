"""Methods that look at data take models of any inputs, targets and outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur import Budget, prune
from secateur.errors import CaptureError, ScoreError
from secateur.graph.replay import Replay
from secateur.methods import SNIP, GraSP
from secateur.methods.rd.curves import distance_named, moved
from secateur.methods.rd.importance import importances
from secateur.reconstruction.compensate import see

HALF = Budget(macs=0.6)


@dataclass
class Output:
    logits: Tensor
    features: tuple[Tensor, ...]
    loss: Tensor | None = None


class Net(nn.Module):
    """Two images in, and out what `shape` says."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 4, 1)
        self.shape = shape

    def forward(self, left: Tensor, right: Tensor | None = None, gain: Tensor | None = None) -> Any:
        x = left if right is None else left + 0.5 * right
        x = self.norm(self.stem(x)).relu()
        y = self.body(x).relu()
        if gain is not None:
            y = y * gain[:, None, None, None]
        return self.shape(self.head(y), y)


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "per-pixel logits": lambda z, y: z,
    "a list": lambda z, y: [z.mean((2, 3)), y],
    "a dict": lambda z, y: {"out": z, "aux": y, "size": z.shape[-1]},
    "a dataclass": lambda z, y: Output(z.mean((2, 3)), (y, y.mean((2, 3)))),
}


def batch(images: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(images, 3, 8, 8, generator=g) for _ in range(2))
    return {"left": left, "right": right, "gain": torch.rand(images, generator=g) + 0.5}


def net(shape: Callable[[Tensor, Tensor], Any]) -> nn.Module:
    torch.manual_seed(0)
    return Net(shape).eval()


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("named", [True, False], ids=["dict in", "tuple in"])
def test_rd_measures_any_outputs_of_any_inputs(outputs: str, named: bool) -> None:
    model = net(OUTPUTS[outputs])
    given = [batch(12, seed) for seed in range(3)]
    batches = given if named else [(tuple(x.values()), torch.zeros(12)) for x in given]
    example = given[0] if named else tuple(given[0].values())
    pruned = prune(model, example, budget=HALF, method="rd", data=batches)
    assert pruned.proof.ok
    assert 0 < pruned.facts["measured"] < float("inf")
    assert all(row["distortion"][-1] > 0 for row in pruned.facts["curves"])


def test_a_distance_sums_over_the_outputs_each_relative_to_its_own_scale() -> None:
    a, b = torch.randn(4, 3, 5, 5), torch.randn(4, 7)
    dense = {"map": a, "vector": 1000 * b, "count": torch.tensor([3])}
    other = {"map": a + 0.1, "vector": 1000 * b + 100, "count": torch.tensor([4])}
    found = moved("relative", dense, other, 4)
    each = 0.01 / a.var(correction=0) + 0.01 / b.var(correction=0)
    np.testing.assert_allclose(found.numpy(), np.full(4, float(each)), rtol=1e-4)
    assert distance_named("auto", dense) == "relative"
    assert distance_named("auto", a) == "relative"
    assert distance_named("auto", {"logits": b}) == "kl"
    with pytest.raises(ScoreError, match="'relative'"):
        distance_named("kl", [b, torch.randn(4)])


@torch.no_grad()
@pytest.mark.parametrize("distortion", ["kl", "logits", "relative"])
def test_importance_is_what_a_small_error_costs(distortion: str) -> None:
    """The diagonal of the distortion's Hessian, against the distortion of small noise at one layer's output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 5)).eval()
    x = torch.randn(64, 3, 2, 2)
    program = Replay(model, x)
    found = importances(program, [x] * 200, see(program, [x]), distortion=distortion)["1.weight"]
    for unit in range(6):
        bias = model[1].bias.detach().clone()
        bias[unit] += 1e-2
        change = moved(distortion, program(x), program(x, {"1.bias": bias}), 64).mean()
        assert float(2 * change / 1e-4) == pytest.approx(float(found[unit]), rel=0.1)


def test_taylor_takes_dicts_and_a_loss() -> None:
    model = net(OUTPUTS["a dataclass"])
    given = [{**batch(6, seed)} for seed in range(2)]

    def loss(outputs: Output, targets: dict[str, Tensor]) -> Tensor:
        return (outputs.logits.sum(1) * targets["gain"]).mean()

    for method in (SNIP(), GraSP()):
        kept = prune(model, given[0], budget=HALF, method=method, data=given, loss=loss)
        assert kept.after["macs"] <= 0.6 * kept.before["macs"]
    pairs = [(tuple(x.values()), {"gain": x["gain"]}) for x in given]
    again = prune(model, pairs[0][0], budget=HALF, method="oneshot", score="taylor", data=pairs, loss=loss)
    first = prune(model, given[0], budget=HALF, method="oneshot", score="taylor", data=given, loss=loss)
    assert again.plan.removed == first.plan.removed


def test_help_is_asked_for_where_it_is_needed() -> None:
    model = net(OUTPUTS["a dict"])
    given = [batch(6, 0)]
    with pytest.raises(ScoreError, match=r"the loss fails on outputs \{out: \(6, 4, 8, 8\).*Pass loss="):
        prune(model, given[0], budget=HALF, method="oneshot", score="taylor", data=given)
    with pytest.raises(ScoreError, match="no number with a gradient"):
        prune(
            model, given[0], budget=HALF, method="oneshot", score="taylor", data=given,
            loss=lambda outputs, _: outputs["out"],
        )  # fmt: skip
    with pytest.raises(ScoreError, match="1 images to measure on; pass at least 2"):
        prune(model, given[0], budget=HALF, method="rd", data=[batch(1, 0)])
    wide = {**given[0], "left": torch.randn(6, 3, 10, 10), "right": torch.randn(6, 3, 10, 10)}
    with pytest.raises(CaptureError, match="batches of one image size"):
        prune(model, given[0], budget=HALF, method="rd", data=[*given, wide])
    with pytest.raises(CaptureError, match=r"inputs \['left'\]; expected"):
        prune(model, given[0], budget=HALF, method="rd", data=[*given, {"left": given[0]["left"]}])
    for flag in model.parameters():
        assert flag.requires_grad
        assert flag.grad is None
