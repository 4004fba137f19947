"""Ultralytics: the network inside of a `YOLO` object, from its own configuration files; nothing is downloaded."""

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())  # read when it is imported
os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from ultralytics import RTDETR, YOLO
from ultralytics.cfg import get_cfg
from ultralytics.engine.exporter import Exporter

from secateur.graph.probe import difference, floats

Made = tuple[nn.Module, Tensor]

SIZE = 64
"""Side of the images."""


def configured(name: str) -> Callable[[], Made]:
    """The network of a configuration, and one image."""

    def make() -> Made:
        made = (RTDETR if "rtdetr" in name else YOLO)(f"{name}.yaml")
        return made.model, torch.rand(1, 3, SIZE, SIZE)

    return make


CASES: dict[str, Callable[[], Made]] = {
    name: configured(name)
    for name in (
        *("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolo26n"),
        *("yolov8n-seg", "yolo11n-seg", "yolo26n-seg", "yolov8n-pose", "yolo11n-pose", "yolo26n-pose"),
        *("yolov8n-cls", "yolo11n-cls", "yolo26n-cls", "yolov8n-rtdetr", "rtdetr-l"),
    )
}
"""Name -> makes the network and its example input."""


def loss(model: nn.Module, inputs: Tensor) -> Tensor:
    """The framework's own loss of random objects, two in every image.

    Args:
        inputs: (images, 3, height, width).
    """
    network: Any = model
    if not hasattr(network.args, "box"):
        network.args = get_cfg(overrides=dict(network.args))  # what its trainer does
    network.nc = network.yaml["nc"]  # likewise
    generator = torch.Generator().manual_seed(0)
    images, side = len(inputs), inputs.shape[-1] // 4
    number = 2 * images
    batch: dict[str, Any] = {"img": inputs}
    if network.task == "classify":
        batch["cls"] = torch.arange(images) % 5
    else:
        sides = 0.2 + 0.4 * torch.rand(number, 4, generator=generator)
        batch |= {
            "batch_idx": torch.arange(images).repeat_interleave(2).float(),
            "cls": (torch.arange(number) % 2).float()[:, None] * (network.model[-1].nc > 1),
            "bboxes": sides,
            "masks": torch.zeros(images, side, side),
        }
        batch["masks"][:, side // 4 : side // 2, side // 4 : side // 2] = 1
        batch["masks"][:, side // 2 :, side // 2 :] = 2
        batch["sem_masks"] = batch["masks"].long() % 2
        points = getattr(network.model[-1], "kpt_shape", (17, 3))
        batch["keypoints"] = torch.rand(number, *points, generator=generator)
    return network.loss(batch)[0].sum()  # type: ignore[no-any-return]


def export(model: nn.Module, inputs: Tensor, path: Path) -> None:
    """Export with the framework's exporter, and compare with ONNX Runtime.

    Raises:
        RuntimeError: the file gives something else than the network.
    """
    network: Any = copy.deepcopy(model).eval()
    network.pt_path = path.with_suffix(".pt")  # it writes beside this
    file = Exporter(overrides={"format": "onnx", "imgsz": SIZE, "batch": 1, "simplify": False})(network)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(x) for x in session.run(None, {"images": np.asarray(inputs)}) if x.ndim > 1]
    if hasattr(network, "end2end"):
        network.end2end = False  # as the exporter does where it is not asked for the other head
    with torch.no_grad():
        answer = network(inputs)[0]
    expected = floats(answer)
    if network.model[-1].__class__.__name__ == "RTDETRDecoder":  # rounding may change the order of boxes
        expected, found = ([x[..., 4] for x in some] for some in (expected, found))
    apart = difference(expected, found)[1]
    if not apart < 1e-3:
        raise RuntimeError(f"the exported network differs by {apart:.1e}")
