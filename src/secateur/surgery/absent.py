"""What stands where a cut left out a residual branch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.graph import Graph, named_tensors
from secateur.graph.branches import Branch, path_of
from secateur.graph.modes import evaluating
from secateur.graph.probe import random_inputs
from secateur.surgery.edit import Edit


class Absent(nn.Module):
    """Takes the place of a block that was left out, or of a part of one: gives back what it is given.

    Args:
        copies: whether it gives back a copy, since something writes to it.
    """

    def __init__(self, *, copies: bool = False) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """Its first argument."""
        return x.clone() if self.copies else x

    def extra_repr(self) -> str:
        return "copies=True" if self.copies else ""


def leave_out(edit: Edit, model: nn.Module, graph: Graph, skipped: Sequence[Branch]) -> list[Tensor]:
    """Put an `Absent` in the place of all modules that belong to these branches alone.

    A module of which nothing else is left goes as a whole. Everywhere else the module around it has to be rewritten.

    Args:
        edit: gets the changes.
        model: before the cut.
        graph: of it.
        skipped: branches that are left out.
    Returns:
        other tensors that only the branches read.
    """
    whole = whole_blocks(model, graph, skipped) if skipped else {}
    parts = {part: True for branch in skipped for part in branch.parts}  # a forward may write to what it gets
    for name, copies in outermost(parts | whole).items():
        replace_(edit, model, name, Absent(copies=copies).train(model.get_submodule(name).training))
    names = [*whole, *parts]
    own = dict(named_tensors(model))
    return [
        own[tensor]
        for branch in skipped
        for tensor in branch.tensors
        if own[tensor].ndim and not any(tensor.startswith(f"{name}.") for name in names)
    ]


def replace_(edit: Edit, model: nn.Module, name: str, new: nn.Module) -> None:
    """Put another module in the place of one, under all of its names."""
    old = model.get_submodule(name)
    for module in model.modules():
        for key, child in module._modules.items():
            if child is old:
                edit.entry(module._modules, key, new)


def outermost(copies: dict[str, bool]) -> dict[str, bool]:
    """Those modules that are in none of the others."""
    return {
        name: value
        for name, value in copies.items()
        if not any(name != other and name.startswith(f"{other}.") for other in copies)
    }


def whole_blocks(model: nn.Module, graph: Graph, skipped: Sequence[Branch]) -> dict[str, bool]:
    """Modules that only give back their first argument without these branches -> whether it must be a copy."""
    assert graph.trace is not None
    gone = {step for branch in skipped for step in branch.steps} | {branch.sum for branch in skipped}
    left: set[str] = set()
    for node in graph.trace.captured.module.graph.nodes:
        if node.op == "call_function" and node.name not in gone:
            left.update(path_of(node))
    able = {
        branch.module: branch.written for branch in skipped if branch.module and branch.module not in left
    }
    seen: dict[str, list[bool]] = {name: [] for name in able}
    handles = []
    for name in able:

        def look(_: nn.Module, args: object, output: object, to: list[bool] = seen[name]) -> None:
            first = args[0] if isinstance(args, tuple) and args else None
            to.append(
                isinstance(first, Tensor) and isinstance(output, Tensor) and first.shape == output.shape
            )

        handles.append(model.get_submodule(name).register_forward_hook(look))
    try:
        args, kwargs = random_inputs(graph, next(model.parameters()).dtype, seed=0)
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: copies for name, copies in able.items() if seen[name] == [True]}
