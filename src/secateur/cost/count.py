"""Parameters and multiply-adds as products of widths, and the budget that bounds them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor

from secateur.errors import BudgetError
from secateur.graph import Axis, Graph, Product

Kept: TypeAlias = Tensor | Sequence[int]
"""Units kept of every group, in the order of `graph.groups`; a float tensor may hold soft counts."""

MEASURES = ("macs", "params", "units")


class Cost:
    """MACs, parameters and units of a model as functions of the units kept.

    Every count is a sum of products of widths, and every width is linear in the kept units, so one formula
    serves the dense, the masked and the cut model, and its gradient serves methods that learn what to keep.

        cost(k) = sum over terms of factor * product over axes of (base + sum of each * k[group])

    >>> from torch import nn
    >>> from secateur.graph import analyze
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False))
    >>> cost = Cost(analyze(model, torch.zeros(1, 3, 8, 8)))
    >>> cost.macs(), cost.macs([4]), cost.params([4])
    (13536, 6768, 288)
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.full = [group.units for group in graph.groups]
        self._macs = _Terms(graph.macs, len(self.full))
        self._params = _Terms(graph.params, len(self.full))

    def macs(self, kept: Kept | None = None) -> int:
        """Multiply-adds for one image (one multiply and one add count as 1)."""
        return round(self.soft_macs(self._counts(kept)).item())

    def params(self, kept: Kept | None = None) -> int:
        """Number of parameters, buffers not included."""
        return round(self.soft_params(self._counts(kept)).item())

    def units(self, kept: Kept | None = None) -> int:
        """Number of units kept over all groups."""
        return round(self._counts(kept).sum().item())

    def soft_macs(self, kept: Tensor) -> Tensor:
        """Multiply-adds for real-valued unit counts, (groups,); a float64 scalar with a gradient."""
        return self._macs(kept)

    def soft_params(self, kept: Tensor) -> Tensor:
        """Parameters for real-valued unit counts, (groups,); a float64 scalar with a gradient."""
        return self._params(kept)

    def soft(self, measure: str, kept: Tensor) -> Tensor:
        """One of the measures by name for real-valued unit counts, (groups,)."""
        if measure == "units":
            return kept.sum()
        return self.soft_macs(kept) if measure == "macs" else self.soft_params(kept)

    def layers(self, kept: Kept | None = None) -> dict[str, int]:
        """Multiply-adds per layer for one image; calls of the same layer add up."""
        values = self._macs.each(self._counts(kept)).tolist()
        total: dict[str, int] = {}
        for term, value in zip(self.graph.macs, values, strict=True):
            total[term.name] = total.get(term.name, 0) + round(value)
        return total

    def of(self, measure: str, kept: Kept | None = None) -> int:
        """One of the measures by name: "macs", "params" or "units"."""
        return int(getattr(self, measure)(kept))

    def all(self, kept: Kept | None = None) -> dict[str, int]:
        """Every measure in closed form, by name."""
        return {measure: self.of(measure, kept) for measure in MEASURES}

    def _counts(self, kept: Kept | None) -> Tensor:
        return torch.as_tensor(self.full if kept is None else kept, dtype=torch.float64)


class _Terms:
    """Sum of products of axis widths, evaluated for all terms at once."""

    def __init__(self, products: Sequence[Product], groups: int) -> None:
        number: dict[Axis, int] = {Axis(1): 0}
        for product in products:
            for axis in product.axes:
                number.setdefault(axis, len(number))
        depth = max((len(product.axes) for product in products), default=0)
        rows = [[number[a] for a in p.axes] + [0] * (depth - len(p.axes)) for p in products]
        self.factor = torch.tensor([product.factor for product in products], dtype=torch.float64)
        self.axes = torch.tensor(rows, dtype=torch.long).reshape(len(products), depth)
        self.base = torch.tensor([axis.base for axis in number], dtype=torch.float64)
        self.slope = torch.zeros(len(number), groups, dtype=torch.float64)
        for axis, row in number.items():
            for group, positions in axis.parts:
                self.slope[row, group] = positions

    def each(self, kept: Tensor) -> Tensor:
        kept = kept.to(device=self.slope.device, dtype=torch.float64)
        return self.factor * (self.base + self.slope @ kept)[self.axes].prod(dim=1)

    def __call__(self, kept: Tensor) -> Tensor:
        return self.each(kept).sum()


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost at most; several bounds must all hold.

    Args:
        macs: multiply-adds for one image. Below 1: share of the dense model that is kept; from 1: a count.
        params: number of parameters, likewise.
        units: number of channels that groups keep, likewise; `sparsity=s` is `units=1 - s`.
        latency_ms: milliseconds of one pass over the example inputs on the machine at hand. It is measured, not
            computed: `secateur.prune` tries several cuts; see `secateur.methods.latency`.
    Raises:
        BudgetError: nothing is bounded, or a bound is not a positive number below the dense cost.

    >>> Budget(macs=0.5).limits(dense={"macs": 1000, "params": 10, "units": 4})
    {'macs': 500}
    """

    macs: float | None = None
    params: float | None = None
    units: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        if not self.given:
            raise BudgetError(
                "an empty budget: give at least one of macs, params, units or latency_ms, such as macs=0.5"
            )
        for name, bound in self.given.items():
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
                raise BudgetError(f"budget {name}={bound!r}: expected a number, such as 0.5 for half")
            if bound <= 0:
                raise BudgetError(f"budget {name}={bound}: must be above 0")
            if name == "latency_ms":
                continue
            if bound == 1:
                raise BudgetError(
                    f"budget {name}=1 keeps everything; use a share below 1, such as 0.5 for half"
                )
            if bound > 1 and bound != int(bound):
                raise BudgetError(
                    f"budget {name}={bound:g}: neither a share below 1 nor a whole number of {name}"
                )

    @property
    def given(self) -> dict[str, float]:
        """All bounds that were given, by measure."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds by measure, where all of them are in closed form.

        Raises:
            BudgetError: one is in milliseconds.
        """
        if self.latency_ms is not None:
            raise BudgetError(
                f"budget latency_ms={self.latency_ms:g}: milliseconds have to be measured, and this method cannot. "
                f"Turn them into MACs first: secateur.methods.budget_in_macs(model, inputs, budget)"
            )
        return self.given

    def limits(self, dense: dict[str, int]) -> dict[str, int]:
        """The largest allowed count per bounded measure."""
        result = {}
        for name, bound in self.bounds.items():
            limit = math.floor(bound * dense[name] + 1e-9) if bound < 1 else math.floor(bound)
            if limit >= dense[name]:
                raise BudgetError(
                    f"budget {name}={bound:g}: the dense model costs {dense[name]:,} {name} and fits already. "
                    f"Give a share below 1 or a count below {dense[name]:,}."
                )
            result[name] = limit
        return result
