"""What may be cut together: capture, labels, rules, groups."""

from secateur.graph.activations import Buffer
from secateur.graph.axes import Axis, Product
from secateur.graph.capture import Inputs
from secateur.graph.groups import (
    Frozen,
    Granularity,
    Graph,
    Group,
    Member,
    analyze,
    fingerprint,
    is_frozen,
    named_tensors,
)
from secateur.graph.modules import mirrored, register_pad

__all__ = [
    "Axis",
    "Buffer",
    "Frozen",
    "Granularity",
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
