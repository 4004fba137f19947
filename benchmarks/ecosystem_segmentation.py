"""segmentation_models_pytorch: every decoder with a small encoder; nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn

Made = tuple[nn.Module, torch.Tensor]


def decoder(name: str, encoder: str = "resnet18", size: int = 64, **options: Any) -> Callable[[], Made]:
    """A decoder with five classes, and one image of `size` × `size`."""

    def make() -> Made:
        model = getattr(smp, name)(encoder_name=encoder, encoder_weights=None, classes=5, **options)
        return model, torch.randn(1, 3, size, size)

    return make


CASES: dict[str, Callable[[], Made]] = {
    "Unet": decoder("Unet"),
    "Unet, scSE attention": decoder("Unet", decoder_attention_type="scse"),
    "Unet with MobileNet v2": decoder("Unet", "mobilenet_v2"),
    "Unet with EfficientNet-B0": decoder("Unet", "efficientnet-b0"),
    "Unet with SegFormer's MiT-B0": decoder("Unet", "mit_b0"),
    "Unet++": decoder("UnetPlusPlus"),
    "MAnet": decoder("MAnet"),
    "Linknet": decoder("Linknet"),
    "FPN": decoder("FPN"),
    "PSPNet": decoder("PSPNet"),
    "PAN": decoder("PAN", size=128),
    "DeepLabV3": decoder("DeepLabV3"),
    "DeepLabV3+": decoder("DeepLabV3Plus"),
    "UPerNet": decoder("UPerNet"),
    "SegFormer": decoder("Segformer"),
    "DPT": decoder("DPT", "tu-test_vit", 160),
}
"""Name -> makes the model and its example input."""
