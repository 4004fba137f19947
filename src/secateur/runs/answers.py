"""What pruning did to a model's answers: by class, by confidence, and on single images."""

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.recipes.data import Dataset
from secateur.report.data import Bin, Calibration, ChangedImage, ClassAccuracy

_BINS = 15  # of confidence, as in Guo et al. 2017, arXiv:1706.04599
_SHOWN = 8  # images at most
_SIDE = 80  # pixels of a picture at most

Answers = Mapping[str, list[Any]]
"""Of each test image the class that a model names ("answers") and its probability ("confidences")."""


def tell_answers(data: Dataset, before: Answers | None, after: Answers) -> dict[str, Any]:
    """Fields of a `Report` that follow from the answers to the test images.

    Args:
        data: whose test images were answered.
        before: of the dense model; None: it is not known, and there is nothing to compare.
        after: of the pruned model.
    """
    labels = data.test.labels.numpy()
    fields: dict[str, Any] = {"calibration": {"after": calibrate(labels, after)}}
    if before is None:
        return fields
    old, new = np.array(before["answers"]), np.array(after["answers"])
    was, now = old == labels, new == labels
    fields["calibration"] = {"before": calibrate(labels, before), **fields["calibration"]}
    fields["classes"] = [
        classify(name, was[labels == number], now[labels == number])
        for number, name in enumerate(data.classes)
        if (labels == number).any()
    ]
    fields["answers"] = {
        "lost": int((was & ~now).sum()),
        "won": int((now & ~was).sum()),
        "other": int((~was & ~now & (old != new)).sum()),
        "same": int((old == new).sum()),
    }
    fields["changed"] = _changed(data, before, after, was, now)
    return fields


def classify(name: str, before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> ClassAccuracy:
    """One class.

    Args:
        name: of the class.
        before, after: (n,), whether each model is right.

    >>> right = np.ones(20, bool)
    >>> classify("cat", right, ~right).suffered, classify("dog", right, right).suffered
    (True, False)
    """
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    return ClassAccuracy(
        name=name,
        images=len(before),
        before=float(before.mean()),
        after=float(after.mean()),
        suffered=lost - won > 3 * math.sqrt(lost + won),  # chance: an image changes sides either way
    )


def calibrate(labels: npt.NDArray[np.int64], answers: Answers) -> Calibration:
    """Confidence beside accuracy, in bins of equal width.

    >>> calibrate(np.array([0, 1]), {"answers": [0, 0], "confidences": [0.75, 0.75]}).error
    0.25
    """
    sure = np.nan_to_num(np.array(answers["confidences"], dtype=float))
    right = np.array(answers["answers"]) == labels
    place = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    return Calibration(
        [
            Bin(int(mine.sum()), float(sure[mine].mean()), float(right[mine].mean()))
            if mine.any()
            else Bin(0, 0.0, 0.0)
            for mine in (place == number for number in range(_BINS))
        ]
    )


def _changed(
    data: Dataset,
    before: Answers,
    after: Answers,
    was: npt.NDArray[np.bool_],
    now: npt.NDArray[np.bool_],
) -> list[ChangedImage]:
    """Three in four that got worse, the rest that got better; those first of which the pruned model is surest."""
    sure = np.nan_to_num(np.array(after["confidences"], dtype=float))
    worse, better = (mask.nonzero()[0] for mask in (was & ~now, now & ~was))
    worse, better = (places[np.argsort(-sure[places], kind="stable")] for places in (worse, better))
    some = max(_SHOWN - len(better), 3 * _SHOWN // 4)
    chosen = [*worse[:some], *better][:_SHOWN]
    if not chosen or data.test.images.shape[1] not in (1, 3):
        return []
    indices = torch.tensor(np.array(chosen))
    images, _ = next(iter(data.test.batches([(indices, None)])))
    return [
        ChangedImage(
            index=int(index),
            label=data.classes[int(data.test.labels[index])],
            before=data.classes[before["answers"][index]],
            after=data.classes[after["answers"][index]],
            confidence_before=before["confidences"][index],
            confidence_after=after["confidences"][index],
            picture=picture_of(image),
        )
        for index, image in zip(chosen, images, strict=True)
    ]


def picture_of(image: Tensor) -> str:
    """An image (1 or 3, h, w), uint8, as a data URI of a few kilobytes."""
    from PIL import Image

    pixels = image.cpu().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    small, file = max(picture.size) <= 32, io.BytesIO()
    picture.thumbnail((_SIDE, _SIDE))
    picture.save(file, "PNG" if small else "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
