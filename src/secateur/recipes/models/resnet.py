"""ResNets for 32×32 images: the CIFAR family of He et al., and the ResNet-8 of MLPerf Tiny."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import ModelError, unknown
from secateur.graph import register_pad
from secateur.recipes.models.initial import initialise_


class PadShortcut(nn.Module):
    """Shortcut A: every second pixel, and zero channels before and after the ones that exist.

    >>> import torch
    >>> PadShortcut(8, 8)(torch.ones(1, 16, 32, 32)).shape
    torch.Size([1, 32, 16, 16])
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}"


register_pad(PadShortcut, "before", "after")


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which changes the shape only where the stride is 2."""

    def __init__(self, i: int, o: int, stride: int, shortcut: Literal["A", "B"]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module
        if stride == 1:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut((o - i) // 2, o - i - (o - i) // 2)
        else:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """A ResNet of depth 6 × blocks + 2 for 32×32 images.

    Args:
        blocks: basic blocks in each of the three stages: 3, 5, 7, 9, 18 for ResNet-20, 32, 44, 56, 110.
        shortcut: "A" has no parameters (`PadShortcut`), "B" is a 1×1 convolution with batch-norm.
        classes: size of the output.
        in_channels: channels of the input.
        widths: channels of the three stages.
    Raises:
        ModelError: unknown shortcut.
    Source: He et al. 2016, arXiv:1512.03385, sec. 4.2.
    Differs: nothing for shortcut A; shortcut B is the common variant of public checkpoints.

    >>> import torch
    >>> model = CifarResNet(3)
    >>> sum(p.numel() for p in model.parameters())
    269722
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        blocks: int,
        shortcut: Literal["A", "B"] = "A",
        classes: int = 10,
        in_channels: int = 3,
        widths: tuple[int, int, int] = (16, 32, 64),
    ) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ModelError(unknown("shortcut", shortcut, "AB"))
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[0], 1, blocks, shortcut)
        self.layer2 = _stage(widths[0], widths[1], 2, blocks, shortcut)
        self.layer3 = _stage(widths[1], widths[2], 2, blocks, shortcut)
        self.fc = nn.Linear(widths[2], classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def _stage(i: int, o: int, stride: int, blocks: int, shortcut: Literal["A", "B"]) -> nn.Sequential:
    first = BasicBlock(i, o, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(o, o, 1, shortcut) for _ in range(blocks - 1)))


class TinyBlock(nn.Module):
    """The block of `TinyResNet8`: biased convolutions, TensorFlow's padding, a bare 1×1 shortcut."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        # TensorFlow's "same" padding at stride 2 of an even size: one row below, one column to the right.
        self.pad = nn.ZeroPad2d((0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        self.conv1 = nn.Conv2d(i, o, 3, stride)
        self.bn1 = nn.BatchNorm2d(o, eps=1e-3)
        self.conv2 = nn.Conv2d(o, o, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(o, eps=1e-3)
        self.shortcut = nn.Conv2d(i, o, 1, stride) if stride == 2 else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(self.pad(x))))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + self.shortcut(x))
        return out


class TinyResNet8(nn.Module):
    """The ResNet-8 of the MLPerf Tiny image classification benchmark.

    Its published weights expect raw pixels, 0 to 255. Image sides must be multiples of 4.

    Args:
        classes: size of the output.
        in_channels: channels of the input.
    Source: Banbury et al. 2021, arXiv:2106.07597.
    Differs: the softmax is left out.

    >>> sum(p.numel() for p in TinyResNet8().parameters())
    78186
    """

    def __init__(self, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16, eps=1e-3)
        self.relu = nn.ReLU()
        self.block1 = TinyBlock(16, 16, 1)
        self.block2 = TinyBlock(16, 32, 2)
        self.block3 = TinyBlock(32, 64, 2)
        self.fc = nn.Linear(64, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out
