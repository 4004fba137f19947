"""Latency by the clock: the median of many forward passes, taken side by side when two are compared."""

import contextlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
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
    args, kwargs = as_call(inputs)
    device = next((x.device for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
    device = device or torch.device("cpu")

    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs.items())
    # not inference_mode: what a module caches under it could never again take part in training
    with contextlib.ExitStack() as stack:
        for run in runs.values():
            if isinstance(run, nn.Module):
                stack.enter_context(evaluating(run))
        stack.enter_context(_torch_threads(threads))
        stack.enter_context(torch.no_grad())
        for i in range(warmup + repeats):
            for name, run in order if i % 2 == 0 else reversed(order):
                wait_for(device)
                start = time.perf_counter_ns()
                run(*args, **kwargs)
                wait_for(device)
                if i >= warmup:
                    milliseconds[name].append((time.perf_counter_ns() - start) / 1e6)
        torch_threads = torch.get_num_threads()

    def latency(name: str) -> Latency:
        p10, median, p90 = (float(x) for x in np.percentile(milliseconds[name], (10, 50, 90)))
        run = runs[name]
        if isinstance(run, Runner) and not isinstance(run, nn.Module):
            used_threads, used_device, runtime = run.threads, device_name("cpu"), run.runtime
        else:
            used_threads, used_device, runtime = torch_threads, device_name(device), "pytorch"
        return Latency(median, p10, p90, repeats, batch_of(inputs), used_threads, used_device, runtime)

    return {name: latency(name) for name in runs}


def device_name(device: torch.device | str) -> str:
    """The name of a processor or GPU as people know it, for example "NVIDIA H100" or "AMD EPYC 9654"."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
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
