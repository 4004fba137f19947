"""Pruning of single weights of a trained model: one budget for all layers, shared out by curves or by a formula."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocate.knapsack import SOLVERS, Problem, Solution, solve
from secateur.allocate.sparsity import WEIGHT_ALLOCATIONS, Counts, allocate_weights, meet_total
from secateur.cost import Budget, Cost
from secateur.engine.method import Context, Meter, Method, Progress, Removes, images_of
from secateur.engine.pruned import Pruned, costs_left
from secateur.errors import BudgetError, PlanError, ScoreError, SecateurError
from secateur.graph import Graph, Inputs, is_frozen
from secateur.graph.capture import batch_of
from secateur.graph.duplicate import duplicate
from secateur.graph.replay import Replay, Tensors, chunks
from secateur.methods.rd.curves import (
    DISTANCES,
    REDUCTIONS,
    Curves,
    even,
    geometric,
    interpolated,
    joint,
    key_of,
    measure,
)
from secateur.plan import WeightPlan
from secateur.plan.weight_plan import pattern_mask, top
from secateur.reconstruction.compensate import ChooseMask, Fitted, compensate, layers, reestimate
from secateur.reconstruction.plans import COMPENSATIONS
from secateur.settings import option, plain, settings

SELECTIONS = {
    "magnitude": "the largest weights of a layer stay",
    "least-squares": "those stay whose removal costs the layer's output most once the others are solved again",
}
"""Which weights of a layer stay -> one line for lists of choices."""


@settings
class _WeightMethod(Method):
    """Base class for methods that set single weights of a trained model to zero.

    The budget is `units`: the weights of convolutions and linear layers that stay, as a share or a number; or `params`:
    all parameters that are not zero. Noise will do as data where there are no images.
    """

    removes: ClassVar[Removes] = "weights"

    selection: str = option("which weights of a layer stay", default="least-squares", choices=SELECTIONS)
    compensation: str = option(
        "what the remaining weights do, without training", default="least-squares", choices=COMPENSATIONS
    )
    distortion: str = option("distance between outputs", default="auto", choices=DISTANCES)
    min_density: float = option("share of each layer that stays at least", default=0.01, least=0, below=1)
    steps: int = option("in which a layer's weights are eliminated", default=8, least=1)
    pattern: tuple[int, int] | None = option(
        "(n, m): a layer either stays whole or keeps n of every m weights", default=None, least=1
    )

    @property
    def needs_data(self) -> bool:
        return True

    def task(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> "Task":
        """What is to be pruned to what, on a copy of the model that `Task.finish` writes to."""
        if context.data is None:
            raise ScoreError(f"method {self.name!r} measures on data: pass data=, batches of images")
        if set(budget.bounds) not in ({"units"}, {"params"}):
            raise BudgetError(
                f"method {self.name!r}: the budget is units, the weights that stay, such as units=0.2, or params, all "
                f"parameters that do; got {', '.join(budget.bounds)}"
            )
        given = images_of(context.data)
        graph = context.graph or self.analyze(model, inputs)
        model = duplicate(model).eval()
        if context.previous is not None:
            context.previous.apply_(model)
        program = Replay(model, given[0])
        weights = {
            layer.weight: program.tensor(layer.weight).detach()
            for layer in layers(program)
            if not is_frozen(layer.weight.rpartition(".")[0], self.freeze)
        }
        if not weights:
            raise BudgetError(
                "nothing can be pruned: the model has no convolution or linear layer with weights that may go"
            )
        able, params = sum(w.numel() for w in weights.values()), Cost(graph).params()
        limits = budget.limits({name: able if name == "units" else params for name in budget.bounds})
        total = limits["units"] if "units" in limits else limits["params"] - (params - able)
        if total <= 0:
            raise BudgetError(
                f"method {self.name!r}: {params - able:,} of {params:,} parameters are no weights that may go, more "
                f"than the {limits['params']:,} that the budget lets stay"
            )
        alive = _alive(weights, context.previous)
        return Task(
            graph, program, tuple(chunks(program, given)), weights, alive, total, self, context.progress
        )


@settings
class RDWeights(_WeightMethod):
    """Share out single weights over layers by measured distortion curves, as one knapsack.

    The defaults are the recipe that measures best, `FAITHFUL` is the published one.

    Raises:
        BudgetError: out of reach; the message gives the reachable range.
        PlanError: earlier masks of another model.
        CaptureError: the forward pass cannot be captured.
    Source: Xu et al. 2023, arXiv:2308.10438, and the code released with it.
    Differs: weights are chosen and solved again by least squares; exponents, rivals and corrections are ours.
    """

    name: ClassVar[str] = "rd-weights"
    summary: ClassVar[str] = "mask single weights, shared out over layers by measured distortion curves"

    reduction: str = option("over the calibration images", default="mean", choices=REDUCTIONS)
    exponent: float = option(
        "of the distortion before curves are added up: 1 takes layers for uncorrelated",
        default=0.5,
        above=0,
        most=4,
    )
    levels: int = option("measured per layer, the dense one included", default=9, least=2)
    spacing: Literal["geometric", "even"] = option("of the levels, in what is kept", default="geometric")
    points: int = option(
        "levels per layer that the solver sees, interpolated; 0: only the measured", default=60, least=0
    )
    solver: str = option("of the knapsack", default="hull", choices=SOLVERS)
    rivals: tuple[str, ...] = option(
        "allocations that are tried as well; the lowest measured distortion wins",
        default=("global", "lamp"),
        choices=WEIGHT_ALLOCATIONS,
    )
    corrections: int = option(
        "rounds in which curves are measured again around the solution", default=0, least=0
    )

    @torch.no_grad()
    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> Pruned:
        task = self.task(model, inputs, budget, context)
        curves = task.curves(self, context.cache)
        counts, solution = task.solve(self, curves)
        found = task.apply(counts)
        taken, kept = "rd", list[float]()
        if self.pattern is None:
            for rival in self.rivals:
                other = task.apply(task.allocate(rival))
                if other.measured < found.measured:
                    found, taken = other, rival
            for _ in range(self.corrections):
                trial = task.correct(self, found)
                if trial is None:
                    break
                found = trial
                kept.append(found.measured)
        facts = {
            "taken": taken,
            "curves": curves.rows(),
            "predicted": solution.distortion ** (1 / self.exponent) if taken == "rd" else None,
            "gap": solution.gap if taken == "rd" else None,
            "corrected": kept,
        }
        return task.finish(found, self.record() | {"taken": taken, "budget": budget.given}, facts)


@settings
class MaskWeights(_WeightMethod):
    """Share out single weights over layers by a formula.

    Raises:
        BudgetError: out of reach.
        PlanError: earlier masks of another model.
        CaptureError: the forward pass cannot be captured.
    Source: of each allocation, see `secateur.allocate.sparsity`.
    """

    name: ClassVar[str] = "weights"
    summary: ClassVar[str] = "mask single weights of the trained model, shared out over layers by a formula"

    allocation: str = option("how much goes from each layer", default="global", choices=WEIGHT_ALLOCATIONS)

    @torch.no_grad()
    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> Pruned:
        task = self.task(model, inputs, budget, context)
        found = task.apply(task.allocate(self.allocation))
        return task.finish(found, self.record() | {"budget": budget.given}, {"curves": [], "predicted": None})


FAITHFUL = RDWeights(
    selection="magnitude",
    compensation="none",
    distortion="logits",
    reduction="max",
    exponent=1.0,
    levels=101,
    spacing="even",
    points=0,
    min_density=0.0,
    rivals=(),
)
"""The published recipe.

Source: Xu et al. 2023, arXiv:2308.10438, and the code released with it: magnitudes, the worst image's mean squared
change of the logits, 101 even levels.
Differs: curves are zero at level 0 and monotone; the solver is exact up to its certificate; one weight of each layer
stays; calibration images are not augmented.
"""


@dataclass(frozen=True)
class Masked:
    """Masks that were tried.

    Attributes:
        counts: weights kept per layer.
        masks: by weight name.
        tensors: of the pruned network, after compensation.
        measured: mean distortion on the calibration images.
    """

    counts: Counts
    masks: dict[str, Tensor]
    tensors: dict[str, Tensor]
    measured: float


def _alive(weights: Mapping[str, Tensor], previous: WeightPlan | None) -> dict[str, Tensor]:
    """What may stay, per weight."""
    earlier = previous.masks if previous else {}
    if strange := sorted(earlier.keys() - weights.keys()):
        raise PlanError(
            f"earlier masks of {strange[:3]}, which are no convolution's or linear layer's weights"
        )
    return {n: earlier.get(n, torch.ones(w.shape, dtype=torch.bool)) for n, w in weights.items()}


@dataclass(frozen=True)
class Task:
    """One pruning to one total.

    Attributes:
        graph: of the model.
        program: of a copy of the dense model.
        batches: calibration images.
        weights: parameter name -> what it is before.
        alive: what may stay of it.
        total: weights to keep in all.
        how: the method.
        progress: is told how far measuring has got.
    """

    graph: Graph
    program: Replay
    batches: tuple[Inputs, ...]
    weights: dict[str, Tensor]
    alive: dict[str, Tensor]
    total: int
    how: _WeightMethod
    progress: Progress | None

    def curves(self, how: RDWeights, path: str | Path | None) -> Curves:
        """Measured, or read from a file that holds just these."""
        same = {"exponent": 1.0, "solver": "hull", "points": 0, "corrections": 0, "reduction": "mean"}
        relevant = plain(how) | same  # what they do not depend on
        del relevant["rivals"]
        for name in ("freeze", "scope"):
            if not relevant[name]:
                del relevant[name]
        masked = {name: mask.sum().item() for name, mask in self.alive.items()}
        key = key_of(self.program.model, self.batches, {"settings": relevant, "alive": masked})
        return Curves.once(path, key, lambda: self.measure_curves(how, key))

    def measure_curves(self, how: RDWeights, key: str) -> Curves:
        """The distortion of every layer at every level."""
        kept, candidates = self.levels(how)
        meter = Meter(self.progress, len(self.batches) * sum(map(len, candidates)))
        images = measure(
            self.program,
            self.batches,
            candidates,
            distortion=self.how.distortion,
            batched=passes(self.program),
            tick=meter.each(1),
        )
        meter.end()
        zero = np.zeros((1, sum(batch_of(x) for x in self.batches)))
        return Curves(tuple(self.weights), kept, tuple(np.concatenate([zero, v]) for v in images), key)

    def allocate(self, allocation: str) -> Counts:
        """Weights per layer by a rule that needs no curves."""
        counts = allocate_weights(
            {n: w.cpu() * self.alive[n] for n, w in self.weights.items()}, self.total, allocation
        )
        sizes = {n: int(mask.sum()) for n, mask in self.alive.items()}
        return meet_total({n: min(count, sizes[n]) for n, count in counts.items()}, sizes, self.total)

    def measure(self, tensors: Tensors) -> float:
        """Mean distortion of the pruned network on the calibration images."""
        found = joint(self.program, self.batches, tensors, distortion=self.how.distortion)
        return float(found.mean())

    def levels(self, how: RDWeights) -> tuple[tuple[Any, ...], list[Sequence[Tensors]]]:
        """What each layer keeps at each level, and its tensors at all levels but the first."""
        fitted = self.fit() if "least-squares" in (self.how.selection, self.how.compensation) else {}
        kept: list[Any] = []
        candidates: list[Sequence[Tensors]] = []
        for name, w in self.weights.items():
            masks = self.nest(how, name, fitted.get(name))
            kept.append(np.array([int(mask.sum()) for mask in masks], dtype=np.int64))
            if self.how.compensation == "least-squares":
                candidates.append([fitted[name].solved(mask) for mask in masks[1:]])
            else:
                candidates.append(MaskedLevels(name, w, masks[1:]))
        return tuple(kept), candidates

    def fit(self) -> dict[str, Fitted]:
        """Every layer at its place in the dense network."""
        whole: dict[str, Tensor | ChooseMask] = dict(self.alive)
        return compensate(self.program, self.batches, whole).fitted

    def nest(self, how: RDWeights, name: str, fitted: Fitted | None) -> list[Tensor]:
        """The layer's masks, from all that is alive downwards."""
        w, mask = self.weights[name], self.alive[name]
        if self.how.pattern is not None:
            other = pattern_mask(torch.where(mask, w.abs().cpu(), -1.0), *self.how.pattern)
            return [mask] if other is None else [mask, other & mask]
        size = int(mask.sum())
        least = min(size, max(1, int(np.ceil(self.how.min_density * w.numel() - 1e-9))))
        make = geometric if how.spacing == "geometric" else even
        masks = [mask]
        for count in make(size, how.levels, least)[1:].tolist():
            if self.how.selection == "magnitude" or fitted is None:
                masks.append(top(torch.where(mask, w.abs().cpu(), -1.0), count))
            else:
                masks.append(fitted.chosen(count, masks[-1], steps=2))
        return masks

    def solve(self, how: RDWeights, curves: Curves) -> tuple[Counts, Solution]:
        """Weights per layer that the curves ask for."""
        names = curves.names
        values = [curve**how.exponent for curve in curves.reduced(how.reduction)]
        points = [
            interpolated(kept, value, how.points)
            if how.points and self.how.pattern is None
            else (kept, value)
            for kept, value in zip(curves.kept, values, strict=True)
        ]
        return self.solve_within(how, names, [kept for kept, _ in points], [value for _, value in points])

    def solve_within(
        self, how: RDWeights, names: Sequence[str], kept: Sequence[Any], values: Sequence[Any]
    ) -> tuple[Counts, Solution]:
        costs = {"weights": tuple(k.astype(np.float64) for k in kept)}
        problem = Problem(tuple(names), tuple(values), costs)
        solution = solve(problem, {"weights": float(self.total)}, how.solver)
        counts = {n: int(k[level]) for n, k, level in zip(names, kept, solution.levels, strict=True)}
        if self.how.pattern is None:
            counts = meet_total(counts, {n: int(mask.sum()) for n, mask in self.alive.items()}, self.total)
        return counts, solution

    def apply(self, counts: Counts) -> Masked:
        """Masks of so many weights, and what they lead to."""
        masks, tensors = self.compensate(counts)
        return Masked(counts, masks, tensors, self.measure(tensors))

    def finish(self, found: Masked, origin: Mapping[str, Any], facts: Mapping[str, Any]) -> Pruned:
        """The copy of the model with these masks and tensors."""
        for name, tensor in found.tensors.items():
            self.program.tensor(name).copy_(tensor)
        model = self.program.model
        plan = WeightPlan.of(model, found.masks, origin)
        facts = {"measured": found.measured, "counts": dict(found.counts), **facts}
        before, after = costs_left(self.graph, plan.masks)
        return Pruned(model, plan, self.graph, (), None, before, after, facts=facts)

    def compensate(self, counts: Counts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Masks, and the tensors of the pruned network after compensation."""
        how = self.how

        def choice(name: str) -> ChooseMask:
            return lambda fitted: fitted.chosen(counts[name], self.alive[name], how.steps)

        fixed: dict[str, Tensor] = {}
        for name, w in self.weights.items():
            size = int(self.alive[name].sum())
            if counts[name] == size:
                fixed[name] = self.alive[name]
            elif how.pattern is not None:
                mask = pattern_mask(torch.where(self.alive[name], w.abs().cpu(), -1.0), *how.pattern)
                assert mask is not None
                fixed[name] = mask & self.alive[name]
            elif how.selection == "magnitude":
                fixed[name] = top(torch.where(self.alive[name], w.abs().cpu(), -1.0), counts[name])
        if how.compensation == "least-squares":
            choices: dict[str, Tensor | ChooseMask] = {n: fixed.get(n, choice(n)) for n in self.weights}
            done = compensate(self.program, self.batches, choices)
            return done.masks, done.tensors
        if open_ := [n for n in self.weights if n not in fixed]:
            fitted = self.fit()
            fixed |= {n: fitted[n].chosen(counts[n], self.alive[n], how.steps) for n in open_}
        masks = {n: fixed[n] for n in self.weights}
        tensors = {n: w * masks[n].to(w.device) for n, w in self.weights.items()}
        if how.compensation == "batch-norm":
            tensors = reestimate(self.program, self.batches, tensors)
        return masks, tensors

    def correct(self, how: RDWeights, now: Masked) -> Masked | None:
        """The solution of curves measured around the present one, if it measures better; smaller steps if not."""
        counts, masks, tensors, measured = now.counts, now.masks, now.tensors, now.measured
        names = list(self.weights)
        sizes = {n: int(mask.sum()) for n, mask in self.alive.items()}
        fitted = self.fit() if self.how.selection == "least-squares" else {}
        for reach in (1.5, 1.25, 1.1):
            kept: list[list[int]] = []
            candidates: list[Sequence[Tensors]] = []
            for name, w in self.weights.items():
                least = max(1, int(self.how.min_density * w.numel()))
                around = {round(counts[name] * f) for f in (1 / reach, reach)}
                others = sorted(
                    {min(max(k, least), sizes[name]) for k in around} - {counts[name]}, reverse=True
                )
                variants: list[Tensors] = []
                for k in others:
                    inside = masks[name] if k < counts[name] else self.alive[name]
                    mask = (
                        fitted[name].chosen(k, inside, steps=4)
                        if name in fitted
                        else top(torch.where(inside, w.abs().cpu(), -1.0), k)
                    )
                    variants.append(
                        fitted[name].solved(mask)
                        if self.how.compensation == "least-squares" and name in fitted
                        else {name: w * mask.to(w.device)}
                    )
                kept.append(others)
                candidates.append(variants)
            images = measure(
                self.program, self.batches, candidates, distortion=self.how.distortion, base=tensors
            )
            grids, values = [], []
            for name, others, moved in zip(names, kept, images, strict=True):
                points = sorted(
                    [(counts[name], measured), *zip(others, moved.mean(1).tolist(), strict=True)],
                    reverse=True,
                )
                grids.append(np.array([k for k, _ in points], dtype=np.int64))
                values.append(np.maximum.accumulate(np.array([v for _, v in points])))
            pairs = [_between(k, v) for k, v in zip(grids, values, strict=True)]
            trial, _ = self.solve_within(how, names, [k for k, _ in pairs], [v for _, v in pairs])
            found = self.apply(trial)
            if found.measured < measured:
                return found
        return None


def _between(kept: Any, values: Any) -> tuple[Any, Any]:
    """A few more levels between measured ones, linear in the logarithm of what is kept."""
    grid = np.unique(np.concatenate([np.round(np.geomspace(kept[0], kept[-1], 15)).astype(np.int64), kept]))[
        ::-1
    ]
    return grid.copy(), np.interp(-np.log(grid), -np.log(kept), values)


class MaskedLevels(Sequence[Tensors]):
    """A weight at several masks, each made when it is asked for."""

    def __init__(self, name: str, weight: Tensor, masks: Sequence[Tensor]) -> None:
        self.name, self.weight, self.masks = name, weight, masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, level: Any) -> Any:
        return {self.name: self.weight * self.masks[level].to(self.weight.device)}


def passes(program: Replay) -> int:
    """Levels that share a pass: a CPU gains nothing from larger batches, an accelerator does."""
    return 1 if next(program.model.parameters()).device.type == "cpu" else 8


Retrain = Callable[[nn.Module, WeightPlan, int], None]
"""(pruned model, its masks, round from 1) -> None; trains the model in place while the masks hold."""


def rounds(sparsity: float, each: float) -> list[float]:
    """Sparsity after each round that removes the same share of what is left: 1 - (1 - each)^t, the last exact.

    >>> [round(s, 3) for s in rounds(0.5, 0.2)]
    [0.2, 0.36, 0.488, 0.5]
    """
    if not 0 < each < 1:
        raise SecateurError(f"share {each:g} per round: expected above 0 and below 1")
    schedule: list[float] = []
    while (reached := 1 - (1 - each) ** (len(schedule) + 1)) < sparsity - 1e-9:
        schedule.append(reached)
    return [*schedule, sparsity]


def prune_iteratively(
    method: RDWeights | MaskWeights,
    model: nn.Module,
    inputs: Inputs,
    retrain: Retrain,
    *,
    sparsity: float,
    context: Context,
    each: float = 0.2,
) -> Pruned:
    """Prune single weights in rounds with retraining between them; what is gone stays gone.

    Args:
        method: of each round.
        model: only read.
        inputs: example inputs.
        retrain: called after every round with the model, its masks and the round's number.
        sparsity: share of the weights that is gone in the end.
        context: data to measure on.
        each: share of what is left that a round removes.
    Source: Xu et al. 2023, arXiv:2308.10438, and the code released with it.
    Differs: the reference of each round is the network as it enters the round, in evaluation mode.
    """
    context = replace(context, data=None if context.data is None else list(context.data))
    pruned: Pruned | None = None
    for number, goal in enumerate(rounds(sparsity, each), 1):
        pruned = method.prune(pruned.model if pruned else model, inputs, Budget(units=1 - goal), context)
        assert isinstance(pruned.plan, WeightPlan)
        context = replace(context, previous=pruned.plan)
        with pruned.plan.holding(pruned.model):
            retrain(pruned.model, pruned.plan, number)
    assert pruned is not None
    return pruned
