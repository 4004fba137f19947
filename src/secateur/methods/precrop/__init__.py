"""PreCropping and PreConfig: widths from layerwise densities, before training."""
