"""Rate–distortion pruning of single weights: one budget for all layers, shared out by measured curves."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocate.knapsack import SOLVERS, Problem, Solution, solve
from secateur.allocate.sparsity import WEIGHT_ALLOCATIONS, Counts, allocate_weights, landed
from secateur.errors import BudgetError, PlanError, SecateurError, unknown
from secateur.graph.replay import Replay, Tensors
from secateur.methods.rd.curves import (
    DISTORTIONS,
    REDUCTIONS,
    Curves,
    Tick,
    even,
    geometric,
    interpolated,
    joint,
    key_of,
    measure,
)
from secateur.plan.weight_plan import WeightPlan, pattern_mask, top
from secateur.reconstruction.compensate import ChooseMask, Fitted, compensate, layers, reestimate

SELECTIONS = {
    "magnitude": "the largest weights of a layer stay",
    "least-squares": "those stay whose removal costs the layer's output most once the others are solved again",
}
"""Which weights of a layer stay -> one line for lists of choices."""

COMPENSATIONS = {
    "none": "the remaining weights stay as they are",
    "batch-norm": "means and variances of batch norms are measured again",
    "least-squares": "the remaining weights of each layer are solved again, on the pruned network's inputs",
}
"""What is done after pruning, without training -> one line for lists of choices."""

WEIGHT_CHOICES = {"rd": "by measured distortion curves, as one knapsack"} | {
    name: entry.summary for name, entry in WEIGHT_ALLOCATIONS.items()
}
"""Allocations of single weights -> one line for lists of choices."""


@dataclass(frozen=True, kw_only=True)
class RDSettings:
    """How curves are measured, solved and followed up.

    Args:
        selection: a name in `SELECTIONS`.
        compensation: a name in `COMPENSATIONS`; it is part of what the curves measure.
        distortion: a name in `secateur.methods.rd.curves.DISTORTIONS`.
        reduction: over the calibration images: "mean", or "max" for the worst of them.
        exponent: of the reduced distortion before curves are added up: 1 takes errors of different layers for
            uncorrelated, 0.5 bounds them by the triangle inequality.
        levels: measured per layer, the dense one included.
        spacing: of the levels: "geometric" in what is kept, or "even".
        points: levels per layer that the solver sees, interpolated between measured ones; 0: only those.
        solver: a name in `secateur.allocate.knapsack.SOLVERS`.
        min_density: share of each layer that stays at least.
        steps: in which a layer's weights are eliminated.
        pattern: (n, m): a layer either stays whole or keeps n of every m weights.
        rivals: allocations of `secateur.allocate.sparsity` that are carried out as well; the one whose measured
            distortion is lowest is taken, since sums over layers are only nearly what all layers do together.
        corrections: rounds in which curves are measured again around the solution; a round that does not lower
            the measured distortion is undone.
    """

    selection: str = "least-squares"
    compensation: str = "least-squares"
    distortion: str = "kl"
    reduction: str = "mean"
    exponent: float = 0.5
    levels: int = 9
    spacing: str = "geometric"
    points: int = 60
    solver: str = "hull"
    min_density: float = 0.01
    steps: int = 8
    pattern: tuple[int, int] | None = None
    rivals: tuple[str, ...] = ("global", "lamp")
    corrections: int = 0

    def __post_init__(self) -> None:
        for kind, name, choices in (
            ("selection", self.selection, SELECTIONS),
            ("compensation", self.compensation, COMPENSATIONS),
            ("distortion", self.distortion, DISTORTIONS),
            ("reduction", self.reduction, REDUCTIONS),
            ("spacing", self.spacing, {"even": "", "geometric": ""}),
            ("solver", self.solver, SOLVERS),
        ):
            if name not in choices:
                raise SecateurError(unknown(kind, name, choices))
        for name in self.rivals:
            if name == "rd" or name not in WEIGHT_CHOICES:
                raise SecateurError(unknown("allocation", name, [n for n in WEIGHT_CHOICES if n != "rd"]))
        if self.levels < 2 or self.steps < 1 or self.corrections < 0 or not 0 < self.exponent <= 4:
            raise SecateurError(
                f"levels {self.levels}, steps {self.steps}, corrections {self.corrections}, exponent "
                f"{self.exponent}: expected at least 2, 1, 0 and above 0"
            )
        if not 0 <= self.min_density < 1:
            raise SecateurError(f"min_density {self.min_density}: expected a share, at least 0 and below 1")


FAITHFUL = RDSettings(
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
class PrunedWeights:
    """A model with single weights at zero, and how it came about.

    Attributes:
        model: the user's class, with the same shapes.
        plan: which weights stay.
        counts: weights kept per layer.
        curves: what was measured; None for allocations by formula.
        predicted: distortion by the sum of the curves; None likewise, and where a rival was taken.
        measured: mean distortion of the pruned model on the calibration images.
        gap: how far the solver's choice may be from the best sum.
        corrected: measured distortion after each round of correction that was kept.
    """

    model: nn.Module
    plan: WeightPlan
    counts: Counts
    curves: Curves | None
    predicted: float | None
    measured: float
    gap: float | None
    corrected: tuple[float, ...] = ()

    def __str__(self) -> str:
        share = self.plan.kept / self.plan.weights
        return f"weights: {self.plan.weights:,} -> {self.plan.kept:,} ({share:.1%} kept)"


@torch.no_grad()
def prune_weights(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    sparsity: float,
    allocation: str = "rd",
    settings: RDSettings | None = None,
    previous: WeightPlan | None = None,
    curves: str | Path | None = None,
    tick: Tick | None = None,
) -> PrunedWeights:
    """Set single weights of convolutions and linear layers to zero, in a copy of a model.

    Args:
        model: one image tensor in, logits out; it is only read.
        batches: calibration images, (n, …) each, as the model expects them; noise will do where there are none.
        sparsity: share of these weights that goes.
        allocation: "rd", or a name in `secateur.allocate.sparsity.WEIGHT_ALLOCATIONS`.
        settings: how; the default is the recipe that measures best, `FAITHFUL` the published one.
        previous: masks of an earlier round: what is gone stays gone.
        curves: file that curves are read from if they are of these weights, images and settings, and written to; or a
            folder for such files.
        tick: is told (passes done, of how many) while curves are measured.
    Raises:
        BudgetError: unknown allocation, or a sparsity out of reach; the message gives the reachable range.
        PlanError: earlier masks of another model.
        CaptureError: the forward pass cannot be captured.
    """
    settings = settings or RDSettings()
    if allocation not in WEIGHT_CHOICES:
        raise BudgetError(unknown("allocation", allocation, WEIGHT_CHOICES))
    model = copy.deepcopy(model).eval()
    if previous is not None:
        previous.apply_(model)
    program = Replay(model, batches[0])
    task = task_of(program, batches, sparsity, settings, previous=previous, tick=tick)
    found: Curves | None = None
    solution: Solution | None = None
    if allocation == "rd":
        found = task.curves(curves)
        counts, solution = task.solved(found)
    else:
        counts = task.allocated(allocation)
    masks, tensors = task.carried_out(counts)
    measured, taken = task.measured(tensors), allocation
    for rival in settings.rivals if allocation == "rd" and settings.pattern is None else ():
        other = task.allocated(rival)
        carried = task.carried_out(other)
        if (value := task.measured(carried[1])) < measured:
            counts, (masks, tensors), measured, taken = other, carried, value, rival
            solution = None
    kept: list[float] = []
    for _ in range(settings.corrections if allocation == "rd" and settings.pattern is None else 0):
        trial = task.corrected(counts, masks, tensors, measured)
        if trial is None:
            break
        counts, masks, tensors, measured = trial
        kept.append(measured)
    for name, tensor in tensors.items():
        program.tensor(name).copy_(tensor)
    origin = {
        "method": "rd" if allocation == "rd" else "weights",
        "allocation": allocation,
        "taken": taken,
        "sparsity": sparsity,
        "settings": asdict(settings),
    }
    predicted = None if solution is None else solution.distortion ** (1 / settings.exponent)
    plan = WeightPlan.of(model, masks, origin)
    return PrunedWeights(
        model, plan, counts, found, predicted, measured, solution.gap if solution else None, tuple(kept)
    )


def _alive(weights: Mapping[str, Tensor], previous: WeightPlan | None) -> dict[str, Tensor]:
    """What may stay, per weight."""
    earlier = previous.masks if previous else {}
    if strange := sorted(earlier.keys() - weights.keys()):
        raise PlanError(
            f"earlier masks of {strange[:3]}, which are no convolution's or linear layer's weights"
        )
    return {n: earlier.get(n, torch.ones(w.shape, dtype=torch.bool)) for n, w in weights.items()}


def task_of(
    program: Replay,
    batches: Sequence[Tensor],
    sparsity: float,
    settings: RDSettings,
    *,
    previous: WeightPlan | None = None,
    tick: Tick | None = None,
) -> "Task":
    """The layers of a program, and how many of their weights a sparsity leaves."""
    if not 0 < sparsity < 1:
        raise BudgetError(f"sparsity {sparsity:g}: expected a share above 0 and below 1")
    weights = {layer.weight: program.tensor(layer.weight).detach() for layer in layers(program)}
    if not weights:
        raise BudgetError("nothing can be pruned: the model has no convolution or linear layer with weights")
    total = int((1 - sparsity) * sum(w.numel() for w in weights.values()) + 1e-9)
    return Task(program, tuple(batches), weights, _alive(weights, previous), total, settings, tick)


@dataclass(frozen=True)
class Task:
    """One pruning to one total.

    Attributes:
        program: of the dense model.
        batches: calibration images.
        weights: parameter name -> what it is before.
        alive: what may stay of it.
        total: weights to keep in all.
    """

    program: Replay
    batches: tuple[Tensor, ...]
    weights: dict[str, Tensor]
    alive: dict[str, Tensor]
    total: int
    settings: RDSettings
    tick: Tick | None

    def curves(self, path: str | Path | None) -> Curves:
        """Measured, or read from a file that holds just these."""
        relevant = asdict(
            replace(self.settings, exponent=1.0, solver="hull", points=0, corrections=0, reduction="mean")
        )
        del relevant["rivals"]
        masked = {name: mask.sum().item() for name, mask in self.alive.items()}
        key = key_of(self.program.model, self.batches, {"settings": relevant, "alive": masked})
        return Curves.once(path, key, lambda: self.sampled(key))

    def sampled(self, key: str) -> Curves:
        """The distortion of every layer at every level."""
        kept, candidates = self.levels()
        images = measure(
            self.program,
            self.batches,
            candidates,
            distortion=self.settings.distortion,
            batched=passes(self.batches[0]),
            tick=self.tick,
        )
        zero = np.zeros((1, sum(len(x) for x in self.batches)))
        return Curves(tuple(self.weights), kept, tuple(np.concatenate([zero, v]) for v in images), key)

    def allocated(self, allocation: str) -> Counts:
        """Weights per layer by a rule that needs no curves."""
        counts = allocate_weights(
            {n: w.cpu() * self.alive[n] for n, w in self.weights.items()}, self.total, allocation
        )
        sizes = {n: int(mask.sum()) for n, mask in self.alive.items()}
        return landed({n: min(count, sizes[n]) for n, count in counts.items()}, sizes, self.total)

    def measured(self, tensors: Tensors) -> float:
        """Mean distortion of the pruned network on the calibration images."""
        found = joint(self.program, self.batches, tensors, distortion=self.settings.distortion)
        return float(found.mean())

    def levels(self) -> tuple[tuple[Any, ...], list[Sequence[Tensors]]]:
        """What each layer keeps at each level, and its tensors at all levels but the first."""
        fitted = (
            self.fitted() if "least-squares" in (self.settings.selection, self.settings.compensation) else {}
        )
        kept: list[Any] = []
        candidates: list[Sequence[Tensors]] = []
        for name, w in self.weights.items():
            masks = self.nested(name, fitted.get(name))
            kept.append(np.array([int(mask.sum()) for mask in masks], dtype=np.int64))
            if self.settings.compensation == "least-squares":
                candidates.append([fitted[name].solved(mask) for mask in masks[1:]])
            else:
                candidates.append(Masked(name, w, masks[1:]))
        return tuple(kept), candidates

    def fitted(self) -> dict[str, Fitted]:
        """Every layer at its place in the dense network."""
        whole: dict[str, Tensor | ChooseMask] = dict(self.alive)
        return compensate(self.program, self.batches, whole).fitted

    def nested(self, name: str, fitted: Fitted | None) -> list[Tensor]:
        """The layer's masks, from all that is alive downwards."""
        w, mask = self.weights[name], self.alive[name]
        if self.settings.pattern is not None:
            other = pattern_mask(torch.where(mask, w.abs().cpu(), -1.0), *self.settings.pattern)
            return [mask] if other is None else [mask, other & mask]
        size = int(mask.sum())
        least = min(size, max(1, int(np.ceil(self.settings.min_density * w.numel() - 1e-9))))
        make = geometric if self.settings.spacing == "geometric" else even
        masks = [mask]
        for count in make(size, self.settings.levels, least)[1:].tolist():
            if self.settings.selection == "magnitude" or fitted is None:
                masks.append(top(torch.where(mask, w.abs().cpu(), -1.0), count))
            else:
                masks.append(fitted.chosen(count, masks[-1], steps=2))
        return masks

    def solved(self, curves: Curves) -> tuple[Counts, Solution]:
        """Weights per layer that the curves ask for."""
        names = curves.names
        values = [curve**self.settings.exponent for curve in curves.reduced(self.settings.reduction)]
        points = [
            interpolated(kept, value, self.settings.points)
            if self.settings.points and self.settings.pattern is None
            else (kept, value)
            for kept, value in zip(curves.kept, values, strict=True)
        ]
        return self.within(names, [kept for kept, _ in points], [value for _, value in points])

    def within(
        self, names: Sequence[str], kept: Sequence[Any], values: Sequence[Any]
    ) -> tuple[Counts, Solution]:
        costs = {"weights": tuple(k.astype(np.float64) for k in kept)}
        problem = Problem(tuple(names), tuple(values), costs)
        solution = solve(problem, {"weights": float(self.total)}, self.settings.solver)
        counts = {n: int(k[level]) for n, k, level in zip(names, kept, solution.levels, strict=True)}
        if self.settings.pattern is None:
            counts = landed(counts, {n: int(mask.sum()) for n, mask in self.alive.items()}, self.total)
        return counts, solution

    def carried_out(self, counts: Counts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Masks, and the tensors of the pruned network after compensation."""
        settings = self.settings

        def choice(name: str) -> ChooseMask:
            return lambda fitted: fitted.chosen(counts[name], self.alive[name], settings.steps)

        fixed: dict[str, Tensor] = {}
        for name, w in self.weights.items():
            size = int(self.alive[name].sum())
            if counts[name] == size:
                fixed[name] = self.alive[name]
            elif settings.pattern is not None:
                mask = pattern_mask(torch.where(self.alive[name], w.abs().cpu(), -1.0), *settings.pattern)
                assert mask is not None
                fixed[name] = mask & self.alive[name]
            elif settings.selection == "magnitude":
                fixed[name] = top(torch.where(self.alive[name], w.abs().cpu(), -1.0), counts[name])
        if settings.compensation == "least-squares":
            choices: dict[str, Tensor | ChooseMask] = {n: fixed.get(n, choice(n)) for n in self.weights}
            done = compensate(self.program, self.batches, choices)
            return done.masks, done.tensors
        if open_ := [n for n in self.weights if n not in fixed]:
            fitted = self.fitted()
            fixed |= {n: fitted[n].chosen(counts[n], self.alive[n], settings.steps) for n in open_}
        masks = {n: fixed[n] for n in self.weights}
        tensors = {n: w * masks[n].to(w.device) for n, w in self.weights.items()}
        if settings.compensation == "batch-norm":
            tensors = reestimate(self.program, self.batches, tensors)
        return masks, tensors

    def corrected(
        self, counts: Counts, masks: dict[str, Tensor], tensors: dict[str, Tensor], measured: float
    ) -> tuple[Counts, dict[str, Tensor], dict[str, Tensor], float] | None:
        """The solution of curves measured around the present one, if it measures better; smaller steps if not."""
        names = list(self.weights)
        sizes = {n: int(mask.sum()) for n, mask in self.alive.items()}
        fitted = self.fitted() if self.settings.selection == "least-squares" else {}
        for reach in (1.5, 1.25, 1.1):
            kept: list[list[int]] = []
            candidates: list[Sequence[Tensors]] = []
            for name, w in self.weights.items():
                least = max(1, int(self.settings.min_density * w.numel()))
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
                        if self.settings.compensation == "least-squares" and name in fitted
                        else {name: w * mask.to(w.device)}
                    )
                kept.append(others)
                candidates.append(variants)
            images = measure(
                self.program, self.batches, candidates, distortion=self.settings.distortion, base=tensors
            )
            grids, values = [], []
            for name, others, found in zip(names, kept, images, strict=True):
                points = sorted(
                    [(counts[name], measured), *zip(others, found.mean(1).tolist(), strict=True)],
                    reverse=True,
                )
                grids.append(np.array([k for k, _ in points], dtype=np.int64))
                values.append(np.maximum.accumulate(np.array([v for _, v in points])))
            pairs = [_between(k, v) for k, v in zip(grids, values, strict=True)]
            trial, _ = self.within(names, [k for k, _ in pairs], [v for _, v in pairs])
            new_masks, new_tensors = self.carried_out(trial)
            value = self.measured(new_tensors)
            if value < measured:
                return trial, new_masks, new_tensors, value
        return None


def _between(kept: Any, values: Any) -> tuple[Any, Any]:
    """A few more levels between measured ones, linear in the logarithm of what is kept."""
    grid = np.unique(np.concatenate([np.round(np.geomspace(kept[0], kept[-1], 15)).astype(np.int64), kept]))[
        ::-1
    ]
    return grid.copy(), np.interp(-np.log(grid), -np.log(kept), values)


class Masked(Sequence[Tensors]):
    """A weight at several masks, each made when it is asked for."""

    def __init__(self, name: str, weight: Tensor, masks: Sequence[Tensor]) -> None:
        self.name, self.weight, self.masks = name, weight, masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, level: Any) -> Any:
        return {self.name: self.weight * self.masks[level].to(self.weight.device)}


def passes(x: Tensor) -> int:
    """Levels that share a pass: a CPU gains nothing from larger batches, an accelerator does."""
    return 1 if x.device.type == "cpu" else 8


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
    model: nn.Module,
    batches: Sequence[Tensor],
    retrain: Retrain,
    *,
    sparsity: float,
    each: float = 0.2,
    **options: Any,
) -> PrunedWeights:
    """Prune in rounds with retraining between them; what is gone stays gone.

    Args:
        retrain: called after every round with the model, its masks and the round's number.
        each: share of what is left that a round removes.
        options: of `prune_weights`.
    Source: Xu et al. 2023, arXiv:2308.10438, and the code released with it.
    Differs: the reference of each round is the network as it enters the round, in evaluation mode.
    """
    previous: WeightPlan | None = None
    pruned: PrunedWeights | None = None
    for number, goal in enumerate(rounds(sparsity, each), 1):
        pruned = prune_weights(
            pruned.model if pruned else model, batches, sparsity=goal, previous=previous, **options
        )
        previous = pruned.plan
        with previous.holding(pruned.model):
            retrain(pruned.model, previous, number)
    assert pruned is not None
    return pruned
