"""Secateur: prune any PyTorch vision network to a budget, and prove the result."""

__version__ = "0.1.0"
