"""What one step of training costs: multiply-adds, memory and time, measured on the model itself."""

import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from secateur.cost.latency import device_name
from secateur.errors import SecateurError
from secateur.graph.duplicate import duplicate
from secateur.graph.modes import few_channels_planar

Holding = Callable[[nn.Module], AbstractContextManager[Any]]
"""model -> what its training runs in, such as `WeightPlan.holding`."""


@dataclass(frozen=True)
class TrainingCost:
    """One step of SGD with momentum on one batch.

    Attributes:
        macs: multiply-adds of forward and backward pass.
        peak_bytes: largest sum of all tensors alive at once: weights, gradients, momentum, activations, the batch. On
            a GPU what the allocator handed out at most; on a CPU without masks and the work space inside operators.
        seconds: median over the steps.
        extremes: seconds of the fastest and of the slowest step.
        batch: images.
        device: its name.
    """

    macs: int
    peak_bytes: int
    seconds: float
    extremes: tuple[float, float]
    batch: int
    device: str


def compare_training(
    models: Mapping[str, nn.Module],
    batch: tuple[Tensor, Tensor],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    holding: Mapping[str, Holding] | None = None,
    steps: int = 5,
    warmup: int = 2,
) -> dict[str, TrainingCost]:
    """Train copies of several models for a few steps and measure; timed steps go in turn: A, B, A, B, …

    Args:
        models: by name; only read. The copies train on their device, in their memory layout.
        batch: inputs and targets, on that device.
        loss: of (outputs, targets).
        holding: for masked models, by name, what holds their masks, such as `plan.holding`.
        steps: timed, of each.
        warmup: steps before, not timed; MACs and memory are taken from two more.
    Returns:
        by the same names.
    Raises:
        SecateurError: no step to time.
    """
    if steps < 1 or warmup < 1:
        raise SecateurError(f"training cost: steps {steps}, warmup {warmup}; expected at least 1 each")
    device, seconds = batch[0].device, {name: list[float]() for name in models}
    counted: dict[str, tuple[int, int]] = {}
    runs: dict[str, _Step] = {}
    held = {name: (holding or {}).get(name, nullcontext) for name in models}
    for name, model in models.items():
        present = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        step = _Step(duplicate(model).train(), batch, loss)
        with held[name](step.model), few_channels_planar(step.model):
            for _ in range(warmup):
                step()
            with FlopCounterMode(display=False, custom_mapping=RULES) as counter:
                step()
            counted[name] = counter.get_total_flops() // 2, _peak_bytes(step, present)
        runs[name] = step
    for _ in range(steps):
        for name, step in runs.items():
            # masks are held only while it is its turn: what holds them may see all optimizers
            with held[name](step.model), few_channels_planar(step.model):
                _wait(device)
                start = time.perf_counter()
                step()
                _wait(device)
                seconds[name].append(time.perf_counter() - start)
    return {
        name: TrainingCost(
            *counted[name],
            statistics.median(times),
            (min(times), max(times)),
            len(batch[0]),
            device_name(device),
        )
        for name, times in seconds.items()
    }


def _backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    w: Sequence[int],
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    wanted: Sequence[bool],
    **_: object,
) -> int:
    """Of a convolution's backward pass: each gradient costs as much as the forward pass."""
    return 2 * math.prod(x if transposed else grad) * math.prod(w[1:]) * sum(wanted[:2])


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
    """Of attention: scores, and their product with the values."""
    return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def _attention_backward_flops(
    grad: Sequence[int], q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object
) -> int:
    """Of its backward pass: the scores once more, then two gradients of each of the two products."""
    return 2 * math.prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])


RULES = {
    torch.ops.aten.convolution_backward: _backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Operators that PyTorch's own counter gets wrong: it takes the weights of grouped convolutions for whole ones, and
some versions miss fused attention on a CPU."""


class _Step:
    """A step of training, to be called again and again."""

    def __init__(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], loss: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> None:
        x, y = self.batch
        self.loss(self.model(x), y).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[Tensor]:
        """What is there between steps."""
        state = [t for own in self.optimizer.state.values() for t in own.values() if isinstance(t, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *state, *self.batch]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(step: _Step, present: int) -> int:
    """The most that is alive during a step; on a GPU without the bytes that other models hold."""
    device = step.batch[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        own = sum(t.nbytes for t in step.batch)
        return int(torch.cuda.max_memory_allocated(device)) - present + own
    with Alive(step.tensors()) as alive:
        step()
    peak: int = alive.peak
    return peak


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the context, counts the bytes of all tensors that operators return and that are still referenced.

    Args:
        present: tensors that exist already.
    Attributes:
        now: bytes alive.
        peak: the most there were.
    """

    def __init__(self, present: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: dict[int, Any] = {}
        for tensor in present:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result


def time_layers(model: nn.Module, x: Tensor, names: Iterable[str], *, repeats: int = 5) -> dict[str, float]:
    """Milliseconds that each layer takes in a forward pass, all its calls together; the median over the repeats.

    Args:
        model: only read, in evaluation mode.
        x: a batch.
        names: of modules; their times are for the whole batch.
        repeats: after one that is not timed.
    """
    began: dict[str, float] = {}
    took: dict[str, list[float]] = {name: [] for name in names}  # one sum per pass
    timed = duplicate(model).eval()  # hooks stay on the copy

    def before(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            _wait(x.device)
            began[name] = time.perf_counter()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            _wait(x.device)
            took[name][-1] += 1e3 * (time.perf_counter() - began[name])

        return hook

    for name in took:
        module = timed.get_submodule(name)
        module.register_forward_pre_hook(before(name))
        module.register_forward_hook(after(name))
    with torch.no_grad():
        for _ in range(repeats + 1):
            for values in took.values():
                values.append(0.0)
            timed(x)
    return {name: statistics.median(values[1:]) for name, values in took.items()}
