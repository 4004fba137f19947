"""Allocations of single weights against their formulas, written the slow way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate.sparsity import WEIGHT_ALLOCATIONS, allocate_weights, lamp, weight_allocation_named
from secateur.errors import BudgetError


def layers(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"first": (16, 3, 3, 3), "a": (16, 16, 3, 3), "b": (32, 16, 1, 1), "fc": (10, 32)}
    return {
        name: torch.randn(*shape, generator=g) * (1 + i) / shape[1]
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("allocation", WEIGHT_ALLOCATIONS)
@settings(max_examples=30, deadline=None)
@given(total=st.integers(4, 432 + 2304 + 512 + 320), seed=st.integers(0, 5))
def test_the_total_is_met_exactly(allocation: str, total: int, seed: int) -> None:
    weights = layers(seed)
    counts = allocate_weights(weights, total, allocation)
    assert list(counts) == list(weights)
    assert sum(counts.values()) == total
    assert all(1 <= counts[name] <= w.numel() for name, w in weights.items())


@pytest.mark.parametrize("allocation", WEIGHT_ALLOCATIONS)
def test_out_of_reach_names_the_range(allocation: str) -> None:
    for total in (3, 3569):
        with pytest.raises(BudgetError, match=r"4 .*3,568"):
            allocate_weights(layers(), total, allocation)
    with pytest.raises(BudgetError, match="erk, global, lamp"):
        allocate_weights(layers(), 100, "best")


def test_global_is_one_threshold() -> None:
    weights = layers()
    values = torch.cat([w.abs().flatten() for w in weights.values()]).sort(descending=True).values
    counts = allocate_weights(weights, 1000, "global")
    assert counts == {name: int((w.abs() >= values[999]).sum()) for name, w in weights.items()}


def test_lamp_follows_its_definition() -> None:
    weights = {name: w[:4, :2] for name, w in layers().items()}
    scores = {}
    for name, w in weights.items():
        flat = w.flatten().tolist()
        scores[name] = [v * v / sum(u * u for u in flat if abs(u) >= abs(v)) for v in flat]
    threshold = sorted((s for some in scores.values() for s in some), reverse=True)[39]
    counts = allocate_weights(weights, 40, "lamp")
    assert counts == {name: sum(s >= threshold for s in some) for name, some in scores.items()}


def test_erk_is_proportional_to_the_sum_of_dims_where_nothing_is_full() -> None:
    weights = layers()
    counts = allocate_weights(weights, 500, "erk")
    dims = {name: sum(w.shape) for name, w in weights.items()}
    for name in weights:
        assert abs(counts[name] - 500 * dims[name] / sum(dims.values())) <= 1
    crowded = allocate_weights(weights, 3200, "erk")
    assert crowded["b"] == 512  # its share would be above its size
    assert crowded["fc"] == 320


def test_uniform_plus_keeps_the_ends() -> None:
    counts = allocate_weights(layers(), 900, "uniform+")
    assert counts["first"] == 432
    assert counts["fc"] == 64
    assert abs(counts["a"] / 2304 - counts["b"] / 512) < 2e-3


def test_an_allocation_of_your_own() -> None:
    g = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(40, 8, generator=g), "b": 3 * torch.randn(2, 8, generator=g)}
    named, given = (allocate_weights(weights, 20, way) for way in (f"{lamp.__module__}:lamp", lamp))
    assert named == given == allocate_weights(weights, 20, "lamp") != allocate_weights(weights, 20, "uniform")
    with pytest.raises(BudgetError, match="unknown allocation 'best'; choose one of: erk, global"):
        weight_allocation_named("best")
