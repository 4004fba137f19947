"""What makes a run on several processes equal the same run on one.

Every process computes the loss of its slice, divided by the size of the whole batch; adding the gradients
over all processes then gives the gradient of the whole batch, whatever the sizes of the slices. What is
left is batch norm, whose statistics must also be those of the whole batch.
"""

import atexit
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def end_group_at_exit() -> None:
    """End the group of processes when this one ends: its threads may not outlive the interpreter.

    Without it a process that is done is now and then killed by its own group ("terminate called without an
    active exception"), and the launcher reports a failure after all work was done.
    """
    if dist.is_initialized():
        atexit.unregister(_end_group)
        atexit.register(_end_group)


def _end_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def share_weights(model: nn.Module) -> None:
    """Give all processes the weights and buffers of the first."""
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its sum over all processes. One message, whatever the number of tensors."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    totals = torch.split_with_sizes(flat, [g.numel() for g in gradients])
    for g, total in zip(gradients, totals, strict=True):
        g.copy_(total.view(g.shape))


class WholeBatchNorm(TorchFunctionMode):
    """While active, batch norm in training uses the statistics of the batch over all processes.

    Equals `torch.nn.SyncBatchNorm`, which exists only on GPUs and must replace modules of the user's
    model; this replaces the function, on any device, so it also covers layers derived from batch norm.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            func = _whole_batch_norm
        return func(*args, **(kwargs or {}))


def _whole_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    over = [0, *range(2, x.ndim)]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    here = x.new_tensor([x.numel() / x.shape[1]])
    sums = _AddOverProcesses.apply(torch.cat([x.sum(over), here]))
    n = sums[-1]
    mean = sums[:-1] / n
    centred = x - mean.view(shape)
    var = _AddOverProcesses.apply(centred.square().sum(over)) / n
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * n / (n - 1)).to(running_var.dtype), momentum)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    y = centred * scale.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    result: Tensor = y.to(input.dtype)
    return result


class _AddOverProcesses(torch.autograd.Function):
    """Sum over processes. Each process's loss depends on every addend, so gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total
