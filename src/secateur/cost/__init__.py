"""What a network costs: parameters and multiply-adds in closed form, latency measured."""

from secateur.cost.count import Budget, Cost, Kept

__all__ = ["Budget", "Cost", "Kept"]
