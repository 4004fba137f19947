"""The networks of the zoo: every torchvision classification, segmentation and detection model, and the
smallest variant of every timm model module. All are built with random weights and no download.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SMALL = 128
"""Image size that is tried first: structure does not depend on it, time does."""

LARGEST = 224
"""Largest side at which a model without a fixed size is run."""

TIMM_FAMILIES = (
    "cspresnet50 darknet53 dm_nfnet_f0 eca_resnet33ts ecaresnet26t ese_vovnet19b_dw fbnetc_100 gernet_s "
    "halonet26t lambda_resnet26t mixnet_s mobilenetv2_035 mobileone_s0 nf_resnet26 repvgg_a0 resnet18 "
    "resnet50 resnetv2_50 seresnet18 tinynet_e vit_small_patch16_224 deit_tiny_patch16_224 "
    "convnext_atto convnextv2_atto dla34 efficientnet_b0 swin_tiny_patch4_window7_224 mobilenetv4_conv_small "
    "mobilevit_xxs mobilevitv2_050 coatnet_nano_rw_224 maxvit_rmlp_pico_rw_256"
).split()
"""Well-known families that share a timm module with a smaller one."""


@dataclass(frozen=True)
class Built:
    """A network in evaluation mode with the input it is analysed on.

    Attributes:
        note: what was built instead of the whole model, and why.
    """

    model: nn.Module
    inputs: Tensor
    note: str = ""


class DenseDetector(nn.Module):
    """The part of a torchvision detector that runs on tensors: backbone, pyramid and dense head."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.head if hasattr(detector, "head") else detector.rpn.head

    def forward(self, images: Tensor) -> object:
        features = self.backbone(images)
        return self.head([features] if isinstance(features, Tensor) else list(features.values()))


def names() -> list[str]:
    """Every network as source/name, in the order of the table."""
    from torchvision import models

    listed = [f"torchvision/{name}" for name in models.list_models(module=models)]
    listed += [f"segmentation/{name}" for name in models.list_models(module=models.segmentation)]
    listed += [f"detection/{name}" for name in models.list_models(module=models.detection)]
    smallest = timm_smallest()
    more = [name for name in TIMM_FAMILIES if name not in smallest]
    return listed + [f"timm/{name}" for name in [*smallest, *more]]


def timm_smallest() -> list[str]:
    """The variant with fewest parameters of every timm module; timm's own toy variants do not count."""
    import timm

    chosen = []
    for module in timm.models.list_modules():
        variants = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
        if variants:
            chosen.append(min(variants, key=timm_params))
    return chosen


def timm_params(name: str) -> int:
    import timm

    with quiet(), torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def build(name: str) -> Built:
    """One network of the zoo with random weights, and an input of the smallest size it accepts."""
    source, _, short = name.partition("/")
    with quiet():
        torch.manual_seed(0)
        return {"timm": build_timm, "detection": build_detection}.get(source, build_torchvision)(short)


def build_timm(name: str) -> Built:
    import timm

    model: Any = timm.create_model(name).eval()
    channels, *native = model.pretrained_cfg["input_size"]
    fixed = model.pretrained_cfg.get("fixed_input_size", False)
    sizes = [tuple(native)] if fixed else [(SMALL, SMALL), (LARGEST, LARGEST), tuple(native)]
    return Built(model, first_that_runs(model, [(channels, *size) for size in sizes]))


def build_torchvision(name: str) -> Built:
    from torchvision import models

    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name in models.list_models(module=models.segmentation):
        options = {"weights_backbone": None, "aux_loss": None}
        if name.startswith("lraspp"):
            del options["aux_loss"]
    model = models.get_model(name, weights=None, **options).eval()
    native = LARGEST if name.startswith(("vit", "swin", "maxvit")) else SMALL
    return Built(model, first_that_runs(model, [(3, native, native), (3, LARGEST, LARGEST), (3, 299, 299)]))


def build_detection(name: str) -> Built:
    """The dense part of a detector; what follows it picks boxes by their values, which no graph can hold."""
    from torchvision import models

    detector = models.get_model(name, weights=None, weights_backbone=None).eval()
    size = 300 if name.startswith("ssd") else 2 * SMALL
    return Built(
        DenseDetector(detector).eval(),
        torch.randn(1, 3, size, size),
        "backbone, pyramid and dense head; the choice of boxes depends on their values and is left alone",
    )


def first_that_runs(model: nn.Module, shapes: list[tuple[int, ...]]) -> Tensor:
    """A random image of the first shape at which the model runs, in training mode with two images too."""
    for shape in shapes[:-1]:
        try:
            with torch.no_grad():
                model.eval()(torch.randn(1, *shape))
                model.train()(torch.randn(2, *shape))
        except Exception:  # too small for the strides, or the size is fixed
            continue
        finally:
            model.eval()
        return torch.randn(1, *shape)
    return torch.randn(1, *shapes[-1])


def wake_(model: nn.Module, x: Tensor) -> nn.Module:
    """Random weights in which nothing is hidden: no parameter is constant, and batch norms fit the activations.

    Fresh networks have zero heads, gates and residual scales of 1e-6, which would hide a wrong result.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            value = parameter.flatten()[0].item()
            if (parameter != value).any():
                continue
            if value:
                parameter.copy_(max(abs(value), 0.3) * (1 + 0.5 * noise.tanh()))
            else:
                spread = 0.1 if parameter.ndim < 2 else max(parameter[0].numel(), 1) ** -0.5
                parameter.copy_(spread * noise + (0.5 if parameter.numel() == 1 else 0.0))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    images = torch.randn(4, *x.shape[1:], generator=generator)
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None:
            norm.running_var.clamp_(min=0.1)
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
