"""DenseNets with bottlenecks and compression for 32×32 images."""

import torch
from torch import Tensor, nn

from secateur.recipes.models.initial import initialise_


class DenseBlock(nn.Module):
    """One dense layer: a 1×1 bottleneck and a 3×3 convolution, whose output is appended to the input."""

    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(i)
        self.conv1 = nn.Conv2d(i, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.bn1(x)))
        y = self.conv2(self.relu(self.bn2(y)))
        return torch.cat([x, y], 1)


class Transition(nn.Module):
    """Between two stages: a 1×1 convolution to half the channels, then 2×2 average pooling."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(i)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(i, o, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pool(self.conv(self.relu(self.bn(x))))
        return out


class CifarDenseNet(nn.Module):
    """A DenseNet-BC for 32×32 images; the stem has 2 × growth channels, each transition halves them.

    Args:
        growth: channels that each dense layer adds (k in the paper).
        blocks: dense layers per stage.
        classes: size of the output.
        in_channels: channels of the input.
    Source: Huang et al. 2017, arXiv:1608.06993, sec. 3 and 4.2.
    Differs: with four stages (DenseNet-121) the ImageNet stem becomes a 3×3 convolution of stride 1.

    >>> sum(p.numel() for p in CifarDenseNet(12, (16, 16, 16)).parameters())
    769162
    """

    def __init__(self, growth: int, blocks: tuple[int, ...], classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        width = 2 * growth
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stage_names: list[str] = []
        for number, depth in enumerate(blocks, start=1):
            stage = nn.Sequential()
            for block in range(1, depth + 1):
                stage.add_module(f"block{block}", DenseBlock(width, growth))
                width += growth
            if number < len(blocks):
                stage.add_module("transition", Transition(width, width // 2))
                width //= 2
            self.add_module(f"stage{number}", stage)
            self.stage_names.append(f"stage{number}")
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(width, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for name in self.stage_names:
            x = self.get_submodule(name)(x)
        x = self.relu(self.bn(x)).mean((2, 3))
        out: Tensor = self.fc(x)
        return out
