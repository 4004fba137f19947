"""What a pruned model may cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from secateur.errors import BudgetError, unknown
from secateur.measures import MEASURES


@dataclass(frozen=True, init=False, repr=False)
class Budget:
    """What the pruned model may cost at most; several bounds must all hold.

    Args:
        <measures>
            Below 1, a bound is the share of the dense model that is kept; from 1, a number. Milliseconds are always
            milliseconds. None: no bound.
    Attributes:
        pairs: (measure, bound), in the order of the table. Each bound is an attribute too: `budget.macs`, None where it
            is not given.
    Raises:
        BudgetError: nothing is bounded, a measure is unknown, or a bound is not a positive number below the dense cost.

    >>> Budget(macs=0.5).limits(dense={"macs": 1000, "params": 10})
    {'macs': 500}
    """

    pairs: tuple[tuple[str, float], ...]

    def __init__(self, **bounds: float | None) -> None:
        for name in bounds:
            if name not in MEASURES:
                raise BudgetError(f"budget: {unknown('measure', name, MEASURES)}")
        pairs = [(name, bound) for name in MEASURES if (bound := bounds.get(name)) is not None]
        if not pairs:
            raise BudgetError(
                f"an empty budget: give at least one of {', '.join(MEASURES)}, such as macs=0.5"
            )
        for name, bound in pairs:
            _check(name, bound)
        object.__setattr__(self, "pairs", tuple(pairs))

    def __getattr__(self, name: str) -> float | None:
        if name not in MEASURES:
            raise AttributeError(f"'Budget' has no attribute {name!r}")
        return self.given.get(name)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={bound!r}' for name, bound in self.pairs)})"

    @property
    def given(self) -> dict[str, float]:
        """All bounds that were given, by measure."""
        return dict(self.pairs)

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds by measure, where all of them follow from widths.

        Raises:
            BudgetError: a clock measures one.
        """
        for name, bound in self.pairs:
            if MEASURES[name].timed:
                raise BudgetError(
                    f"budget {name}={bound:g}: {MEASURES[name].unit} have to be measured, and this method cannot. "
                    f"Turn them into MACs first: secateur.methods.budget_in_macs(model, inputs, budget)"
                )
        return self.given

    def limits(self, dense: Mapping[str, int]) -> dict[str, int]:
        """The largest allowed number per bounded measure, from what the dense model costs."""
        result = {}
        for name, bound in self.bounds.items():
            limit = math.floor(bound * dense[name] + 1e-9) if bound < 1 else math.floor(bound)
            if limit >= dense[name]:
                raise BudgetError(
                    f"budget {name}={bound:g}: the dense model costs {dense[name]:,} {MEASURES[name].unit} and fits "
                    f"already. Give a share below 1 or a number below {dense[name]:,}."
                )
            result[name] = limit
        return result


def _check(name: str, bound: object) -> None:
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
        raise BudgetError(f"budget {name}={bound!r}: expected a number, such as 0.5 for half")
    if bound <= 0:
        raise BudgetError(f"budget {name}={bound}: must be above 0")
    if MEASURES[name].timed:
        return
    if bound == 1:
        raise BudgetError(f"budget {name}=1 keeps everything; use a share below 1, such as 0.5 for half")
    if bound > 1 and bound != int(bound):
        raise BudgetError(
            f"budget {name}={bound:g}: neither a share below 1 nor a whole number of {MEASURES[name].unit}"
        )


Budget.__doc__ = (Budget.__doc__ or "").replace(
    "<measures>", "\n        ".join(f"{measure.name}: {measure.help}." for measure in MEASURES.values())
)
