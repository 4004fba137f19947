"""The networks every law is tested on."""

from dataclasses import dataclass

import torch
from torch import nn

from secateur.proof.verify import randomise_
from secateur.recipes.models import build_model, list_models

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
LARGE = {"densenet121", "densenet121_cifar", "googlenet", "resnet110", "resnet110_b", "resnet50", "vgg16_bn"}
ALL = sorted(list_models()) + [f"torchvision/{name}" for name in TORCHVISION]


@dataclass(frozen=True)
class Network:
    """A network with weights that hide nothing, and the smallest input that passes all its strides."""

    name: str
    model: nn.Module
    inputs: torch.Tensor


def network(name: str, *, dtype: torch.dtype = torch.float64, classes: int = 10) -> Network:
    torch.manual_seed(0)
    model = build_model(name, classes=classes)
    size = 32 if "/" in name or "vgg" in name else 16
    return Network(name, randomise_(model, 0).to(dtype).eval(), torch.randn(1, 3, size, size, dtype=dtype))
