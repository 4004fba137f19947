"""The one weight initialisation that the built-in models share."""

from torch import nn


def initialise_(model: nn.Module) -> None:
    """Draw convolutions from He's normal distribution; all else keeps PyTorch's default.

    Source: He et al. 2015, arXiv:1502.01852, sec. 2.2, backward case.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
