"""VGG-16 for 32 × 32 images at a quarter of the width, which a CPU trains: model = "benchmarks/thin_vgg.py:quarter"."""

from torch import nn

from secateur.recipes.models import build_model


def quarter(classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Of 0.92 million parameters and 20 million MACs, with fresh weights."""
    widths = (16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128)
    return build_model("vgg16_bn_cifar", classes=classes, in_channels=in_channels, widths=widths)
