"""Papers and classics, one file or folder each: which units go, and when. `METHODS` is the table of them.

A method is a frozen dataclass of options: `secateur.prune(model, inputs, budget=…, method=RD(levels=5), data=…)`, or,
beside your own training loop, `LAPP().start(model, inputs, budget=…, steps=…)`.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from secateur.cost import Budget
from secateur.cost.prices import measure_prices
from secateur.engine.decay import Decay, Restore
from secateur.engine.method import Batch, Context, Method, Progress
from secateur.engine.pruned import Pruned, proven
from secateur.engine.session import Session
from secateur.engine.training_method import TrainingMethod
from secateur.errors import BudgetError, SecateurError, unknown
from secateur.graph import Graph, Inputs
from secateur.graph.guard import uncompiled
from secateur.imports import imported
from secateur.methods.at_init import SNIP, AtInit, GraSP, SynFlow
from secateur.methods.auto import Auto, Selection, choose
from secateur.methods.depgraph import DepGraph
from secateur.methods.gate_decorator import GateDecorator
from secateur.methods.gradual import Gradual
from secateur.methods.hesso import HESSO
from secateur.methods.lapp import LAPP
from secateur.methods.latency import Clock, budget_in_macs, here, prune_at_prices, prune_to_latency
from secateur.methods.oneshot import OneShot
from secateur.methods.oto import OTO
from secateur.methods.own import Own
from secateur.methods.paam import PAAM
from secateur.methods.precrop import PreConfig, PreCrop, RandomFilters, RandomWeights
from secateur.methods.rd import RD, MaskWeights, RDWeights
from secateur.plan import Plan
from secateur.settings import checked
from secateur.surgery.cut import cut_copy

__all__ = [
    "HESSO",
    "LAPP",
    "METHODS",
    "OTO",
    "PAAM",
    "RD",
    "SNIP",
    "AtInit",
    "Auto",
    "Context",
    "Decay",
    "DepGraph",
    "GateDecorator",
    "GraSP",
    "Gradual",
    "MaskWeights",
    "Method",
    "OneShot",
    "Own",
    "PreConfig",
    "PreCrop",
    "Pruned",
    "RDWeights",
    "RandomFilters",
    "RandomWeights",
    "Restore",
    "Selection",
    "Session",
    "SynFlow",
    "TrainingMethod",
    "budget_in_macs",
    "choose",
    "method_named",
    "prune",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Auto,
        OneShot,
        RD,
        LAPP,
        PAAM,
        Gradual,
        DepGraph,
        OTO,
        HESSO,
        GateDecorator,
        PreCrop,
        PreConfig,
        MaskWeights,
        RDWeights,
        SynFlow,
        SNIP,
        GraSP,
        AtInit,
        RandomWeights,
        RandomFilters,
    )
}
"""By name. To add a method, write its class and enter it here; your own need no entry, see `method_named`."""

MethodLike: TypeAlias = str | Method | Callable[..., Any]


@checked(SecateurError, but=("method",))
def method_named(method: MethodLike, options: Mapping[str, Any] | None = None) -> Method:
    """A method with its options.

    Args:
        method: a name in `METHODS`; a method that is made already; or your own: a class derived from `Method`, or a
            function (see `Own`), given as such or as `module:name`.
        options: by name; `removal.steps` is option `steps` of the settings in option `removal`.
    Raises:
        SecateurError: there is no such method or option, or an option does not take the value.

    >>> method_named("oneshot", {"score": "l1"}).record()["score"]
    'l1'
    """
    given = dict(options or {})
    if isinstance(method, Method):
        return type(method).of({**vars(method), **given}) if given else method
    if isinstance(method, str) and ":" not in method:
        if method not in METHODS:
            raise SecateurError(unknown("method", method, METHODS))
        if method == Auto.name:
            common = {name: given.pop(name) for name in ("freeze", "scope") if name in given}
            return Auto(**common, options=given)
        return METHODS[method].of(given)
    found = imported("method", method) if isinstance(method, str) else method
    if not callable(found):
        raise SecateurError(f"method is {found!r}; expected a name, a Method, or a function of your own")
    if isinstance(found, type) and issubclass(found, Method):
        return found.of(given)
    common = {name: given.pop(name) for name in ("freeze", "scope") if name in given}
    return Own(function=found, **common, options=given)


@uncompiled
@checked(SecateurError, but=("model", "inputs", "budget", "method"))
def prune(
    model: nn.Module,
    inputs: Inputs,
    *,
    budget: Budget | float,
    method: MethodLike = "auto",
    data: Iterable[Batch | Inputs] | None = None,
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
    clock: Clock | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    graph: Graph | None = None,
    **options: Any,
) -> Pruned:
    """Prune a copy of a model to a budget, and prove the result.

    Args:
        model: any vision network; it is only read.
        inputs: example inputs, such as torch.randn(1, 3, 224, 224).
        budget: what the result may cost at most; a number is a bound of the MACs, 0.5 for half of them.
        method: as for `method_named`; "auto" takes rd where there is data to measure on, and else the l2 norms of
            filters. Not one that prunes while the model trains.
        data: batches of (inputs, targets) from training, for methods and scores that look at data; a few hundred
            images will do. Inputs may be what `inputs` may be; a batch that is a dict is both.
        loss: of (outputs, targets), a mean over the batch; outputs are what the model returns.
        clock: measures the milliseconds of a model for budgets of `latency_ms`, such as with another runtime;
            default: `secateur.methods.latency.here`, PyTorch on the device of `inputs`.
        cache: a folder for measurements that serve several budgets, or the file for them.
        progress: is told how far a long measurement has got: (done, of how many).
        graph: of the model, from `analyze` with the method's `freeze`, `attention` and `granularity`, if it is known.
        options: of the method; `secateur methods NAME` lists them.
    Raises:
        SecateurError: unknown method or option; else what the method raises.
    """
    if isinstance(budget, int | float):
        budget = Budget(macs=budget)
    if not isinstance(budget, Budget):
        raise BudgetError(
            f"budget is {budget!r}; expected a Budget, such as Budget(macs=0.5), or a share of the MACs"
        )
    chosen = method_named(method, options)
    context = Context(data, loss, None if cache is None else Path(cache), progress, graph=graph)
    if isinstance(chosen, Auto):
        return prune_by_choice(chosen, model, inputs, budget, context, clock)
    return prune_by(chosen, model, inputs, budget, context, clock)


def prune_by_choice(
    auto: Auto, model: nn.Module, inputs: Inputs, budget: Budget, context: Context, clock: Clock | None
) -> Pruned:
    """Prune by what "auto" chooses; where rd cannot run a model in steps, by gradients, or norms without a loss."""
    data = None if context.data is None else list(context.data)
    trained, context = data is not None, replace(context, data=data)
    chosen = choose(auto, bounds=budget.given, trained=trained, data=trained, training=False).method
    graph = context.graph or chosen.analyze(model, inputs)
    if isinstance(chosen, RD) and graph.parts is not None:
        score = OneShot.score if context.loss is Context.loss else "taylor"
        chosen = OneShot.of({"freeze": auto.freeze, "scope": auto.scope, "score": score, **auto.options})
    return prune_by(chosen, model, inputs, budget, replace(context, graph=graph), clock)


def prune_by(
    chosen: Method, model: nn.Module, inputs: Inputs, budget: Budget, context: Context, clock: Clock | None
) -> Pruned:
    """Prune by a method that is known."""
    if budget.latency_ms is None or chosen.when == "during":
        return chosen.prune(model, inputs, budget, context)
    if chosen.removes != "channels":
        raise SecateurError(
            f"method {chosen.name}: zeros do not make dense layers faster, so budgets of latency_ms are for channels"
        )
    return prune_within_latency(chosen, model, inputs, budget, context, clock or here(model, inputs))


def prune_within_latency(
    method: Method, model: nn.Module, inputs: Inputs, budget: Budget, context: Context, clock: Clock
) -> Pruned:
    """Prune to a budget with milliseconds: by trying shares of the MACs, or, where blocks may go, by prices.

    See `prune_to_latency` and `prune_at_prices`. Plain scores share one graph, and only what is returned is proven.
    """
    data = None if context.data is None else list(context.data)  # it is gone through once per trial
    with tempfile.TemporaryDirectory() as folder:
        cache = context.cache or Path(folder)  # the same for all trials
        again = replace(context, data=data, cache=cache)
        if isinstance(method, OneShot):
            graph = context.graph or method.analyze(model, inputs)
            again = replace(again, graph=graph, prove=method.compensation != "none")  # of the solved weights
        if isinstance(method, RD) and method.granularity != "channels":
            graph = context.graph or method.analyze(model, inputs)
            prices = measure_prices(
                model, graph, lambda masks: cut_copy(model, graph, Plan.of(graph, masks)), clock
            )
            again = replace(again, prices=prices)
            return prune_at_prices(
                lambda within: method.prune(model, inputs, within, again), model, budget, prices, clock
            )
        found = prune_to_latency(
            lambda within: method.prune(model, inputs, within, again), model, budget, clock
        )
    return found if again.prove else proven(model, found, seed=getattr(method, "seed", 0))
