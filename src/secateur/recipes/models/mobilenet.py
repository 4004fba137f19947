"""MobileNetV2 for 32×32 images."""

from torch import Tensor, nn

from secateur.recipes.models.initial import initialise_

# expansion, output channels, blocks, stride of the first block
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand (1×1), filter each channel (3×3), project (1×1); a shortcut where the shape stays."""

    def __init__(self, i: int, o: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * i
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn_relu(i, hidden, 1)]
        layers += [
            _conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, o, 1, bias=False),
            nn.BatchNorm2d(o),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 for 32×32 images.

    Args:
        classes: size of the output.
        in_channels: channels of the input.
        width: multiplier of all channels; they are rounded to multiples of 8.
    Source: Sandler et al. 2018, arXiv:1801.04381, table 2.
    Differs: the strides of the stem and of the 24-channel stage are 1, as is usual on CIFAR.

    >>> sum(p.numel() for p in CifarMobileNetV2().parameters())
    2236682
    """

    def __init__(self, classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        i = _multiple_of_8(32 * width)
        layers: list[nn.Module] = [_conv_bn_relu(in_channels, i, 3)]
        for expansion, channels, blocks, first_stride in _STAGES:
            o = _multiple_of_8(channels * width)
            for block in range(blocks):
                layers.append(InvertedResidual(i, o, first_stride if block == 0 else 1, expansion))
                i = o
        last = _multiple_of_8(1280 * max(1.0, width))
        layers.append(_conv_bn_relu(i, last, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return out


def _conv_bn_relu(i: int, o: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(i, o, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU6())


def _multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8 and loses at most a tenth.

    >>> [_multiple_of_8(c) for c in (4, 16, 18, 24, 33.6)]
    [8, 16, 24, 24, 32]
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
