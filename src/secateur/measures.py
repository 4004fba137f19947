"""The measures of a network: what budgets bound and reports compare, as one table.

Budgets, costs, command-line flags and reports go over `MEASURES`. A new kind of budget is a file with its formula (see
`secateur.cost.formulas`) and an entry here. Nothing here needs PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from secateur.errors import BudgetError, unknown
from secateur.imports import imported


def show_count(value: float) -> str:
    """A count with its digits in groups of three.

    >>> show_count(269722)
    '269,722'
    """
    return f"{value:,.0f}"


def show_bytes(value: float) -> str:
    """A number of bytes.

    >>> show_bytes(768), show_bytes(2_408_448)
    ('768 B', '2.41 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5 or unit == "GB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def show_milliseconds(value: float) -> str:
    """A number of milliseconds.

    >>> show_milliseconds(12.345)
    '12.3 ms'
    """
    return f"{value:.3g} ms"


@dataclass(frozen=True)
class Measure:
    """Something that a network costs.

    Attributes:
        name: in `Budget(name=…)`, tables and files.
        label: in text for people.
        unit: what a number of it counts, in the plural.
        help: what a bound on it bounds, in one line without a full stop.
        formula: for what follows from widths, a function: graph -> (function of the units kept per group, a float64
            tensor (groups,) -> scalar tensor), or its `module:function`. It must not fall when more is kept; its value
            at whole numbers is rounded. None: a clock measures it.
        per_weight: it is a sum over the weights of layers, so that it also follows from how many weights a layer keeps.
        peak: it is the largest of several sums, not a sum over layers.
        show: a value in text, with the unit if the label does not say it.
    """

    name: str
    label: str
    unit: str
    help: str
    formula: Callable[[Any], Callable[[Any], Any]] | str | None = None
    per_weight: bool = False
    peak: bool = False
    show: Callable[[float], str] = show_count

    @property
    def timed(self) -> bool:
        """Whether a clock measures it."""
        return self.formula is None

    def of(self, graph: Any) -> Callable[[Any], Any]:
        """The cost of a model as a function of the units that it keeps.

        Raises:
            BudgetError: a clock measures it.
        """
        if self.formula is None:
            raise BudgetError(
                f"{self.name}: {self.label} does not follow from widths, it is measured; choose one of: "
                f"{', '.join(closed())}"
            )
        formula = self.formula
        if isinstance(formula, str):
            formula = imported("measure", formula, BudgetError)
        return formula(graph)


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(
            "macs",
            label="MACs",
            unit="MACs",
            help="multiply-adds for one image (one multiply and one add count as 1)",
            formula="secateur.cost.formulas:macs",
            per_weight=True,
        ),
        Measure(
            "params",
            label="parameters",
            unit="parameters",
            help="number of parameters, buffers not included",
            formula="secateur.cost.formulas:params",
            per_weight=True,
        ),
        Measure(
            "units",
            label="channels",
            unit="channels",
            help="number of channels that groups keep",
            formula="secateur.cost.formulas:units",
        ),
        Measure(
            "activations",
            label="peak activation memory",
            unit="bytes",
            help="bytes of all tensors that are alive at once, for one image in float32",
            formula="secateur.cost.formulas:activations",
            peak=True,
            show=show_bytes,
        ),
        Measure(
            "latency_ms",
            label="latency",
            unit="milliseconds",
            help="milliseconds of one pass over the example inputs on the machine at hand, measured on several cuts",
            show=show_milliseconds,
        ),
    )
}
"""What can be bounded, by name."""


def measure_named(name: str) -> Measure:
    """An entry of the table.

    Raises:
        BudgetError: there is none of this name.
    """
    if not isinstance(name, str) or name not in MEASURES:
        raise BudgetError(unknown("measure", str(name), MEASURES))
    return MEASURES[name]


def per_weight() -> list[str]:
    """Names of the measures that are sums over the weights of layers."""
    return [name for name, measure in MEASURES.items() if measure.per_weight]


def closed() -> list[str]:
    """Names of the measures that follow from widths."""
    return [name for name, measure in MEASURES.items() if not measure.timed]
