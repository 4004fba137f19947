"""Carrying a plan out: mask, cut, verify, save and load."""

from secateur.surgery.cut import cut_
from secateur.surgery.embed import embed
from secateur.surgery.mask import mask_
from secateur.surgery.store import load, save
from secateur.surgery.verify import Verification, verify

__all__ = ["Verification", "cut_", "embed", "load", "mask_", "save", "verify"]
