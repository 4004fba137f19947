"""Capturing reads a model and leaves nothing behind."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import CaptureError
from secateur.graph.capture import capture
from secateur.graph.operators import module_of


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y.relu() if y.sum() > 0 else y


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(1, 6, 3)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        return self.head(self.a(x) + self.b(depth))


class Sliced(nn.Module):
    """Runs parts of its containers, and one module in several places."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.ReLU()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 1), shared, nn.Conv2d(6, 6, 1), shared, nn.Conv2d(6, 6, 1))
        self.rest = nn.ModuleList([nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Dropout()])
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.first[:-1]:
            x = layer(x)
        for layer in self.rest[1:][1:]:
            x = layer(x)
        return self.head(self.rest[0](x))


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "modes": [m.training for m in model.modules()],
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "grads": [p.grad for p in model.parameters()],
    }


def assert_unchanged(before: dict[str, object], model: nn.Module) -> None:
    after = snapshot(model)
    tensors, others = before.pop("tensors"), after.pop("tensors")
    assert before == after
    assert all(torch.equal(t, others[name]) for name, t in tensors.items())


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_unchanged(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 3))
    model[1].eval()
    before = snapshot(model)
    state = torch.get_rng_state()
    capture(model, torch.randn(1, 3, 8, 8), training=training)
    torch.set_rng_state(state)
    assert_unchanged(before, model)


def test_a_failing_capture_leaves_nothing_behind() -> None:
    model = Branching().train()
    before = snapshot(model)
    with pytest.raises(CaptureError, match=r"Branching: runs, but its graph cannot be captured.*torch.where"):
        sc.analyze(model, torch.randn(1, 3, 8, 8))
    assert_unchanged(before, model)


def test_inputs_that_do_not_fit_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(CaptureError, match=r"0 \(Conv2d\): does not run on .*\[\(1, 5, 8, 8\) float32"):
        sc.analyze(model, torch.randn(1, 5, 8, 8))
    with pytest.raises(CaptureError, match="expected a tensor"):
        sc.analyze(model, "an image")


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_several_inputs(form: str) -> None:
    model, x, depth = TwoInputs(), torch.randn(1, 3, 8, 8), torch.randn(1, 1, 8, 8)
    inputs = (x, depth) if form == "tuple" else {"depth": depth, "x": x}
    pruned = sc.prune(model, inputs, budget=sc.Budget(units=0.5), round_to=1)
    assert pruned.model.a.out_channels == pruned.model.b.out_channels == 3


def test_models_that_take_one_batch_size_only() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).reshape(1, -1))

    graph = sc.analyze(Fixed(), torch.randn(1, 3, 8, 8))
    assert sc.Cost(graph).macs() == 36 * 4 * 27 + 4 * 36 * 5


def test_modules_taken_from_a_slice_have_their_own_names() -> None:
    found = capture(Sliced(), torch.randn(1, 3, 8, 8), training=True)
    nodes = [node for node in found.module.graph.nodes if node.op == "call_function"]
    names = [module_of(node) for node in nodes if "conv" in str(node.target) or "dropout" in str(node.target)]
    assert names == ["first.0", "first.2", "rest.2", "rest.3", "rest.0", "head"]
    weights = [found.tensors[node.args[1].name] for node in nodes if "conv" in str(node.target)]
    assert [f"{name}.weight" for name in names if name != "rest.3"] == weights
    around = [[entry[0] for entry in node.meta["nn_module_stack"].values()] for node in nodes]
    assert not any("slice" in name for stack in around for name in stack)
