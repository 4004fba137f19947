"""Widths by curves where costs are products, against exhaustive search."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from secateur.allocate.products import choose_widths, cover
from secateur.cost import Cost
from secateur.errors import BudgetError
from secateur.graph import analyze


def chain() -> Cost:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(),
        nn.Conv2d(5, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 4, 1),
    )  # fmt: skip
    return Cost(analyze(model, torch.zeros(1, 3, 6, 6)))


def curves_of(cost: Cost, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    levels = [np.arange(units, 0, -1) for units in cost.full]
    return levels, [
        np.concatenate([[0.0], np.cumsum(rng.exponential(1, len(level) - 1))]) for level in levels
    ]


@pytest.mark.parametrize("measure", ["macs", "params", "units"])
@pytest.mark.parametrize("seed", range(8))
def test_against_exhaustive_search(measure: str, seed: int) -> None:
    cost = chain()
    levels, curves = curves_of(cost, seed)
    limit = 0.5 * cost.of(measure)
    best = min(
        sum(float(curve[k]) for curve, k in zip(curves, choice, strict=True))
        for choice in itertools.product(*(range(len(level)) for level in levels))
        if cost.of(measure, [int(level[k]) for level, k in zip(levels, choice, strict=True)]) <= limit
    )
    found = choose_widths(cost, ["a", "b", "c"], levels, curves, measure, limit)
    assert cost.of(measure, found.kept) <= limit
    assert found.bound <= best + 1e-9
    assert best - 1e-9 <= found.distortion <= 1.15 * best + 1e-9
    assert found.distortion == pytest.approx(
        sum(
            float(curve[level.tolist().index(k)])
            for curve, level, k in zip(curves, levels, found.kept, strict=True)
        )
    )


def test_the_descent_finds_widths_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = chain()
    levels, curves = curves_of(cost, 0)
    limit = 0.4 * cost.macs()
    whole = choose_widths(cost, ["a", "b", "c"], levels, curves, "macs", limit)
    monkeypatch.setattr("secateur.allocate.products.EXHAUSTIVE", 1)
    found = choose_widths(cost, ["a", "b", "c"], levels, curves, "macs", limit)
    assert cost.macs(found.kept) <= limit
    assert found.bound == float("-inf")
    assert whole.distortion - 1e-9 <= found.distortion <= 1.3 * whole.distortion


class Gated(nn.Module):
    """An expansion whose channels are gated by what a narrow layer makes of their means."""

    def __init__(self, width: int, expanded: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(width, expanded, 1), nn.Conv2d(expanded, width, 1)
        self.squeeze, self.excite = nn.Conv2d(expanded, 16, 1), nn.Conv2d(16, expanded, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.expand(x))
        gate = self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        return x + self.project(y * gate)


@pytest.mark.parametrize("seed", range(3))
def test_the_descent_passes_what_one_group_does_not_by_itself(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the budget is spent, one group gets wider only while another gets narrower."""
    blocks = [Gated(width=8, expanded=expanded) for expanded in (32, 64, 32, 64)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    cost, rng = Cost(analyze(model, torch.zeros(1, 3, 8, 8))), np.random.default_rng(seed)
    names = [group.name for group in cost.graph.groups]
    levels = [np.arange(units, 0, -max(1, units // 4)) for units in cost.full]
    curves = [
        rng.exponential(1) * np.r_[0, np.sort(rng.exponential(1, units)).cumsum()][units - level]
        for units, level in zip(cost.full, levels, strict=True)
    ]
    limit = 0.4 * cost.macs()
    monkeypatch.setattr("secateur.allocate.products.EXHAUSTIVE", 10**5)
    whole = choose_widths(cost, names, levels, curves, "macs", limit)
    monkeypatch.setattr("secateur.allocate.products.EXHAUSTIVE", 1)
    found = choose_widths(cost, names, levels, curves, "macs", limit)
    assert whole.distortion - 1e-9 <= found.distortion <= 1.02 * whole.distortion


def test_the_cover_touches_every_product() -> None:
    cost = chain()
    assert cover(cost.graph.macs, 3) == [1]
    assert cover([], 3) == []


def test_out_of_reach_names_the_range() -> None:
    cost = chain()
    levels, curves = curves_of(cost, 0)
    with pytest.raises(BudgetError, match=f"to {cost.macs():,}"):
        choose_widths(cost, ["a", "b", "c"], levels, curves, "macs", 10)


def test_a_measure_that_is_no_sum_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    cost = Cost(analyze(model, torch.zeros(1, 3, 4, 4)))
    with pytest.raises(
        BudgetError, match=r"peak activation memory is no sum .* choose one of: macs, params, units"
    ):
        choose_widths(cost, ["0"], [np.arange(1, 5)], [np.arange(4.0)[::-1]], "activations", 100)
