"""What networks have computed so far of several batches, on the disk where it is too much for memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

MEMORY = 2 * 2**30
"""Bytes that stay in memory; what is beyond goes to files."""


class Held:
    """Values of batches, each taken out to be worked on and put back.

    Args:
        folder: for the files.

    Attributes:
        bytes: of the tensors that are held in memory now.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._kept: dict[int, tuple[list[Any], Any]] = {}
        self.bytes = 0

    def put(self, number: int, values: Any) -> None:
        """Hold a batch's values: any tree of tensors, with dicts of any keys."""
        leaves, structure = pytree.tree_flatten(values)
        size = size_of(leaves)
        if self.bytes + size > MEMORY:
            tensors = {str(i): x for i, x in enumerate(leaves) if isinstance(x, Tensor)}
            torch.save(tensors, self._folder / f"{number}.pt")
            leaves = [None if isinstance(x, Tensor) else x for x in leaves]
        else:
            self.bytes += size
        self._kept[number] = leaves, structure

    def take(self, number: int) -> Any:
        """Give a batch's values back; they are no longer held."""
        leaves, structure = self._kept.pop(number)
        path = self._folder / f"{number}.pt"
        if path.exists():
            for place, tensor in torch.load(path, weights_only=True).items():
                leaves[int(place)] = tensor
            path.unlink()
        else:
            self.bytes -= size_of(leaves)
        return pytree.tree_unflatten(leaves, structure)


def size_of(leaves: list[Any]) -> int:
    """Bytes of all storages that tensors of a list keep in memory."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in leaves if isinstance(x, Tensor)}
    return sum(storage.nbytes() for storage in storages.values())
