"""The table of data sets, and how one is loaded by its name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from secateur.errors import DataError, unknown
from secateur.imports import imported
from secateur.recipes.data.dataset import Dataset, Split, checked, stratified_split
from secateur.recipes.data.folder import load_imagefolder
from secateur.recipes.data.known import KNOWN, load_known
from secateur.recipes.normalisation import Normalisation


@dataclass(frozen=True)
class Source:
    """An entry of the table.

    Attributes:
        load: makes the data set; gets `folder`, `image_size` and `download` by name, as far as it takes them.
        image_size: default side of the images where it is a choice; None: it is not.
        in_folder: whether it lies in a folder that must be given.
        downloads: whether it can be fetched.
    """

    load: Callable[..., Dataset]
    image_size: int | None = None
    in_folder: bool = True
    downloads: bool = False


def list_data() -> list[str]:
    """Names that `load_data` knows, sorted.

    >>> list_data()
    ['cifar10', 'digits', 'fashion-mnist', 'imagefolder']
    """
    return sorted(DATA_SETS)


def load_data(
    name: str,
    folder: str | Path | None = None,
    *,
    normalisation: Normalisation | None = None,
    image_size: int | None = None,
    download: bool = False,
) -> Dataset:
    """Load a data set: into memory, or for image folders the list of its files.

    - `digits`: 1,797 handwritten digits that come with the package, enlarged to `image_size` (16).
    - `cifar10`, `fashion-mnist`: from `folder`, as compressed arrays (`cifar10_train_images.npy.xz`, …;
      decoded once into the user's cache folder) or in torchvision's layout.
    - `imagefolder`: `folder/train/CLASS/*.jpg` and `folder/val/…` or `folder/test/…`, read batch by
      batch as squares of `image_size` (224). Without a second folder a fifth of each class is set aside for testing.

    Args:
        name: which one; or `module:function` of your own, which is called with the folder and returns a `Dataset`.
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
    if ":" in name:
        data = imported("data set", name, DataError)(folder)
        if not isinstance(data, Dataset):
            raise DataError(
                f"data set {name!r}: got {type(data).__name__}; expected a secateur.recipes.data.Dataset"
            )
        return checked(replace(data, normalisation=normalisation or data.normalisation))
    if name not in DATA_SETS:
        raise DataError(unknown("data set", name, DATA_SETS))
    source = DATA_SETS[name]
    if image_size is not None and (source.image_size is None or image_size < 1):
        sized = " or ".join(name for name, one in DATA_SETS.items() if one.image_size)
        raise DataError(f"image_size {image_size}: expected a positive size, and {sized}, not {name}")
    given: dict[str, Any] = {}
    if source.image_size is not None:
        given["image_size"] = image_size or source.image_size
    if source.in_folder:
        if folder is None:
            raise DataError(f"data set {name!r}: no folder given. Name the folder that holds it.")
        given["folder"] = Path(folder)
    if source.downloads:
        given["download"] = download
    data = source.load(**given)
    return checked(replace(data, normalisation=normalisation or data.normalisation))


def _load_digits(image_size: int) -> Dataset:
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        pixels, labels = arrays["images"].astype(np.float64), arrays["labels"].astype(np.int64)
    images = torch.from_numpy(pixels).unsqueeze(1) * (255 / 16)  # stored as 0..16
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    split = Split(images.round().to(torch.uint8), torch.from_numpy(labels))
    train, test = stratified_split(split, 0.2, seed=0)
    classes = tuple(str(digit) for digit in range(10))
    return Dataset("digits", train, test, classes, Normalisation((0.305,), (0.320,)), "shift")


DATA_SETS: dict[str, Source] = {
    "digits": Source(_load_digits, image_size=16, in_folder=False),
    "imagefolder": Source(load_imagefolder, image_size=224),
    **{name: Source(partial(load_known, name), downloads=True) for name in KNOWN},
}
"""By name."""
