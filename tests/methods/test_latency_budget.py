"""Budgets in milliseconds: with a clock that is a formula, the search lands where the formula says."""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from secateur import Budget, analyze, prune
from secateur.cost import Cost
from secateur.errors import BudgetError
from secateur.methods import LAPP, Context, OneShot, budget_in_macs
from secateur.methods.latency import Clock
from secateur.methods.rd import channels as rd_channels
from tests.small import residual_net


def chain() -> tuple[nn.Module, torch.Tensor]:
    """One unit of its layers is a small part of the whole."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 48, 3),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Conv2d(48, 4, 1)), torch.randn(2, 3, 12, 12)


def formula(x: torch.Tensor, milliseconds: Callable[[float], float]) -> Clock:
    """Milliseconds by the share of the first model's MACs."""
    dense: list[int] = []

    def clock(model: nn.Module) -> float:
        dense.append(Cost(analyze(model, x[:1])).macs())
        return milliseconds(dense[-1] / dense[0])

    return clock


@pytest.mark.parametrize(
    "milliseconds",
    [
        lambda share: 10 * share,
        lambda share: 3 + 7 * share,  # a network has costs that no cut lowers
        lambda share: 10 * share**0.5,
        lambda share: float(round(3 + 7 * share)),  # and steps, where a kernel's tiles end
    ],
    ids=["line", "offset", "root", "steps"],
)
@pytest.mark.parametrize("bound", [4.5, 6.0, 9.0])
def test_the_largest_model_that_is_fast_enough(milliseconds: Callable[[float], float], bound: float) -> None:
    model, x = chain()
    clock = formula(x, milliseconds)
    pruned = prune(model, x[:1], budget=Budget(latency_ms=bound), clock=clock, round_to=1)
    assert (pruned.before["latency_ms"], pruned.after["latency_ms"]) == (
        milliseconds(1.0),
        clock(pruned.model),
    )
    found = pruned.plan.origin["latency_ms"]
    assert len(found["trials"]) <= 8
    slower = [share for share, ms in found["trials"] if ms is not None and ms > bound]
    assert clock(pruned.model) <= bound
    share = pruned.after["macs"] / pruned.before["macs"]
    assert clock(pruned.model) >= 0.95 * bound or min([1.0, *slower]) - share < 0.05
    assert f"{milliseconds(1.0):.3g} ms -> " in str(pruned)


def test_other_bounds_hold_as_well() -> None:
    model, x = chain()
    clock = formula(x, lambda share: 10 * share)
    loose = prune(model, x[:1], budget=Budget(latency_ms=8.0, macs=0.5), clock=clock, round_to=1)
    assert 0.45 < loose.after["macs"] / loose.before["macs"] <= 0.5
    tight = prune(model, x[:1], budget=Budget(latency_ms=2.0, macs=0.5), clock=clock, round_to=1)
    assert 0.15 < tight.after["macs"] / tight.before["macs"] <= 0.2


def test_what_cannot_be_met_is_said() -> None:
    model, x = chain()
    with pytest.raises(
        BudgetError, match=r"latency_ms=2: not reached. The dense model takes 10 ms; with .*takes 3"
    ):
        prune(model, x[:1], budget=Budget(latency_ms=2), clock=formula(x, lambda share: 3 + 7 * share))
    with pytest.raises(BudgetError, match="latency_ms=11: the dense model takes 10 ms and fits already"):
        prune(model, x[:1], budget=Budget(latency_ms=11), clock=formula(x, lambda share: 10 * share))
    with pytest.raises(BudgetError, match="must be above 0"):
        Budget(latency_ms=-1)
    with pytest.raises(BudgetError, match="budget_in_macs"):
        LAPP(bypass="none").start(model, x[:1], budget=Budget(latency_ms=3), steps=10)
    with pytest.raises(BudgetError, match="budget_in_macs"):
        OneShot().prune(model, x[:1], Budget(latency_ms=3), Context())


def test_curves_are_measured_once_for_all_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    measure = rd_channels.measure_curves
    monkeypatch.setattr(rd_channels, "measure_curves", lambda *args: calls.append(1) or measure(*args))
    model, x = residual_net(32)
    pruned = prune(
        model, x[:1], budget=Budget(latency_ms=5), method="rd", data=iter([x]), levels=3, round_to=1,
        clock=formula(x, lambda share: 10 * share**0.5),
    )  # fmt: skip
    assert len(calls) == 1
    assert len(pruned.plan.origin["latency_ms"]["trials"]) > 1
    assert pruned.proof.ok


def test_trials_share_one_graph_and_only_the_winner_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {"analyze": 0, "verify": 0}

    def counted(place: str) -> None:
        module, name = place.rsplit(".", 1)
        original = getattr(importlib.import_module(module), name)

        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(place, call)

    model, x = chain()
    clock = formula(x, lambda share: 10 * share**0.5)
    for place in (
        "secateur.engine.method.analyze",
        "secateur.engine.pruned.verify",
    ):
        counted(place)
    pruned = prune(model, x[:1], budget=Budget(latency_ms=5), clock=clock)
    assert len(pruned.plan.origin["latency_ms"]["trials"]) > 1
    assert calls == {"analyze": 1, "verify": 1}
    assert pruned.proof.ok


def test_widths_in_multiples_are_timed_once_each() -> None:
    model, x = chain()
    timed: list[float] = []
    clock = formula(x, lambda share: timed.append(share) or 10 * share)
    pruned = prune(model, x[:1], budget=Budget(latency_ms=4.5), clock=clock, round_to="avx512")
    assert all(k % 16 == 0 for k in pruned.plan.kept(pruned.graph))
    assert len(set(timed)) == len(timed)
    assert pruned.after["latency_ms"] <= 4.5


def test_milliseconds_as_macs_for_methods_that_train() -> None:
    model, x = chain()
    clock = formula(x, lambda share: 10 * share)
    budget = budget_in_macs(model, x[:1], Budget(latency_ms=6, params=0.9), clock=clock)
    dense = Cost(analyze(model, x[:1])).macs()
    assert 0.55 * dense < budget.bounds["macs"] <= 0.6 * dense
    assert budget.bounds["params"] == 0.9


def test_by_the_real_clock() -> None:
    class Wide(nn.Sequential):
        """Slow enough for a clock to tell a cut from noise."""

    model = Wide(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1))
    x = torch.randn(4, 3, 32, 32)
    dense = prune(model, x, budget=Budget(macs=0.99)).before["macs"]
    for part in (0.5, 0.6, 0.7):  # a machine that others slow down may need another try
        try:
            pruned = prune(model, x, budget=Budget(latency_ms=part * now(model, x)))
        except BudgetError:
            continue
        assert pruned.after["macs"] < dense
        assert pruned.after["latency_ms"] < pruned.before["latency_ms"]
        return
    pytest.fail("no bound was met")


def now(model: nn.Module, x: torch.Tensor) -> float:
    from secateur.cost.latency import measure_latency

    return measure_latency(model, x).p10_ms
