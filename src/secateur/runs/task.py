"""The model and the data of a run, loaded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import FileError, ModelError, first_line
from secateur.files import read_tensors
from secateur.recipes.data import Batches, Dataset, Normalisation, load_data
from secateur.recipes.models import build_model, list_models
from secateur.recipes.models.weights import load_weights, name_in, normalisation_for
from secateur.recipes.train import Evaluation, evaluate
from secateur.runs.config import Task
from secateur.runs.folder import SavedRun
from secateur.surgery import load


@dataclass(frozen=True)
class LoadedTask:
    """A model, on the CPU, and its data.

    Attributes:
        model: with its weights.
        data: normalised as the weights expect it.
        notes: what a reader of the results must know, one sentence each.
    """

    model: nn.Module
    data: Dataset
    notes: tuple[str, ...]

    @property
    def inputs(self) -> Tensor:
        """An example input: one black image."""
        return torch.zeros(1, *self.data.test.images.shape[1:])

    def batches(self, images: int, *, shuffle: bool = False) -> Batches:
        """Training images with their labels in batches of 64, balanced over the classes and without augmentation."""
        some = self.data.subset(train_images=min(images, len(self.data.train)))
        return Batches(some.train, batch_size=64, normalisation=some.normalisation, shuffle=shuffle)

    def saved_run(self, kind: str, command: str, settings: dict[str, object]) -> SavedRun:
        """What `config.json` is to say about a run on this task."""
        channels, height, width = self.data.test.images.shape[1:]
        return SavedRun(
            kind=kind,
            command=command,
            settings=settings,
            input_shape=(channels, height, width),
            classes=len(self.data.classes),
            normalisation=self.data.normalisation,
        )


def load_task(task: Task) -> LoadedTask:
    """Load the data, build the model, load the weights.

    Raises:
        DataError, ModelError, FileError: see `load_data`, `build_model`, `load_weights`, `secateur.load`.
    """
    normalisation = task.normalisation
    if normalisation is None and task.weights is not None:
        normalisation = _trained_with(task.weights)
    whole = load_data(
        task.data,
        task.data_dir,
        normalisation=normalisation,
        image_size=task.image_size,
        download=task.download,
    )
    data = whole.subset(train_images=task.train_images, test_images=task.test_images)
    model = fresh_model(task.model, len(data.classes), data.train.images.shape[1], task.seed)
    notes = []
    if task.weights is not None and (note := load_into(model, task.weights)):
        notes.append(f"The weights: {note}.")
    _check_fit(model, data.subset(test_images=min(2, len(data.test))))
    if len(data.test) < len(whole.test):
        notes.append(f"Accuracies are of {len(data.test):,} of the {len(whole.test):,} test images.")
    if len(data.train) < len(whole.train):
        notes.append(f"Trained on {len(data.train):,} of the {len(whole.train):,} training images.")
    return LoadedTask(model, data, tuple(notes))


def _check_fit(model: nn.Module, few: Dataset) -> None:
    """Raise ModelError unless the model turns images into one logit per class: before anything else is done."""
    try:
        evaluate(model, few)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: does not run on images {tuple(few.test.images.shape)}: {first_line(error)}. "
            f"Build it for such images, or give another image_size."
        ) from error


def fresh_model(name: str, classes: int | None, in_channels: int, seed: int) -> nn.Module:
    """Build a model; the same seed gives the same weights."""
    with seeded(seed):
        return build_model(name, classes=classes, in_channels=in_channels)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block, what is drawn without a generator follows from the seed; outside, nothing changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def load_into(model: nn.Module, weights: Path) -> str:
    """Load a weights file of either kind: one that `secateur.save` wrote, or original weights.

    Returns:
        what the reader of its accuracy must know; mostly empty.
    Raises:
        FileError, ModelError: the file is damaged or does not fit; the model is unchanged.
    """
    if weights.suffix == ".safetensors" and "recipe" in read_tensors(weights)[1]:
        load(model, weights)
        return ""
    try:
        info = load_weights(model, weights)
    except ModelError as error:
        fitting = [name for name in list_models() if _has_convolutions_of(name, read_tensors(weights)[0])]
        if not fitting:
            raise
        raise ModelError(f"{error} Its convolutions are those of {' and '.join(fitting)}.") from None
    return info.note if info else ""


def _has_convolutions_of(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a built-in model has the convolution kernels of a weights file, name by name."""
    with torch.device("meta"):
        own = build_model(name).state_dict()
    named = {name_in(own, key): tensor for key, tensor in tensors.items()}
    kernels = [{(key, *t.shape) for key, t in one.items() if t.ndim == 4} for one in (own, named)]
    return kernels[0] == kernels[1]


def evaluate_once(model: nn.Module, data: Dataset) -> Evaluation:
    """Evaluate a model on the test images, on the accelerator if there is one; it ends on the CPU."""
    try:
        return evaluate(model.to(device()), data)
    finally:
        model.cpu()


def device() -> torch.device:
    """Where models are evaluated and timed."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _trained_with(weights: Path) -> Normalisation | None:
    """What a weights file was trained with: known of published ones, and of those that a run wrote."""
    if (
        weights.name in ("model.safetensors", "dense.safetensors")
        and (weights.parent / "config.json").is_file()
    ):
        try:
            return SavedRun.read(weights.parent).normalisation
        except FileError:
            return None  # another program's config.json
    return normalisation_for(weights)


def input_shape(model: str, channels: int, image_size: int | None) -> tuple[int, int, int]:
    """The shape of one image for a model without data; the side is 32 for built-in models, else 224."""
    side = image_size or (32 if model in list_models() else 224)
    return channels, side, side
