"""What becomes of a model's answers."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from secateur.recipes.data import Dataset, Normalisation, Split
from secateur.report.data import Bin
from secateur.runs.answers import calibrate, classify, picture_of, tell_answers

LABELS = [0, 0, 0, 0, 1, 1, 1, 1]
BEFORE = {"answers": [0, 0, 0, 1, 1, 1, 1, 0], "confidences": [0.9] * 8}
AFTER = {
    "answers": [0, 1, 1, 1, 1, 1, 2, 1],
    "confidences": [0.9, 0.6, 0.8, 0.9, 0.9, 0.9, 0.7, 0.5],
}


def data(channels: int = 1) -> Dataset:
    images = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, channels, 4, 4).contiguous()
    split = Split(images, torch.tensor(LABELS))
    normalisation = Normalisation((0.5,) * channels, (0.5,) * channels)
    return Dataset("toy", split, split, ("cat", "dog", "owl"), normalisation, "none")


def test_counts_of_answers():
    told = tell_answers(data(), BEFORE, AFTER)
    assert told["answers"] == {"lost": 3, "won": 1, "other": 0, "same": 4}
    assert [(one.name, one.images, one.before, one.after) for one in told["classes"]] == [
        ("cat", 4, 0.75, 0.25),
        ("dog", 4, 0.75, 0.75),  # no test image shows an owl
    ]


def test_the_surest_new_mistakes_are_shown_first():
    changed = tell_answers(data(), BEFORE, AFTER)["changed"]
    assert [(one.index, one.label, one.before, one.after) for one in changed] == [
        (2, "cat", "cat", "dog"),
        (6, "dog", "dog", "owl"),
        (1, "cat", "cat", "dog"),
        (7, "dog", "cat", "dog"),
    ]
    assert [one.confidence_after for one in changed] == [0.8, 0.7, 0.6, 0.5]
    picture = Image.open(io.BytesIO(base64.b64decode(changed[0].picture.partition(",")[2])))
    assert np.asarray(picture).tolist() == [[2] * 4] * 4
    assert tell_answers(data(channels=2), BEFORE, AFTER)["changed"] == []  # no picture shows two channels


def test_without_the_dense_model_there_is_nothing_to_compare():
    assert list(tell_answers(data(), None, AFTER)) == ["calibration"]


def test_only_clear_losses_count_as_suffering():
    def one(lost: int, won: int, same: int) -> bool:
        before = np.array([True] * lost + [False] * won + [True] * same)
        after = np.array([False] * lost + [True] * won + [True] * same)
        return classify("x", before, after).suffered

    assert not one(9, 0, 41)  # exactly three standard errors
    assert one(10, 0, 40)
    assert not one(20, 8, 22)
    assert one(25, 5, 20)


def test_calibration_by_the_definition():
    labels = np.array([0, 0, 1, 1, 1])
    found = calibrate(
        labels, {"answers": [0, 1, 1, 1, 0], "confidences": [0.95, 0.97, 0.5, 1.0, float("nan")]}
    )
    assert len(found.bins) == 15
    assert found.bins[0] == Bin(1, 0.0, 0.0)  # what is not a number is no confidence
    assert found.bins[7] == Bin(1, 0.5, 1.0)
    assert found.bins[14].images == 3
    assert found.bins[14].accuracy == pytest.approx(2 / 3)
    assert found.error == pytest.approx(0.2 * 0.5 + 0.6 * abs((0.95 + 0.97 + 1) / 3 - 2 / 3))


def test_pictures_are_small():
    noise = torch.randint(
        0, 256, (3, 300, 200), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    uri = picture_of(noise)
    assert uri.startswith("data:image/jpeg;base64,")
    assert 8 * len(uri) < 100_000
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (53, 80)
    assert picture_of(noise[:, :32, :32]).startswith("data:image/png;base64,")
    assert 8 * len(picture_of(noise[:, :32, :32])) < 100_000
