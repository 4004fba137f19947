"""Folders of images, one folder per class."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from secateur.errors import DataError
from secateur.recipes.data.dataset import Dataset, Normalisation, Split, stratified_split

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # nothing that runs another program, as EPS does
_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_imagefolder(folder: Path, image_size: int) -> Dataset:
    """Load `folder/train/CLASS/*` with `folder/val/…` or `folder/test/…`, or else `folder/CLASS/*`.

    Where there is neither `val` nor `test`, a fixed fifth of each class is set aside for testing.

    Args:
        folder: holds the images.
        image_size: side of the squares that are cut from the middle of each image.
    Raises:
        DataError: no images, a class without training images, or an image that cannot be read.
    """
    home = folder / "train" if (folder / "train").is_dir() else folder
    if not home.is_dir():
        raise DataError(
            f"data set 'imagefolder': {folder} is not a folder. Name the one that holds train/CLASS/*.jpg."
        )
    classes = tuple(sorted(_subfolders(home)))
    if len(classes) < 2:
        raise DataError(f"{home}: found {len(classes)} class folders, expected at least 2")
    train = _read_split(home, classes, image_size)
    empty = [name for label, name in enumerate(classes) if label not in train.labels]
    if empty:
        raise DataError(f"{home}: no images of the classes {', '.join(empty)}")
    tests = [folder / name for name in ("val", "test") if home != folder and (folder / name).is_dir()]
    if tests:
        test = _read_split(tests[0], classes, image_size)
    else:
        train, test = stratified_split(train, 0.2, seed=0)
    return Dataset("imagefolder", train, test, classes, _IMAGENET, "shift+flip")


def _read_split(home: Path, classes: tuple[str, ...], image_size: int) -> Split:
    extra = _subfolders(home) - set(classes)
    if extra:
        raise DataError(f"{home}: no training images of the classes {', '.join(sorted(extra))}")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in (home / name).rglob("*") if file.suffix.lower() in _SUFFIXES)
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"{home}: no images; expected CLASS/*.jpg (or {', '.join(sorted(_SUFFIXES))})")
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)

    def read(index: int) -> None:
        images[index] = _read_image(files[index], image_size)

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        list(pool.map(read, range(len(files))))
    return Split(images, torch.tensor(labels))


def _subfolders(home: Path) -> set[str]:
    return {child.name for child in home.iterdir() if child.is_dir() and not child.name.startswith(".")}


def _read_image(path: Path, image_size: int) -> Tensor:
    """The largest square in the middle of an image, scaled to (3, image_size, image_size), uint8."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            square = ImageOps.fit(image.convert("RGB"), (image_size, image_size), Image.Resampling.BILINEAR)
    except Exception as error:  # the decoders raise many kinds on hostile files
        raise DataError(f"{path}: cannot be read as an image: {error}. Remove or replace it.") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
