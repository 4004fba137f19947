"""How much to keep of each group, so that the budget is met from below."""

from secateur.allocate.table import ALLOCATIONS, allocate, allocation_named, list_widths

__all__ = ["ALLOCATIONS", "allocate", "allocation_named", "list_widths"]
