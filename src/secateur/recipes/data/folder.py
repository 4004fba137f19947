"""Folders of images, one folder per class."""

from pathlib import Path

import torch

from secateur.errors import DataError
from secateur.recipes.data.dataset import Dataset, Split, stratified_split
from secateur.recipes.data.image_files import ImageFiles, read_image
from secateur.recipes.normalisation import Normalisation

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_imagefolder(folder: Path, image_size: int) -> Dataset:
    """List `folder/train/CLASS/*` with `folder/val/…` or `folder/test/…`, or else `folder/CLASS/*`.

    The images stay in their files and are read batch by batch. Where there is neither `val` nor `test`, a fixed
    fifth of each class is set aside for testing.

    Args:
        folder: holds the images.
        image_size: side of the squares that images are read as.
    Raises:
        DataError: no images, a class without training images, or the first image cannot be read.
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
    there = set(train.labels.tolist())
    empty = [name for label, name in enumerate(classes) if label not in there]
    if empty:
        raise DataError(f"{home}: no images of the classes {', '.join(empty)}")
    tests = [folder / name for name in ("val", "test") if home != folder and (folder / name).is_dir()]
    if tests:
        test = _read_split(tests[0], classes, image_size)
    else:
        train, test = stratified_split(train, 0.2, seed=0)
    return Dataset("imagefolder", train, test, classes, _IMAGENET, "crop+flip")


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
    read_image(files[0], image_size)  # a folder of something else is better refused now than after an epoch
    return Split(ImageFiles(tuple(files), image_size), torch.tensor(labels))


def _subfolders(home: Path) -> set[str]:
    return {child.name for child in home.iterdir() if child.is_dir() and not child.name.startswith(".")}
