"""Torchvision's detectors with random weights, small enough for a CPU: what `ecosystem.py` prunes whole."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, list[Tensor]]
"""A detector in evaluation mode, and two example images."""

REGIONS = {
    "min_size": 64, "max_size": 96, "rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0, "box_detections_per_img": 5,
}  # fmt: skip
"""Random weights are sure of nothing: without these, the heads on boxes that were found would see none."""

SMALL = {"min_size": 64, "max_size": 96}


def detector(name: str, size: int, **options: Any) -> Case:
    """A detector of torchvision and images of this height and width."""
    from torchvision.models import detection

    torch.manual_seed(0)
    options = {"num_classes": 2 if "keypoint" in name else 5, **options}
    model = getattr(detection, name)(weights=None, weights_backbone=None, **options).eval()
    return model, [torch.rand(3, size, size) for _ in range(2)]


CASES: dict[str, Callable[[], Case]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": partial(
        detector, "fasterrcnn_mobilenet_v3_large_320_fpn", 64, **REGIONS
    ),
    "fasterrcnn_resnet50_fpn": partial(detector, "fasterrcnn_resnet50_fpn", 64, **REGIONS),
    "fasterrcnn_resnet50_fpn_v2": partial(detector, "fasterrcnn_resnet50_fpn_v2", 64, **REGIONS),
    "maskrcnn_resnet50_fpn": partial(detector, "maskrcnn_resnet50_fpn", 64, **REGIONS),
    "keypointrcnn_resnet50_fpn": partial(detector, "keypointrcnn_resnet50_fpn", 64, **REGIONS),
    "retinanet_resnet50_fpn": partial(detector, "retinanet_resnet50_fpn", 64, **SMALL),
    "retinanet_resnet50_fpn_v2": partial(detector, "retinanet_resnet50_fpn_v2", 64, **SMALL),
    "fcos_resnet50_fpn": partial(detector, "fcos_resnet50_fpn", 64, **SMALL),
    "ssd300_vgg16": partial(detector, "ssd300_vgg16", 300),
    "ssdlite320_mobilenet_v3_large": partial(detector, "ssdlite320_mobilenet_v3_large", 320),
}
"""Name -> makes the detector and its images."""


def targets(images: list[Tensor], keypoints: int = 17) -> list[dict[str, Tensor]]:
    """What a detector needs in training mode: one box in each image, with a mask and key points for those that ask."""
    found = []
    for image in images:
        height, width = image.shape[1:]
        box = torch.tensor([[0.2 * width, 0.2 * height, 0.7 * width, 0.8 * height]])
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, height // 4 : height // 2, width // 4 : width // 2] = 1
        points = torch.tensor([0.4 * width, 0.5 * height, 1.0]).repeat(1, keypoints, 1)
        found.append(
            {"boxes": box, "labels": torch.ones(1, dtype=torch.int64), "masks": mask, "keypoints": points}
        )
    return found


def loss(model: nn.Module, images: list[Tensor]) -> Tensor:
    """The sum of a detector's losses, in training mode."""
    return torch.stack(list(model.train()(images, targets(images)).values())).sum()


if (
    __name__ == "__main__"
):  # python benchmarks/ecosystem_detectors.py [NAME …]: prune, train on, save, load, compare
    import sys
    import tempfile
    import time
    from pathlib import Path

    from torch.utils.flop_counter import FlopCounterMode

    import secateur as sc
    from secateur.graph.duplicate import duplicate

    def macs(model: nn.Module, images: list[Tensor]) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
        return counter.get_total_flops() / 2 / len(images)

    print(
        "| detector | parts | MACs kept | torch counts | float64 | float32 | equal | trains | loads | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or CASES:
        began = time.process_time()
        model, images = CASES[name]()
        pruned = sc.prune(model, images, budget=0.6)
        spent, proof = time.process_time() - began, pruned.proof
        counted = [macs(m, images) / pruned.before["macs"] for m in (model, pruned.model)]
        with tempfile.TemporaryDirectory() as folder:
            pruned.save(Path(folder) / "small.safetensors")
            loaded = sc.load(duplicate(model), Path(folder) / "small.safetensors").eval()
        with torch.no_grad():
            same = all(
                torch.equal(a[key], b[key])
                for a, b in zip(loaded(images), pruned.model.eval()(images), strict=True)
                for key in a
            )
        loss(loaded, images).backward()
        trains = all(p.grad.isfinite().all() for p in loaded.parameters() if p.grad is not None)
        share = pruned.after["macs"] / pruned.before["macs"]
        print(
            f"| {name} | {len(proof.parts)} | {share:.1%} | {counted[0]:.4f} {counted[1]:.4f} | "
            f"{proof.max_rel_error:.1e} | {proof.max_rel_error_float32:.1e} | {proof.ok} | {trains} | {same} | "
            f"{spent:.0f} |",
            flush=True,
        )
