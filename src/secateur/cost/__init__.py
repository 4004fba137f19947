"""What a network costs: measures that follow from widths, budgets that bound them, latency by the clock."""

from secateur.cost.budget import Budget
from secateur.cost.cost import Cost, Kept

__all__ = ["Budget", "Cost", "Kept"]
