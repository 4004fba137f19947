"""Seconds per epoch of a built-in model on images of CIFAR-10's size and number, on this machine.

python benchmarks/epoch.py [model] [images]
"""

import sys
import tempfile

import torch

from secateur.recipes.data import Dataset, Normalisation, Split
from secateur.recipes.models import build_model
from secateur.recipes.train import TrainConfig, fit

name = sys.argv[1] if len(sys.argv) > 1 else "resnet20"
images = int(sys.argv[2]) if len(sys.argv) > 2 else 50_000

torch.manual_seed(0)
data = Dataset(
    name="noise",
    train=Split(torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (images,))),
    test=Split(torch.randint(256, (10_000, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (10_000,))),
    classes=tuple("0123456789"),
    normalisation=Normalisation((0.5,) * 3, (0.25,) * 3),
    augment="shift+flip",
)
for precision in ("no", "bf16"):
    for channels_last in (True, False):
        config = TrainConfig(epochs=2, lr=0.01, precision=precision, channels_last=channels_last)
        with tempfile.TemporaryDirectory() as folder:
            last = fit(build_model(name), data, config, folder).history[-1]
        print(
            f"{name}, precision {precision!r}, channels_last {channels_last}: {last.seconds:.1f} s per epoch "
            f"with its test, {last.images_per_second:.0f} training images/s"
        )
