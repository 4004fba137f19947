"""One table of operators (table.py), entered by a file per family."""

from secateur.graph.operators import contract, elementwise, image, norm, recurrent, select, shape
from secateur.graph.operators.site import Site, module_of, shapes_of
from secateur.graph.operators.step import CutSite, LiveSite, Shape, Step
from secateur.graph.operators.table import OPERATORS, Constants, Operator, label

__all__ = [
    "OPERATORS",
    "Constants",
    "CutSite",
    "LiveSite",
    "Operator",
    "Shape",
    "Site",
    "Step",
    "contract",
    "elementwise",
    "image",
    "label",
    "module_of",
    "norm",
    "recurrent",
    "select",
    "shape",
    "shapes_of",
]
