"""What a training step costs, against counts by hand."""

import pytest
import torch
from torch import nn

from secateur import Budget, prune
from secateur.cost.training import TrainingCost, compare_training, time_layers
from secateur.errors import SecateurError


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 50), torch.zeros(n, dtype=torch.int64)


def training_cost(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], *, holding=None, **options
) -> TrainingCost:
    """Of one model, compared with no other."""
    return compare_training({"it": model}, batch, holding={"it": holding} if holding else None, **options)[
        "it"
    ]


def test_a_linear_layer_costs_two_passes_and_a_chain_three() -> None:
    one = nn.Linear(50, 20, bias=False)
    assert (
        training_cost(one, batch(), steps=1).macs == 2 * 4 * 50 * 20
    )  # nobody asks for the input's gradient
    two = nn.Sequential(nn.Linear(50, 30, bias=False), nn.ReLU(), nn.Linear(30, 20, bias=False))
    assert training_cost(two, batch(), steps=1).macs == 4 * (2 * 50 * 30 + 3 * 30 * 20)


def test_grouped_and_transposed_convolutions_cost_three_passes() -> None:
    layers = [
        nn.Conv2d(3, 8, 1, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4, bias=False),
        nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2, bias=False),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 64, 10, bias=False))
    each = [64 * 8 * 3, 64 * 8 * 9, 16 * 12 * 2 * 9, 16 * 12 * 3 * 4, 6 * 64 * 10]
    expected = 2 * (2 * each[0] + 3 * sum(each[1:]))
    found = training_cost(model, (torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)), steps=1)
    assert found.macs == expected


class Attention(nn.Module):
    """Three heads of four dims over five tokens of ten numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(10, 36, bias=False), nn.Linear(12, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x.view(-1, 5, 10)).view(-1, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


def test_fused_attention_costs_its_two_products_and_five_more_backward() -> None:
    found = training_cost(Attention(), batch(), steps=1)
    assert found.macs == 4 * (2 * 5 * 10 * 36 + (2 + 5) * 3 * 5 * 5 * 4 + 3 * 12 * 7)


def test_models_are_compared_without_touching_one_another() -> None:
    small, large = nn.Linear(50, 10), nn.Linear(50, 400)
    pair = compare_training({"small": small, "large": large}, batch(), steps=2)
    alone = {"small": training_cost(small, batch(), steps=1), "large": training_cost(large, batch(), steps=1)}
    for name, cost in pair.items():
        assert (cost.macs, cost.peak_bytes) == (alone[name].macs, alone[name].peak_bytes)
        assert cost.extremes[0] <= cost.seconds <= cost.extremes[1]


def test_peak_memory_holds_weights_gradients_momentum_and_activations() -> None:
    small, large = (
        nn.Linear(50, 1000, bias=False),
        nn.Sequential(nn.Linear(50, 1000, bias=False), *[nn.Tanh()] * 5),
    )
    weights = 4 * 50 * 1000
    peak = training_cost(small, batch(), steps=1).peak_bytes
    assert 3 * weights < peak < 4.5 * weights
    more = (
        training_cost(large, batch(64), steps=1).peak_bytes
        - training_cost(small, batch(64), steps=1).peak_bytes
    )
    assert 4 * 64 * 1000 * 4 <= more <= 4 * 64 * 1000 * 6  # five more activations, one more alive in backward


def test_masks_cost_as_much_as_the_dense_network() -> None:
    model = nn.Sequential(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 20))
    before = [p.clone() for p in model.parameters()]
    sparse = prune(model, torch.zeros(1, 50), budget=Budget(params=0.5), method="at-init", score="magnitude")
    dense = training_cost(model, batch(), steps=1)
    masked = training_cost(sparse.model, batch(), steps=1, holding=sparse.plan.holding)
    assert (masked.macs, masked.batch) == (dense.macs, 4)
    assert masked.peak_bytes >= dense.peak_bytes
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with pytest.raises(SecateurError, match="at least 1"):
        training_cost(model, batch(), steps=0)


def test_times_of_layers_add_up_all_calls_of_a_pass() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(500, 500)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                x = self.layer(x)
            return x

    x = torch.randn(256, 500)
    many = time_layers(Again(), x, ["layer"])["layer"]
    once = time_layers(nn.Sequential(nn.Linear(500, 500)), x, ["0"])["0"]
    assert many > 5 * once


def test_times_of_layers_name_every_layer_and_leave_no_hook() -> None:
    model = nn.Sequential(nn.Linear(50, 300), nn.ReLU(), nn.Linear(300, 20))
    times = time_layers(model, batch(256)[0], ["0", "2"], repeats=3)
    assert list(times) == ["0", "2"]
    assert all(t > 0 for t in times.values())
    assert not model[0]._forward_hooks
