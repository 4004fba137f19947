"""CIFAR-10 and Fashion-MNIST: compressed arrays, decoded once, or the files that torchvision keeps."""

import contextlib
import hashlib
import lzma
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.errors import DataError, FileError
from secateur.files import replacing
from secateur.recipes.data.dataset import Dataset, Split
from secateur.recipes.normalisation import Normalisation


@dataclass(frozen=True)
class Known:
    """What is known about a data set before it is read: where it is found and what its labels mean."""

    prefix: str
    torchvision: str
    classes: tuple[str, ...]
    normalisation: Normalisation
    augment: str


KNOWN: Mapping[str, Known] = {
    "cifar10": Known(
        prefix="cifar10",
        torchvision="CIFAR10",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        normalisation=Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        augment="shift+flip",
    ),
    "fashion-mnist": Known(
        prefix="fashion_mnist",
        torchvision="FashionMNIST",
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        normalisation=Normalisation((0.2860,), (0.3530,)),
        augment="shift",
    ),
}


def load_known(name: str, folder: Path, download: bool) -> Dataset:
    """Load from compressed arrays in `folder` or `folder/name` if they are there, else through torchvision.

    Raises:
        DataError: neither is there, or a file is unreadable or of the wrong shape.
    """
    known = KNOWN[name]
    homes = [home for home in (folder, folder / name) if (home / f"{known.prefix}_train_labels.npy").exists()]
    if homes:
        train, test = (_from_arrays(homes[0], f"{known.prefix}_{part}") for part in ("train", "test"))
    else:
        train, test = (
            _from_torchvision(name, folder, part == "train", download) for part in ("train", "test")
        )
    return Dataset(name, train, test, known.classes, known.normalisation, known.augment)


def cache_folder() -> Path:
    """Where decoded arrays are kept: `$XDG_CACHE_HOME/secateur`, or `~/.cache/secateur`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"


def _from_arrays(home: Path, stem: str) -> Split:
    return _split(
        _decoded(home / f"{stem}_images.npy.xz"), _read(home / f"{stem}_labels.npy"), str(home / stem)
    )


def _decoded(path: Path) -> NDArray[Any]:
    """The array in an `.npy.xz` file. It is decoded once for each content and kept in the cache folder.

    Two processes may decode the same file at once: each writes its own temporary file, and the renames
    leave one whole file.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error
    cached = cache_folder() / f"{path.name.removesuffix('.npy.xz')}-{digest[:16]}.npy"
    with contextlib.suppress(DataError):  # not decoded yet, or damaged since
        return _read(cached)
    array = _read(path)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as temporary:
            np.save(temporary, array)
    except (OSError, FileError) as error:
        raise DataError(f"the decoded images need a cache, but {error} Set XDG_CACHE_HOME.") from error
    return array


def _read(path: Path) -> NDArray[Any]:
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            array: NDArray[Any] = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise _unreadable(path, error) from error
    return array


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return DataError(f"{path}: cannot be read: {reason}. Use another copy.")


def _from_torchvision(name: str, folder: Path, train: bool, download: bool) -> Split:
    known = KNOWN[name]
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{_not_found(name, folder)}, which needs: pip install 'secateur[vision]'") from error
    try:
        part = getattr(datasets, known.torchvision)(str(folder), train=train, download=download)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise DataError(f"{_not_found(name, folder)}, which says: {error}") from error
    return _split(np.asarray(part.data), np.asarray(part.targets), f"{folder} ({known.torchvision})")


def _not_found(name: str, folder: Path) -> str:
    return (
        f"data set {name!r}: found neither {KNOWN[name].prefix}_train_labels.npy in {folder} "
        f"or {folder / name}, nor the files of torchvision.datasets.{KNOWN[name].torchvision}"
    )


def _split(images: NDArray[Any], labels: NDArray[Any], what: str) -> Split:
    """Images (n, h, w) or (n, h, w, c) and labels (n,), as read, in the form of `Split`."""
    if images.ndim not in (3, 4) or images.dtype != np.uint8:
        raise DataError(
            f"{what}: images are {images.dtype} {images.shape}, expected uint8 (n, h, w) or (n, h, w, c)"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{what}: labels are {labels.dtype} {labels.shape}, expected integers of shape (n,)")
    pixels = torch.from_numpy(images)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return Split(pixels.contiguous(), torch.from_numpy(labels.astype(np.int64)))
