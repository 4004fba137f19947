"""Batches: any run, on any number of ranks, sees the same images in the same order."""

import functools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import DataError, unknown
from secateur.recipes.data.dataset import Split
from secateur.recipes.data.image_files import Crops, ImageFiles, draw_crops
from secateur.recipes.normalisation import Normalisation

AUGMENTATIONS = ("none", "shift", "shift+flip", "crop+flip")


class Batches:
    """Normalised batches of a split, by epoch.

    Global batch k of epoch e, augmentation included, is a pure function of (seed, e, k). Rank r takes its
    contiguous part of it, so a run that is resumed, or continued on another number of ranks, sees what an
    uninterrupted run would have seen. Iterating the object itself gives epoch 0.

    Args:
        split: the images. Those in memory move to `device` whole, as uint8; of those in files, each batch does.
        batch_size: images per global batch, a multiple of `world_size`.
        normalisation: applied last.
        augment: "none"; "shift" moves each image by up to an eighth of its side, zeros coming in, which for
            32×32 images is the usual pad-by-4-and-crop; "shift+flip" also mirrors half of the images;
            "crop+flip" takes crops of all sizes out of images that lie in files, and mirrors half of them.
        shuffle: draw a new order for each epoch; else the order of the split.
        alternate_flips: mirror each image in every second epoch, in place of by chance: one half of them, which the
            seed chooses, in even epochs, the others in odd ones.
        drop_last: leave out the last batch if it is smaller than `batch_size`.
        seed: of order and augmentation, at least 0.
        rank: which part of each global batch to yield; it may be empty if the last one is very small.
        world_size: into how many parts global batches are divided.
        device: where the images are kept, augmented and yielded.
        channels_last: yield images in the channels-last memory format.
    Raises:
        DataError: unknown augmentation, sizes that do not fit, or not a single batch.

    >>> split = Split(torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.arange(10))
    >>> batches = Batches(split, batch_size=4, normalisation=Normalisation((0.,) * 3, (1.,) * 3))
    >>> [y.tolist() for x, y in batches]
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        normalisation: Normalisation,
        augment: str = "none",
        shuffle: bool = False,
        alternate_flips: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise DataError(unknown("augmentation", augment, AUGMENTATIONS))
        if augment == "crop+flip" and not isinstance(split.images, ImageFiles):
            raise DataError(
                "augmentation 'crop+flip' cuts images while they are read from files, and these are in memory; "
                "choose 'shift+flip'"
            )
        if batch_size < 1 or batch_size % world_size:
            raise DataError(
                f"batch_size {batch_size}: expected a positive multiple of the {world_size} ranks"
            )
        self.split = split.to(device)
        self.batch_size = batch_size
        self.normalisation = normalisation
        self.augment = augment
        self.shuffle = shuffle
        self.alternate_flips = alternate_flips
        self.drop_last = drop_last
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        if len(self) == 0:
            raise DataError(
                f"batch_size {batch_size} is larger than the {len(split)} images. Choose a smaller one."
            )

    def __len__(self) -> int:
        """Batches per epoch."""
        return (
            len(self.split) // self.batch_size if self.drop_last else -(-len(self.split) // self.batch_size)
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch.

        Args:
            epoch: which one, from 0.
            start_batch: batches that an interrupted run has already seen.
        Returns:
            An iterator of images (n, c, h, w), float32, and labels (n,), int64.
        """
        order = torch.arange(len(self.split))
        if self.shuffle:
            order = torch.from_numpy(_stream(self.seed, epoch, 0).permutation(len(self.split)))
        numbers = range(start_batch, len(self))
        parts = self.split.batches(self._request(order, epoch, batch) for batch in numbers)
        for batch, (images, labels) in zip(numbers, parts, strict=True):
            chosen = order[batch * self.batch_size :][: self.batch_size]
            images = self._shifted(images.to(self.device), epoch, batch, chosen)
            yield self.normalisation(images, self.memory_format), labels.to(self.device)

    def _request(self, order: Tensor, epoch: int, batch: int) -> tuple[Tensor, Crops | None]:
        """This rank's images of a global batch, and their crops."""
        indices, mine = order[batch * self.batch_size :][: self.batch_size], self._mine(batch)
        if self.augment != "crop+flip":
            return indices[mine], None
        crops = draw_crops(_stream(self.seed, epoch, 1 + batch), len(indices))
        if self.alternate_flips:
            crops[:, 4] = self._mirrored(indices, epoch).numpy()
        return indices[mine], crops[mine.numpy()]

    def _shifted(self, images: Tensor, epoch: int, batch: int, chosen: Tensor) -> Tensor:
        if not self.augment.startswith("shift"):
            return images
        reach, mine = (images.shape[2] // 8, images.shape[3] // 8), self._mine(batch)
        down, right, mirror = _draw(_stream(self.seed, epoch, 1 + batch), self._images(batch), reach)
        if self.augment == "shift":
            mirror[:] = False
        elif self.alternate_flips:
            mirror = self._mirrored(chosen, epoch)
        return shift(images, down[mine], right[mine], mirror[mine])

    def _mirrored(self, chosen: Tensor, epoch: int) -> Tensor:
        """Which of the chosen images are mirrored in an epoch, where flips alternate, (n,), bool."""
        return self._halves[chosen] ^ bool(epoch % 2)

    @functools.cached_property
    def _halves(self) -> Tensor:
        """Which images are mirrored in even epochs, (images,), bool."""
        drawn = np.random.default_rng((self.seed, 0, 0, 1)).integers(0, 2, len(self.split))
        return torch.from_numpy(drawn.astype(bool))

    def _images(self, batch: int) -> int:
        """How many images a global batch has."""
        return min(self.batch_size, len(self.split) - batch * self.batch_size)

    def _mine(self, batch: int) -> Tensor:
        """Which images of a global batch are this rank's."""
        return torch.arange(self._images(batch)).tensor_split(self.world_size)[self.rank]


def shift(images: Tensor, down: Tensor, right: Tensor, mirror: Tensor) -> Tensor:
    """Move each image by its own offsets, zeros coming in, and mirror some of the results left to right.

    Args:
        images: (n, c, h, w), any dtype.
        down: (n,), int64: pixels; negative moves up.
        right: (n,), int64: pixels; negative moves left.
        mirror: (n,), bool.
    Returns:
        As `images`.

    >>> one, left, same = torch.tensor([1]), torch.tensor([-1]), torch.tensor([False])
    >>> shift(torch.tensor([[[[1, 2], [3, 4]]]]), one, left, same).tolist()
    [[[[0, 0], [2, 0]]]]
    """
    n, c, h, w = images.shape
    reach = int(torch.stack([down, right]).abs().max()) if n else 0
    padded = F.pad(images, (reach, reach, reach, reach))
    columns = torch.where(mirror[:, None], torch.arange(w).flip(0), torch.arange(w))
    columns = (columns + (reach - right)[:, None]).to(images.device)  # n, w
    rows = (torch.arange(h) + (reach - down)[:, None]).to(images.device)  # n, h
    source = rows[:, :, None] * (w + 2 * reach) + columns[:, None, :]  # n, h, w
    source = source.view(n, 1, h * w).expand(n, c, h * w)
    return padded.flatten(2).gather(2, source).view(n, c, h, w)


def _draw(stream: np.random.Generator, count: int, reach: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets down and right (int64) and whether to mirror (bool), each (count,)."""
    down = stream.integers(-reach[0], reach[0] + 1, count)
    right = stream.integers(-reach[1], reach[1] + 1, count)
    mirror = stream.integers(0, 2, count).astype(bool)
    return torch.from_numpy(down), torch.from_numpy(right), torch.from_numpy(mirror)


def _stream(seed: int, epoch: int, number: int) -> np.random.Generator:
    """An independent random stream for each triple; number 0 orders the epoch, 1 + k augments batch k."""
    return np.random.default_rng((seed, epoch, number))
