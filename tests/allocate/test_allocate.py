"""Budgets are met from below, within one unit, whatever the network, measure or allocation."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocate import ALLOCATIONS, allocate, allocation_named
from secateur.allocate.table import Order
from secateur.errors import BudgetError
from secateur.measures import closed
from secateur.scores import score_groups
from tests.graph.nets import Net, conv
from tests.networks import network
from tests.oracles import best_masks

NETWORKS = [
    "resnet20",
    "shufflenet_v2_x0_5_cifar",
    "torchvision/regnet_y_400mf",
    "torchvision/mobilenet_v3_small",
]


@pytest.fixture(scope="module", params=NETWORKS)
def scored(request: pytest.FixtureRequest):
    net = network(request.param, dtype=torch.float32)
    graph = sc.analyze(net.model, net.inputs)
    return score_groups(net.model, graph, "l2"), sc.Cost(graph)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("measure", closed())
@pytest.mark.parametrize("share", [0.9, 0.7, 0.55])
def test_lands_within_one_unit_below_the_budget(scored, allocation: str, measure: str, share: float) -> None:
    scores, cost = scored
    masks = allocate(scores, cost, sc.Budget(**{measure: share}), allocation)
    kept = [int(mask.sum()) for mask in masks]
    limit = int(share * cost.of(measure) + 1e-6)
    assert cost.of(measure, kept) <= limit
    for number, (k, mask) in enumerate(zip(kept, masks, strict=True)):
        if k < len(mask):
            more = [*kept[:number], k + 1, *kept[number + 1 :]]
            assert cost.of(measure, more) > limit, f"one more unit of group {number} would fit"


def test_the_kept_units_of_a_group_are_its_best(scored) -> None:
    scores, cost = scored
    for score, mask in zip(scores, allocate(scores, cost, sc.Budget(macs=0.6)), strict=True):
        if not mask.all():
            assert score[mask].min() >= score[~mask].max()


def test_several_bounds_all_hold(scored) -> None:
    scores, cost = scored
    kept = [int(mask.sum()) for mask in allocate(scores, cost, sc.Budget(macs=0.7, params=0.6))]
    assert cost.macs(kept) <= 0.7 * cost.macs()
    assert cost.params(kept) <= 0.6 * cost.params()


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_min_keep_and_round_to(scored, allocation: str) -> None:
    scores, cost = scored
    masks = allocate(scores, cost, sc.Budget(macs=0.75), allocation, min_keep=3, round_to=4)
    kept = [int(mask.sum()) for mask in masks]
    assert cost.macs(kept) <= 0.75 * cost.macs()
    assert all(k == len(mask) or (k % 4 == 0 and k >= 3) for k, mask in zip(kept, masks, strict=True))


def test_uniform_keeps_the_same_share_of_every_group(scored) -> None:
    scores, cost = scored
    masks = allocate(scores, cost, sc.Budget(units=0.5), "uniform")
    for mask in masks:
        assert abs(int(mask.sum()) - len(mask) / 2) <= 1


def test_global_removes_the_lowest_units_of_all(scored) -> None:
    """In units, every one costs the same, so the cut is a threshold on the relative score."""
    scores, cost = scored
    masks = allocate(scores, cost, sc.Budget(units=0.6), "global")
    relative = [score / score.mean() for score in scores]
    removed = [r[~m] for r, m in zip(relative, masks, strict=True)]
    kept = [r[m] for r, m in zip(relative, masks, strict=True) if m.sum() > 1]
    assert torch.cat(removed).max() <= torch.cat(kept).min()


def test_on_units_global_is_the_exact_optimum() -> None:
    """Against exhaustive search over all widths of a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    graph = sc.analyze(model, torch.zeros(1, 3, 9, 9))
    cost, scores = sc.Cost(graph), score_groups(model, graph, "l2")
    for share in (0.3, 0.5, 0.8):
        masks = allocate(scores, cost, sc.Budget(units=share), relative=False)
        found = sum(score[mask].sum().item() for score, mask in zip(scores, masks, strict=True))
        assert found == pytest.approx(best_masks(scores, cost, "units", int(share * cost.of("units"))))


@pytest.mark.parametrize("bound", [0, -0.5, 1, 1.0, float("nan"), float("inf"), True, "half"])
def test_a_malformed_budget_is_refused(bound) -> None:
    with pytest.raises(BudgetError, match="budget macs"):
        sc.Budget(macs=bound)


def test_an_empty_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="at least one of"):
        sc.Budget()


def test_an_unreachable_budget_names_the_range(scored) -> None:
    scores, cost = scored
    with pytest.raises(BudgetError, match=r"reachable are .* of the dense model\) to"):
        allocate(scores, cost, sc.Budget(macs=10))
    with pytest.raises(BudgetError, match="fits already"):
        allocate(scores, cost, sc.Budget(params=10**12))
    least = cost.macs([1] * len(scores))
    kept = [int(mask.sum()) for mask in allocate(scores, cost, sc.Budget(macs=least))]
    assert cost.macs(kept) == least


def deepest_first(scores: Sequence[Tensor], least: Sequence[int]) -> Order:
    """Empty the last group, then the one before it, and so on."""
    steps = [[group] * (len(s) - low) for group, (s, low) in enumerate(zip(scores, least, strict=True))]
    return np.concatenate(steps[::-1])


@pytest.mark.parametrize("way", [deepest_first, f"{__name__}:deepest_first"])
def test_an_allocation_of_your_own(scored, way) -> None:
    """The groups that come first stay whole, and the budget is met as by any other."""
    scores, cost = scored
    kept = [int(mask.sum()) for mask in allocate(scores, cost, sc.Budget(units=0.5), way)]
    limit = cost.of("units") // 2
    assert sum(kept) == limit
    cut = next(number for number, (k, full) in enumerate(zip(kept, cost.full, strict=True)) if k < full)
    assert kept[:cut] == cost.full[:cut]
    assert all(k == 1 for k in kept[cut + 1 :])


@pytest.mark.parametrize("order", [lambda scores, least: [0], lambda scores, least: [len(scores)] * 5])
def test_an_order_that_is_none_is_refused(scored, order) -> None:
    scores, cost = scored
    with pytest.raises(BudgetError, match="expected the number of each group once for every unit"):
        allocate(scores, cost, sc.Budget(macs=0.5), order)


def test_a_wrong_name_of_an_allocation_says_what_is_missing() -> None:
    with pytest.raises(BudgetError, match="unknown allocation 'best'; choose one of: global, uniform"):
        allocation_named("best")
    with pytest.raises(BudgetError, match="allocation 'math:best': 'math' has no function 'best'"):
        allocation_named("math:best")


def test_a_model_without_groups_says_so() -> None:
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(BudgetError, match="nothing can be pruned"):
        allocate([], sc.Cost(sc.analyze(model, torch.zeros(1, 3, 8, 8))), sc.Budget(macs=0.5))


def unreachable(model: nn.Module, budget: sc.Budget, **options: object) -> str:
    with pytest.raises(BudgetError) as error:
        sc.prune(model, torch.zeros(1, 3, 8, 8), budget=budget, **options)
    return str(error.value)


def test_a_budget_out_of_reach_says_what_stays_and_what_would_free_it() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.b(m.a(x).relu()).relu()
        return m.e(torch.fft.fft(m.d(m.c(y))).real)

    model = Net(forward, a=conv(3, 8), b=conv(8, 8, 3), c=conv(8, 16), d=conv(16, 8), e=conv(8, 4))
    said = unreachable(model, sc.Budget(macs=0.01), freeze=["b"])
    assert "min_keep" not in said
    assert "round_to" not in said
    # a and b are frozen by the user, since b reads what a makes: 64 positions, all of the 8 + 8 channels stay
    assert "b, a (38,400 MACs): frozen by the user – leave it out of freeze; " in said
    assert "d (512 MACs): no rule for aten.fft_fft – write it with operators that have a rule." in said
    assert "; e (2,048 MACs): model output" in said
    said = unreachable(model, sc.Budget(params=0.01), freeze=["b"], min_keep=2)
    assert "with min_keep=2: " in said
    assert "Raise the budget, or lower min_keep. What stays and costs most: b, a (616 parameters)" in said
    assert "round_to" not in said


def test_a_session_whose_budget_is_out_of_reach_says_what_stays() -> None:
    model = nn.Sequential(
        conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4)
    )
    method = sc.methods.Gradual(freeze=("2",))
    with pytest.raises(BudgetError, match=r"What stays and costs most: 2, 0 \(.* MACs\): frozen by the user"):
        method.start(model, torch.zeros(1, 3, 8, 8), budget=sc.Budget(macs=0.1), steps=100)


def test_a_model_without_groups_says_why() -> None:
    said = unreachable(nn.Conv2d(3, 4, 1), sc.Budget(macs=0.5))
    assert "What stays and costs most: the model itself (768 MACs): model output" in said
