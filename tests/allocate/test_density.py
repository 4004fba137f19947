"""Densities before training: the published quantities, and the laws of the closed form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import analyze
from secateur.allocate.density import (
    Layer,
    allocate_densities,
    costs_of,
    list_layers,
    rank_weights,
    solve_densities,
)
from secateur.errors import BudgetError
from secateur.recipes.models import build_model


def resnet20() -> dict[str, list[int]]:
    """Weights and MACs of the 19 convolutions, written out."""
    shapes = [
        (3, 16, 32),
        *[(16, 16, 32)] * 6,
        (16, 32, 16),
        *[(32, 32, 16)] * 5,
        (32, 64, 8),
        *[(64, 64, 8)] * 5,
    ]
    params = [9 * i * o for i, o, _ in shapes]
    return {"params": params, "macs": [w * side**2 for w, (_, _, side) in zip(params, shapes, strict=True)]}


def resnet50() -> dict[str, list[int]]:
    """Weights and MACs of the 53 convolutions at 224 × 224, shortcuts included."""
    params, macs = [7 * 7 * 3 * 64], [7 * 7 * 3 * 64 * 112**2]
    i = 64
    for width, blocks, side in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        for block in range(blocks):
            before = side * 2 if block == 0 and width > 64 else side  # the 3 × 3 convolution has the stride
            rows = [(i * width, before), (9 * width**2, side), (4 * width**2, side)]
            if block == 0:
                rows.append((4 * i * width, side))
            params += [w for w, _ in rows]
            macs += [w * s**2 for w, s in rows]
            i = 4 * width
    return {"params": params, "macs": macs}


# network, measure, share, level, dense layers, share of the other cost, least density
FIXTURES = [
    (resnet20, "params", 0.50, "11,484", 13, "78.9", "0.312"),
    (resnet20, "params", 0.25, "4,389", 7, "56.8", "0.119"),
    (resnet20, "params", 0.10, "1,463", 1, "30.2", "0.040"),
    (resnet20, "macs", 0.50, "1.10 M", 1, "50.8", "0.467"),
    (resnet50, "params", 0.50, "428,117", 36, "81.8", "0.181"),  # 428,117 of 2,359,296 weights
    (resnet50, "params", 0.25, "153,494", 25, "62.5", "0.065"),
    (resnet50, "params", 0.10, "50,983", 12, "39.7", "0.022"),
    (resnet50, "macs", 0.50, "39.1 M", 1, "50.0", "0.331"),
]


@pytest.mark.parametrize(("network", "measure", "share", "level", "dense", "other", "least"), FIXTURES)
def test_the_closed_form_on_residual_networks(network, measure, share, level, dense, other, least) -> None:
    costs = network()
    p = solve_densities(costs, {measure: share * sum(costs[measure])})
    kept = np.array(costs[measure]) * p
    found = kept[p < 1].max()
    digits = len(level.split()[0].split(".")[-1]) if measure == "macs" else 0
    assert (f"{found / 1e6:.{digits}f} M" if measure == "macs" else f"{found:,.0f}") == level
    assert int((p == 1).sum()) == dense
    remaining = "macs" if measure == "params" else "params"
    assert f"{100 * (np.array(costs[remaining]) @ p) / sum(costs[remaining]):.1f}" == other
    assert f"{p.min():.3f}" == least
    assert np.ptp(kept[p < 1]) < 1e-6 * found  # all layers that are touched keep the same
    assert kept.sum() == pytest.approx(share * sum(costs[measure]), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "side", "written", "totals"),
    [
        ("resnet20", 32, resnet20, [267_696, 40_550_400]),
        ("torchvision/resnet50", 224, resnet50, [23_454_912, 4_087_136_256]),
    ],
)
def test_the_graph_gives_the_same_layers(name, side, written, totals) -> None:
    if "/" in name:
        pytest.importorskip("torchvision")
    layers = list_layers(analyze(build_model(name), torch.zeros(1, 3, side, side)))
    found = sorted((layer.weights, layer.costs["macs"]) for layer in layers)
    assert found == sorted(zip(*written().values(), strict=True))
    assert [round(costs_of(layers, m).sum()) for m in ("params", "macs")] == totals


CASES = st.integers(0, 10_000)


def random_costs(seed: int) -> tuple[dict[str, np.ndarray], dict[str, float], np.random.Generator]:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 12))
    names = ["params", "macs", "ms"][: int(rng.integers(1, 4))]
    costs = {name: np.exp(rng.normal(3, 2, size)) for name in names}
    return costs, {name: float(rng.uniform(0.05, 0.95) * c.sum()) for name, c in costs.items()}, rng


@settings(max_examples=60, deadline=None)
@given(seed=CASES, cap=st.sampled_from([1.0, 2.0]))
def test_the_optimum_meets_every_budget_and_its_conditions(seed: int, cap: float) -> None:
    costs, limits, rng = random_costs(seed)
    p = solve_densities(costs, limits, cap=cap)
    used = {name: float(costs[name] @ p) for name in costs}
    assert (p > 0).all()
    assert (p <= cap).all()
    assert all(used[name] <= limits[name] * (1 + 1e-9) for name in costs)
    assert any(used[name] >= limits[name] * (1 - 1e-9) for name in costs)
    best = np.log(p).sum()
    for _ in range(200):  # no other feasible point is better
        other = np.minimum(cap, p * np.exp(rng.normal(0, 0.3, len(p))))
        scale = max(float(costs[name] @ other) / limits[name] for name in costs)
        assert np.log(other / max(scale, 1.0)).sum() <= best + 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=CASES)
def test_densities_do_not_depend_on_the_order_and_are_equal_for_equal_layers(seed: int) -> None:
    costs, limits, rng = random_costs(seed)
    p = solve_densities(costs, limits)
    order = rng.permutation(len(p))
    assert solve_densities({n: c[order] for n, c in costs.items()}, limits) == pytest.approx(
        p[order], rel=1e-9
    )
    twice = {n: np.concatenate([c, c[:1]]) for n, c in costs.items()}
    q = solve_densities(twice, limits)
    assert q[0] == q[-1]


def test_a_budget_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(BudgetError, match="above 0"):
        solve_densities({"macs": [1.0]}, {"macs": 0.0})


@pytest.mark.parametrize("allocation", ["erk", "smart-ratio", "uniform"])
@pytest.mark.parametrize("limits", [{"params": 0.3}, {"macs": 0.3}, {"params": 0.3, "macs": 0.5}])
def test_formulas_use_the_budget_up(allocation: str, limits: dict[str, float]) -> None:
    model = build_model("resnet20")
    layers = list_layers(analyze(model, torch.zeros(1, 3, 32, 32)))
    bounds = {m: share * costs_of(layers, m).sum() for m, share in limits.items()}
    found = allocate_densities(layers, dict(model.named_parameters()), bounds, allocation)
    p = np.array([found[layer.name] for layer in layers])
    used = {m: costs_of(layers, m) @ p / bound for m, bound in bounds.items()}
    assert max(used.values()) <= 1
    assert max(used.values()) > 0.999
    assert ((p > 0) & (p <= 1)).all()


def test_the_list_of_best_weights_is_as_long_as_each_budget_allows() -> None:
    g = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(4, 5, generator=g), "b": torch.rand(30, generator=g)}
    costs = {"params": {"a": 1.0, "b": 1.0}, "macs": {"a": 7.0, "b": 2.0}}
    limits = {"params": 25.0, "macs": 90.0}
    masks = rank_weights(scores, costs, limits)

    def cost(measure: str) -> float:
        return sum(costs[measure][n] * int(mask.sum()) for n, mask in masks.items())

    assert all(cost(m) <= limit for m, limit in limits.items())
    kept = torch.cat([scores[n][mask] for n, mask in masks.items()])
    gone = torch.cat([scores[n][~mask] for n, mask in masks.items()])
    assert kept.min() >= gone.max()
    following = "a" if scores["a"][~masks["a"]].max() == gone.max() else "b"
    assert any(cost(m) + costs[m][following] > limit for m, limit in limits.items())


@pytest.mark.parametrize("measure", ["units", "activations", "latency_ms"])
def test_a_measure_that_does_not_follow_from_weights_is_refused(measure: str) -> None:
    layer = Layer("a", "a.weight", 40, {"params": 40, "macs": 160})
    assert costs_of([layer], "macs").tolist() == [160]
    with pytest.raises(BudgetError, match=f"{measure}: .* does not follow .* bound one of: macs, params"):
        costs_of([layer], measure)
