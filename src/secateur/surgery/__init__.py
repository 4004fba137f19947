"""Applying a plan: mask, cut, save and load."""

from secateur.surgery.cut import cut_
from secateur.surgery.embed import embed
from secateur.surgery.mask import mask_
from secateur.surgery.store import load, save

__all__ = ["cut_", "embed", "load", "mask_", "save"]
