"""ShuffleNetV2 for 32×32 images."""

import torch
from torch import Tensor, nn

from secateur.recipes.models.initial import initialise_


class ShuffleUnit(nn.Module):
    """Half of the channels pass and half are transformed; at stride 2 all go through both branches."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        half = o // 2
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1 = nn.Sequential(
                nn.Conv2d(i, i, 3, stride, padding=1, groups=i, bias=False),
                nn.BatchNorm2d(i),
                nn.Conv2d(i, half, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(i if stride == 2 else half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, stride, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        first, second = (x, x) if self.stride == 2 else x.chunk(2, 1)
        y = torch.cat([self.branch1(first), self.branch2(second)], 1)
        n, c, h, w = y.shape
        return y.reshape(n, 2, c // 2, h, w).transpose(1, 2).flatten(1, 2)  # n, c, h, w


class CifarShuffleNetV2(nn.Module):
    """ShuffleNetV2 for 32×32 images.

    Args:
        widths: channels of the three stages, even numbers.
        last: channels of the convolution before the pooling.
        classes: size of the output.
        in_channels: channels of the input.
    Source: Ma et al. 2018, arXiv:1807.11164, table 5.
    Differs: the stem has stride 1 and no pooling, as is usual on CIFAR.

    >>> sum(p.numel() for p in CifarShuffleNetV2((48, 96, 192)).parameters())
    352042
    """

    def __init__(
        self, widths: tuple[int, int, int], last: int = 1024, classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = _conv_bn_relu(in_channels, 24, 3)
        self.stage2 = _stage(24, widths[0], 4)
        self.stage3 = _stage(widths[0], widths[1], 8)
        self.stage4 = _stage(widths[1], widths[2], 4)
        self.conv5 = _conv_bn_relu(widths[2], last, 1)
        self.fc = nn.Linear(last, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.conv1(x))))
        out: Tensor = self.fc(self.conv5(x).mean((2, 3)))
        return out


def _stage(i: int, o: int, units: int) -> nn.Sequential:
    return nn.Sequential(ShuffleUnit(i, o, 2), *(ShuffleUnit(o, o, 1) for _ in range(units - 1)))


def _conv_bn_relu(i: int, o: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())
