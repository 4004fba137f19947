"""A method with its settings: when it prunes, what it removes, and all its options, in one frozen dataclass.

    @settings
    class Nearest(Method):
        name, summary = "nearest", "remove what is nearest to zero"
        share: float = option("share of the units that are looked at", default=0.5, above=0, most=1)

        def prune(self, model, inputs, budget, context): ...

Its fields are its options; see `secateur.settings`. Everything that evolves lives elsewhere: methods that prune a model
while it trains keep it in a `Session`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

from torch import Tensor, nn

from secateur.cost import Budget
from secateur.cost.prices import Prices
from secateur.engine.pruned import Pruned
from secateur.errors import ScoreError, SecateurError, unknown
from secateur.graph import Graph, Inputs, analyze
from secateur.graph.capture import batch_of
from secateur.plan import WeightPlan
from secateur.settings import option, options_of, plain, settings

When: TypeAlias = Literal["before", "during", "after"]
Removes: TypeAlias = Literal["channels", "weights", "filters"]
Batch: TypeAlias = tuple[Any, Any]
"""(inputs, targets), each a tensor or tensors in tuples, lists and dicts."""

Progress: TypeAlias = Callable[[int, int], None]
"""Is told how much is done, of how much: in thousandths of the whole, or in passes."""


GRANULARITY_HELP = "what a unit is: channels, whole residual branches (blocks), or both in one budget"


class Meter:
    """Tells a `Progress` how far a piece of work has got, from its start to its end.

    Args:
        progress: is told; None: nobody is.
        total: of the work, in any unit that is proportional to time; may be set later, when it is known.
    """

    def __init__(self, progress: Progress | None, total: float = math.inf) -> None:
        self.total = total
        self._progress, self._done, self._told = progress, 0.0, -1
        self.add(0.0)

    def add(self, work: float) -> None:
        """So much more is done."""
        self._done += work
        self._tell(min(999, int(1000 * self._done / max(self.total, 1e-12))))

    def each(self, work: float) -> Callable[[], None]:
        """What is called once for every piece of so much work."""
        return lambda: self.add(work)

    def end(self) -> None:
        """All is done."""
        self._tell(1000)

    def _tell(self, done: int) -> None:
        if self._progress and done > self._told:
            self._told = done
            self._progress(done, 1000)


@dataclass(frozen=True)
class Context:
    """What a method may use besides the model.

    Attributes:
        data: batches of (inputs, targets), or of inputs where no targets are needed; None: there are none. Inputs are
            what `analyze` takes, a dict of keyword arguments among them; a batch that is a dict is its own targets.
        loss: of (outputs, targets), a mean over the batch; outputs are what the model returns.
        cache: a folder for measurements that serve several budgets, or the file for them; None: they are not kept.
        progress: is told how far a long measurement has got.
        previous: masks of an earlier round: what is gone stays gone.
        graph: of the model, if it is known already.
        prove: whether the cut is proven; a trial need not be, if what comes of it is cut again.
        prices: what widths and blocks cost in milliseconds, for methods that choose by them; the budget is then of
            `latency_ms`, as these prices tell it.
    """

    data: Iterable[Batch | Inputs] | None = None
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy
    cache: Path | None = None
    progress: Progress | None = None
    previous: WeightPlan | None = None
    graph: Graph | None = None
    prove: bool = True
    prices: Prices | None = None


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
    when: ClassVar[When] = "after"
    removes: ClassVar[Removes] = "channels"

    freeze: tuple[str, ...] = option(
        "modules, or patterns such as 'layer4.*', that no cut may touch", default=()
    )
    scope: tuple[str, ...] = option(
        "modules that are pruned, the rest left as it is; none: all that can be captured", default=()
    )

    @property
    def needs_data(self) -> bool:
        """Whether it chooses on labelled images."""
        return False

    def analyze(self, model: nn.Module, inputs: Inputs) -> Graph:
        """What may be cut together in a model, under the options of the method."""
        how = {name: getattr(self, name) for name in ("attention", "granularity") if hasattr(self, name)}
        return analyze(model, inputs, freeze=self.freeze, scope=self.scope, **how)

    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> Pruned:
        """Prune a copy of a model to a budget.

        Args:
            model: only read.
            inputs: example inputs.
            budget: what the result may cost at most.
            context: what else there is to use.
        """
        raise NotImplementedError

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


def pairs_of(data: Iterable[Batch | Inputs]) -> Iterator[Batch]:
    """The batches, one by one, as (inputs, targets); a dict is both.

    Raises:
        ScoreError: one has no targets.
    """
    for batch in data:
        if isinstance(batch, Mapping):
            yield batch, batch
        elif isinstance(batch, Tensor) or len(batch) != 2:
            raise ScoreError("data has batches without targets; pass batches of (inputs, targets)")
        else:
            yield batch[0], batch[1]


def images_of(data: Iterable[Batch | Inputs]) -> list[Inputs]:
    """The inputs of each batch, whether it has targets or not.

    Raises:
        ScoreError: there is no batch, or fewer than two images in all.
    """
    found = [batch[0] if isinstance(batch, tuple | list) else batch for batch in data]
    images = sum(batch_of(x) for x in found)
    if images < 2:
        raise ScoreError(f"data has {images} images to measure on; pass at least 2, better some hundred")
    return found
