"""What may be cut together: capture, labels, rules, groups."""

from secateur.graph.capture import Inputs
from secateur.graph.groups import (
    Axis,
    Frozen,
    Graph,
    Group,
    Member,
    Product,
    analyze,
    fingerprint,
    is_frozen,
    named_tensors,
)
from secateur.graph.modules import mirrored, register_pad

__all__ = [
    "Axis",
    "Frozen",
    "Graph",
    "Group",
    "Inputs",
    "Member",
    "Product",
    "analyze",
    "fingerprint",
    "is_frozen",
    "mirrored",
    "named_tensors",
    "register_pad",
]
