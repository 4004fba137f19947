"""Bool tensors as bits."""

import math

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as bits, eight to a byte, the first in the lowest.

    >>> pack(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What `pack` was given.

    Raises:
        ValueError: too few or too many bytes for the shape.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),) or min(shape, default=1) < 0:
        raise ValueError(f"{packed.dtype} {tuple(packed.shape)} for a mask of shape {shape}")
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten()[:count].bool().view(shape)
