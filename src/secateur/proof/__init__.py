"""Proof that a cut model computes what the original computes without the removed units."""

from secateur.proof.verify import Verification, verify

__all__ = ["Verification", "verify"]
