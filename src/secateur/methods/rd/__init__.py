"""Rate–distortion pruning: budgets shared out by measured distortion curves."""

from secateur.methods.rd.channels import RD
from secateur.methods.rd.single_weights import FAITHFUL, MaskWeights, RDWeights

__all__ = ["FAITHFUL", "RD", "MaskWeights", "RDWeights"]
