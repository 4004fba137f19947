"""Measures are one table: whoever adds an entry has a budget, a cost and its words."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.cost.formulas import Formula
from secateur.errors import BudgetError
from secateur.graph import Graph
from secateur.measures import MEASURES, Measure, closed


def widest(graph: Graph) -> Formula:
    """The units of the widest group."""
    return lambda kept: kept.max()


@pytest.mark.parametrize("formula", [widest, f"{__name__}:widest"])
def test_a_new_measure_is_a_function_and_an_entry(formula, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Measure("widest", "widest layer", "channels", "channels of the widest layer", formula=formula)
    monkeypatch.setitem(MEASURES, entry.name, entry)
    model = nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    pruned = sc.prune(model, torch.randn(1, 3, 8, 8), budget=sc.Budget(widest=0.3), round_to=1)
    assert (pruned.before["widest"], pruned.after["widest"]) == (20, 6)
    assert [pruned.model[number].out_channels for number in (0, 2)] == [6, 6]
    budget = sc.Budget(macs=0.9, widest=12)
    assert (budget.widest, budget.given, list(budget.limits({"macs": 100, "widest": 20}).values())) == (
        12,
        {"macs": 0.9, "widest": 12},
        [90, 12],
    )


def test_a_budget_is_a_value() -> None:
    budget = sc.Budget(params=0.3, macs=0.5, units=None)
    assert (
        budget
        == sc.Budget(macs=0.5, params=0.3)
        == copy.deepcopy(budget)
        == pickle.loads(pickle.dumps(budget))
    )
    assert len({budget, sc.Budget(macs=0.5, params=0.3), sc.Budget(macs=0.5)}) == 2
    assert repr(budget) == "Budget(macs=0.5, params=0.3)"
    assert (budget.macs, budget.units, budget.latency_ms) == (0.5, None, None)
    with pytest.raises(AttributeError, match="flops"):
        _ = budget.flops


def test_an_unknown_measure_lists_the_choices() -> None:
    choices = "choose one of: activations, latency_ms, macs, params, units"
    with pytest.raises(BudgetError, match=f"unknown measure 'flops'; {choices}"):
        sc.Budget(flops=0.5)
    cost = sc.Cost(sc.analyze(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 4, 4)))
    with pytest.raises(BudgetError, match=f"unknown measure 'flops'; {choices}"):
        cost.of("flops")
    with pytest.raises(
        BudgetError, match="latency does not follow from widths, it is measured; choose one of: macs"
    ):
        cost.of("latency_ms")


def test_a_bound_by_the_clock_is_no_bound_in_closed_form() -> None:
    assert sc.Budget(latency_ms=1.5).given == {"latency_ms": 1.5}
    with pytest.raises(BudgetError, match="milliseconds have to be measured, and this method cannot"):
        _ = sc.Budget(macs=0.5, latency_ms=1.5).bounds


def test_every_entry_speaks() -> None:
    for name, measure in MEASURES.items():
        assert name == measure.name
        assert measure.help in (sc.Budget.__doc__ or "")
        assert not measure.help.endswith(".")
    assert closed() == ["macs", "params", "units", "activations"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("macs", 13_536, "13,536"), ("activations", 999, "999 B"), ("activations", 999_600, "1 MB"),
     ("activations", 5.5e9, "5.5 GB"), ("latency_ms", 0.12345, "0.123 ms")],
)  # fmt: skip
def test_values_in_text(name: str, value: float, text: str) -> None:
    assert MEASURES[name].show(value) == text


def test_the_table_does_not_need_torch() -> None:
    """So that the command line can make flags of it at once."""
    code = "import sys, secateur.measures; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
