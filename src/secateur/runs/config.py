"""What a run is, as data: two runs of equal configuration give equal results."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.allocate import ALLOCATIONS, list_widths
from secateur.cost import Budget, Cost
from secateur.errors import BudgetError, DataError, FileError, ModelError, SecateurError, unknown
from secateur.graph import Graph
from secateur.methods import AUTO, METHODS, Decay, Rectify, method_named
from secateur.methods.rd.single_weights import COMPENSATIONS, WEIGHT_CHOICES
from secateur.recipes.data import Normalisation, list_data
from secateur.recipes.models import build_model, list_models
from secateur.recipes.train_config import TrainConfig
from secateur.scores import SCORES

GRANULARITIES = {
    "channels": "output channels of convolutions and linear layers, and all that depends on them",
    "weights": "single weights of convolutions and linear layers: smaller files, but no faster models",
    "filters": "whole filters of single layers, as zeros that nothing is cut by: a control for precrop",
}
"""What one unit may be -> one line for lists of choices."""

_SHARED = ("score", "allocation", "attention", "compensation", "min_keep", "round_to")
_OF_CHANNELS = ("freeze", "score", "attention", "min_keep", "round_to", "decay", "rectify")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, and the data it is for.

    Args:
        model: a name for `secateur.recipes.models.build_model`.
        data: a name for `secateur.recipes.data.load_data`.
        weights: safetensors file, of original weights or written by `secateur.save`; None: fresh weights.
        data_dir: folder of the data, where it needs one.
        image_size: side of the images, where it is a choice.
        normalisation: of the images; None: what the weights were trained with, as far as that is known,
            else the data set's own.
        train_images, test_images: use only so many, balanced over the classes; None: all.
        download: let torchvision fetch the data.
        seed: of fresh weights, and of everything else that draws random numbers.
    Raises:
        SecateurError: an unknown name, or no such weights file.
    """

    model: str
    data: str
    weights: Path | None = None
    data_dir: Path | None = None
    image_size: int | None = None
    normalisation: Normalisation | None = None
    train_images: int | None = None
    test_images: int | None = None
    download: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.data not in list_data():
            raise DataError(unknown("data set", self.data, list_data()))
        check_model_name(self.model)
        if self.weights is not None and not self.weights.is_file():
            raise FileError(f"weights {self.weights}: no such file. Check the path.")
        if self.data_dir is not None and not self.data_dir.is_dir() and not self.download:
            raise DataError(f"data folder {self.data_dir}: no such folder. Check the path.")
        if self.seed < 0:
            raise SecateurError(f"seed {self.seed}: expected a whole number, at least 0")


def check_model_name(name: str) -> None:
    """Raise ModelError now, rather than after the data was read, if there is no model of this name."""
    if not name:
        raise ModelError(unknown("model", name, list_models()))
    if name not in list_models() and ":" not in name:
        build_model(name)


@dataclass(frozen=True, kw_only=True)
class TrainRunConfig:
    """A training, from scratch or on from the task's weights.

    Args:
        task: what to train on what; its seed takes the place of that in `train`.
        train: how.
    """

    task: Task
    train: TrainConfig

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as plain JSON."""
        return _plain(asdict(self))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """A pruning, with training before and after if that is wanted.

    Args:
        task: what to prune, and on which data.
        keep_macs: at most this share of the dense model's MACs stays, above 0 and below 1.
        keep_params: the same for parameters.
        sparsity: at least this share of the units goes, above 0 and below 1. Several bounds must all hold.
        latency_ms: a pass over `latency_batch` images takes at most this long, measured in PyTorch on this machine.
        method: a name in `secateur.methods.METHODS`; `module:function` of your own, see
            `secateur.methods.method_named`; or "auto", see `secateur.methods.auto.choose`.
        score: a name in `secateur.scores.SCORES`.
        allocation: a name in `secateur.allocate.ALLOCATIONS`.
        granularity: a name in `GRANULARITIES`; None: what the method removes unless told otherwise. For the weights of
            trained models, the budget is `sparsity`, the allocation a name in `WEIGHT_CHOICES` of
            `secateur.methods.rd.single_weights`.
            Before training, a weight at zero costs nothing in budgets of MACs and parameters.
        compensation: a name in `COMPENSATIONS` of the same module, for method "rd" and for weights of trained models.
        freeze: module names or shell patterns that no cut may touch.
        attention: what attention loses: whole "heads", or the same "dims" of every head.
        min_keep: units that every group keeps at least.
        round_to: kept units per group are a multiple of this, or all of them.
        calibration_images: training images, without augmentation, for scores that need gradients.
        options: of the method, by name; see its docstring.
        decay: optimizer steps in which a unit that was chosen fades away; 1: it goes at once. Only for methods
            with a `removal`.
        rectify: let fading units go that resist.
        train: how to train the dense model first; None: take it as it is. With a method that prunes during
            training: how to train.
        finetune: how to train the cut model; None: leave it as it is. A `distill_weight` above 0 makes the
            trained dense model its teacher.
        latency_batch: images per pass where latency is measured.
        exports: also write ONNX and `torch.export` files, and measure latency.
    Raises:
        SecateurError: an unknown name or a number out of range. What budgets can be reached is only known
            once the model has been analysed: see `budget`.
    """

    task: Task
    keep_macs: float | None = None
    keep_params: float | None = None
    sparsity: float | None = None
    latency_ms: float | None = None
    method: str = "oneshot"
    score: str = "l2"
    allocation: str = "global"
    granularity: str | None = None
    compensation: str = "least-squares"
    freeze: tuple[str, ...] = ()
    attention: str = "heads"
    min_keep: int = 1
    round_to: int = 1
    calibration_images: int = 512
    options: Mapping[str, Any] = field(default_factory=dict)
    decay: int = 1
    rectify: bool = False
    train: TrainConfig | None = None
    finetune: TrainConfig | None = None
    latency_batch: int = 1
    exports: bool = True

    def __post_init__(self) -> None:
        entry = None if self.method == AUTO else method_named(self.method)
        trained_weights = self.masks and (entry is None or entry.when == "after")
        names: tuple[tuple[str, str, dict[str, Any]], ...] = (
            ("granularity", self.unit, GRANULARITIES),
            ("score", self.score, SCORES if self.method in ("oneshot", AUTO) else {}),
            ("allocation", self.allocation, WEIGHT_CHOICES if trained_weights else ALLOCATIONS),
            ("compensation", self.compensation, COMPENSATIONS),
            ("attention", self.attention, dict.fromkeys(("heads", "dims"), "")),
        )
        for kind, name, choices in names:
            if choices and name not in choices:
                raise SecateurError(unknown(kind, name, choices))
        if entry is not None and self.unit not in entry.runs:
            others = ", ".join(name for name, other in METHODS.items() if self.unit in other.runs)
            raise SecateurError(
                f"granularity {self.unit}: method {self.method} removes {' or '.join(entry.runs)}; methods for "
                f"{self.unit}: {others}"
            )
        self._check_phases()
        if self.keep_macs is self.keep_params is self.sparsity is self.latency_ms is None:
            raise BudgetError(
                "no budget: give at least one of keep-macs, keep-params, sparsity and latency-ms, such as keep-macs 0.5"
            )
        if self.latency_ms is not None:
            Budget(latency_ms=self.latency_ms)
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise BudgetError(
                    "latency-ms: each process would measure something else; find the share of MACs with one process, "
                    "then give keep-macs"
                )
            if self.masks:
                raise BudgetError(
                    f"granularity {self.unit}: zeros do not make dense layers faster, so latency-ms is for channels"
                )
        if trained_weights and (self.sparsity is None or self.keep_macs or self.keep_params):
            raise BudgetError(
                "granularity weights: the budget is sparsity, the share of weights that go, such as 0.8"
            )
        if self.masks and not trained_weights:
            if self.sparsity is not None:
                raise BudgetError(
                    f"method {self.method}, granularity {self.unit}: the budget is keep-macs or keep-params, in which "
                    f"a weight at zero costs nothing, such as keep-params 0.25; not sparsity"
                )
            for given, share in (("keep-macs", self.keep_macs), ("keep-params", self.keep_params)):
                if share is not None and not 0 < share < 1:
                    raise BudgetError(f"{given} {share:g}: expected a share above 0, below 1")
        for what in ("min_keep", "round_to", "calibration_images", "latency_batch"):
            if (number := getattr(self, what)) < 1:
                raise SecateurError(f"{what.replace('_', '-')} {number}: expected at least 1")

    @property
    def unit(self) -> str:
        """What one unit is: a name in `GRANULARITIES`."""
        if self.granularity is None:
            return "channels" if self.method == AUTO else method_named(self.method).granularity
        return self.granularity

    @property
    def masks(self) -> bool:
        """Whether units become zeros that stay where they are, and nothing is cut."""
        return self.unit != "channels"

    @property
    def needs_data(self) -> bool:
        """Whether what goes is chosen on labelled images."""
        entry = method_named(self.method)
        scored = {"snip", "grasp", "rd"}.intersection((self.method, str(self.options.get("densities"))))
        by_units = self.method == "oneshot" and SCORES[self.score].needs_data
        return bool(scored) or by_units or (entry.own and entry.takes("data"))

    def _check_phases(self) -> None:
        """What is trained when must suit the method."""
        if self.method == AUTO:
            if self.options:
                raise SecateurError(f"method auto takes no {next(iter(self.options))}; name the method")
            return
        self.method_options()
        when = method_named(self.method).when
        if when == "during":
            if self.train is None:
                raise SecateurError(f"method {self.method} prunes while the model is trained; give epochs")
            if self.finetune is not None:
                raise SecateurError(
                    f"method {self.method} trains as it prunes; there is no fine-tuning after it"
                )
        elif when == "before" and self.train is not None:
            raise SecateurError(f"method {self.method} prunes before training; give `finetune`, not `train`")
        if when == "before" and not self.masks and self.task.weights is not None:
            raise SecateurError(f"method {self.method} draws fresh weights; leave out weights")
        taught = [how for how in (self.train, self.finetune) if how and how.distill_weight > 0]
        if taught and (when != "after" or self.train in taught):
            raise SecateurError(
                f"distillation needs a trained dense model as its teacher, and method {self.method} with this training "
                f"has none; set distill to 0"
            )

    @property
    def wanted(self) -> list[str]:
        """Those settings of `method_options` that several methods share and that are not at their defaults."""
        return [name for name in _SHARED if self._is_set(name)]

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) != type(self).__dataclass_fields__[name].default  # type: ignore[no-any-return]

    def method_options(self) -> dict[str, Any]:
        """What the method is to be run with: its own options, and those that several methods share.

        Raises:
            SecateurError: the method has no such option.
        """
        entry = method_named(self.method)
        if self.masks and entry.when == "after":
            given = [*self.options, *(name for name in _OF_CHANNELS if self._is_set(name))]
            if given:
                names = ", ".join(given).replace("_", "-")
                raise SecateurError(f"granularity {self.unit} of trained models takes no {names}")
            return {}
        able = entry.options(self.unit)
        entry.check(self.method, self.options, self.unit)
        chosen = dict(self.options)
        wanted = self.wanted
        for option in _SHARED:
            if option in able:
                chosen.setdefault(option, getattr(self, option))
            elif option in wanted:
                raise SecateurError(f"method {self.method} takes no {option.replace('_', '-')}")
        if "seed" in able:
            chosen.setdefault("seed", self.task.seed)
        if "removal" in able:
            chosen["removal"] = Decay(self.decay, Rectify() if self.rectify else None)
        elif self.decay != 1 or self.rectify:
            others = ", ".join(name for name, other in METHODS.items() if "removal" in other.options())
            raise SecateurError(f"method {self.method} takes no decay; methods that do: {others}")
        if self.rectify and self.decay == 1:
            raise SecateurError("rectify needs units that fade: give decay, the number of steps")
        return chosen

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as plain JSON."""
        return _plain(asdict(self) | {"granularity": self.unit})  # type: ignore[no-any-return]

    def budget(self, graph: Graph) -> Budget:
        """The budget, once it is known to be within reach; for masks, their method says what is.

        Raises:
            BudgetError: a bound keeps nothing, everything, or less than is possible; the message says what
                can be reached.
        """
        if self.masks:
            return Budget(macs=self.keep_macs, params=self.keep_params)
        if not graph.groups:
            raise BudgetError("nothing can be pruned: the model has no removable units. `inspect` says why.")
        shares: dict[str, float] = {}
        for option, given, measure, word in (
            ("keep-macs", self.keep_macs, "macs", "MACs"),
            ("keep-params", self.keep_params, "params", "parameters"),
            ("sparsity", self.sparsity, "units", "units"),
        ):
            if given is None:
                continue
            least, dense = reachable(graph, self.min_keep, self.round_to)[measure]
            share = round(1 - given, 9) if option == "sparsity" else given
            if not (0 < share < 1 and share * dense + 1e-9 >= least):
                low = rounded_up(least / dense)
                bounds = (
                    f"above 0, at most {1 - low:.4f}"
                    if option == "sparsity"
                    else f"at least {low:.4f}, below 1"
                )
                raise BudgetError(
                    f"{option} {given:g}: expected a share {bounds}. Within reach (min-keep {self.min_keep}, "
                    f"round-to {self.round_to}) are {least:,} to {dense:,} {word}."
                )
            shares[measure] = share
        return Budget(**shares, latency_ms=self.latency_ms)


def reachable(graph: Graph, min_keep: int = 1, round_to: int = 1) -> dict[str, tuple[int, int]]:
    """The least and the full cost, for each measure that a budget can bound.

    >>> import torch
    >>> from secateur import analyze
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 5, 1))
    >>> reachable(analyze(model, torch.zeros(1, 3, 4, 4)))
    {'macs': (128, 1024), 'params': (14, 77), 'units': (1, 8)}
    """
    cost = Cost(graph)
    least = [list_widths(group.units, min_keep, round_to)[0] for group in graph.groups]
    return {measure: (cost.of(measure, least), cost.of(measure)) for measure in ("macs", "params", "units")}


def rounded_up(share: float) -> float:
    """To four digits, so that a share which is named as reachable can be reached.

    >>> rounded_up(0.00121)
    0.0013
    """
    return math.ceil(share * 10_000) / 10_000


def _plain(value: Any) -> Any:
    """The same as JSON will give it back; paths are made absolute."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value.resolve()) if isinstance(value, Path) else value
