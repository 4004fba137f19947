"""One table: ATen operator -> what it does to labels; a file per family of operators."""

from secateur.graph.rules import contract, elementwise, image, norm, select, shape
from secateur.graph.rules.site import RULES, Site, apply, flatten, without_rule

__all__ = [
    "RULES",
    "Site",
    "apply",
    "contract",
    "elementwise",
    "flatten",
    "image",
    "norm",
    "select",
    "shape",
    "without_rule",
]
