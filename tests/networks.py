"""The networks that the laws are tested on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models import DenseNet, EfficientNet, ResNet
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import Bottleneck
from torchvision.models.vgg import make_layers as vgg_layers

from secateur.proof.verify import randomise_
from secateur.recipes.models import build_model, list_models
from secateur.recipes.models.densenet import CifarDenseNet

TORCHVISION = [
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "vgg16_bn",
]
NARROW_VGG = (8, 8, 12, 12, 16, 16, 16, 24, 24, 24, 32, 32, 32)
ALL = [*list_models(), *(f"torchvision/{name}" for name in TORCHVISION)]
QUICK = {"resnet8", "resnet20", "vgg16_bn_cifar", "torchvision/resnet18", "torchvision/squeezenet1_1"}
"""Those that take a moment; tests of the others are slow."""

EFFICIENT = [
    MBConvConfig(1, 3, 1, 32, 16, 1, 1, 1),
    MBConvConfig(6, 3, 2, 16, 24, 2, 1, 1),
    MBConvConfig(6, 5, 2, 24, 40, 2, 1, 1),
]
SMALLER: dict[str, Callable[[int], nn.Module]] = {
    "densenet_bc_100": lambda classes: CifarDenseNet(12, (4, 4, 4), classes),
    "densenet121_cifar": lambda classes: CifarDenseNet(32, (2, 3, 3, 2), classes),
    "torchvision/densenet121": lambda classes: DenseNet(32, (2, 3, 3, 2), 64, num_classes=classes),
    "torchvision/efficientnet_b0": lambda classes: EfficientNet(EFFICIENT, 0.2, num_classes=classes),
    "torchvision/resnet50": lambda classes: ResNet(
        Bottleneck, [2, 2, 2, 2], num_classes=classes, width_per_group=16
    ),
}
"""Networks built of fewer of their blocks: another block of the same kind obeys the same laws."""


@dataclass(frozen=True)
class Network:
    """A network with weights that hide nothing, and the smallest input that passes all its strides."""

    name: str
    model: nn.Module
    inputs: torch.Tensor


def network(name: str, *, dtype: torch.dtype = torch.float64, classes: int = 10) -> Network:
    torch.manual_seed(0)
    options = {"widths": NARROW_VGG} if name == "vgg16_bn_cifar" else {}
    smaller = SMALLER.get(name)
    model = smaller(classes) if smaller else build_model(name, classes=classes, **options)
    if name == "torchvision/vgg16_bn":
        narrow_(model)
    size = 32 if "/" in name or "vgg" in name else 16
    return Network(name, randomise_(model, 0).to(dtype).eval(), torch.randn(1, 3, size, size, dtype=dtype))


def narrow_(vgg: nn.Module) -> None:
    """Torchvision's VGG with layers of other widths: its laws are the same without a hundred million weights."""
    widths = iter(NARROW_VGG)
    layers = [
        next(widths) if isinstance(layer, nn.Conv2d) else "M"
        for layer in vgg.features
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d)
    ]
    vgg.features = vgg_layers(layers, batch_norm=True)
    vgg.classifier[0] = nn.Linear(NARROW_VGG[-1] * 49, 64)
    vgg.classifier[3] = nn.Linear(64, 64)
    vgg.classifier[6] = nn.Linear(64, vgg.classifier[6].out_features)
