"""Channels by curves: budgets, proofs, and compensation that leaves removed channels at zero."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from secateur import Budget, prune
from secateur.allocate import list_widths
from secateur.engine.pruned import Pruned
from secateur.errors import BudgetError, ScoreError, SecateurError
from secateur.graph import analyze
from secateur.graph.replay import Replay
from secateur.methods.rd.channels import (
    Ranking,
    anchors_of,
    columns_of,
    estimate,
    grid_of,
    is_stream,
    part_of,
)
from secateur.methods.rd.curves import joint
from secateur.proof import verify
from secateur.reconstruction.leastsquares import Elimination, Moments, solve
from secateur.reconstruction.plans import compensated
from secateur.surgery.cut import cut_copy
from tests.small import residual_net


@pytest.mark.parametrize("compensation", ["none", "batch-norm", "least-squares"])
@pytest.mark.parametrize("bound", [{"macs": 0.5}, {"params": 0.6}, {"units": 0.7}])
def test_the_budget_is_met_and_the_cut_proven(bound: dict[str, float], compensation: str) -> None:
    model, x = residual_net()
    before = copy.deepcopy(model.state_dict())
    pruned = prune(
        model, x[:2], budget=Budget(**bound), method="rd", data=[x], compensation=compensation, levels=4
    )
    after, dense = (record.get(next(iter(bound))) for record in (pruned.after, pruned.before))
    assert after <= next(iter(bound.values())) * dense
    assert pruned.proof.ok
    assert pruned.model(x).shape == model(x).shape
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_least_squares_is_closest_to_the_dense_model() -> None:
    model, x = residual_net(images=64)
    moved = [
        prune(model, x[:2], budget=Budget(macs=0.6), method="rd", data=[x], compensation=c, levels=5).facts[
            "measured"
        ]
        for c in ("least-squares", "none")
    ]
    assert moved[0] < moved[1]


def test_any_plan_can_be_compensated_and_stays_cuttable() -> None:
    model, x = residual_net(images=64)
    plain = prune(model, x[:2], budget=Budget(macs=0.5), method="oneshot")
    program = Replay(model, x)
    changed = {}
    for compensation in ("none", "batch-norm", "least-squares"):
        tensors = compensated(program, plain.graph, plain.plan, [x], compensation)
        other = copy.deepcopy(model)
        other.load_state_dict(model.state_dict() | tensors)
        small = cut_copy(other, plain.graph, plain.plan)
        assert verify(other, small, plain.graph, plain.plan).ok
        with torch.no_grad():
            changed[compensation] = float((small(x) - model(x)).square().mean())
            masked = nn.functional.mse_loss(program(x, tensors), small(x))
        assert masked < 1e-8  # removed channels are zero in the compensated network too
    assert changed["least-squares"] < min(changed["none"], changed["batch-norm"])


def problem(outputs: int, units: int, each: int, seed: int = 0) -> tuple[Moments, torch.Tensor]:
    """A layer's moments where its own outputs are the target, and the columns of every unit."""
    g = torch.Generator().manual_seed(seed)
    k = units * each
    x = torch.randn(6 * k, k, generator=g, dtype=torch.float64)
    x = x @ torch.randn(k, k, generator=g, dtype=torch.float64)
    w = torch.randn(outputs, k, generator=g, dtype=torch.float64)
    a, zero = x.T @ x / len(x), torch.zeros(k, dtype=torch.float64)
    moments = Moments(a, w @ a, ((w @ a) * w).sum(1), zero, zero[:1].expand(outputs), w)
    return moments, torch.arange(k).view(units, each)


def without(moments: Moments, gone: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The solution without some columns, by a fresh solve, and what it costs: the slow, obvious version."""
    keep = torch.ones(len(moments.a), dtype=torch.bool)
    keep[gone] = False
    w = solve(moments, keep.expand(len(moments.b), -1))
    missing = moments.before - w
    system = moments.a + moments.damping * torch.eye(len(moments.a), dtype=torch.float64)
    return w, float(((missing @ system) * missing).sum(1) @ importance)


def test_what_leaves_costs_what_solving_without_it_costs() -> None:
    moments, blocks = problem(outputs=4, units=5, each=3)
    importance = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    layer = Elimination(moments.a, moments.damping, moments.before, blocks, importance)
    spent = layer.remove(torch.tensor([1, 3]))
    w, cost = without(moments, blocks[[1, 3]].flatten(), importance)
    torch.testing.assert_close(layer.full(), w)
    assert spent == pytest.approx(cost, rel=1e-6)
    prices = layer.prices()
    assert prices[1] == prices[3] == float("inf")
    for unit in (0, 2, 4):
        _, total = without(moments, blocks[[1, 3, unit]].flatten(), importance)
        assert float(prices[unit]) == pytest.approx(total - spent, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_downdated_order_is_that_of_fresh_inverses(seed: int) -> None:
    moments, blocks = problem(outputs=6, units=40, each=2, seed=seed)
    importance = torch.ones(6, dtype=torch.float64)
    layer = Elimination(moments.a, moments.damping, moments.before, blocks, importance)
    gone: list[int] = []
    while len(gone) < 39:
        _, spent = without(moments, blocks[gone].flatten(), importance) if gone else (None, 0.0)
        prices = [
            float("inf")
            if u in gone
            else without(moments, blocks[[*gone, u]].flatten(), importance)[1] - spent
            for u in range(40)
        ]
        cheapest = int(np.argmin(prices))
        assert int(layer.prices().argmin()) == cheapest
        layer.remove(torch.tensor([cheapest]))
        gone.append(cheapest)


def test_an_estimate_has_the_readers_shape_and_the_measured_size() -> None:
    kept = np.arange(8, 0, -1)
    ranking = Ranking(torch.arange(8), kept, np.arange(8.0) ** 2, {})
    assert anchors_of(ranking, (0.75, 0.4)) == [6, 3]
    one = estimate(ranking, [4], [8.0], kept)
    np.testing.assert_allclose(one, 0.5 * np.arange(8.0) ** 2)
    two = estimate(ranking, [6, 3], [4.0, 100.0], kept)
    np.testing.assert_allclose(two[[0, 2, 5]], [0.0, 4.0, 100.0])
    assert (np.diff(two) >= 0).all()


@torch.no_grad()
def test_estimates_order_widths_as_measured_curves_do() -> None:
    model, x = residual_net(images=64)
    facts = [
        prune(
            model, x[:2], budget=Budget(macs=0.6), method="rd", data=[x], curves=curves, levels=8, round_to=1
        ).facts
        for curves in ("estimated", "measured")
    ]
    for fast, slow in zip(*(found["curves"] for found in facts), strict=True):
        at = np.interp([-k for k in slow["kept"]], [-k for k in fast["kept"]], fast["distortion"])
        assert spearmanr(at, slow["distortion"]).statistic > 0.9
        assert 0.2 < at[2:].sum() / np.sum(slow["distortion"][2:]) < 5


def test_the_search_sees_allowed_widths_only_and_enough_of_them() -> None:
    assert grid_of(list_widths(50, 4, 8)).tolist() == [50, 48, 40, 32, 24, 16, 8]
    wide = grid_of(list_widths(2048, 4, 8))
    assert 20 < len(wide) <= 36
    assert all(k % 8 == 0 for k in wide)
    assert (wide[0], wide[-1]) == (2048, 8)


def test_columns_are_where_the_units_are_read() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(16, 3))
    (group,) = analyze(model, torch.zeros(1, 2, 2, 2)).groups
    reader = next(m for m in group.members if m.role == "in")
    assert columns_of(reader, model[2].weight).tolist() == [[4 * u + p for p in range(4)] for u in range(4)]


def test_curves_are_cached_and_widths_respect_the_options(tmp_path: Path) -> None:
    model, x = residual_net()
    path = tmp_path / "curves.safetensors"
    calls: list[tuple[int, int]] = []
    for budget in (0.7, 0.5):
        calls.clear()
        pruned = prune(
            model, x[:2], budget=Budget(macs=budget), method="rd", data=[(x, torch.zeros(len(x)))], levels=4,
            min_keep=2, round_to=2, cache=path, progress=lambda *done: calls.append(done),
        )  # fmt: skip
        assert all(k % 2 == 0 and k >= 2 for k in pruned.plan.kept(pruned.graph))
        done = [now for now, _ in calls]
        assert (done[0], done[-1], done) == (0, 1000, sorted(set(done)))
    assert len(list(tmp_path.iterdir())) == 1
    assert all((np.diff(row["distortion"]) >= 0).all() for row in pruned.facts["curves"])


def test_two_images_are_enough_to_run_and_nan_is_told() -> None:
    """Far fewer rows than inputs: least squares draws the weights to what they were."""
    model, x = residual_net(width=32)
    few = prune(model, x[:2], budget=Budget(macs=0.5), method="rd", data=[x[:2]])
    assert few.proof.ok
    assert torch.isfinite(few.model(x)).all()
    with pytest.raises(ScoreError, match="not finite"):
        prune(model, x[:2], budget=Budget(macs=0.5), method="rd", data=[torch.full_like(x, torch.nan)])
    with pytest.raises(ScoreError, match="at least 2"):
        prune(model, x[:2], budget=Budget(macs=0.5), method="rd", data=[])


def test_groups_that_several_layers_write_are_streams() -> None:
    model, x = residual_net()
    names = {group.name: is_stream(group) for group in analyze(model, x[:2]).groups}
    assert names == {"stem": True, "block.conv1": False}


def test_streams_are_protected_where_that_measures_enough_better() -> None:
    model, x = residual_net(images=64)

    def by(weight: float, gain: float) -> Pruned:
        return prune(
            model, x[:2], budget=Budget(macs=0.4), method="rd", data=[x], curves="measured", levels=5, exponents=(0.5,),
            stream_weight=weight, stream_gain=gain, round_to=1,
        )  # fmt: skip

    plain, protected = by(1.0, 1.0), by(1000.0, 1.0)
    assert protected.plan.origin["stream_weight"] == 1000.0
    assert protected.facts["measured"] < plain.facts["measured"]
    share = protected.facts["measured"] / plain.facts["measured"]
    assert by(1000.0, 0.99 * share).plan.removed == plain.plan.removed
    assert by(1000.0, min(1.0, 1.01 * share)).plan.removed == protected.plan.removed
    kept = [plan.plan.kept(plan.graph) for plan in (plain, protected)]
    (stream,) = (place for place, group in enumerate(plain.graph.groups) if is_stream(group))
    assert kept[0][stream] < kept[1][stream]


@torch.no_grad()
def test_the_distortion_told_is_of_images_that_nothing_was_solved_on() -> None:
    """Two quarters of the images try widths; the weights that are returned are then solved on all of them."""
    model, x = residual_net(images=64)
    pruned = prune(model, x[:2], budget=Budget(macs=0.5), method="rd", data=[x])
    program = Replay(model, x)
    few, others = (part_of(program, [x], 4, {place}) for place in (0, 1))
    tried, final = (
        compensated(program, pruned.graph, pruned.plan, images, "least-squares") for images in (few, [x])
    )
    assert pruned.facts["measured"] == pytest.approx(joint(program, others, tried).mean(), rel=1e-4)
    assert joint(program, others, final).mean() < 0.9 * pruned.facts["measured"]
    torch.testing.assert_close(pruned.model(x), program(x, final), rtol=1e-3, atol=1e-4)


def test_mistakes_say_what_to_do() -> None:
    model, x = residual_net()
    with pytest.raises(ScoreError, match="data="):
        prune(model, x[:2], budget=Budget(macs=0.5), method="rd")
    with pytest.raises(BudgetError, match="one bound"):
        prune(model, x[:2], budget=Budget(macs=0.5, params=0.5), method="rd", data=[x])
    with pytest.raises(BudgetError, match="within reach"):
        prune(model, x[:2], budget=Budget(macs=0.01), method="rd", data=[x], levels=3)
    with pytest.raises(SecateurError, match="least-squares"):
        prune(model, x[:2], budget=Budget(macs=0.5), method="rd", data=[x], compensation="magic")
    for exponents in ((), (1.0, 0.0)):
        with pytest.raises(SecateurError, match=r"exponents is .*(give at least one|each above 0)"):
            prune(model, x[:2], budget=Budget(macs=0.5), method="rd", data=[x], exponents=exponents)
    for wrong in ({"stream_weight": 0.5}, {"stream_gain": 0.0}, {"stream_gain": 2.0}):
        with pytest.raises(SecateurError, match=f"RD: {next(iter(wrong))} is .* expected a number"):
            prune(model, x[:2], budget=Budget(macs=0.5), method="rd", data=[x], **wrong)
