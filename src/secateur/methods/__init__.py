"""One file per paper or classic: which units go, and when."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.cost import Budget
from secateur.errors import SecateurError, unknown
from secateur.graph import Inputs
from secateur.methods.oneshot import Pruned, oneshot
from secateur.methods.precrop import preconfig, precrop

__all__ = ["METHODS", "Method", "Pruned", "oneshot", "preconfig", "precrop", "prune"]


@dataclass(frozen=True)
class Method:
    """An entry of the table.

    Attributes:
        run: (model, inputs, budget, **options) -> Pruned.
        summary: one line for lists of choices.
    """

    run: Callable[..., Pruned]
    summary: str


METHODS = {
    "oneshot": Method(oneshot, "score every unit of the trained model once, remove the lowest"),
    "precrop": Method(precrop, "choose narrower widths before training, and draw fresh weights"),
    "preconfig": Method(preconfig, "choose other proportions before training; some layers grow"),
}


def prune(
    model: nn.Module, inputs: Inputs, *, budget: Budget, method: str = "oneshot", **options: Any
) -> Pruned:
    """Prune a copy of a model to a budget with one of the methods.

    Args:
        model: any vision network; it is only read.
        inputs: example inputs, such as torch.randn(1, 3, 224, 224).
        budget: what the result may cost at most.
        method: a name in `secateur.methods.METHODS`.
        options: of the method; see its docstring (`secateur.methods.oneshot`, …).
    Raises:
        SecateurError: unknown method; else what the method raises.
    """
    if method not in METHODS:
        raise SecateurError(unknown("method", method, METHODS))
    return METHODS[method].run(model, inputs, budget, **options)
