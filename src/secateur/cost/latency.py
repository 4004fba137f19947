"""Latency by the clock: many forward passes, of two models in turn when they are compared.

Other work on the machine makes passes slower, never faster. So a quotient of two models is that of their fast tenths,
and how far it can be trusted follows from how much it differs between parts of the measurement.
"""

import contextlib
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.graph.capture import Inputs, as_call, batch_of
from secateur.graph.modes import evaluating


@runtime_checkable
class Runner(Protocol):
    """A model outside PyTorch, such as `secateur.export.OnnxRunner`: it says what runs it, on the CPU.

    Attributes:
        runtime: the name of what runs the model.
        threads: how many threads it was set up to use.
    """

    runtime: str
    threads: int

    def __call__(self, *args: Any, **kwargs: Any) -> object: ...


@dataclass(frozen=True)
class Latency:
    """How long one forward pass takes, and under which conditions that was measured.

    Attributes:
        median_ms, p10_ms, p90_ms: milliseconds for the whole batch; one pass in ten was faster than
            `p10_ms`, one in ten slower than `p90_ms`.
        repeats: timed passes.
        batch: images per pass.
        threads: CPU threads of the runtime.
        device: the name of the processor or GPU.
        runtime: "pytorch" or "onnxruntime".
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int
    batch: int
    threads: int
    device: str
    runtime: str

    def to_json(self) -> dict[str, float | int | str]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class LatencyPair:
    """Both models timed on the same inputs, in turn: see `compare_pair`.

    Attributes:
        before, after: of the dense and of the pruned model.
        spread: how far the speed-up of a third of the passes is from that of another, ± as a share of it; None: not
            known, as in files of older versions.
    """

    before: Latency
    after: Latency
    spread: float | None = None

    @property
    def speed_up(self) -> float:
        """Before over after, of the fast tenths."""
        return self.before.p10_ms / self.after.p10_ms

    @property
    def steady(self) -> bool:
        """Whether other work left the clock alone, so that the speed-up can be told."""
        if self.spread is None:
            return all(one.p90_ms <= 2 * one.p10_ms for one in (self.before, self.after))
        return self.spread <= STEADY

    def to_json(self) -> dict[str, Any]:
        """Both measurements, the speed-up × and its spread."""
        before, after = self.before.to_json(), self.after.to_json()
        return {"before": before, "after": after, "speed_up": self.speed_up, "spread": self.spread}


STEADY = 0.1
"""Spread up to which a speed-up is told; of a machine that does nothing else it is 0.01 to 0.03."""

_SURE = 0.02  # spread at which a measurement ends early
_LEAST, _ENOUGH, _MOST = 6, 24, 120  # passes of each model: at first, that can be sure, in one try
_SOON, _LATE = 1.0, 4.0  # seconds after which fewer passes will do as well
_TRIES = 3


def measure_latency(
    run: nn.Module | Callable[..., object],
    inputs: Inputs,
    *,
    warmup: int = 5,
    repeats: int = 30,
    threads: int | None = None,
) -> Latency:
    """Time `run(inputs)`.

    Modules are timed in evaluation mode without gradients, and each submodule gets its own mode back.
    A GPU is waited for before the clock is read.

    Args:
        run: a module, or anything that can be called with the inputs.
        inputs: as for the module's `forward`, on its device; their batch is the batch that is timed.
        warmup: passes before the clock is first read.
        repeats: timed passes.
        threads: CPU threads for PyTorch while measuring; default: as PyTorch is set. A `Runner` keeps the
            number it was made with.
    Returns:
        the median, the spread and the conditions.
    Raises:
        SecateurError: `repeats` or `threads` is not positive, or `warmup` is negative.

    >>> latency = measure_latency(torch.nn.Linear(8, 2), torch.zeros(4, 8), repeats=3)
    >>> latency.batch, latency.repeats, latency.runtime, latency.p10_ms <= latency.median_ms
    (4, 3, 'pytorch', True)
    """
    return compare_latency({"run": run}, inputs, warmup=warmup, repeats=repeats, threads=threads)["run"]


def compare_latency(
    runs: Mapping[str, nn.Module | Callable[..., object]],
    inputs: Inputs,
    *,
    warmup: int = 5,
    repeats: int = 30,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time several models on the same inputs, in turn: A, B, B, A, A, B, …

    A machine that slows down or speeds up in the meantime does so for all of them alike, so their
    quotients can be trusted further than those of separate measurements.

    Args:
        runs: what to time, by name.
        inputs, warmup, repeats, threads: as for `measure_latency`.
    Returns:
        one measurement per name, in the same order.
    Raises:
        SecateurError: `repeats` or `threads` is not positive, or `warmup` is negative.
    """
    for name, value, least in (("warmup", warmup, 0), ("repeats", repeats, 1), ("threads", threads, 1)):
        if value is not None and value < least:
            raise SecateurError(f"latency: {name} is {value}; expected at least {least}.")
    with _clock(runs, inputs, threads) as clock:
        clock.take(warmup)
        return {name: clock.latency(name, times) for name, times in clock.take(repeats).items()}


def compare_pair(
    before: nn.Module | Callable[..., object],
    after: nn.Module | Callable[..., object],
    inputs: Inputs,
    *,
    threads: int | None = None,
) -> LatencyPair:
    """Time a dense and a pruned model in turn: see `compare_pairs`."""
    return compare_pairs(before, {"after": after}, inputs, threads=threads)["after"]


def compare_pairs(
    before: nn.Module | Callable[..., object],
    after: Mapping[str, nn.Module | Callable[..., object]],
    inputs: Inputs,
    *,
    threads: int | None = None,
) -> dict[str, LatencyPair]:
    """Time a dense model and what became of it in turn, for as long as it takes to be sure of the speed-ups.

    The passes fall into three parts, one after the other; a spread is how far the speed-ups of these are apart. More
    passes are added until all are small. A measurement that stays unsure is repeated, and the steadiest of three is
    returned: see `LatencyPair.steady`.

    Args:
        before: the dense model.
        after: pruned ones, by name.
        inputs, threads: as for `measure_latency`.
    Returns:
        a pair per name of `after`.
    """
    best: dict[str, LatencyPair] = {}
    with _clock(
        {"": before} | {f"after {name}": run for name, run in after.items()}, inputs, threads
    ) as clock:
        clock.take(2)
        for _ in range(_TRIES):
            pairs = _try(clock, tuple(after))
            if not best or _worst(pairs) < _worst(best):
                best = pairs
            if all(pair.steady for pair in best.values()):
                break
    return best


def _worst(pairs: Mapping[str, LatencyPair]) -> float:
    return max(pair.spread or 0.0 for pair in pairs.values())


def _try(clock: "_Clock", names: Sequence[str]) -> dict[str, LatencyPair]:
    started, times = time.perf_counter(), clock.take(_LEAST)
    while True:
        dense, count = times[""], len(times[""])
        spreads = [_spread(dense, times[f"after {name}"]) for name in names]
        seconds = time.perf_counter() - started
        sure = max(spreads) <= _SURE and (count >= _ENOUGH or seconds >= _SOON)
        if sure or count >= _MOST or seconds >= _LATE:
            return {
                name: LatencyPair(
                    clock.latency("", dense), clock.latency(f"after {name}", times[f"after {name}"]), spread
                )
                for name, spread in zip(names, spreads, strict=True)
            }
        for name, more in clock.take(count // 2).items():
            times[name] += more


def _spread(before: Sequence[float], after: Sequence[float]) -> float:
    thirds = zip(np.array_split(before, 3), np.array_split(after, 3), strict=True)
    quotients = [_low(a) / _low(b) for a, b in thirds]
    return (max(quotients) - min(quotients)) / 2 * _low(after) / _low(before)


def _low(times: Sequence[float] | npt.NDArray[np.float64]) -> float:
    return float(np.percentile(times, 10))


@dataclass(frozen=True)
class _Clock:
    """Models that are ready to be timed."""

    runs: Mapping[str, nn.Module | Callable[..., object]]
    inputs: Inputs
    device: torch.device
    threads: int
    rounds: Iterator[int] = field(default_factory=itertools.count)

    def take(self, rounds: int) -> dict[str, list[float]]:
        """Milliseconds of so many passes of each, in turn: A, B, B, A, …"""
        args, kwargs = as_call(self.inputs)
        found: dict[str, list[float]] = {name: [] for name in self.runs}
        order = list(self.runs.items())
        for i in itertools.islice(self.rounds, rounds):
            for name, run in order if i % 2 == 0 else reversed(order):
                wait_for(self.device)
                start = time.perf_counter_ns()
                run(*args, **kwargs)
                wait_for(self.device)
                found[name].append((time.perf_counter_ns() - start) / 1e6)
        return found

    def latency(self, name: str, times: list[float]) -> Latency:
        """What they come to, and under which conditions they were measured."""
        p10, median, p90 = (float(x) for x in np.percentile(times, (10, 50, 90)))
        run, batch = self.runs[name], batch_of(self.inputs)
        if isinstance(run, Runner) and not isinstance(run, nn.Module):
            used = run.threads, device_name("cpu"), run.runtime
        else:
            used = self.threads, device_name(self.device), "pytorch"
        return Latency(median, p10, p90, len(times), batch, *used)


@contextlib.contextmanager
def _clock(
    runs: Mapping[str, nn.Module | Callable[..., object]], inputs: Inputs, threads: int | None
) -> Iterator[_Clock]:
    """Modules in evaluation mode, without gradients."""
    leaves = pytree.tree_leaves(as_call(inputs))
    device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
    # not inference_mode: what a module caches under it could never again take part in training
    with contextlib.ExitStack() as stack:
        for run in runs.values():
            if isinstance(run, nn.Module):
                stack.enter_context(evaluating(run))
        stack.enter_context(_torch_threads(threads))
        stack.enter_context(torch.no_grad())
        yield _Clock(runs, inputs, device, torch.get_num_threads())


def device_name(device: torch.device | str) -> str:
    """The name of a GPU as people know it, or of a processor with its vector instructions: "AMD EPYC (AVX512)"."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; a processor that has none emulates it, ten times as slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(device.type != "cpu" or (check and check()))


def _processor() -> str:
    with contextlib.suppress(OSError):  # the file exists on Linux only
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
