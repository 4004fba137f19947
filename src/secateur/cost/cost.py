"""What a model costs at any widths, in every measure that follows from them."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from secateur.cost.budget import Budget
from secateur.cost.formulas import Formula, Sum
from secateur.errors import BudgetError
from secateur.graph import Graph
from secateur.measures import closed, measure_named
from secateur.settings import checked

Kept: TypeAlias = Tensor | Sequence[int]
"""Units kept of every group, in the order of `graph.groups`; a float tensor may hold soft counts."""


class Cost:
    """The measures of a model as functions of the units kept.

    One formula serves the dense, the masked and the cut model, and its gradient serves methods that learn what to
    keep.

    >>> from torch import nn
    >>> from secateur.graph import analyze
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False))
    >>> cost = Cost(analyze(model, torch.zeros(1, 3, 8, 8)))
    >>> cost.all([4])
    {'macs': 6768, 'params': 288, 'units': 4, 'activations': 1344}
    >>> cost.of("macs"), cost.macs([4])
    (13536, 6768)
    """

    @checked(BudgetError)
    def __init__(self, graph: Graph, further: Mapping[str, Sum] | None = None) -> None:
        """Further measures may be given by name."""
        self.graph = graph
        self.full = [group.units for group in graph.groups]
        self._formulas: dict[str, Formula] = dict(further or {})

    def formula(self, measure: str) -> Formula:
        """A measure as a function of real-valued unit counts.

        Raises:
            BudgetError: there is no such measure, or a clock measures it.
        """
        if not isinstance(measure, str) or measure not in self._formulas:
            self._formulas[measure] = measure_named(measure).of(self.graph)
        return self._formulas[measure]

    def sum(self, measure: str) -> Sum:
        """A measure that is a sum of products of widths.

        Raises:
            BudgetError: it is none.
        """
        formula = self.formula(measure)
        if not isinstance(formula, Sum):
            sums = [name for name in closed() if isinstance(self.formula(name), Sum)]
            raise BudgetError(
                f"{measure}: {measure_named(measure).label} is no sum over layers, which is needed here; choose one "
                f"of: {', '.join(sums)}"
            )
        return formula

    def of(self, measure: str, kept: Kept | None = None) -> int:
        """One measure by name; of the dense model unless told otherwise."""
        return round(self.formula(measure)(self._counts(kept)).item())

    def soft(self, measure: str, kept: Tensor) -> Tensor:
        """One measure for real-valued unit counts, (groups,); a float64 scalar with a gradient."""
        return self.formula(measure)(kept)

    def all(self, kept: Kept | None = None) -> dict[str, int]:
        """Every measure in closed form, by name."""
        return {measure: self.of(measure, kept) for measure in closed()}

    def limits(self, budget: Budget) -> dict[str, int]:
        """The largest allowed number per measure that a budget bounds.

        Raises:
            BudgetError: the dense model fits already, or a clock measures one.
        """
        return budget.limits({measure: self.of(measure) for measure in budget.bounds})

    def within(self, limits: Mapping[str, int], kept: Kept) -> bool:
        """Whether widths meet all limits."""
        return all(self.of(measure, kept) <= limit for measure, limit in limits.items())

    def macs(self, kept: Kept | None = None) -> int:
        """Multiply-adds for one image (one multiply and one add count as 1)."""
        return self.of("macs", kept)

    def params(self, kept: Kept | None = None) -> int:
        """Number of parameters, buffers not included."""
        return self.of("params", kept)

    def layers(self, kept: Kept | None = None, measure: str = "macs") -> dict[str, int]:
        """A measure that is a sum, by the names of its terms: MACs per layer, unless told otherwise.

        Raises:
            BudgetError: it is no sum.
        """
        formula = self.sum(measure)
        counts = self._counts(kept)
        total: dict[str, int] = {}
        for term, value in zip(formula.products, formula.each(counts).tolist(), strict=True):
            total[term.name] = total.get(term.name, 0) + round(value)
        return total

    def _counts(self, kept: Kept | None) -> Tensor:
        """(groups,), float64.

        Raises:
            BudgetError: there is not one number for every group.
        """
        try:
            counts = torch.as_tensor(self.full if kept is None else kept, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            counts = None
        if counts is None or counts.shape != (len(self.full),):
            raise BudgetError(
                f"kept must be the units that each of {len(self.full)} groups keeps, such as {self.full[:4]}"
            )
        return counts
