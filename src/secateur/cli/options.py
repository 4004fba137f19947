"""Options that several commands share, each with its help; and what turns them into configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

if TYPE_CHECKING:
    from secateur.recipes.data import Normalisation
    from secateur.runs import Mode

SUBJECT, DATA, BUDGET, METHOD = "Model", "Data", "Budget", "Method"
TRAINING, FINE_TUNING, RUN = "Training", "Fine-tuning", "Run"

Model = Annotated[
    str,
    Option(
        metavar="NAME",
        help="Built-in model, NAME of torchvision or timm (torchvision/NAME, timm/NAME to be exact), or "
        "module:function of your own. [bold]secateur methods[/] lists the built-in ones.",
        rich_help_panel=SUBJECT,
        show_default=False,
    ),
]
MaybeModel = Annotated[
    str | None,
    Option(
        "--model",
        metavar="NAME",
        help="As for [bold]secateur prune[/].",
        rich_help_panel=SUBJECT,
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help="Weights (.safetensors): original ones, or a model that Secateur saved.",
        rich_help_panel=SUBJECT,
        show_default=False,
    ),
]
Classes = Annotated[
    int | None,
    Option(
        min=1,
        metavar="N",
        help="Size of the output.",
        rich_help_panel=SUBJECT,
        show_default="the model's own",
    ),
]
Channels = Annotated[int, Option(min=1, metavar="N", help="Channels of the input.", rich_help_panel=SUBJECT)]
InputSize = Annotated[
    int | None,
    Option(
        "--image-size",
        min=1,
        metavar="N",
        help="Side of the input images.",
        rich_help_panel=SUBJECT,
        show_default="32 for built-in models, else 224",
    ),
]
Run = Annotated[
    Path | None,
    Option(
        "--run",
        metavar="DIR",
        help="Folder of an earlier run; takes the place of --model.",
        rich_help_panel=SUBJECT,
        show_default=False,
    ),
]

Data = Annotated[
    str,
    Option(
        metavar="NAME",
        help="digits, cifar10, fashion-mnist or imagefolder.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
MaybeData = Annotated[
    str | None,
    Option(
        "--data",
        metavar="NAME",
        help="digits, cifar10, fashion-mnist or imagefolder.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
DataDir = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Folder that holds the data; digits need none.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]
ImageSize = Annotated[
    int | None,
    Option(
        min=1,
        metavar="N",
        help="Side of the images of digits and imagefolder.",
        rich_help_panel=DATA,
        show_default="16 and 224",
    ),
]
Normalize = Annotated[
    str | None,
    Option(
        metavar="MEAN/STD",
        help="Per channel, on pixels of 0 to 1, such as 0.5,0.5,0.5/0.2,0.2,0.2; or: imagenet.",
        rich_help_panel=DATA,
        show_default="what the weights were trained with, if known, else the data set's own",
    ),
]


def train_images(default: str) -> Any:
    """Option for a part of the training images; `default` says what holds without it."""
    return _images("Learn from a fixed, balanced part of the images.", default)


def test_images(default: str) -> Any:
    """The same for the test images."""
    return _images("Measure on a fixed, balanced part of the images.", default)


def _images(what: str, default: str) -> Any:
    return Option(min=1, metavar="N", help=what, rich_help_panel=DATA, show_default=default)


TrainImages = Annotated[int | None, train_images("all")]
TestImages = Annotated[int | None, test_images("all")]
Download = Annotated[bool, Option("--download", help="Let torchvision fetch the data.", rich_help_panel=DATA)]

Freeze = Annotated[
    list[str] | None,
    Option(
        metavar="MODULE",
        help="Module, or pattern such as 'layer4.*', that no cut may touch; may be repeated.",
        rich_help_panel=METHOD,
        show_default=False,
    ),
]
Attention = Annotated[
    str,
    Option(
        metavar="NAME",
        help="What attention loses: whole heads, or the same dims of every head.",
        rich_help_panel=METHOD,
    ),
]
Out = Annotated[
    Path,
    Option(
        metavar="DIR",
        help="Folder for everything the run writes; new or empty.",
        rich_help_panel=RUN,
        show_default=False,
    ),
]
Seed = Annotated[
    int, Option(min=0, metavar="N", help="Of everything that draws random numbers.", rich_help_panel=RUN)
]
Threads = Annotated[
    int | None,
    Option(
        min=1, metavar="N", help="CPU threads.", rich_help_panel=RUN, show_default="as many as PyTorch likes"
    ),
]
Resume = Annotated[
    bool,
    Option(
        "--resume", help="Go on with the run in the folder where it was interrupted.", rich_help_panel=RUN
    ),
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the run in the folder.", rich_help_panel=RUN)]
NoProgress = Annotated[bool, Option("--no-progress", help="Say nothing until the end.", rich_help_panel=RUN)]


def batch_size(panel: str) -> Any:
    return Option(min=1, metavar="N", help="Images per step.", rich_help_panel=panel)


def learning_rate(panel: str) -> Any:
    return Option(metavar="X", help="Highest learning rate.", rich_help_panel=panel)


def optimizer(panel: str) -> Any:
    return Option(metavar="NAME", help="sgd or adamw.", rich_help_panel=panel)


def weight_decay(panel: str) -> Any:
    return Option(metavar="X", help="Pull of the weights towards zero.", rich_help_panel=panel)


def schedule(panel: str) -> Any:
    return Option(
        metavar="NAME",
        help="Of the learning rate: cosine, steps, one-cycle or constant.",
        rich_help_panel=panel,
    )


def label_smoothing(panel: str) -> Any:
    return Option(
        metavar="X", help="Share of the target that is spread over all classes.", rich_help_panel=panel
    )


def precision(panel: str) -> Any:
    return Option(metavar="NAME", help="no (float32) or bf16.", rich_help_panel=panel)


def compile_steps(panel: str) -> Any:
    return Option(
        "--compile",
        help="Run the steps in which no method prunes through torch.compile.",
        rich_help_panel=panel,
    )


def checkpoint_every(panel: str) -> Any:
    return Option(min=1, metavar="N", help="Steps between checkpoints.", rich_help_panel=panel)


def mode_of(resume: bool, overwrite: bool) -> Mode:
    """What to do with a folder that holds a run."""
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other; give one of them")
    return "resume" if resume else "overwrite" if overwrite else "new"


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def normalisation_of(text: str | None) -> Normalisation | None:
    """Read `MEAN/STD`.

    >>> normalisation_of("0.5/0.25")
    Normalisation(mean=(0.5,), std=(0.25,), scale=0.00392156862745098)
    """
    from secateur.recipes.data import Normalisation

    if text is None:
        return None
    if text == "imagenet":
        return Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    try:
        mean, std = (tuple(float(number) for number in part.split(",")) for part in text.split("/"))
    except ValueError:
        mean, std = (), ()
    if not mean or len(mean) != len(std) or not all(s > 0 for s in std):
        raise typer.BadParameter(
            f"--normalize {text}: expected one mean and one std above 0 for each channel, such as "
            f"0.5,0.5,0.5/0.2,0.2,0.2, or: imagenet"
        )
    return Normalisation(mean, std)


def options_of(given: list[str] | None) -> dict[str, Any]:
    """Read `NAME=VALUE`s; a value is JSON, or else text.

    >>> options_of(["bypass=shared", "weight=2.5", "learn=false"])
    {'bypass': 'shared', 'weight': 2.5, 'learn': False}
    """
    options: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--option {text}: expected NAME=VALUE, such as bypass=shared")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
