"""Calls of submodules, seen while a forward is captured.

Two operators of our own stand in the captured graph around every call: one that names its inputs, and one through
which its outputs go. So the graph says which operators are exactly one call, and who reads what that call returned,
also of a submodule that runs no operator in evaluation mode.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.rewriting.program import ANYTHING, Made, Ref, entries_of

CALLED, RETURNED = "secateur.called.default", "secateur.returned.default"
"""The two operators, as a captured graph names them."""


LITERALS = (bool, int, float)
"""What a call may be given besides tensors; no text, since a program may come from a file that nobody vouches for."""


@dataclass(frozen=True)
class Site:
    """One call of a submodule, as the forward around it makes it.

    Attributes:
        module: name of the submodule.
        args, kwargs: with `Ref` in place of each tensor; they count the tensors of the call.
        output: what it returned, likewise.
    """

    module: str
    args: Any
    kwargs: Any
    output: Any


@functools.cache
def _marks() -> tuple[torch.library.Library, Callable[..., Tensor], Callable[..., list[Tensor]]]:
    """The two operators: (tensors, number of the call) -> a token; (tensors, token, number) -> the same tensors."""
    library: Any = torch.library.Library("secateur", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define("called(Tensor[] ins, int site) -> Tensor")
    library.define("returned(Tensor[] outs, Tensor token, int site) -> Tensor[]")

    def called(ins: Sequence[Tensor], site: int) -> Tensor:
        return torch.empty(0)

    def returned(outs: Sequence[Tensor], token: Tensor, site: int) -> list[Tensor]:
        return [t.detach() for t in outs]

    for name, function in (("called", called), ("returned", returned)):
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"secateur::{name}", function, lib=library)
    return library, torch.ops.secateur.called.default, torch.ops.secateur.returned.default


class Sites(list[Site]):
    """The calls that were marked, by their number.

    Attributes:
        passed: names of submodules whose calls were not, so that what they call was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[str] = []


@contextmanager
def marked(model: nn.Module, apart: Collection[str] | None) -> Iterator[Sites]:
    """Inside the block, while a graph is captured, calls of submodules are marked, and not what runs in them.

    Args:
        model: whose graph is captured.
        apart: submodules whose calls are not marked, but those that they make; None: none is.
    """
    _, called, returned = _marks()
    sites = Sites()
    stack: list[
        tuple[int, Tensor] | str | None
    ] = []  # a marked call, the name of one that is not, one inside a call

    def before(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not name:
            stack.clear()  # an earlier try may have failed half-way
        elif any(not isinstance(entry, str) for entry in stack):
            stack.append(None)
        else:
            tensors: list[Tensor] = []
            given = strip(args, tensors), strip(kwargs, tensors)
            if apart is None or name in apart or not is_plain(given):
                sites.passed.append(name)
                stack.append(name)
            else:
                stack.append((len(sites), called(tensors, len(sites))))
                sites.append(Site(name, *given, None))

    def after(name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        entry = stack.pop()
        if not isinstance(entry, tuple):
            return output
        number, token = entry
        tensors: list[Tensor] = []
        sites[number] = replace(sites[number], output=strip(output, tensors))
        through = returned(tensors, token, number)
        return replaced(output, {id(t): new for t, new in zip(tensors, through, strict=True)})

    handles = []
    try:
        for name, module in model.named_modules():
            first = functools.partial(before, name)
            handles.append(module.register_forward_pre_hook(first, prepend=True, with_kwargs=True))
            if name:
                last = functools.partial(after, name)
                handles.append(module.register_forward_hook(last, with_kwargs=True))
        yield sites
    finally:
        for handle in handles:
            handle.remove()


def is_plain(given: Any) -> bool:
    """Whether arguments can be written down: tensors and numbers, in plain containers."""
    return all(leaf is None or isinstance(leaf, (Ref, *LITERALS)) for _, leaf in leaves_of(given))


def strip(tree: Any, leaves: list[Tensor]) -> Any:
    """A tree of dicts, lists, tuples and dataclasses with `Ref` in place of each tensor; the tensors go to `leaves`."""
    if isinstance(tree, Tensor):
        known = next((i for i, leaf in enumerate(leaves) if leaf is tree), len(leaves))
        if known == len(leaves):
            leaves.append(tree)
        return Ref(known)
    if type(tree) is dict and all(isinstance(name, str) for name in tree):
        return {name: strip(part, leaves) for name, part in tree.items()}
    if isinstance(tree, torch.Size):
        return tuple(tree)
    if type(tree) in (list, tuple):
        return type(tree)(strip(part, leaves) for part in tree)
    entries = entries_in(tree)
    if entries is not None:
        parts = {name: strip(part, leaves) for name, part in entries.items()}
        return Made(type(tree), parts) if any(isinstance(x, Ref) for _, x in leaves_of(parts)) else ANYTHING
    return tree if tree is None or isinstance(tree, bool | int | float | str) else ANYTHING


def entries_in(tree: Any) -> dict[str, Any] | None:
    """The entries of an object that can be made again from them; None: it cannot."""
    cls = type(tree)
    if is_dataclass(cls):
        if not all(field.init for field in fields(cls)):
            return None
        found = {name: getattr(tree, name) for name in entries_of(cls)}
        # such as ModelOutput, which has only those of its entries that are not None
        return {n: x for n, x in found.items() if not isinstance(tree, Mapping) or n in tree}
    if issubclass(cls, tuple) and entries_of(cls):
        return dict(zip(entries_of(cls), tree, strict=True))
    return dict(tree) if cls is OrderedDict and all(isinstance(name, str) for name in tree) else None


def replaced(tree: Any, tensors: Mapping[int, Tensor]) -> Any:
    """The same tree with other tensors in the place of some, by identity."""
    if isinstance(tree, Tensor):
        return tensors.get(id(tree), tree)
    if type(tree) is dict:
        return {name: replaced(part, tensors) for name, part in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(replaced(part, tensors) for part in tree)
    entries = entries_in(tree)
    if entries is None:
        return tree
    return Made(type(tree), entries)({name: replaced(part, tensors) for name, part in entries.items()})


def leaves_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf of a stripped tree, with the keys that lead to it."""
    parts: Any = ()
    if isinstance(tree, Made | dict):
        parts = (tree.entries if isinstance(tree, Made) else tree).items()
    elif isinstance(tree, list | tuple):
        parts = enumerate(tree)
    else:
        yield path, tree
    for key, part in parts:
        yield from leaves_of(part, (*path, key))
