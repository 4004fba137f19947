"""What a run is, as data: two runs of equal configuration give equal results.

Nothing here imports PyTorch before a configuration is made: command-line flags come from these classes.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.errors import BudgetError, DataError, FileError, ModelError, SecateurError, unknown
from secateur.recipes.normalisation import Normalisation
from secateur.recipes.train_config import TrainConfig
from secateur.settings import option, plain, settings

if TYPE_CHECKING:
    from secateur.cost import Budget
    from secateur.engine.method import Method
    from secateur.graph import Graph

MODEL, DATA, BUDGET, METHOD, RUN = "Model", "Data", "Budget", "Method", "Run"
"""Headings under which the command line shows flags."""


@settings
class Task:
    """A model, and the data it is for.

    Raises:
        SecateurError: an unknown name, or no such file or folder.
    """

    model: str = option(
        "built-in model, NAME of torchvision or timm (torchvision/NAME, timm/NAME to be exact), or module:function of "
        "your own",
        panel=MODEL,
        metavar="NAME",
    )
    data: str = option(
        "data set: digits, cifar10, fashion-mnist or imagefolder, or module:function of your own",
        panel=DATA,
        metavar="NAME",
    )
    weights: Path | None = option(
        "weights (.safetensors): original ones, or a model that Secateur saved",
        default=None,
        panel=MODEL,
        metavar="FILE",
        shown="fresh weights",
    )
    data_dir: Path | None = option(
        "folder that holds the data; digits need none", default=None, panel=DATA, metavar="DIR", shown="none"
    )
    image_size: int | None = option(
        "side of the images of digits and imagefolder", default=None, least=1, panel=DATA, shown="16 and 224"
    )
    normalisation: Normalisation | None = option(
        "per channel, on pixels of 0 to 1, such as 0.5,0.5,0.5/0.2,0.2,0.2; or: imagenet",
        default=None,
        panel=DATA,
        flag="--normalize",
        metavar="MEAN/STD",
        shown="what the weights were trained with, if known, else the data set's own",
    )
    train_images: int | None = option(
        "learn from a fixed, balanced part of the images", default=None, least=1, panel=DATA, shown="all"
    )
    test_images: int | None = option(
        "measure on a fixed, balanced part of the images", default=None, least=1, panel=DATA, shown="all"
    )
    download: bool = option("let torchvision fetch the data", default=False, panel=DATA)
    seed: int = option(
        "random seed, of fresh weights and everything else that is drawn", default=0, least=0, panel=RUN
    )

    def check(self) -> None:
        from secateur.recipes.data import list_data

        if ":" not in self.data and self.data not in list_data():
            raise DataError(unknown("data set", self.data, list_data()))
        check_model_name(self.model)
        if self.weights is not None and not self.weights.is_file():
            raise FileError(f"weights {self.weights}: no such file. Check the path.")
        if self.data_dir is not None and not self.data_dir.is_dir() and not self.download:
            raise DataError(f"data folder {self.data_dir}: no such folder. Check the path.")


def check_model_name(name: str) -> None:
    """Raise ModelError now, rather than after the data was read, if there is no model of this name."""
    from secateur.recipes.models import build_model, list_models

    if not name:
        raise ModelError(unknown("model", name, list_models()))
    if name not in list_models() and ":" not in name:
        build_model(name)


@settings
class TrainRunConfig:
    """A training, from scratch or on from the task's weights, whose seed takes the place of that in `train`."""

    task: Task = option("model and data")
    train: TrainConfig = option("how to train")

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as plain JSON."""
        return plain(self)  # type: ignore[no-any-return]


@settings
class PruneConfig:
    """A pruning, with training before and after if that is wanted.

    Raises:
        SecateurError: an unknown name or a number out of range. What budgets can be reached is only known once the
            model has been analysed: see `check_reach`.
    """

    task: Task = option("model and data")
    budget: Mapping[str, float] = option(
        "measure -> share that stays, or milliseconds; all bounds must hold", default={}
    )
    method: str = option(
        "how and when units go: a name, or module:name of your own; auto takes what does best with what there is",
        default="oneshot",
        panel=METHOD,
        metavar="NAME",
    )
    options: Mapping[str, Any] = option(
        "of the method, by name; `secateur methods NAME` lists them", default={}
    )
    calibration_images: int = option(
        "training images, without augmentation, for methods and scores that look at data",
        default=512,
        least=1,
        panel=METHOD,
    )
    train: TrainConfig | None = option(
        "how to train the dense model first; with a method that prunes during training, how to train",
        default=None,
    )
    finetune: TrainConfig | None = option(
        "how to train the pruned model; with a method that prunes before training, how to train", default=None
    )
    keep: Literal["better", "last"] = option(
        "which model to write if fine-tuning made the cut one worse on the test images",
        default="better",
        panel=RUN,
    )
    latency_batch: int = option("images per pass where latency is measured", default=1, least=1, panel=RUN)
    exports: bool = option("write ONNX and torch.export files", default=True)
    latency: bool | None = option("measure latency; None: if files are written", default=None)

    @property
    def chosen(self) -> "Method":
        """The method with its options; its seed is the task's, unless an option says otherwise."""
        from secateur.methods import method_named
        from secateur.settings import options_of

        method = method_named(self.method, self.options)
        if "seed" in options_of(method) and "seed" not in self.options:
            method = method_named(method, {"seed": self.task.seed})
        return method

    def check(self) -> None:
        from secateur.cost import Budget

        method = self.chosen
        self._check_phases(method)
        if not self.budget:
            raise BudgetError(
                "no budget: give at least one of keep-macs, keep-params, sparsity and latency-ms, such as keep-macs 0.5"
            )
        for measure, bound in self.budget.items():
            if measure != "latency_ms" and not 0 < bound < 1:
                said = f"sparsity {1 - bound:g}" if measure == "units" else f"budget {measure} {bound:g}"
                raise BudgetError(f"{said}: expected a share above 0 and below 1")
        Budget(**self.budget)
        if "latency_ms" in self.budget:
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise BudgetError(
                    "latency-ms: each process would measure something else; find the share of MACs with one process, "
                    "then give keep-macs"
                )
            if method.removes != "channels":
                raise BudgetError(
                    f"method {self.method}: zeros do not make dense layers faster, so latency-ms is for channels"
                )
        if method.removes != "channels":
            trained = method.when == "after"
            if trained and set(self.budget) not in ({"units"}, {"params"}):
                raise BudgetError(
                    f"method {self.method}: the budget is sparsity, the share of weights that go, such as 0.8; or "
                    f"keep-params, the share of all parameters that stay"
                )
            if not trained and not set(self.budget) <= {"macs", "params"}:
                raise BudgetError(
                    f"method {self.method}: the budget is keep-macs or keep-params, in which a weight at zero costs "
                    f"nothing, such as keep-params 0.25"
                )

    def _check_phases(self, method: "Method") -> None:
        """What is trained when must suit the method."""
        if method.when == "during":
            if self.train is None:
                raise SecateurError(f"method {self.method} prunes while the model is trained; give epochs")
            if self.finetune is not None:
                raise SecateurError(
                    f"method {self.method} trains as it prunes; there is no fine-tuning after it"
                )
        elif method.when == "before" and self.train is not None:
            raise SecateurError(f"method {self.method} prunes before training; give `finetune`, not `train`")
        if method.when == "before" and method.removes == "channels" and self.task.weights is not None:
            raise SecateurError(f"method {self.method} draws fresh weights; leave out weights")
        taught = [how for how in (self.train, self.finetune) if how and how.distill_weight > 0]
        if taught and (method.when != "after" or self.train in taught):
            raise SecateurError(
                f"distillation needs a trained dense model as its teacher, and method {self.method} with this training "
                f"has none; set distill to 0"
            )

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as plain JSON."""
        return plain(self)  # type: ignore[no-any-return]

    def bounds(self) -> "Budget":
        """The budget."""
        from secateur.cost import Budget

        return Budget(**self.budget)

    def check_reach(self, graph: "Graph") -> None:
        """Raise BudgetError unless channels can meet the budget; the message says what is within reach.

        For masks, their method says what is.
        """
        method = self.chosen
        if method.removes != "channels":
            return
        if not graph.groups:
            raise BudgetError("nothing can be pruned: the model has no removable units. `inspect` says why.")
        least_kept, step = getattr(method, "min_keep", 1), getattr(method, "round_to", 1)
        step = step if isinstance(step, int) else 1  # by hardware, widths are as fine as the budget asks for
        within = reachable(graph, least_kept, step)
        for measure, share in self.budget.items():
            if measure not in within:
                continue
            least, dense = within[measure]
            if share * dense + 1e-9 < least:
                raise BudgetError(
                    f"budget {measure} {share:g}: expected a share of at least {rounded_up(least / dense):.4f}, below "
                    f"1. Within reach (min_keep {least_kept}, round_to {step}) are {least:,} to {dense:,}."
                )


def reachable(graph: "Graph", min_keep: int = 1, round_to: int = 1) -> dict[str, tuple[int, int]]:
    """The least and the full cost, for each measure in closed form.

    >>> import torch
    >>> from secateur import analyze
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 5, 1))
    >>> reachable(analyze(model, torch.zeros(1, 3, 4, 4)))["macs"]
    (128, 1024)
    """
    from secateur.allocate.table import widths_of
    from secateur.cost import Cost

    cost = Cost(graph)
    least = cost.all([widths_of(group, min_keep, round_to)[0] for group in graph.groups])
    return {measure: (least[measure], dense) for measure, dense in cost.all().items()}


def rounded_up(share: float) -> float:
    """To four digits, so that a share which is named as reachable can be reached.

    >>> rounded_up(0.00121)
    0.0013
    """
    return math.ceil(share * 10_000) / 10_000
