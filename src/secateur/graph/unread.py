"""Parameters that the forward pass does not read, but another way through their module does.

The token that stands for a masked patch, or the embedding of the objects that a detector learns to denoise, is read
only where the model is given a mask, or targets. Whatever reads it then meets it with tensors of the module it
belongs to: with those that are as wide. It follows these, and where there are several widths of that size, they
lose the same positions, or none if one of them stays.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from secateur.graph.labels import Atoms, Labels, Value, support
from secateur.graph.operators import module_of

Values = Mapping[fx.Node, Any]


def follow(model: nn.Module, aside: Sequence[str], passes: Sequence[Values], labels: Labels) -> set[str]:
    """Tie parameters that nothing reads, or only as a whole, to the widths that they are made for.

    Args:
        aside: parameters that the evaluation pass does not read.
        passes: what every node holds, of each pass that was captured.
    Returns:
        names of the parameters that follow.
    """
    tensors = {name: p for name, p in model.named_parameters() if name in aside and p.numel() > 1}
    seen: dict[str, list[Value]] = {}
    found = set()
    for name in untouched(labels, tensors):
        owner = around(model, name, passes)
        if owner not in seen:
            seen[owner] = list(values_in(owner, passes))
        for dim, from_end in widths(model, name):
            size = tensors[name].shape[dim]
            partners = [atoms for value in seen[owner] for atoms in lines(value, from_end, size)]
            if partners:
                own = labels.tensor_axis(name, dim, size, "other")
                for atoms in partners:
                    labels.tie(own, atoms)
                found.add(name)
    return found


def untouched(labels: Labels, parameters: Iterable[str]) -> list[str]:
    """Those of these parameters that no operator reads, or only as a whole, such as their sum."""
    touched = np.zeros(labels.count, dtype=bool)
    for item in (*labels.ties, *(option.ties for a in labels.alternatives for option in a.options)):
        touched[item[0]] = touched[item[1]] = True
    for atoms in (*labels.units, *(pin.atoms for pin in labels.pins)):
        touched[atoms] = True
    for contraction in labels.contractions:
        for atoms in contraction.axes:
            touched[atoms] = True
    used = {name for (name, _), atoms in labels.tensors.items() if touched[atoms].any()}
    return [name for name in parameters if name not in used]


def around(model: nn.Module, name: str, passes: Sequence[Values]) -> str:
    """The innermost module around a parameter in whose forward, its submodules included, anything runs."""
    running = {module_of(node) for values in passes for node in values if node.op == "call_function"}
    owner = name.rpartition(".")[0]
    while owner and not any(f"{module}.".startswith(f"{owner}.") for module in running):
        owner = owner.rpartition(".")[0]
    return owner


def values_in(owner: str, passes: Sequence[Values]) -> Iterator[Value]:
    """What a module's own forward reads: tensors that go into its operators, or from one submodule to another."""

    def place(node: fx.Node) -> str | None:
        """The submodule that an operator runs in, "" for the module's own; None: outside."""
        module = module_of(node)
        if owner and not f"{module}.".startswith(f"{owner}."):
            return None
        return module.removeprefix(owner).removeprefix(".").partition(".")[0]

    for values in passes:
        for node, value in values.items():
            for user in node.users if isinstance(value, Value) and value.tensor is None else ():
                there = place(user) if user.op == "call_function" else None
                if there is not None and (not there or there != place(node)):
                    yield value
                    break


def widths(model: nn.Module, name: str) -> Iterator[tuple[int, int]]:
    """The dims of a parameter that may meet a width, and which dim of other tensors they would meet.

    Rows of a table are no width. A layer meets the channels; any other parameter is aligned from the last dim.
    """
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    rank = module.get_parameter(last).ndim
    if isinstance(module, nn.Embedding):
        yield 1, -1
    elif isinstance(module, nn.Linear | _ConvNd | _NormBase):
        channels = -1 if isinstance(module, nn.Linear) else 1
        yield from ((dim, channels) for dim in range(min(rank, 2)))
    else:
        yield from ((dim, dim - rank) for dim in range(rank))


def lines(value: Value, dim: int, size: int) -> Iterator[Atoms]:
    """The labels along one dim of a tensor, if it is as long."""
    rank = len(value.shape)
    if not -rank <= dim < rank or value.shape[dim] != size or size < 2:
        return
    for factor in value.factors:
        if support(factor) == {dim % rank}:
            yield factor.ravel()
