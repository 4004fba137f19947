"""Data sets by name."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from secateur.errors import DataError, unknown
from secateur.recipes.data.dataset import Dataset, Normalisation, Split, checked, stratified_split
from secateur.recipes.data.folder import load_imagefolder
from secateur.recipes.data.known import KNOWN, load_known

_SIZED = {"digits": 16, "imagefolder": 224}  # default side of the images where it is a choice


def list_data() -> list[str]:
    """Names that `load_data` knows, sorted.

    >>> list_data()
    ['cifar10', 'digits', 'fashion-mnist', 'imagefolder']
    """
    return sorted([*_SIZED, *KNOWN])


def load_data(
    name: str,
    folder: str | Path | None = None,
    *,
    normalisation: Normalisation | None = None,
    image_size: int | None = None,
    download: bool = False,
) -> Dataset:
    """Load a data set: into memory, or for image folders the list of its files.

    - `digits`: scikit-learn's 1,797 handwritten digits, which need no folder, enlarged to `image_size` (16).
    - `cifar10`, `fashion-mnist`: from `folder`, as compressed arrays (`cifar10_train_images.npy.xz`, …;
      decoded once into the user's cache folder) or in torchvision's layout.
    - `imagefolder`: `folder/train/CLASS/*.jpg` and `folder/val/…` or `folder/test/…`, read batch by
      batch as squares of `image_size` (224). Without a second folder a fifth of each class is set aside for testing.

    Args:
        name: which one.
        folder: where it lies.
        normalisation: instead of the data set's own, for weights that were trained with another.
        image_size: side of the images of `digits` and `imagefolder`.
        download: let torchvision fetch a data set that is not in `folder`.
    Raises:
        DataError: unknown name, missing or unreadable files; the message says which and what was expected.

    >>> data = load_data("digits")
    >>> data.train.images.shape, len(data.test), data.classes[:3]
    (torch.Size([1438, 1, 16, 16]), 359, ('0', '1', '2'))
    """
    if name not in list_data():
        raise DataError(unknown("data set", name, list_data()))
    if image_size is not None and (name not in _SIZED or image_size < 1):
        raise DataError(
            f"image_size {image_size}: expected a positive size, and digits or imagefolder, not {name}"
        )
    if name == "digits":
        data = _load_digits(image_size or _SIZED[name])
    elif folder is None:
        raise DataError(f"data set {name!r}: no folder given. Name the folder that holds it.")
    elif name == "imagefolder":
        data = load_imagefolder(Path(folder), image_size or _SIZED[name])
    else:
        data = load_known(name, Path(folder), download)
    return checked(replace(data, normalisation=normalisation or data.normalisation))


def _load_digits(image_size: int) -> Dataset:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).view(-1, 1, 8, 8) * (255 / 16)  # stored as 0..16
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    split = Split(images.round().to(torch.uint8), torch.from_numpy(labels).to(torch.int64))
    train, test = stratified_split(split, 0.2, seed=0)
    classes = tuple(str(digit) for digit in range(10))
    return Dataset("digits", train, test, classes, Normalisation((0.305,), (0.320,)), "shift")
