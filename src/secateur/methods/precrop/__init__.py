"""PreCropping and PreConfig: widths from layerwise densities, before training."""

from secateur.methods.precrop.crop import PreConfig, PreCrop
from secateur.methods.precrop.random_masks import RandomFilters, RandomWeights

__all__ = ["PreConfig", "PreCrop", "RandomFilters", "RandomWeights"]
