"""Channels by curves: budgets, proofs, and compensation that leaves removed channels at zero."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from secateur import Budget, prune
from secateur.engine.pruned import Pruned
from secateur.errors import BudgetError, ScoreError, SecateurError
from secateur.graph import analyze
from secateur.graph.replay import Replay
from secateur.methods.rd.channels import columns_of, compensated, is_stream
from secateur.proof import verify
from secateur.reconstruction.leastsquares import Moments, block_prices, solve
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


def test_a_block_costs_what_solving_without_it_costs() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 9, generator=g, dtype=torch.float64) @ torch.randn(
        9, 9, generator=g, dtype=torch.float64
    )
    w = torch.randn(4, 9, generator=g, dtype=torch.float64)
    zero = torch.zeros(9, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    t = x @ w.T
    m = Moments(x.T @ x / 300, t.T @ x / 300, t.square().mean(0), *zero, w)
    blocks = torch.arange(9).view(3, 3)
    alive = torch.ones(9, dtype=torch.bool)
    alive[blocks[1]] = False
    prices = block_prices(m, alive, blocks)
    assert prices[1] == float("inf")
    for unit in (0, 2):
        keep = alive.clone()
        keep[blocks[unit]] = False
        lost = m.error(solve(m, keep.expand(4, 9))) - m.error(solve(m, alive.expand(4, 9)))
        assert prices[unit] == pytest.approx(lost, rel=0.05)


def test_columns_are_where_the_units_are_read() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Flatten(), nn.Linear(16, 3))
    (group,) = analyze(model, torch.zeros(1, 2, 2, 2)).groups
    reader = next(m for m in group.members if m.role == "in")
    assert columns_of(reader, model[2].weight).tolist() == [[4 * u + p for p in range(4)] for u in range(4)]


def test_curves_are_cached_and_widths_respect_the_options(tmp_path: Path) -> None:
    model, x = residual_net()
    path = tmp_path / "curves.safetensors"
    calls: list[int] = []
    for budget in (0.7, 0.5):
        pruned = prune(
            model, x[:2], budget=Budget(macs=budget), method="rd", data=[(x, torch.zeros(len(x)))], levels=4,
            min_keep=2, round_to=2, cache=path, progress=lambda done, total: calls.append(total),
        )  # fmt: skip
        assert all(k % 2 == 0 and k >= 2 for k in pruned.plan.kept(pruned.graph))
    assert len(calls) == calls[0]
    assert all((np.diff(row["distortion"]) >= 0).all() for row in pruned.facts["curves"])


def test_groups_that_several_layers_write_are_streams() -> None:
    model, x = residual_net()
    names = {group.name: is_stream(group) for group in analyze(model, x[:2]).groups}
    assert names == {"stem": True, "block.conv1": False}


def test_streams_are_protected_where_that_measures_enough_better() -> None:
    model, x = residual_net(images=64)

    def by(weight: float, gain: float) -> Pruned:
        return prune(
            model, x[:2], budget=Budget(macs=0.6), method="rd", data=[x], levels=5, exponents=(0.5,),
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
