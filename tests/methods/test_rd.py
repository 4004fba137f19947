"""Rate-distortion pruning of single weights: budgets, masks, curves, and the corrections that must not hurt."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur import Budget
from secateur.allocate.sparsity import WEIGHT_ALLOCATIONS
from secateur.engine.method import Context
from secateur.engine.pruned import Pruned
from secateur.errors import BudgetError, FileError, PlanError, SecateurError
from secateur.graph.replay import Replay
from secateur.methods.rd.curves import Curves, even, geometric, interpolated, joint, key_of, measure
from secateur.methods.rd.single_weights import FAITHFUL, MaskWeights, RDWeights, prune_iteratively, rounds
from secateur.settings import options_of
from tests.small import residual_net

SMALL = RDWeights(levels=4, steps=2, points=20)
ALLOCATIONS = ("rd", *WEIGHT_ALLOCATIONS)


def prune_weights(
    model: nn.Module,
    batches: list[torch.Tensor],
    *,
    sparsity: float,
    settings: RDWeights = SMALL,
    allocation: str = "rd",
    **context: Any,
) -> Pruned:
    method = settings if allocation == "rd" else by_formula(settings, allocation)
    return method.prune(
        model, batches[0][:2], Budget(units=round(1 - sparsity, 9)), Context(batches, **context)
    )


def by_formula(settings: RDWeights, allocation: str) -> MaskWeights:
    same = {name: getattr(settings, name) for name in options_of(MaskWeights) if name != "allocation"}
    return MaskWeights(allocation=allocation, **same)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("settings", [SMALL, replace(FAITHFUL, levels=11)], ids=["default", "faithful"])
def test_the_budget_is_met_to_the_weight(allocation: str, settings: RDWeights) -> None:
    model, x = residual_net()
    before = copy.deepcopy(model.state_dict())
    pruned = prune_weights(model, [x], sparsity=0.7, allocation=allocation, settings=settings)
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert pruned.plan.kept == int(0.3 * total)
    assert pruned.plan.weights == total
    for name, mask in pruned.plan.masks.items():
        assert (pruned.model.get_parameter(name)[~mask] == 0).all()
        assert int(mask.sum()) == pruned.facts["counts"][name] >= 1
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    if settings.compensation == "none":
        for name, mask in pruned.plan.masks.items():
            assert torch.equal(pruned.model.get_parameter(name)[mask], model.get_parameter(name)[mask])


def test_a_budget_of_parameters_counts_those_that_are_no_weights() -> None:
    model, x = residual_net()
    params = sum(p.numel() for p in model.parameters())
    for method in (SMALL, by_formula(SMALL, "lamp")):
        pruned = method.prune(model, x[:2], Budget(params=0.4), Context([x]))
        zeros = sum(int((~mask).sum()) for mask in pruned.plan.masks.values())
        assert params - zeros == int(0.4 * params) == pruned.after["params"]
    with pytest.raises(BudgetError, match="are no weights that may go"):
        SMALL.prune(model, x[:2], Budget(params=0.001), Context([x]))


def test_one_layer_takes_the_whole_budget() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 10))
    pruned = prune_weights(model, [torch.randn(40, 3, 2, 2)], sparsity=0.65, settings=SMALL)
    assert pruned.facts["counts"] == {"1.weight": 42}


@pytest.mark.parametrize("compensation", ["none", "batch-norm", "least-squares"])
def test_compensation_helps(compensation: str) -> None:
    model, x = residual_net(images=64)
    moved = {
        c: prune_weights(
            model, [x], sparsity=0.6, allocation="global",
            settings=replace(SMALL, selection="magnitude", compensation=c, distortion="logits"),
        ).facts["measured"]
        for c in ("none", compensation)
    }  # fmt: skip
    assert moved[compensation] <= moved["none"]


def test_what_is_gone_stays_gone() -> None:
    model, x = residual_net()
    first = prune_weights(model, [x], sparsity=0.5, settings=SMALL)
    for allocation in ("rd", "uniform"):
        second = prune_weights(
            first.model, [x], sparsity=0.7, allocation=allocation, settings=SMALL, previous=first.plan
        )
        for name, mask in second.plan.masks.items():
            assert (mask <= first.plan.masks[name]).all()
    other, _ = residual_net(width=4)
    with pytest.raises(PlanError, match="made for model"):
        prune_weights(other, [x], sparsity=0.7, previous=first.plan)


def test_rounds_follow_the_schedule_and_hold_the_masks() -> None:
    assert rounds(0.95, 0.2)[:3] == pytest.approx([0.2, 0.36, 0.488])
    assert rounds(0.95, 0.2)[-1] == 0.95
    assert len(rounds(0.95, 0.2)) == 14
    model, x = residual_net()
    seen = []

    def retrain(trained: torch.nn.Module, plan: object, number: int) -> None:
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        trained(x).square().mean().backward()
        optimizer.step()
        seen.append(sum(int((p != 0).sum()) for p in trained.parameters() if p.ndim > 1))

    pruned = prune_iteratively(SMALL, model, x[:2], retrain, sparsity=0.6, each=0.4, context=Context([x]))
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert seen == [int((1 - s) * total + 1e-9) for s in rounds(0.6, 0.4)]
    assert pruned.plan.kept == seen[-1]


@pytest.mark.parametrize("distortion", ["kl", "logits", "variation"])
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_curves_are_zero_at_level_0_and_monotone(distortion: str, reduction: str) -> None:
    model, x = residual_net()
    pruned = prune_weights(
        model, [x], sparsity=0.5, settings=replace(SMALL, distortion=distortion, reduction=reduction)
    )
    for row in pruned.facts["curves"]:
        kept, curve = row["kept"], row["distortion"]
        assert curve[0] == 0
        assert (np.diff(curve) >= 0).all()
        assert (np.diff(kept) < 0).all()


def test_curves_repeat_bit_for_bit_and_level_0_is_the_dense_model() -> None:
    model, x = residual_net()
    program = Replay(model, x)
    with torch.no_grad():
        task = SMALL.task(model, x[:2], Budget(units=0.5), Context([x[:8], x[8:]]))
        _, candidates = task.levels(SMALL)
        one, two = (measure(program, [x[:8], x[8:]], candidates) for _ in range(2))
        unchanged = {"fc.weight": model.get_parameter("fc.weight")}
        assert (measure(program, [x], [[unchanged]])[0] == 0).all()
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    full = joint(program, [x[:8], x[8:]], candidates[1][1])
    assert np.allclose(one[1][1], full, atol=1e-9)


def test_cached_curves_are_read_and_refused_after_a_change(tmp_path: Path) -> None:
    model, x = residual_net()
    path = tmp_path / "curves.safetensors"
    calls: list[int] = []
    first = prune_weights(
        model, [x], sparsity=0.5, settings=SMALL, cache=path, progress=lambda a, b: calls.append(b)
    )
    assert calls
    measured = len(calls)
    second = prune_weights(
        model, [x], sparsity=0.8, settings=SMALL, cache=path, progress=lambda a, b: calls.append(b)
    )
    assert len(calls) == measured  # read, and good for any budget
    assert first.facts["curves"] == second.facts["curves"]
    with torch.no_grad():
        model.get_parameter("fc.weight")[0, 0] += 1e-3
    with pytest.raises(FileError, match="other weights"):
        prune_weights(model, [x], sparsity=0.5, settings=SMALL, cache=path)
    model, x = residual_net()
    with pytest.raises(FileError, match="other weights, images"):
        prune_weights(model, [x + 1e-3], sparsity=0.5, settings=SMALL, cache=path)
    first.plan.save(path)
    with pytest.raises(FileError, match="not a file of curves"):
        Curves.load(path, key_of(model, [x], {}))


def test_levels() -> None:
    assert even(100, 101, 1).tolist() == [*range(100, 0, -1)]
    assert geometric(7, 30, 1).tolist() == [7, 6, 5, 4, 3, 2, 1]
    kept = np.array([100, 30, 5])
    grid, values = interpolated(kept, np.array([0.0, 0.2, 3.0]), 20)
    assert {100, 30, 5} <= set(grid.tolist())
    assert (np.diff(values) >= 0).all()
    assert values[grid == 30] == pytest.approx(0.2)
    assert values[0] == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_correction_never_makes_the_measured_distortion_worse(seed: int) -> None:
    model, x = residual_net()
    x = x + seed
    for selection, compensation in (("magnitude", "none"), ("least-squares", "least-squares")):
        settings = replace(SMALL, selection=selection, compensation=compensation, exponent=1.0)
        plain = prune_weights(model, [x], sparsity=0.7, settings=settings)
        better = prune_weights(model, [x], sparsity=0.7, settings=replace(settings, corrections=3))
        assert better.facts["measured"] <= plain.facts["measured"]
        assert better.facts["corrected"] == sorted(better.facts["corrected"], reverse=True)
        assert better.plan.kept == plain.plan.kept


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.8, 0.9])
def test_rd_is_never_behind_its_rivals_in_what_it_measures(sparsity: float) -> None:
    model, x = residual_net()
    settings = replace(SMALL, selection="least-squares", compensation="least-squares")
    rivals = {
        name: prune_weights(model, [x], sparsity=sparsity, allocation=name, settings=settings)
        for name in settings.rivals
    }
    best = min(rivals, key=lambda name: rivals[name].facts["measured"])
    alone = prune_weights(model, [x], sparsity=sparsity, settings=replace(settings, rivals=()))
    found = prune_weights(model, [x], sparsity=sparsity, settings=settings)
    assert found.facts["measured"] == min(alone.facts["measured"], rivals[best].facts["measured"])
    taken = best if rivals[best].facts["measured"] < alone.facts["measured"] else "rd"
    assert found.plan.origin["taken"] == taken
    assert (found.facts["predicted"] is None) == (taken != "rd")


def test_patterns_share_the_knapsack() -> None:
    model, x = residual_net()
    pruned = prune_weights(model, [x], sparsity=0.3, settings=replace(SMALL, pattern=(2, 4)))
    halved = [n for n, mask in pruned.plan.masks.items() if not mask.all()]
    assert halved
    for name in halved:
        assert (pruned.plan.masks[name].reshape(-1, 4).sum(1) == 2).all()
    assert pruned.plan.kept <= 0.7 * pruned.plan.weights
    with pytest.raises(BudgetError, match="within reach"):
        prune_weights(model, [x], sparsity=0.6, settings=replace(SMALL, pattern=(2, 4)))


def test_a_budget_out_of_reach_names_the_range() -> None:
    model, x = residual_net()
    with pytest.raises(BudgetError, match="within reach are"):
        prune_weights(model, [x], sparsity=0.999, settings=replace(SMALL, min_density=0.2))
    with pytest.raises(BudgetError, match="must be above 0"):
        prune_weights(model, [x], sparsity=1.0)
    with pytest.raises(BudgetError, match=r"the weights that stay, such as units=0\.2"):
        SMALL.prune(model, x[:2], Budget(macs=0.5), Context([x]))
    with pytest.raises(SecateurError, match="one of erk, global, lamp"):
        MaskWeights(allocation="best")
    for wrong in ({"solver": "x"}, {"levels": 1}, {"min_density": 1.0}, {"exponent": 0.0}):
        with pytest.raises(SecateurError):
            RDWeights(**wrong)  # type: ignore[arg-type]


def test_frozen_layers_keep_their_weights() -> None:
    model, x = residual_net()
    pruned = prune_weights(model, [x], sparsity=0.5, settings=replace(SMALL, freeze=("fc",)))
    assert "fc.weight" not in pruned.plan.masks
    assert pruned.plan.kept == int(0.5 * pruned.plan.weights)
