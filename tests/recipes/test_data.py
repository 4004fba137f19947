"""Batches are reproducible whatever the number of ranks; damaged files are named."""

import lzma
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from secateur.errors import DataError
from secateur.recipes.data import AUGMENTATIONS, Batches, Normalisation, Split, image_files, load_data
from secateur.recipes.data.batches import shift
from secateur.recipes.data.dataset import balanced_order, stratified_split
from secateur.recipes.data.known import cache_folder

LAW = settings(deadline=None, derandomize=True)
PLAIN = Normalisation((0.0,) * 3, (1.0,) * 3, scale=1.0)


def pictures(count: int, side: int = 16) -> Split:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(1, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count) % 10)


def training(split: Split, **options) -> Batches:
    defaults = {"batch_size": 8, "augment": "shift+flip", "shuffle": True, "seed": 3}
    return Batches(split, normalisation=PLAIN, **defaults | options)


def same(first, second) -> bool:
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, second, strict=True)
    )


# Batches


def test_batches_are_a_function_of_seed_and_epoch():
    split = pictures(40)
    assert same(training(split).epoch(2), training(split).epoch(2))
    assert not same(training(split).epoch(2), training(split).epoch(3))
    assert not same(training(split).epoch(2), training(split, seed=4).epoch(2))
    assert same(training(split), training(split).epoch(0))


def test_order_and_augmentation_of_neighbouring_epochs_are_unrelated():
    split = pictures(40)
    labels = [torch.cat([y for _, y in training(split, seed=s).epoch(e)]) for s in (0, 1) for e in (0, 1, 2)]
    assert len({tuple(order.tolist()) for order in labels}) == 6


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_see_the_batch_of_a_single_rank(world_size):
    split = pictures(44)  # the last batch of 4 is partial
    ranks = [list(training(split, rank=r, world_size=world_size).epoch(1)) for r in range(world_size)]
    together = [
        tuple(torch.cat([part[i] for part in parts]) for i in (0, 1)) for parts in zip(*ranks, strict=True)
    ]
    assert same(together, training(split).epoch(1))


@pytest.mark.parametrize("start", [0, 1, 5])
def test_starting_later_equals_continuing(start):
    split = pictures(44)
    assert same(training(split).epoch(1, start_batch=start), list(training(split).epoch(1))[start:])


def test_an_epoch_has_each_image_once():
    split = pictures(44)
    batches = Batches(split, batch_size=8, normalisation=PLAIN, shuffle=True)
    seen = torch.cat([x for x, _ in batches.epoch(5)])
    as_rows = {tuple(row.tolist()) for row in seen.flatten(1).to(torch.uint8)}
    assert as_rows == {tuple(row.tolist()) for row in split.images.flatten(1)}
    assert len(batches) == 6
    assert len(list(batches)) == 6


def test_evaluation_is_in_order_and_whole():
    split = pictures(44)
    batches = Batches(split, batch_size=8, normalisation=PLAIN)
    assert torch.equal(torch.cat([x for x, _ in batches]), split.images.float())
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)


def test_drop_last_leaves_the_partial_batch_out():
    assert [len(y) for _, y in training(pictures(44), drop_last=True)] == [8] * 5


def test_channels_last_changes_the_layout_only():
    split = pictures(16)
    x, _ = next(iter(training(split, channels_last=True)))
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == torch.float32
    assert torch.equal(x, next(iter(training(split)))[0])


def test_images_in_memory_are_kept_on_the_device():
    """Not copied there batch by batch; "meta" is a device, too, whose tensors have no values."""
    batches = training(pictures(12), device="meta")
    assert batches.split.images.device.type == batches.split.labels.device.type == "meta"
    assert [(x.device.type, len(y)) for x, y in batches] == [("meta", 8), ("meta", 4)]


@pytest.mark.parametrize("side", [8, 16, 28])
@pytest.mark.parametrize("augment", ["shift", "shift+flip"])
def test_every_sample_is_moved_and_mirrored_on_its_own(side, augment):
    """The augmented image is one of the shifts of its original, and all kinds of shifts occur."""
    split = pictures(64, side)
    x, _ = next(iter(training(split, batch_size=64, augment=augment, shuffle=False)))
    reach = side // 8
    seen = set()
    for image, original in zip(x, split.images, strict=True):
        seen.add(find_shift(image, original, reach))
    downs, rights, mirrors = (set(values) for values in zip(*seen, strict=True))
    assert downs == rights == set(range(-reach, reach + 1))
    assert mirrors == ({False} if augment == "shift" else {False, True})


def test_alternating_flips_show_each_image_both_ways_in_two_epochs():
    split = pictures(40)
    batches = training(split, alternate_flips=True, shuffle=False)
    seen = [
        [
            find_shift(*pair, reach=2)[2]
            for x, _ in [*batches.epoch(epoch)]
            for pair in zip(x, rest, strict=False)
        ]
        for epoch in range(4)
        for rest in [iter(split.images)]
    ]
    assert (
        seen[0] == seen[2] == [not mirrored for mirrored in seen[1]] == [not mirrored for mirrored in seen[3]]
    )
    assert 8 <= sum(seen[0]) <= 32


def test_no_two_batches_share_their_augmentation():
    split = pictures(40)
    batches = training(split, shuffle=False)
    shifts = {
        tuple(find_shift(*pair, reach=2) for pair in zip(x, split.images[8 * k :], strict=False))
        for epoch in (0, 1)
        for k, (x, _) in enumerate(batches.epoch(epoch))
    }
    assert len(shifts) == 10


def find_shift(image: torch.Tensor, original: torch.Tensor, reach: int) -> tuple[int, int, bool]:
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            for mirror in (False, True):
                if torch.equal(image, cropped(original, down, right, mirror, reach).float()):
                    return down, right, mirror
    raise AssertionError("not a shift of the original")


def cropped(image: torch.Tensor, down: int, right: int, mirror: bool, reach: int) -> torch.Tensor:
    """Pad and crop, as the papers say it."""
    _, h, w = image.shape
    crop = F.pad(image, (reach,) * 4)[:, reach - down :, reach - right :][:, :h, :w]
    return crop.flip(2) if mirror else crop


def slow_shift(image: torch.Tensor, down: int, right: int, mirror: bool) -> torch.Tensor:
    """One pixel at a time."""
    moved = torch.zeros_like(image)
    _, h, w = image.shape
    for row in range(h):
        for column in range(w):
            if 0 <= row - down < h and 0 <= column - right < w:
                moved[:, row, column] = image[:, row - down, column - right]
    return moved.flip(2) if mirror else moved


@LAW
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.booleans()), min_size=1, max_size=4),
    st.integers(3, 6),
    st.integers(3, 6),
)
def test_shift_equals_its_slow_version(moves, h, w):
    images = torch.arange(len(moves) * 2 * h * w).view(len(moves), 2, h, w)
    down, right, mirror = (torch.tensor(values) for values in zip(*moves, strict=True))
    slow = torch.stack([slow_shift(image, *move) for image, move in zip(images, moves, strict=True)])
    assert torch.equal(shift(images, down, right, mirror), slow)


def test_normalisation_is_its_formula():
    split = pictures(4)
    normalisation = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (normalisation.mean, normalisation.std))
    torch.testing.assert_close(normalisation(split.images), (split.images / 255 - mean) / std)
    assert split.images.dtype == torch.uint8


def test_normalisation_never_writes_its_input():
    images = torch.ones(1, 1, 2, 2)
    Normalisation((0.5,), (0.5,))(images)
    assert torch.equal(images, torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "rotate"}, "unknown augmentation 'rotate'; choose one of: crop\\+flip, none, shift"),
        ({"augment": "crop+flip"}, "these are in memory; choose 'shift\\+flip'"),
        ({"batch_size": 6, "world_size": 4}, "multiple of the 4 ranks"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 64, "drop_last": True}, "larger than the 44 images"),
    ],
)
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        training(pictures(44), **options)


# Parts of a data set


def test_subsets_are_balanced_fixed_and_nested():
    digits = load_data("digits")
    part = digits.subset(train_images=100, seed=1)
    assert torch.bincount(part.train.labels).tolist() == [10] * 10
    assert part.test is digits.test
    assert torch.equal(part.train.images, digits.subset(train_images=100, seed=1).train.images)
    assert torch.equal(part.train.images[:35], digits.subset(train_images=35, seed=1).train.images)
    assert not torch.equal(part.train.images, digits.subset(train_images=100, seed=2).train.images)
    assert len(digits.subset(test_images=20).test) == 20


@pytest.mark.parametrize("count", [0, -1, 1439])
def test_impossible_subsets_are_refused(count):
    with pytest.raises(DataError, match=f"cannot take {count} of 1438"):
        load_data("digits").subset(train_images=count)


@LAW
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 3))
def test_balanced_order_is_a_permutation_with_balanced_beginnings(labels, seed):
    labels = torch.tensor(labels)
    order = balanced_order(labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    available = torch.bincount(labels, minlength=5)
    for end in range(1, len(labels) + 1):
        taken = torch.bincount(labels[order[:end]], minlength=5)
        unfinished = taken[taken < available]
        assert not len(unfinished) or unfinished.min() >= taken.max() - 1


@LAW
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 3))
def test_stratified_split_divides_each_class(labels, seed):
    labels = torch.tensor(labels)
    split = Split(torch.arange(len(labels)).view(-1, 1, 1, 1), labels)
    train, test = stratified_split(split, 0.2, seed)
    together = torch.cat([train.images, test.images]).flatten()
    assert sorted(together.tolist()) == list(range(len(labels)))
    for label in labels.unique():
        count, aside = int((labels == label).sum()), int((test.labels == label).sum())
        assert aside == (min(max(1, round(0.2 * count)), count - 1))


# Data sets


def test_digits_need_nothing_and_are_fixed():
    first, second = load_data("digits"), load_data("digits", image_size=32)
    assert first.train.images.dtype == torch.uint8
    assert first.train.images.shape == (1438, 1, 16, 16)
    assert second.test.images.shape == (359, 1, 32, 32)
    assert torch.equal(first.test.labels, second.test.labels)
    assert first.augment in AUGMENTATIONS
    pixels = first.normalisation(first.train.images)
    assert abs(float(pixels.mean())) < 0.01
    assert abs(float(pixels.std()) - 1) < 0.01


@pytest.mark.parametrize(
    ("name", "folder", "options", "message"),
    [
        ("cifar11", None, {}, "unknown data set 'cifar11'; choose one of: cifar10, digits"),
        ("cifar10", None, {}, "'cifar10': no folder given"),
        ("cifar10", "nowhere", {}, r"cifar10_train_labels.npy in nowhere .*torchvision.datasets.CIFAR10"),
        ("fashion-mnist", "nowhere", {}, r"fashion_mnist_train_labels.npy in nowhere"),
        ("imagefolder", "nowhere", {}, "nowhere is not a folder"),
        ("cifar10", "nowhere", {"image_size": 16}, "digits or imagefolder, not cifar10"),
        ("digits", None, {"image_size": 0}, "image_size 0"),
        ("digits", None, {"normalisation": PLAIN}, "normalisation of \\{3} channels, images of \\{1}"),
    ],
)
def test_what_cannot_be_loaded_is_said(name, folder, options, message):
    with pytest.raises(DataError, match=message):
        load_data(name, folder, **options)


@pytest.fixture
def arrays(tmp_path, monkeypatch) -> Path:
    """A folder with a tiny CIFAR-10 as compressed arrays, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home = tmp_path / "cifar10"
    home.mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 10)):
        images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
        with lzma.open(home / f"cifar10_{part}_images.npy.xz", "wb") as file:
            np.save(file, images)
        np.save(home / f"cifar10_{part}_labels.npy", np.arange(count, dtype=np.uint8) % 10)
    return home


def raw_images(home: Path, part: str) -> torch.Tensor:
    with lzma.open(home / f"cifar10_{part}_images.npy.xz") as file:
        return torch.from_numpy(np.load(file)).permute(0, 3, 1, 2)


def test_arrays_are_decoded_once(arrays):
    first = load_data("cifar10", arrays)
    assert torch.equal(first.train.images, raw_images(arrays, "train"))
    assert first.train.labels.dtype == torch.int64
    cached = {file: file.stat().st_mtime_ns for file in cache_folder().iterdir()}
    assert len(cached) == 2
    second = load_data("cifar10", arrays.parent)  # the folder above is as good
    assert torch.equal(second.train.images, first.train.images)
    assert {file: file.stat().st_mtime_ns for file in cache_folder().iterdir()} == cached


def test_a_changed_source_is_decoded_anew(arrays):
    load_data("cifar10", arrays)
    shutil.copy(arrays / "cifar10_test_images.npy.xz", arrays / "cifar10_train_images.npy.xz")
    shutil.copy(arrays / "cifar10_test_labels.npy", arrays / "cifar10_train_labels.npy")
    assert torch.equal(load_data("cifar10", arrays).train.images, raw_images(arrays, "test"))


def test_a_damaged_cache_is_decoded_anew(arrays):
    load_data("cifar10", arrays)
    for file in cache_folder().iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(load_data("cifar10", arrays).train.images, raw_images(arrays, "train"))


def test_decoding_twice_at_once_is_safe(arrays):
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_data("cifar10", arrays), range(8)))
    assert all(torch.equal(data.train.images, raw_images(arrays, "train")) for data in loaded)
    assert len(list(cache_folder().iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_said(arrays, monkeypatch):
    (arrays / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(arrays / "file"))
    with pytest.raises(DataError, match="Set XDG_CACHE_HOME"):
        load_data("cifar10", arrays)


def test_damaged_arrays_are_named(arrays):
    good = {file.name: file.read_bytes() for file in arrays.iterdir()}
    damages = {
        "cifar10_train_images.npy.xz": [b"", good["cifar10_train_images.npy.xz"][:200], b"not xz at all"],
        "cifar10_test_labels.npy": [b"", good["cifar10_test_labels.npy"][:-3], b"\x93NUMPY garbage"],
    }
    for name, contents in damages.items():
        for content in contents:
            (arrays / name).write_bytes(content)
            with pytest.raises(DataError, match=name):
                load_data("cifar10", arrays)
        (arrays / name).write_bytes(good[name])
    (arrays / "cifar10_test_images.npy.xz").unlink()
    with pytest.raises(DataError, match="cifar10_test_images"):
        load_data("cifar10", arrays)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(20, dtype=np.uint8), "labels 0 to 19, expected 0 to 9"),
        (np.arange(20, dtype=np.int64) - 15, "labels -15 to 4"),
        (np.zeros(19, np.uint8), "20 images, 19 labels"),
        (np.zeros((20, 1), np.uint8), r"labels are uint8 \(20, 1\)"),
        (np.zeros(20, np.float32), "labels are float32"),
        (np.array([{}] * 20), "cannot be read"),  # would need pickle
    ],
)
def test_labels_that_do_not_fit_are_refused(arrays, labels, message):
    np.save(arrays / "cifar10_train_labels.npy", labels)
    with pytest.raises(DataError, match=message):
        load_data("cifar10", arrays)


def test_images_that_do_not_fit_are_refused(arrays):
    with lzma.open(arrays / "cifar10_train_images.npy.xz", "wb") as file:
        np.save(file, np.zeros((20, 32, 32, 3), np.float32))
    with pytest.raises(DataError, match="images are float32"):
        load_data("cifar10", arrays)


def test_torchvisions_layout(tmp_path):
    pytest.importorskip("torchvision")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        pixels = bytes(count * 28 * 28 - 1) + b"\x07"
        header = struct.pack(">IIII", 0x0803, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x0801, count) + bytes(count))
    data = load_data("fashion-mnist", tmp_path)
    assert data.train.images.shape == (20, 1, 28, 28)
    assert data.test.images[-1, 0, -1, -1] == 7
    assert len(data.test) == 10


def test_published_arrays_are_whole(shared_data):
    cifar10, fashion = load_data("cifar10", shared_data), load_data("fashion-mnist", shared_data)
    for data, channels in ((cifar10, 3), (fashion, 1)):
        assert data.train.images.shape[1] == channels
        for channel, (mean, std) in enumerate(
            zip(data.normalisation.mean, data.normalisation.std, strict=True)
        ):
            counts = torch.bincount(data.train.images[:, channel].flatten(), minlength=256).double()
            share, level = counts / counts.sum(), torch.arange(256) / 255
            measured = float(share @ level.double())
            assert abs(measured - mean) < 2e-4
            assert abs(float(share @ (level.double() - measured) ** 2) ** 0.5 - std) < 2e-4
        assert torch.bincount(data.test.labels).tolist() == [1000] * 10


# Folders of images


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of ten images, in several formats, modes and sizes, under `train`."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        home = tmp_path / "train" / name
        home.mkdir(parents=True)
        for index in range(10):
            mode, shape = (("RGB", (20, 30, 3)), ("L", (40, 10)), ("RGBA", (9, 9, 4)))[index % 3]
            pixels = generator.integers(100 * label, 100 * label + 100, shape, np.uint8)
            Image.fromarray(pixels, mode).save(home / f"{index}.png")
        (home / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    return tmp_path


def everything(*splits: Split) -> torch.Tensor:
    return torch.cat([next(split.batches([(torch.arange(len(split)), None)]))[0] for split in splits])


def test_imagefolder_sets_a_fixed_part_aside(folder):
    for home in (folder, folder / "train"):
        data = load_data("imagefolder", home, image_size=12)
        assert data.classes == ("cat", "dog")
        assert data.train.images.shape == (16, 3, 12, 12)
        assert data.test.labels.tolist() == [0, 0, 1, 1]
        images = everything(data.test)
        assert images.dtype == torch.uint8
        assert images[:2].max() < 100 <= images[2:].min()
        assert data.test.images.paths == load_data("imagefolder", home, image_size=12).test.images.paths


@pytest.mark.parametrize("name", ["val", "test"])
def test_imagefolder_takes_the_test_images_that_there_are(folder, name):
    (folder / name / "dog").mkdir(parents=True)
    pixels = np.zeros((30, 10, 3), np.uint8)
    pixels[10:20] = (10, 20, 30)  # the middle square
    Image.fromarray(pixels).save(folder / name / "dog" / "one.png")
    data = load_data("imagefolder", folder, image_size=10)
    assert len(data.train) == 20
    assert data.test.labels.tolist() == [1]
    assert torch.equal(everything(data.test)[0], torch.from_numpy(pixels[10:20]).permute(2, 0, 1))


def png_bomb(side: int) -> bytes:
    """A PNG whose header promises side × side pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("truncated", ""),
        ("empty", "cannot identify"),
        ("text", "cannot identify"),
        ("bomb", ".*decompression bomb"),  # not decoded to find out that it is truncated
        ("huge bomb", ".*decompression bomb"),
        ("eps", "cannot identify"),  # not handed to an interpreter
    ],
)
def test_hostile_images_are_named(folder, damage, reason):
    file = folder / "train" / "dog" / "3.png"
    file.write_bytes(
        {
            "truncated": file.read_bytes()[:100],
            "empty": b"",
            "text": b"not an image",
            "bomb": png_bomb(10_000),
            "huge bomb": png_bomb(100_000),
            "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        }[damage]
    )
    data = load_data("imagefolder", folder, image_size=12)
    with pytest.raises(DataError, match=rf"dog.3\.png: cannot be read as an image: {reason}"):
        everything(data.train, data.test)
    (folder / "train" / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"cat.0\.png: cannot be read"):  # without reading all of them
        load_data("imagefolder", folder)


def test_imagefolder_without_a_use_is_refused(folder):
    (folder / "val" / "bird").mkdir(parents=True)
    with pytest.raises(DataError, match="no training images of the classes bird"):
        load_data("imagefolder", folder, image_size=12)
    shutil.rmtree(folder / "val")
    (folder / "train" / "bird").mkdir()
    with pytest.raises(DataError, match="no images of the classes bird"):
        load_data("imagefolder", folder, image_size=12)
    shutil.rmtree(folder / "train" / "bird")
    shutil.rmtree(folder / "train" / "cat")
    with pytest.raises(DataError, match="1 class folders, expected at least 2"):
        load_data("imagefolder", folder, image_size=12)
    shutil.rmtree(folder / "train" / "dog")
    with pytest.raises(DataError, match="0 class folders"):
        load_data("imagefolder", folder, image_size=12)


def test_files_are_read_in_the_order_of_any_run(folder):
    """Of any part, from any batch on, with any number of ranks: the same pixels."""
    data = load_data("imagefolder", folder, image_size=12)
    settings = {"batch_size": 6, "normalisation": data.normalisation, "augment": "crop+flip", "shuffle": True}
    whole = list(Batches(data.train, seed=3, **settings).epoch(2))
    assert [len(y) for _, y in whole] == [6, 6, 4]
    later = list(Batches(data.train, seed=3, **settings).epoch(2, start_batch=1))
    halves = [Batches(data.train, seed=3, rank=r, world_size=2, **settings).epoch(2) for r in range(2)]
    for k, parts in enumerate(zip(*halves, strict=True)):
        for place, part in enumerate(whole[k]):
            assert torch.equal(torch.cat([parts[0][place], parts[1][place]]), part)
            assert k == 0 or torch.equal(later[k - 1][place], part)
    other = next(Batches(data.train, seed=3, **settings).epoch(3))
    assert not torch.equal(other[0], whole[0][0])


def test_an_unfinished_epoch_reads_no_further(folder, monkeypatch):
    data, read = load_data("imagefolder", folder, image_size=12), []
    monkeypatch.setattr(
        image_files, "read_image", lambda path, *_: read.append(path) or torch.zeros(3, 12, 12)
    )
    batches = Batches(data.train, batch_size=2, normalisation=data.normalisation).epoch(0)
    next(batches)
    batches.close()
    assert 2 <= len(read) <= 8  # of 16


@LAW
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)), seed=st.integers(0, 9), side=st.integers(1, 40)
)
def test_crops_lie_inside_and_show_what_is_there(tmp_path_factory, size, seed, side):
    """In an image whose red grows to the right and green downwards, a crop's colours tell where it lies."""
    file = tmp_path_factory.mktemp("crop") / "image.png"
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    Image.fromarray(np.stack([across, down, 0 * down], 2).astype(np.uint8)).save(file)
    crop = image_files.draw_crops(np.random.default_rng(seed), 1)[0]
    found = image_files.read_image(file, side, crop).int()
    assert found.shape == (3, side, side)
    rightwards = found[0].diff(dim=1)
    assert (rightwards <= 0).all() if crop[4] >= 0.5 else (rightwards >= 0).all()
    assert (found[1].diff(dim=0) >= 0).all()


def test_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path):
    across, down = np.meshgrid(np.linspace(0, 255, 1000), np.linspace(0, 255, 800))
    pixels = np.stack([across, down, 255 - across], 2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    for crop in image_files.draw_crops(np.random.default_rng(0), 20):
        exact, fast = (
            image_files.read_image(tmp_path / f"a.{kind}", 32, crop).int() for kind in ("png", "jpg")
        )
        assert (exact - fast).abs().max() <= 6


def test_the_middle_is_what_networks_are_tested_on(tmp_path):
    pixels = np.full((64, 96, 3), 255, np.uint8)
    pixels[4:60, 20:76] = 7  # seven eighths of the shorter side
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (image_files.read_image(tmp_path / "a.png", 56) == 7).all()
