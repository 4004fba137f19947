"""One file per paper or classic: which units go, and when."""

import inspect
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from secateur.cost import Budget
from secateur.engine.decay import Decay, Restore
from secateur.engine.pruned import Pruned
from secateur.engine.training_method import TrainingMethod
from secateur.errors import SecateurError, unknown
from secateur.graph import Inputs
from secateur.imports import imported
from secateur.methods.at_init import INITIAL_SCORES, Sparse, prune_initial
from secateur.methods.auto import AUTO, Choice, choose
from secateur.methods.depgraph import DepGraph
from secateur.methods.gate_decorator import GateDecorator
from secateur.methods.gradual import Gradual
from secateur.methods.hesso import HESSO
from secateur.methods.lapp import LAPP
from secateur.methods.latency import Clock, budget_in_macs, here, prune_to_latency
from secateur.methods.oneshot import oneshot
from secateur.methods.oto import OTO
from secateur.methods.paam import PAAM
from secateur.methods.precrop.crop import preconfig, precrop
from secateur.methods.precrop.random_masks import crop_masks
from secateur.methods.rd.channels import rd
from secateur.methods.rd.single_weights import prune_weights

__all__ = [
    "AUTO",
    "HESSO",
    "LAPP",
    "METHODS",
    "OTO",
    "PAAM",
    "Choice",
    "Decay",
    "DepGraph",
    "GateDecorator",
    "Gradual",
    "Method",
    "Pruned",
    "Restore",
    "Sparse",
    "TrainingMethod",
    "budget_in_macs",
    "choose",
    "crop_masks",
    "method_named",
    "oneshot",
    "preconfig",
    "precrop",
    "prune",
    "prune_initial",
    "prune_weights",
    "rd",
]


@dataclass(frozen=True)
class Method:
    """An entry of the table.

    Attributes:
        run: before and after training: (model, inputs, budget, **options) -> Pruned. During training: a
            `StructuredMethod`, made with (model, inputs, budget=…, steps=…, **options).
        summary: one line for lists of choices.
        when: whether it prunes a trained model, one that is being trained, or one that is yet to be.
        granularity: what one unit is for `run`: "channels"; or "weights", with a `Sparse` as its result.
        others: what does the same for other units. Before training it gives a `Sparse`; after training it is
            `prune_weights`.
        own: whether it is the user's: see `method_named`.
    """

    run: Callable[..., Any]
    summary: str
    when: Literal["before", "during", "after"] = "after"
    granularity: str = "channels"
    others: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    own: bool = False

    def takes(self, name: str) -> bool:
        """Whether `run` has a parameter of that name."""
        return name in inspect.signature(self.run).parameters

    @property
    def runs(self) -> Mapping[str, Callable[..., Any]]:
        """All that it can do, by granularity; the first is what it does unless told otherwise."""
        return {self.granularity: self.run, **self.others}

    def options(self, granularity: str = "") -> Mapping[str, Any]:
        """What may be set, by name, with the defaults; budgets, steps and frozen modules aside."""
        run = self.runs[granularity or self.granularity]
        given = {
            "model",
            "inputs",
            "budget",
            "steps",
            "freeze",
            "data",
            "loss",
            "curves",
            "tick",
            "initialise",
        }
        if isinstance(run, partial):
            given |= run.keywords.keys()
        parameters = inspect.signature(run).parameters
        return {n: p.default for n, p in parameters.items() if n not in given and p.kind is not p.VAR_KEYWORD}

    def check(self, name: str, options: Mapping[str, Any], granularity: str = "") -> None:
        """Raise SecateurError for an option that the method does not have."""
        able = self.options(granularity)
        for option in options:
            if option not in able:
                raise SecateurError(f"method {name}: {unknown('option', option, able)}")


METHODS = {
    "oneshot": Method(
        oneshot,
        "score every unit of the trained model once, remove the lowest",
        others={"weights": prune_weights},
    ),
    "rd": Method(
        rd,
        "choose widths by measured distortion curves, and make up for what is cut",
        others={"weights": prune_weights},
    ),
    "precrop": Method(
        precrop,
        "choose narrower widths before training, and draw fresh weights",
        "before",
        others={name: partial(crop_masks, granularity=name) for name in ("weights", "filters")},
    ),
    "preconfig": Method(preconfig, "choose other proportions before training; some layers grow", "before"),
    **{
        score: Method(
            partial(prune_initial, score=score),
            f"mask weights before training: {INITIAL_SCORES[score]}",
            "before",
            "weights",
        )
        for score in ("synflow", "snip", "grasp")
    },
    "lapp": Method(
        LAPP, "learn a threshold per layer under a cost constraint, with a light bypass", "during"
    ),
    "paam": Method(PAAM, "attention networks score the filters of all layers at once", "during"),
    "gradual": Method(Gradual, "remove the lowest units in rounds while training", "during"),
    "depgraph": Method(DepGraph, "push whole groups towards zero, then cut the lowest", "during"),
    "oto": Method(OTO, "penalise redundant units and project them to zero (OTOv2)", "during"),
    "hesso": Method(HESSO, "decay redundant units to zero in periods", "during"),
    "gate-decorator": Method(GateDecorator, "batch norms as gates that close one after another", "during"),
}


def method_named(name: str) -> Method:
    """An entry of `METHODS`, or `module:function` of the user's own.

    A function prunes a trained model: (model, inputs, budget, *, options by name) -> the smaller model, or a
    `Pruned`. It gets a copy that it may change; and `data`, batches of (images, labels), if it has such a parameter.
    A class derived from `StructuredMethod` prunes while the model is trained.

    Raises:
        SecateurError: there is no such method.
    """
    if ":" in name:
        run = imported("method", name)
        during = isinstance(run, type) and issubclass(run, TrainingMethod)
        return Method(run, f"your own, {name}", "during" if during else "after", own=True)
    if name not in METHODS:
        raise SecateurError(unknown("method", name, METHODS))
    return METHODS[name]


def prune(
    model: nn.Module,
    inputs: Inputs,
    *,
    budget: Budget,
    method: str = "oneshot",
    clock: Clock | None = None,
    **options: Any,
) -> Pruned:
    """Prune channels of a copy of a model to a budget with one of the methods that need no training.

    Args:
        model: any vision network; it is only read.
        inputs: example inputs, such as torch.randn(1, 3, 224, 224).
        budget: what the result may cost at most.
        method: a name in `secateur.methods.METHODS`.
        clock: measures the milliseconds of a model for budgets of `latency_ms`, such as with another runtime;
            default: `secateur.methods.latency.here`, PyTorch on the device of `inputs`.
        options: of the method; see its docstring (`secateur.methods.oneshot`, …).
    Raises:
        SecateurError: unknown method, one that prunes during training, or one that makes masks of single weights;
            else what the method raises.
    """
    if method not in METHODS:
        raise SecateurError(unknown("method", method, METHODS))
    entry = METHODS[method]
    if entry.when == "during":
        raise SecateurError(
            f"method {method} prunes while the model is trained: put secateur.methods.{entry.run.__name__} beside "
            f"your training loop (see its docstring), or use `secateur prune --method {method} --epochs …`"
        )
    if entry.granularity != "channels":
        raise SecateurError(
            f"method {method} cuts nothing, it makes masks of single weights: call "
            f'secateur.methods.prune_initial(model, inputs, budget, score="{method}") and train within its '
            f"plan.holding(model)"
        )
    if budget.latency_ms is None:
        pruned: Pruned = entry.run(model, inputs, budget, **options)
        return pruned
    if "data" in options:
        options["data"] = list(options["data"])  # it is gone through once per trial
    with tempfile.TemporaryDirectory() as folder:
        if entry.takes("curves"):  # they are the same for all trials
            options = {"curves": Path(folder) / "curves.safetensors"} | options
        return prune_to_latency(
            lambda within: entry.run(model, inputs, within, **options),
            model,
            budget,
            clock or here(model, inputs),
        )
