"""Which positions of a model's tensors a plan's masks remove, and which they keep.

`Survivors` (trace.py) says the same of every value of the captured graph; here it is the tensors as they are now.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from secateur.graph.groups import Graph, named_tensors
from secateur.graph.labels import Atoms
from secateur.graph.modules import Keep


def removed_positions(graph: Graph, masks: Sequence[Tensor]) -> dict[tuple[str, int], Atoms]:
    """(tensor name, dim) -> sorted positions that go, for every dim that loses some.

    Args:
        graph: of the model.
        masks: (units,) bool per group, True = keep.
    """
    parts: dict[tuple[str, int], list[Atoms]] = {}
    for group, mask in zip(graph.groups, masks, strict=True):
        if mask.all() or group.branch:  # what a branch is made of goes as a whole
            continue
        removed = ~mask.cpu().numpy()
        for member in group.members:
            parts.setdefault((member.tensor, member.dim), []).append(member.index[removed].ravel())
    return {key: np.sort(np.concatenate(found)) for key, found in parts.items()}


def kept_positions(model: nn.Module, graph: Graph, masks: Sequence[Tensor]) -> dict[tuple[str, int], Keep]:
    """(tensor name, dim) -> mask over its positions, True = keep, for every dim that loses some.

    Args:
        model: the graph's; it gives the sizes.
        graph: of the model.
        masks: (units,) bool per group, True = keep.
    """
    shapes = {name: tensor.shape for name, tensor in named_tensors(model)}
    keep: dict[tuple[str, int], Keep] = {}
    for (name, dim), removed in removed_positions(graph, masks).items():
        keep[name, dim] = np.ones(shapes[name][dim], dtype=bool)
        keep[name, dim][removed] = False
    return keep
