"""The decision, as data: which units of which groups go, or which single weights. A plan knows no module."""

from secateur.plan.channel_plan import Plan
from secateur.plan.weight_plan import WeightPlan

__all__ = ["Plan", "WeightPlan"]
