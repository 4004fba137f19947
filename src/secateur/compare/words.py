"""Budgets, numbers and names of a comparison, as people read them."""

import math
from collections.abc import Mapping

from secateur.measures import MEASURES as TABLE
from secateur.measures import per_weight

MEASURES = {name: TABLE[name].label for name in per_weight()}
"""What a budget of a comparison may bound, so that masks of weights can be held to it too -> as people say it."""

DENSE = "dense"
"""The arm that trains the dense model, which others are compared with if nothing else is said."""


def describe_budget(budget: Mapping[str, float]) -> str:
    """A budget as a heading.

    >>> describe_budget({"macs": 0.5, "params": 0.25})
    '50 % of the MACs, 25 % of the parameters'
    """
    return ", ".join(f"{100 * share:g} % of the {MEASURES[name]}" for name, share in budget.items())


def format_percentage(mean: float | None, spread: float | None = None, sign: str = "") -> str:
    """Fractions as percentages, without the sign.

    >>> format_percentage(0.915, 0.0021), format_percentage(-0.01, sign="+")
    ('91.50 ± 0.21', '−1.00')
    """
    if mean is None:
        return "–"
    text = f"{100 * mean:{sign}.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
    return text.replace("-", "−")


def format_milliseconds(mean: float, spread: float | None) -> str:
    """A latency, with as many digits as its spread.

    >>> format_milliseconds(1.2345, 0.056), format_milliseconds(12.345, None)
    ('1.23 ± 0.06', '12.3')
    """
    if spread is None:
        return f"{mean:.3g}"
    digits = max(0, 2 - math.floor(math.log10(mean)))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def plain_name(name: str) -> str:
    """A name as a file name.

    >>> plain_name("l2, then fine-tune")
    'l2-then-fine-tune'
    """
    return "-".join("".join(c if c.isalnum() or c in "-._" else " " for c in name).split())
