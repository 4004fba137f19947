"""VGG-16 with batch-norm for 32×32 images."""

from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.recipes.models.initial import initialise_

_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
_POOL_AFTER = frozenset({1, 3, 6, 9, 12})  # indices of the convolutions that end a stage


class CifarVGG16(nn.Module):
    """VGG-16 with batch-norm and one linear layer, for 32×32 images.

    Args:
        classes: size of the output.
        in_channels: channels of the input.
        widths: output channels of the thirteen convolutions; a pruned VGG is this class with smaller ones.
    Raises:
        ModelError: not thirteen widths.
    Source: Simonyan and Zisserman 2015, arXiv:1409.1556, configuration D.
    Differs: batch-norm, and one linear layer instead of three, as is usual on CIFAR.

    >>> sum(p.numel() for p in CifarVGG16().parameters())
    14728266
    """

    def __init__(self, classes: int = 10, in_channels: int = 3, widths: tuple[int, ...] = _WIDTHS) -> None:
        super().__init__()
        if len(widths) != len(_WIDTHS):
            raise ModelError(
                f"widths: got {len(widths)} numbers, expected {len(_WIDTHS)}, one per convolution"
            )
        layers: list[nn.Module] = []
        i = in_channels
        for index, o in enumerate(widths):
            layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
            if index in _POOL_AFTER:
                layers.append(nn.MaxPool2d(2))
            i = o
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(i, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return out
