"""The remaining weights solved again, without training, so that each layer keeps its output."""
