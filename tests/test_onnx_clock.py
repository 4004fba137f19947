"""Times in onnxruntime: one export serves all cut networks, and what is timed is what was cut."""

from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import onnx_clock
from secateur.errors import ExportError
from tests.small import residual_net


def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is exported from now on."""
    found: list[Any] = []
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: found.append(a) or export(*a, **k))
    return found


def test_one_export_serves_all_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = residual_net(64)
    exported = exports(monkeypatch)
    clock = onnx_clock.in_onnxruntime(model, x[:1], threads=1)
    dense = clock(model)
    times = [clock(sc.prune(model, x[:1], budget=share, round_to=1).model) for share in (0.7, 0.1)]
    assert len(exported) == 1
    assert dense > times[1] > 0


def test_what_is_timed_computes_what_the_cut_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = residual_net(16)
    runners: list[Any] = []
    monkeypatch.setattr(
        onnx_clock, "in_turn", lambda dense, inputs, ready: lambda m: runners.append(ready(m)) or 1.0
    )
    clock = onnx_clock.in_onnxruntime(model, x[:2], threads=1)
    small = sc.prune(model, x[:2], budget=0.5, round_to=1).model
    for one in (model, small):
        clock(one)
        (got,) = runners[-1](x[:2])
        torch.testing.assert_close(got, one(x[:2]), rtol=1e-4, atol=1e-4)


def test_a_network_with_other_operators_is_exported_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = residual_net(16)
    exported = exports(monkeypatch)
    clock = onnx_clock.in_onnxruntime(model, x[:1], threads=1)
    plan = sc.prune(model, x[:1], budget=0.9, method="oneshot", granularity="blocks")
    assert clock(plan.model) > 0
    assert len(exported) == 2


def test_what_cannot_be_exported_is_said() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="Branching cannot be timed in onnxruntime"):
        onnx_clock.in_onnxruntime(Branching(), torch.ones(1, 3))
