"""Networks that choose (top-k, arguments of maxima, sorting, thresholds), compared with the same choices.

Between candidates that are almost equal, rounding decides, and what follows a choice may be anything. So where few
digits are compared, the second run takes the choices of the first, as long as it chooses between the same candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

VALUED = frozenset("topk sort max min median nanmedian kthvalue mode cummax cummin".split())
"""Operators that return indices along a dim, and the values there."""


@dataclass(eq=False)
class Choice:
    """One call of an operator that chooses.

    Attributes:
        operator: such as aten.topk.default.
        candidates: the floating-point tensors that it read.
        chosen: the integers or bools that it returned.
    """

    operator: Any
    candidates: list[Tensor]
    chosen: list[Tensor]


@dataclass
class Choices:
    """What one run chose, and where another run, made to choose the same, would not have.

    Attributes:
        made: by the first run.
        apart: largest difference between the candidates of both runs, relative to the largest candidate.
        overruled: names of the operators that chose something else in the second run.
    """

    made: list[Choice] = field(default_factory=list)
    apart: float = 0.0
    overruled: dict[str, None] = field(default_factory=dict)

    def recorded(self) -> TorchDispatchMode:
        """Inside this context, choices are noted, and those before are forgotten."""
        self.made.clear()
        return _Watch(self.made.append)

    def repeated(self, tolerance: float) -> TorchDispatchMode:
        """Inside this context, a choice is the one noted between the same candidates, up to a relative difference."""
        left = list(self.made)

        def repeat(choice: Choice) -> list[Tensor] | None:
            known = [(_apart(one, choice), one) for one in left if _alike(one, choice)]
            if not known:  # worked out once and then kept, such as a mask; the outputs tell
                return None
            near = (pair for pair in known if pair[0] <= tolerance)
            distance, same = next(near, min(known, key=lambda pair: pair[0]))
            left.remove(same)
            self.apart = max(self.apart, distance)
            if all(torch.equal(a, b) for a, b in zip(same.chosen, choice.chosen, strict=True)):
                return None
            self.overruled[choice.operator._schema.name.rpartition("::")[2]] = None
            return same.chosen

        return _Watch(repeat)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every choice to a function, which may return what is to be chosen instead."""

    def __init__(self, seen: Callable[[Choice], list[Tensor] | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = [x for x in pytree.tree_leaves((args, kwargs)) if _is_float(x)]
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        chosen = [x for x in made if not _is_float(x)]
        valued = func._schema.name.rpartition("::")[2] in VALUED
        if not read or not chosen or func._schema.is_mutable or (len(chosen) < len(made) and not valued):
            return result
        candidates = [x.clone() for x in read]
        instead = self._seen(Choice(func, candidates, [x.clone() for x in chosen]))
        if instead is None:
            return result
        if isinstance(result, Tensor):
            return instead[0]
        if not valued:
            return pytree.tree_map(lambda x: instead.pop(0) if isinstance(x, Tensor) else x, result)
        names = [argument.name for argument in func._schema.arguments]
        dim = (dict(zip(names, args, strict=False)) | kwargs).get("dim", -1)
        values, index = result[0], instead[0]
        along = index if index.ndim == read[0].ndim else index.unsqueeze(dim)
        return read[0].gather(dim, along).reshape(values.shape), index


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _alike(one: Choice, other: Choice) -> bool:
    def shapes(tensors: list[Tensor]) -> list[torch.Size]:
        return [t.shape for t in tensors]

    return (
        one.operator is other.operator
        and shapes(one.candidates) == shapes(other.candidates)
        and shapes(one.chosen) == shapes(other.chosen)
    )


def _apart(one: Choice, other: Choice) -> float:
    """The largest relative difference between the candidates of two choices; infinite ones must be the same."""
    worst = 0.0
    for a, b in zip(one.candidates, other.candidates, strict=True):
        if not a.numel():
            continue
        error = torch.where(a == b, 0.0, (a - b).abs()).max().item()
        scale = torch.where(a.isfinite(), a.abs(), 0.0).max().item()
        relative = error / scale if scale else error
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst
