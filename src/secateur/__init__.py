"""Secateur: prune any PyTorch vision network to a budget, and prove the result.

model + inputs -> Graph -> groups -> scores -> allocation -> Plan -> cut model

`secateur.methods` holds all methods with their options.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from secateur import methods as methods
    from secateur.cost import Budget, Cost
    from secateur.engine.pruned import Pruned
    from secateur.errors import SecateurError
    from secateur.graph import Graph, analyze, register_pad
    from secateur.methods import prune
    from secateur.plan import Plan
    from secateur.proof.verify import Verification, verify
    from secateur.surgery import cut_, load, mask_, save

_HOME = {
    "Budget": "cost",
    "Cost": "cost",
    "Graph": "graph",
    "Plan": "plan",
    "Pruned": "engine.pruned",
    "SecateurError": "errors",
    "Verification": "proof",
    "analyze": "graph",
    "cut_": "surgery",
    "load": "surgery",
    "mask_": "surgery",
    "prune": "methods",
    "register_pad": "graph",
    "save": "surgery",
    "verify": "proof",
}

__all__ = [
    "Budget",
    "Cost",
    "Graph",
    "Plan",
    "Pruned",
    "SecateurError",
    "Verification",
    "analyze",
    "cut_",
    "load",
    "mask_",
    "prune",
    "register_pad",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `secateur --help` need not wait for PyTorch."""
    if name == "methods":
        return import_module(f"{__name__}.methods")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "methods"])
