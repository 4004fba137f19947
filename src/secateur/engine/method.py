"""A method with its settings: when it prunes, what it removes, and all its options, in one frozen dataclass.

    @settings
    class Nearest(Method):
        name, summary = "nearest", "remove what is nearest to zero"
        share: float = option(0.5, "share of the units that are looked at", above=0, most=1)

        def prune(self, model, inputs, budget, context): ...

Its fields are its options; see `secateur.settings`. Everything that evolves lives elsewhere: methods that prune a model
while it trains keep it in a `Session`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

from torch import Tensor, nn

from secateur.cost import Budget
from secateur.engine.pruned import Pruned
from secateur.errors import ScoreError, SecateurError, unknown
from secateur.graph import Inputs
from secateur.settings import option, options_of, plain, settings

Batch: TypeAlias = tuple[Tensor, Tensor]
Progress: TypeAlias = Callable[[int, int], None]
"""Is told how many passes are done, of how many."""


@dataclass(frozen=True)
class Context:
    """What a method may use besides the model.

    Attributes:
        data: batches of (inputs, targets); None: there are none.
        loss: of (outputs, targets), a mean over the batch.
        cache: a folder for measurements that serve several budgets, or the file for them; None: they are not kept.
        progress: is told how far a long measurement has got.
    """

    data: Iterable[Batch] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    cache: Path | None = None
    progress: Progress | None = None


@settings
class Method:
    """Base class of all methods.

    Attributes:
        name: in tables and on the command line.
        summary: one line for lists of choices.
        when: whether it prunes a trained model, one that is being trained, or one that is yet to be.
        removes: "channels", which are cut; or "weights" or "filters", which become zeros.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    when: ClassVar[Literal["before", "during", "after"]] = "after"
    removes: ClassVar[Literal["channels", "weights", "filters"]] = "channels"

    freeze: tuple[str, ...] = option((), "modules, or patterns such as 'layer4.*', that no cut may touch")

    @property
    def needs_data(self) -> bool:
        """Whether it chooses on labelled images."""
        return False

    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> Pruned:
        """Prune a copy of a model to a budget.

        Args:
            model: only read.
            inputs: example inputs.
            budget: what the result may cost at most.
            context: what else there is to use.
        """
        raise NotImplementedError

    def require_data(self, context: Context) -> list[Batch]:
        """The batches to choose on.

        Raises:
            ScoreError: there are none.
        """
        if context.data is None:
            raise ScoreError(
                f"method {self.name!r} needs data with these options: pass data=, an iterable of (inputs, targets)"
            )
        return list(context.data)

    def record(self) -> dict[str, Any]:
        """The method and its options as plain JSON: what plans, reports and run folders say."""
        return {"method": self.name, **plain(self)}

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The method with some options set, as in a recipe; `a.b` is option b of the settings in option a.

        Raises:
            SecateurError: there is no such option, or it does not take the value.
        """
        nested: dict[str, Any] = {}
        able = options_of(cls)
        for name, value in options.items():
            first, _, rest = name.partition(".")
            if first not in able:
                raise SecateurError(f"method {cls.name}: {unknown('option', first, able)}")
            if rest:
                inner = nested.setdefault(first, {})
                if not isinstance(inner, dict):
                    inner = nested[first] = {}
                inner[rest] = value
            else:
                nested[name] = value
        return cls(**nested)
