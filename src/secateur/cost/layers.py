"""What each layer takes of a forward pass, by the clock: its own time, and its multiply-adds."""

import contextlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur.cost.latency import wait_for
from secateur.graph.modes import evaluating


@dataclass(frozen=True)
class LayerTime:
    """One module of a model.

    Attributes:
        layer: its name; empty for the model itself.
        kind: its class.
        macs: multiply-adds of one image, of convolutions and linear layers; 0 for all else.
        ms: milliseconds of its own, without the modules that it calls: median over the passes.
    """

    layer: str
    kind: str
    macs: int
    ms: float


def time_layers(
    models: Mapping[str, nn.Module], images: Tensor, *, warmup: int = 2, passes: int = 10
) -> dict[str, list[LayerTime]]:
    """Time every module of several models on the same images, in turn, in eval mode and without gradients.

    Each module is waited for, so all of them together take longer than a pass that is timed as a whole.

    Args:
        models: by name, on the device of the images; only read.
        images: (n, c, h, w).
        warmup: passes before the clock is first read.
        passes: timed ones.
    Returns:
        per model its modules that were called, in the order of their first call.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    >>> [(row.layer, row.kind, row.macs) for row in time_layers({"a": model}, torch.zeros(2, 1, 8, 8))["a"]]
    [('', 'Sequential', 0), ('0', 'Conv2d', 1296), ('1', 'ReLU', 0)]
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        clocks = {}
        for name, model in models.items():
            stack.enter_context(evaluating(model))
            clocks[name] = stack.enter_context(_Clock(model, images.device))
        for i in range(warmup + passes):
            for name, model in models.items():
                clocks[name].begin_pass()
                model(images)
                if i >= warmup:
                    clocks[name].end_pass()
    return {name: clock.rows(len(images)) for name, clock in clocks.items()}


class _Clock:
    """Hooks on every module of a model, for as long as it is entered."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.modules, self.device = dict(model.named_modules()), device
        self.passes: list[dict[str, float]] = []
        self.begin_pass()

    def begin_pass(self) -> None:
        self.ms: dict[str, float] = {}
        self.macs: dict[str, int] = {}
        self.running: list[list[float]] = []  # when it began, and milliseconds of the modules that it called

    def end_pass(self) -> None:
        self.passes.append(self.ms)

    def __enter__(self) -> "_Clock":
        self.handles = []
        for name, module in self.modules.items():
            before, after = partial(self._before, name), partial(self._after, name)
            self.handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, name: str, *_: Any) -> None:
        self.ms.setdefault(name, 0.0)
        wait_for(self.device)
        self.running.append([time.perf_counter(), 0.0])

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        wait_for(self.device)
        started, inside = self.running.pop()
        spent = 1e3 * (time.perf_counter() - started)
        if self.running:
            self.running[-1][1] += spent
        self.ms[name] += spent - inside
        self.macs[name] = self.macs.get(name, 0) + _multiply_adds(module, args, output)

    def rows(self, images: int) -> list[LayerTime]:
        return [
            LayerTime(
                name,
                type(self.modules[name]).__name__,
                self.macs[name] // images,
                statistics.median(one.get(name, 0.0) for one in self.passes),
            )
            for name in self.ms
        ]


def _multiply_adds(module: nn.Module, args: Any, output: Any) -> int:
    """Of one call, for the whole batch."""
    if not isinstance(module, _ConvNd | nn.Linear) or not isinstance(output, Tensor):
        return 0
    places = args[0] if isinstance(module, _ConvTransposeNd) and args else output
    return int(places.numel() * module.weight[0].numel())
