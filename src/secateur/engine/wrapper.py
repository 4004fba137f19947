"""Data parallelism that follows a cut: the wrapper stays the same object, so whoever holds it need not know."""

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def renew_wrapper(wrapped: nn.Module) -> None:
    """Let DistributedDataParallel look at its module afresh, in place: at its parameters and their sizes.

    Its reducer knows them from the start. It is made anew as it is when the wrapper is unpickled. Where no processes
    are connected any more, there is nothing to do.

    Args:
        wrapped: between two optimizer steps, in every process.
    """
    if not isinstance(wrapped, DistributedDataParallel) or not dist.is_initialized():
        return
    kept = {name: value for name, value in vars(wrapped).items() if name not in ("reducer", "logger")}
    wrapped.reducer = wrapped.logger = None  # type: ignore[assignment] # the old one takes its hooks off parameters
    wrapped.__setstate__(kept)  # type: ignore[no-untyped-call]
    for hook, state in wrapped._comm_hooks:
        dist._register_comm_hook(wrapped.reducer, state, hook)  # type: ignore[attr-defined]
