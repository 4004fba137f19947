"""A forward pass in steps equals the forward pass, with tensors replaced and from the middle."""

import copy

import pytest
import torch
from torch import nn

from secateur.errors import CaptureError
from secateur.graph.replay import Replay
from tests.small import residual_net


def replaced(model: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    state = other.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    return other


def noisy(model: nn.Module, name: str, seed: int) -> dict[str, torch.Tensor]:
    tensor = model.state_dict()[name]
    return {name: tensor + torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed))}


@torch.no_grad()
def test_it_computes_what_the_model_computes() -> None:
    model, x = residual_net()
    program = Replay(model, x)
    assert program.batch is None
    for images in (1, 3, len(x)):
        torch.testing.assert_close(program(x[:images]), model(x[:images]))
    change = noisy(model, "block.conv1.weight", 0)
    torch.testing.assert_close(program(x, change), replaced(model, change)(x))
    torch.testing.assert_close(program(x), model(x))  # nothing was written


class Viewed(nn.Module):
    """Only its `view` cares how the images lie in memory."""

    def __init__(self, reshape: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8 * 6 * 6, 5)
        self.reshape = reshape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu()
        return self.head(x.flatten(1) if self.reshape else x.view(x.shape[0], -1))


@torch.no_grad()
@pytest.mark.parametrize("reshape", [True, False])
def test_channels_lie_last_where_the_steps_take_that(reshape: bool) -> None:
    model, x = Viewed(reshape), torch.randn(4, 3, 8, 8)
    program = Replay(model, x)
    image = next(iter(program.begin(x).values()))
    assert image.is_contiguous(memory_format=torch.channels_last) is reshape
    torch.testing.assert_close(program(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("batched", [1, 2, 5])
def test_suffixes_equal_full_passes(batched: int) -> None:
    model, x = residual_net()
    program = Replay(model, x)
    names = [
        "stem.weight",
        "bn.running_mean",
        "block.conv1.weight",
        "block.conv2.weight",
        "block.bn2.weight",
        "fc.weight",
    ]
    candidates = [[noisy(model, name, seed) for seed in range(3)] for name in names]
    candidates.append([noisy(model, "block.conv1.weight", s) | noisy(model, "fc.bias", s) for s in range(3)])
    base = noisy(model, "block.bn1.bias", 9)
    seen = set()
    for number, level, output in program.variants(x, candidates, base, batched=batched):
        expected = replaced(model, {**base, **candidates[number][level]})(x)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        seen.add((number, level))
    assert seen == {(n, k) for n in range(len(candidates)) for k in range(3)}


@torch.no_grad()
def test_a_size_written_into_forward_leaves_one_batch_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x.reshape(6, 12))

    model, x = Fixed(), torch.randn(6, 3, 2, 2)
    program = Replay(model, x)
    assert program.batch == 6
    change = noisy(model, "fc.weight", 0)
    ((_, _, output), _) = program.variants(x, [[change, change]], batched=2)
    assert torch.equal(output, replaced(model, change)(x))


def test_what_cannot_be_captured_says_so() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    model = Branches()
    model.train()
    with pytest.raises(CaptureError, match="Branches"):
        Replay(model, torch.randn(2, 3))
    assert model.training
