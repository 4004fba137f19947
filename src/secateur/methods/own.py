"""A function of the user's own as a method."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from secateur.cost import Budget, Cost
from secateur.engine.describe import layer_facts
from secateur.engine.method import Context, Method
from secateur.engine.pruned import Pruned
from secateur.errors import SecateurError, unknown
from secateur.graph import Graph, Inputs, analyze
from secateur.graph.duplicate import duplicate
from secateur.settings import option, plain, settings


@settings
class Own(Method):
    """A function that prunes a trained model: (model, inputs, budget, *, options by name) -> the smaller model, or a
    `Pruned`.

    It gets a copy of the model, which it may change; and `data`, batches of (inputs, targets), `freeze` and `scope`, if
    it has such parameters. Its options are its other keyword parameters.
    """

    name: ClassVar[str] = "own"
    summary: ClassVar[str] = "your own"

    function: Callable[..., Any] = option("function to call")
    options: Mapping[str, Any] = option("what it is called with besides", default={})

    def check(self) -> None:
        able = set(self._parameters) - {"data", *self._common}
        for name in self.options:
            if name not in able:
                raise SecateurError(f"method {self.title}: {unknown('option', name, able)}")
        for name, value in self._common.items():
            if value and name not in self._parameters:
                raise SecateurError(f"method {self.title} takes no {name}")

    @property
    def title(self) -> str:
        """`module:function`."""
        return str(plain(self.function))

    @property
    def needs_data(self) -> bool:
        return "data" in self._parameters

    @property
    def _common(self) -> dict[str, tuple[str, ...]]:
        """The options of every method."""
        return {"freeze": self.freeze, "scope": self.scope}

    @property
    def _parameters(self) -> list[str]:
        """Its parameters after model, inputs and budget: all that is known of a function of somebody else's."""
        return list(inspect.signature(self.function).parameters)[3:]

    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> Pruned:
        given = dict(self.options)
        if self.needs_data:
            given["data"] = context.data
        given |= {name: value for name, value in self._common.items() if name in self._parameters}
        result = self.function(duplicate(model), inputs, budget, **given)
        if isinstance(result, Pruned):
            return result
        if not isinstance(result, nn.Module):
            raise SecateurError(
                f"method {self.title}: got {type(result).__name__}, expected the smaller model, a torch.nn.Module, or "
                f"a secateur Pruned. Return one of them."
            )
        graph = analyze(model, inputs)
        facts = layer_facts(graph, model, result)
        return Pruned(result, None, graph, (), None, *count_costs(graph, result), facts=facts)

    def record(self) -> dict[str, Any]:
        return {
            "method": self.title,
            **dict(plain(self.options)),
            "freeze": list(self.freeze),
            "scope": list(self.scope),
        }


def count_costs(graph: Graph, small: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Cost by measure of a model and of what was made of it without a plan; zeros do not count as parameters.

    Args:
        graph: of the original.
        small: what was made of it.
    """
    after = Cost(analyze(small, graph.inputs)).all()
    after["params"] -= sum(int((p == 0).sum()) for p in small.parameters() if p.ndim > 1)
    return Cost(graph).all(), after
