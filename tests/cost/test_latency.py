"""The clock: what is timed, in which order, and what is left behind."""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from secateur.cost.latency import (
    Latency,
    LatencyPair,
    compare_latency,
    compare_pair,
    compare_pairs,
    device_name,
    measure_latency,
)
from secateur.errors import SecateurError
from secateur.report.html import speed


def test_a_pass_that_sleeps_takes_at_least_that_long():
    latency = measure_latency(lambda x: time.sleep(0.004), torch.zeros(3, 2), warmup=1, repeats=5)
    assert 4 <= latency.p10_ms <= latency.median_ms <= latency.p90_ms
    assert (latency.batch, latency.repeats, latency.runtime) == (3, 5, "pytorch")
    assert latency.device == device_name("cpu") != ""


def test_runs_take_turns():
    order: list[str] = []
    runs = {name: lambda x, name=name: order.append(name) for name in "ab"}
    timed = compare_latency(runs, torch.zeros(1, 1), warmup=1, repeats=3)
    assert order == list("abba" * 2)
    assert list(timed) == ["a", "b"]


def test_modes_and_gradients_are_as_before():
    class Spy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    seen: list[tuple[bool, bool]] = []
    model = nn.Sequential(Spy(), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()  # frozen by its owner
    measure_latency(model, torch.zeros(2, 2), warmup=0, repeats=1)
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert model[1].num_batches_tracked == 0


def test_modes_come_back_when_the_model_fails():
    model = nn.Linear(3, 1)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency(model, torch.zeros(2, 2), threads=1)
    assert model.training
    assert torch.get_num_threads() == threads


def test_threads_hold_while_measuring_only():
    seen: list[int] = []
    before = torch.get_num_threads()
    latency = measure_latency(lambda x: seen.append(torch.get_num_threads()), torch.zeros(1, 1), threads=1)
    assert set(seen) == {1}
    assert latency.threads == 1
    assert torch.get_num_threads() == before


def test_a_runner_says_what_it_is():
    class Elsewhere:
        runtime, threads = "onnxruntime", 7

        def __call__(self, *args: Any, **kwargs: Any) -> None: ...

    latency = measure_latency(Elsewhere(), torch.zeros(1, 1), repeats=1)
    assert (latency.runtime, latency.threads) == ("onnxruntime", 7)


def test_json_holds_every_field():
    latency = Latency(2.0, 1.5, 3.0, 30, 8, 2, "a processor", "pytorch")
    assert Latency(**json.loads(json.dumps(latency.to_json()))) == latency


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"warmup": -1}, {"threads": 0}])
def test_numbers_that_make_no_sense_are_named(bad: dict[str, int]):
    with pytest.raises(SecateurError, match=next(iter(bad))):
        measure_latency(nn.Identity(), torch.zeros(1, 1), **bad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_is_waited_for():
    x = torch.randn(4096, 4096, device="cuda")
    latency = measure_latency(lambda x: [x @ x for _ in range(20)], x, repeats=5)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    _ = [x @ x for _ in range(20)]
    end.record()
    torch.cuda.synchronize()
    assert latency.median_ms > 0.5 * start.elapsed_time(end)
    assert latency.device == torch.cuda.get_device_name()


class Time:
    """A clock that only moves when a model runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ms = 0.0
        monkeypatch.setattr("secateur.cost.latency.time", self)

    def perf_counter_ns(self) -> int:
        return round(1e6 * self.ms)

    def perf_counter(self) -> float:
        return self.ms / 1e3

    def model(self, takes: Callable[[int], float]) -> Callable[[torch.Tensor], None]:
        """A model whose n-th pass takes so many milliseconds."""
        passes = itertools.count()

        def run(x: torch.Tensor) -> None:
            self.ms += takes(next(passes))

        return run


@pytest.mark.parametrize(
    ("dense", "cut", "passes"),
    [
        (lambda n: 10.0, lambda n: 5.0, 28),
        (lambda n: 400.0, lambda n: 200.0, 6),  # long passes: fewer will do
        (lambda n: 100.0 if n % 2 else 10.0, lambda n: 50.0 if n % 3 else 5.0, 19),  # other work
    ],
)
def test_other_work_does_not_change_a_speed_up(
    monkeypatch: pytest.MonkeyPatch, dense: Callable[[int], float], cut: Callable[[int], float], passes: int
) -> None:
    clock = Time(monkeypatch)
    pair = compare_pair(clock.model(dense), clock.model(cut), torch.zeros(1, 1))
    assert (pair.speed_up, pair.spread, pair.before.repeats) == (2.0, 0.0, passes)
    assert pair.steady


def test_a_speed_up_that_does_not_settle_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    pair = compare_pair(clock.model(lambda n: 40.0), clock.model(lambda n: 20 * 1.1**n), torch.zeros(1, 1))
    assert not pair.steady
    assert speed(pair) == "not told: other work disturbed the clock"
    calm = LatencyPair(pair.before, replace(pair.before, p10_ms=pair.before.p10_ms / 2), 0.03)
    assert speed(calm) == "2.00× faster (± 3 %)"


def test_a_disturbed_measurement_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Time(monkeypatch)
    pair = compare_pair(
        clock.model(lambda n: 10.0),
        clock.model(lambda n: 5.0 * (1 + n // 30) if n < 120 else 5.0),
        torch.zeros(1, 1),
    )
    assert pair.speed_up == 2.0
    assert pair.spread == 0.0


def test_several_are_timed_beside_one() -> None:
    order: list[str] = []
    runs = {name: lambda x, name=name: order.append(name) for name in "abc"}
    pairs = compare_pairs(runs["a"], {name: runs[name] for name in "bc"}, torch.zeros(1, 1))
    assert order[:12] == list("abccba" * 2)
    assert list(pairs) == ["b", "c"]
    assert pairs["b"].before == pairs["c"].before
