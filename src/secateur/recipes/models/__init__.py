"""Models by name: the built-in ones, torchvision's, timm's, and a function of the user's own.

>>> import torch
>>> build_model("resnet20", classes=100)(torch.zeros(1, 3, 32, 32)).shape
torch.Size([1, 100])
"""

import difflib
import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from secateur.errors import ModelError, unknown
from secateur.imports import imported, working_directory_importable
from secateur.recipes.models.densenet import CifarDenseNet
from secateur.recipes.models.mobilenet import CifarMobileNetV2
from secateur.recipes.models.resnet import CifarResNet, PadShortcut, TinyResNet8
from secateur.recipes.models.shufflenet import CifarShuffleNetV2
from secateur.recipes.models.vgg import CifarVGG16
from secateur.recipes.models.weights import load_weights, normalisation_for

__all__ = ["PadShortcut", "build_model", "list_models", "load_weights", "normalisation_for"]

_BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "densenet121_cifar": partial(CifarDenseNet, growth=32, blocks=(6, 12, 24, 16)),
    "densenet_bc_100": partial(CifarDenseNet, growth=12, blocks=(16, 16, 16)),
    "mobilenet_v2_cifar": CifarMobileNetV2,
    "mobilenet_v2_x0_5_cifar": partial(CifarMobileNetV2, width=0.5),
    "resnet8": TinyResNet8,
    "resnet8_x2_b": partial(CifarResNet, blocks=1, shortcut="B", widths=(32, 64, 128)),
    "resnet20": partial(CifarResNet, blocks=3),
    "resnet20_b": partial(CifarResNet, blocks=3, shortcut="B"),
    "resnet32": partial(CifarResNet, blocks=5),
    "resnet32_b": partial(CifarResNet, blocks=5, shortcut="B"),
    "resnet44": partial(CifarResNet, blocks=7),
    "resnet44_b": partial(CifarResNet, blocks=7, shortcut="B"),
    "resnet56": partial(CifarResNet, blocks=9),
    "resnet56_b": partial(CifarResNet, blocks=9, shortcut="B"),
    "resnet110": partial(CifarResNet, blocks=18),
    "resnet110_b": partial(CifarResNet, blocks=18, shortcut="B"),
    "shufflenet_v2_x0_5_cifar": partial(CifarShuffleNetV2, widths=(48, 96, 192)),
    "shufflenet_v2_x1_0_cifar": partial(CifarShuffleNetV2, widths=(116, 232, 464)),
    "shufflenet_v2_x1_5_cifar": partial(CifarShuffleNetV2, widths=(176, 352, 704)),
    "shufflenet_v2_x2_0_cifar": partial(CifarShuffleNetV2, widths=(244, 488, 976), last=2048),
    "vgg16_bn_cifar": CifarVGG16,
}


def list_models() -> list[str]:
    """Names of the built-in models, sorted.

    >>> "resnet56" in list_models()
    True
    """
    return sorted(_BUILT_IN)


def build_model(name: str, *, classes: int | None = None, in_channels: int = 3, **options: Any) -> nn.Module:
    """Build a model with fresh weights; nothing is downloaded.

    A name is looked up among the built-in models, then torchvision's, then timm's; `torchvision/NAME` and
    `timm/NAME` choose one of these. `module:function` imports the user's module (the working directory is
    searched too) and calls the function.

    Args:
        name: what to build.
        classes: size of the output; None leaves the model's own default. A user's function gets it only
            if it has a parameter of that name.
        in_channels: channels of the input; 3 for torchvision. Of a user's function as for `classes`.
        options: further keyword arguments of the model.
    Raises:
        ModelError: unknown name, arguments that the model does not take, or a missing library.

    >>> build_model("vgg16_bn_cifar", classes=7, in_channels=1).classifier.out_features
    7
    """
    if name in _BUILT_IN:
        sizes: dict[str, Any] = {"in_channels": in_channels}
        if classes is not None:
            sizes["classes"] = classes
        return _call(name, _BUILT_IN[name], sizes | options)
    if ":" in name:
        return _from_user(name, classes, in_channels, options)
    library, _, bare = name.rpartition("/")
    for candidate in (library,) if library else ("torchvision", "timm"):
        known = bare.partition(".")[0] if candidate == "timm" else bare  # timm names weights after a dot
        if known in _names(candidate):
            return _FROM_LIBRARY[candidate](bare, classes, in_channels, options)
    raise ModelError(_unknown_model(library, bare))


def _call(name: str, build: Callable[..., nn.Module], arguments: dict[str, Any]) -> nn.Module:
    """Call `build`, with a clear message if it does not take the arguments or gives no module."""
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as error:
        raise ModelError(f"model {name!r}: {error}; it takes {inspect.signature(build)}") from error
    model = build(**arguments)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {name!r}: got {type(model).__name__}, expected a torch.nn.Module")
    return model


def _from_torchvision(name: str, classes: int | None, in_channels: int, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if in_channels != 3:
        raise ModelError(
            f"model 'torchvision/{name}' takes 3 input channels, not {in_channels}; "
            f"choose a built-in model or one of timm's"
        )
    build = models.get_model_builder(name)
    arguments: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(build).parameters:
        arguments["weights_backbone"] = None  # detection and segmentation models would download it
    if classes is not None:
        arguments["num_classes"] = classes
    return _call_library(f"torchvision/{name}", build, arguments | options)


def _from_timm(name: str, classes: int | None, in_channels: int, options: dict[str, Any]) -> nn.Module:
    import timm

    arguments: dict[str, Any] = {"pretrained": False}
    if in_channels != 3:
        arguments["in_chans"] = in_channels
    if classes is not None:
        arguments["num_classes"] = classes
    return _call_library(f"timm/{name}", partial(timm.create_model, name), arguments | options)


def _call_library(name: str, build: Callable[..., nn.Module], arguments: dict[str, Any]) -> nn.Module:
    """Call a library's `build`, which takes **kwargs and complains about them somewhere inside."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about the library's own later defaults
            return build(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"model {name!r}: {error}") from error


def _from_user(name: str, classes: int | None, in_channels: int, options: dict[str, Any]) -> nn.Module:
    build = imported("model", name, ModelError)
    parameters = inspect.signature(build).parameters
    sizes = {"classes": classes, "in_channels": in_channels}
    known = {key: size for key, size in sizes.items() if key in parameters and size is not None}
    with working_directory_importable():
        return _call(name, build, known | options)


_FROM_LIBRARY = {"torchvision": _from_torchvision, "timm": _from_timm}


def _names(library: str) -> list[str]:
    """The models that a library offers; none if it is unknown or not installed."""
    try:
        if library == "torchvision":
            from torchvision import models

            return list(models.list_models())
        if library == "timm":
            import timm

            return list(timm.list_models())
    except ImportError:
        pass
    return []


def _unknown_model(library: str, name: str) -> str:
    """The message for a name that is nowhere: the built-in models, and what resembles it elsewhere."""
    message = unknown("model", f"{library}/{name}" if library else name, list_models())
    missing = [other for other in _FROM_LIBRARY if not _names(other)]
    elsewhere = {found: f"{other}/{found}" for other in ("timm", "torchvision") for found in _names(other)}
    close = [elsewhere[found] for found in difflib.get_close_matches(name, elsewhere, n=5)]
    more = [f"close to it elsewhere: {', '.join(close)}"] if close else []
    if missing:
        more.append(f"for the models of {' and '.join(missing)}, pip install 'secateur[vision]'")
    return f"{message} ({'; '.join(more)})" if more else message
