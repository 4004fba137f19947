"""A tiny training in Ultralytics: a classifier of four layers, on images of 32 × 32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ultralytics import YOLO

from secateur.integrations.ultralytics import Prune
from tests.integrations.examples import KEEP

NETWORK = """
nc: 2
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C2f, [32, True]]
head:
  - [-1, 1, Classify, [nc]]
"""
EPOCHS, BATCHES = 4, 4


def prepare(folder: Path) -> None:
    """Bright and dark images, and the network's configuration."""
    (folder / "tiny-cls.yaml").write_text(NETWORK)
    random = np.random.default_rng(0)
    for split, number in (("train", 4 * BATCHES), ("val", 2)):
        for offset, name in enumerate(("dark", "bright")):
            where = folder / "data" / split / name
            where.mkdir(parents=True)
            for image in range(number):
                pixels = random.random((32, 32, 3)) * 120 + 120 * offset
                Image.fromarray(pixels.astype("uint8")).save(where / f"{image}.png")


def run(
    method: Any,
    folder: Path,
    name: str,
    *,
    resume: Path | None = None,
    events: dict[str, Callable[[Any], None]] | None = None,
    **options: Any,
) -> tuple[YOLO, Prune]:
    """Train, with 8 images in a batch and in a step."""
    given = options.pop("given", {})
    model = YOLO(resume or folder / "tiny-cls.yaml", task="classify")
    for event, function in (events or {}).items():
        model.add_callback(event, function)
    prune = Prune(method, budget=KEEP, **given).add_to(model)
    arguments: dict[str, Any] = {
        "data": str(folder / "data"),
        "epochs": EPOCHS,
        "imgsz": 32,
        "batch": 8,
        "nbs": 8,
        "warmup_epochs": 0,
        "optimizer": "SGD",
        "lr0": 0.05,
        "device": "cpu",
        "workers": 0,
        "plots": False,
        "verbose": False,
        "project": str(folder / "runs"),
        "name": name,
    }
    model.train(**({"resume": True} if resume else {**arguments, **options}))
    return model, prune
