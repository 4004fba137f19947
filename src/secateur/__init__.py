"""Secateur: prune any PyTorch vision network to a budget, and prove the result.

model + inputs -> Graph -> groups -> scores -> allocation -> Plan -> cut model
"""

__version__ = "0.1.0"

from secateur.cost import Budget, Cost
from secateur.errors import SecateurError
from secateur.graph import analyze, register_pad
from secateur.methods import prune
from secateur.plan import Plan
from secateur.surgery import cut_, load, mask_, save, verify

__all__ = [
    "Budget",
    "Cost",
    "Plan",
    "SecateurError",
    "analyze",
    "cut_",
    "load",
    "mask_",
    "prune",
    "register_pad",
    "save",
    "verify",
]
