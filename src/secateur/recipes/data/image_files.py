"""Images that stay in their files until a batch needs them."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from secateur.errors import DataError

Crops = npt.NDArray[np.float64]
"""(n, 5), each 0..1: area, aspect, position across and down, and whether to mirror (from 0.5)."""

_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # nothing that runs another program, as EPS does
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
_CENTRE = 7 / 8
_AHEAD = 3  # batches that are read while one is in use


@dataclass(frozen=True)
class ImageFiles:
    """Images as files, which are read in threads, a few batches ahead.

    Args:
        paths: of the files.
        side: of the squares that they are read as.
    """

    paths: tuple[Path, ...]
    side: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, 3, side, side), as a tensor of all of them would have it."""
        return len(self), 3, self.side, self.side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> "ImageFiles":
        return ImageFiles(tuple(self.paths[i] for i in indices.tolist()), self.side)

    def batches(self, requests: Iterable[tuple[Tensor, Crops | None]]) -> Iterator[Tensor]:
        """Read batches, in order.

        Args:
            requests: for each batch the indices of its images, and how to crop them; None: the middle.
        Returns:
            an iterator of (n, 3, side, side), uint8.
        Raises:
            DataError: a file cannot be read as an image.
        """
        waiting: deque[list[Future[Tensor]]] = deque()
        pool = ThreadPoolExecutor(_readers())
        try:
            for indices, crops in requests:
                drawn: Iterable[npt.NDArray[np.float64] | None] = (
                    [None] * len(indices) if crops is None else crops
                )
                waiting.append(
                    [
                        pool.submit(read_image, self.paths[i], self.side, crop)
                        for i, crop in zip(indices.tolist(), drawn, strict=True)
                    ]
                )
                if len(waiting) > _AHEAD:
                    yield self._stacked(waiting.popleft())
            while waiting:
                yield self._stacked(waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _stacked(self, images: list[Future[Tensor]]) -> Tensor:
        stacked = torch.empty(len(images), *self.shape[1:], dtype=torch.uint8)
        for row, image in zip(stacked, images, strict=True):
            row.copy_(image.result())
        return stacked


def draw_crops(stream: np.random.Generator, count: int) -> Crops:
    """Random crops of the kind ImageNet networks are trained with, (count, 5)."""
    return stream.random((count, 5))


def read_image(path: Path, side: int, crop: npt.NDArray[np.float64] | None = None) -> Tensor:
    """A square of an image, scaled to (3, side, side), uint8.

    Without a crop it is the middle, seven eighths of the shorter side where that is longer than `side`, as
    networks for ImageNet are usually tested. A crop has 8 to 100 % of the area and an aspect of 3:4 to 4:3 (Szegedy et
    al. 2014, arXiv:1409.4842), and half of them are mirrored. Differs: a crop that is too wide or too high
    for the image is cut off there, not drawn again.

    Args:
        path: a BMP, JPEG, PNG or WebP file.
        side: of the result.
        crop: a row of `Crops`.
    Raises:
        DataError: it cannot be read as an image.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or np.inf):
                raise ValueError(f"{image.width} × {image.height} pixels could be a decompression bomb")
            if crop is None:
                share = _CENTRE if min(image.size) > side else 1.0
                middle = round(min(image.size) * share)
                left, top = (image.width - middle) / 2, (image.height - middle) / 2
                box = (left, top, left + middle, top + middle)
            else:
                (width, height), (left, top, right, bottom) = image.size, _box(image.size, crop)
                # a JPEG can be decoded at a half, a quarter or an eighth of its size, if that is enough
                image.draft("RGB", (int(width * side / (right - left)), int(height * side / (bottom - top))))
                across, down = image.width / width, image.height / height
                box = (
                    left * across,
                    top * down,
                    min(right * across, image.width),
                    min(bottom * down, image.height),
                )
            square = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box)
            if crop is not None and crop[4] >= 0.5:
                square = ImageOps.mirror(square)
    except Exception as error:  # the decoders raise many kinds on hostile files
        # other packages put an `Image.open` of their own in place, which then misses a decoder
        cause = error.__context__ if isinstance(error, ImportError) and error.__context__ else error
        raise DataError(f"{path}: cannot be read as an image: {cause}. Remove or replace it.") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _box(size: tuple[int, int], crop: npt.NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop, in pixels."""
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * crop[0]) * size[0] * size[1]
    aspect = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** crop[1]
    width, height = min(size[0], (area * aspect) ** 0.5), min(size[1], (area / aspect) ** 0.5)
    left, top = crop[2] * (size[0] - width), crop[3] * (size[1] - height)
    return left, top, left + width, top + height


def _readers() -> int:
    """Threads of this process that read: its share of the processors."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
