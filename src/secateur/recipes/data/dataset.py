"""A data set, in memory or in files, and choosing part of it."""

import itertools
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.recipes.data.image_files import Crops, ImageFiles
from secateur.recipes.normalisation import Normalisation


@dataclass(frozen=True)
class Split:
    """Images with their classes.

    Args:
        images: (n, c, h, w), uint8; or the files that hold them.
        labels: (n,), int64.
    """

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Split":
        """The images at `indices` (m,), in that order."""
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device | str) -> "Split":
        """The same images and labels on a device; images in files stay there."""
        if not isinstance(self.images, Tensor):
            return self
        return Split(self.images.to(device), self.labels.to(device))

    def batches(self, requests: Iterable[tuple[Tensor, Crops | None]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images (m, c, h, w), uint8, and labels (m,), in order.

        Args:
            requests: for each batch the indices of its images (m,), and how files are to be cropped.
        Raises:
            DataError: a file cannot be read as an image.
        """
        if isinstance(self.images, Tensor):
            for indices, _ in requests:
                yield self.images[indices], self.labels[indices]
            return
        first, second = itertools.tee(requests)
        for images, (indices, _) in zip(self.images.batches(first), second, strict=True):
            yield images, self.labels[indices]

    def checksum(self) -> int:
        """Of all labels, and of the first images or the names of all files: 32 bits."""
        if isinstance(self.images, Tensor):
            content = self.images[:100].cpu().numpy().tobytes()
        else:
            content = "\n".join(f"{path.parent.name}/{path.name}" for path in self.images.paths).encode()
        return zlib.crc32(self.labels.cpu().numpy().tobytes() + content)


@dataclass(frozen=True)
class Dataset:
    """A data set.

    Args:
        name: what it was loaded as.
        train: images to learn from.
        test: images to measure on.
        classes: what each label means.
        normalisation: how models expect the images.
        augment: the augmentation that suits the training images, one of `AUGMENTATIONS`.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    normalisation: Normalisation
    augment: str

    def subset(
        self, *, train_images: int | None = None, test_images: int | None = None, seed: int = 0
    ) -> "Dataset":
        """A smaller data set, as balanced over the classes as the images allow.

        The same seed gives the same images, and a smaller subset is part of a larger one.

        Args:
            train_images: how many to keep; None keeps all, in their order.
            test_images: how many to keep; None keeps all, in their order.
            seed: which ones.
        Raises:
            DataError: fewer images exist, or the number is not positive.
        """
        return replace(
            self,
            train=_balanced_part(self.train, train_images, seed, f"{self.name}, training images"),
            test=_balanced_part(self.test, test_images, seed, f"{self.name}, test images"),
        )


def _balanced_part(split: Split, count: int | None, seed: int, what: str) -> Split:
    if count is None:
        return split
    if not 0 < count <= len(split):
        raise DataError(f"{what}: cannot take {count} of {len(split)}. Choose between 1 and {len(split)}.")
    return split.take(balanced_order(split.labels, seed)[:count])


def balanced_order(labels: Tensor, seed: int) -> Tensor:
    """Indices of all images, such that every beginning of the list is balanced over the classes.

    Args:
        labels: (n,), int64.
        seed: which image of a class comes first.
    Returns:
        (n,), int64: the first images of each class in random order, then the second ones, and so on.

    >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
    >>> labels[balanced_order(labels, seed=0)].view(3, 2).sum(1)
    tensor([1, 1, 1])
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = labels.numpy()[shuffled]
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(by_class):
        members = by_class == label
        turn[members] = np.arange(members.sum())
    return torch.from_numpy(shuffled[np.argsort(turn, kind="stable")])


def stratified_split(split: Split, test_share: float, seed: int) -> tuple[Split, Split]:
    """Set a share of each class aside for testing.

    Args:
        split: images to divide.
        test_share: of each class, rounded, but at least one image stays on either side if there are two.
        seed: which ones.
    Returns:
        Training and test images, each in the order of `split`.
    """
    aside = torch.zeros(len(split), dtype=torch.bool)
    order = balanced_order(split.labels, seed)
    for label in range(int(split.labels.max()) + 1):
        members = order[split.labels[order] == label]
        count = max(0, min(max(1, round(test_share * len(members))), len(members) - 1))
        aside[members[:count]] = True
    return split.take((~aside).nonzero().flatten()), split.take(aside.nonzero().flatten())


def checked(dataset: Dataset) -> Dataset:
    """The data set itself, once images, labels, classes and normalisation fit together.

    Raises:
        DataError: they do not.
    """
    channels = {dataset.train.images.shape[1], dataset.test.images.shape[1]}
    _require(len(channels) == 1, dataset, f"channels of training and test images: {channels}")
    lengths = {len(dataset.normalisation.mean), len(dataset.normalisation.std)}
    _require(lengths == channels, dataset, f"normalisation of {lengths} channels, images of {channels}")
    for what, split in (("train", dataset.train), ("test", dataset.test)):
        _require(len(split) > 0, dataset, f"{what}: no images")
        _require(
            len(split.images) == len(split),
            dataset,
            f"{what}: {len(split.images)} images, {len(split)} labels",
        )
        lowest, highest = int(split.labels.min()), int(split.labels.max())
        _require(
            0 <= lowest <= highest < len(dataset.classes),
            dataset,
            f"{what}: labels {lowest} to {highest}, expected 0 to {len(dataset.classes) - 1}",
        )
    return dataset


def _require(fits: bool, dataset: Dataset, message: str) -> None:
    if not fits:
        raise DataError(f"data set {dataset.name!r}: {message}")
