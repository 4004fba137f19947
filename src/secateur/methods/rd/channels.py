"""Rate–distortion pruning of channels: curves per group, widths as one problem, consumers solved again."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateur.allocate.knapsack import Curve
from secateur.allocate.products import ChosenWidths, Costs, choose_widths
from secateur.allocate.table import widths_of
from secateur.cost import Budget, Cost
from secateur.cost.multiples import AUTO, ROUND_TO, ROUND_TO_HELP, Multiples, choose_multiples
from secateur.cost.prices import NANOSECONDS
from secateur.engine.method import GRANULARITY_HELP, Context, Meter, Method, images_of
from secateur.engine.pruned import Pruned, cut_and_prove
from secateur.errors import BudgetError, ScoreError, SecateurError
from secateur.graph import Granularity, Graph, Group, Inputs, Member
from secateur.graph.capture import batch_of
from secateur.graph.duplicate import duplicate
from secateur.graph.replay import Outputs, Replay, chunks, joined, some_of
from secateur.methods.rd.curves import (
    DISTANCES,
    Curves,
    at_levels,
    joint,
    key_of,
    measure,
    references,
)
from secateur.methods.rd.importance import by_power, importances
from secateur.methods.rd.single_weights import passes
from secateur.plan import Plan
from secateur.reconstruction.compensate import WIDEST, Seen, layers, see
from secateur.reconstruction.leastsquares import Elimination, damping
from secateur.reconstruction.plans import COMPENSATIONS, compensated, positions
from secateur.settings import option, settings

GRID = 36
"""Widths of a group that the search over widths sees at most."""


@settings
class RD(Method):
    """Choose widths by measured distortion curves, and solve the remaining weights again.

    For each group of channels and several widths, the distance of the outputs is measured when only that group is
    pruned, with its consumers solved again. Widths of least summed distance within the budget are then cut together,
    and all remaining weights solved again. Sums mislead most about groups that several layers write, such as residual
    streams; so sums that protect these are tried as well.

    By default few widths are measured. The rest of a group's curve follows the squared error that is left in its
    consumers' outputs, each output weighted by what one backward pass says of it.

    Takes budgets of one bound.

    Raises:
        CaptureError, BudgetError, ScoreError: see `analyze`, `choose_widths`; no data.
        CutError: the model's forward cannot run at other widths, or the result is not equal.
    Source: after Xu et al. 2023, arXiv:2308.10438, which prunes single weights.
    Differs: whole channels, chosen by what their removal costs their consumers once these are solved again; costs are
        products of widths.
    """

    name: ClassVar[str] = "rd"
    summary: ClassVar[str] = "choose widths by measured distortion curves, and make up for what is cut"

    compensation: str = option(
        "what the remaining weights do, without training", default="least-squares", choices=COMPENSATIONS
    )
    distortion: str = option("distance between outputs", default="auto", choices=DISTANCES)
    exponents: tuple[float, ...] = option(
        "of the mean distortion before curves are added up; of several, the best is taken",
        default=(0.5, 0.7, 1.0),
        above=0,
    )
    stream_weight: float = option(
        "factor of the curves of groups that several layers write, in sums that protect them",
        default=10.0,
        least=1,
    )
    stream_gain: float = option(
        "sums that protect streams are taken if they measure less than this share of the others; 1 without training",
        default=0.5,
        above=0,
        most=1,
    )
    curves: Literal["estimated", "measured"] = option(
        "estimated: by the readers' error, scaled to what is measured at some widths; measured: at all levels",
        default="estimated",
    )
    shares: tuple[float, ...] = option(
        "of a group's units, at which an estimate is scaled to what is measured",
        default=(0.75, 0.4),
        above=0,
        below=1,
    )
    part: int = option("estimates are measured on one of so many calibration images", default=4, least=1)
    levels: int = option("widths measured per group, where curves are measured", default=9, least=2)
    granularity: Granularity = option(GRANULARITY_HELP, default="channels")
    block_weights: tuple[float, ...] = option(
        "factors of the curves of blocks, which are measured before other layers make up for them; of several, the "
        "best is taken",
        default=(1.0, 0.3, 10.0),
        above=0,
    )
    min_keep: int = option("units that every group keeps at least", default=1, least=1)
    round_to: int | str = option(ROUND_TO_HELP, default=AUTO, choices=ROUND_TO, least=1)
    seed: int = option("of the images for the proof, and of estimates", default=0, least=0)

    def check(self) -> None:
        if not self.exponents:
            raise SecateurError("RD: exponents is empty; give at least one, such as (0.5, 1.0)")
        if not self.block_weights:
            raise SecateurError("RD: block_weights is empty; give at least one, such as (1.0,)")
        if not self.shares:
            raise SecateurError("RD: shares is empty; give at least one, such as (0.75, 0.4)")

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def estimates(self) -> bool:
        """Whether curves are estimated: the readers' error says nothing where they are not solved again."""
        return self.curves == "estimated" and self.compensation == "least-squares"

    @torch.no_grad()
    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> Pruned:
        if context.data is None:
            raise ScoreError("method 'rd' measures on data: pass data=, batches of images")
        bounds = budget.bounds if context.prices is None else budget.given
        if len(bounds) != 1:
            raise BudgetError(f"method 'rd' takes one bound, got {', '.join(bounds)}; give one of them")
        meter = Meter(context.progress)
        given = images_of(context.data)
        model = duplicate(model).eval()
        graph = context.graph or self.analyze(model, inputs)
        if not graph.groups:
            raise BudgetError(
                "nothing can be pruned: the model has no group of removable units (see graph.frozen)"
            )
        ((bound, asked),) = bounds.items()
        if context.prices is None:
            cost = Cost(graph)
            cost.sum(bound)  # or it is refused here, before anything is measured
            limit = budget.limits({bound: cost.of(bound)})[bound]
        else:
            cost = Cost(graph, {NANOSECONDS: context.prices.formula(graph)})
            bound, limit = NANOSECONDS, int(1e6 * asked)
        multiples = choose_multiples(
            model, graph, self.round_to, partial(cost.within, {bound: limit}), min_keep=self.min_keep
        )
        program = Replay(model, given[0])
        task = Task.of(program, graph, chunks(program, given), self, multiples, meter)
        key = key_of(model, given, self.measured_with() | {"round_to": list(multiples.units)})
        seen = task.see()
        rankings = task.rank(seen)
        curves = Curves.once(context.cache, key, lambda: measure_curves(task, rankings, seen, key))
        orders = [ranking.order for ranking in rankings]
        seen.clear()  # moments and weights that are no longer needed
        rankings.clear()
        best = self._best(task, cost, orders, curves, bound, limit, budget)
        task.meter.end()
        for name, tensor in best.tensors.items():
            program.tensor(name).copy_(tensor)
        facts = {
            "curves": curves.rows(),
            "predicted": best.predicted,
            "measured": best.measured,
            "gap": best.gap,
        }
        scores = [score_ranks(order) for order in orders]
        with torch.enable_grad():
            return cut_and_prove(model, graph, best.plan, scores, seed=self.seed, facts=facts)

    def measured_with(self) -> dict[str, Any]:
        """What curves depend on."""
        how = (
            {"shares": list(self.shares), "part": self.part, "seed": self.seed}
            if self.estimates
            else {"levels": self.levels}
        )
        return {
            "compensation": self.compensation, "distortion": self.distortion, **how,
            "freeze": list(self.freeze), "min_keep": self.min_keep,
            "granularity": self.granularity, **({"scope": list(self.scope)} if self.scope else {}),
        }  # fmt: skip

    def _best(
        self,
        task: "Task",
        cost: Cost,
        orders: Sequence[Tensor],
        curves: Curves,
        bound: str,
        limit: float,
        budget: Budget,
    ) -> "Trial":
        """Of the widths that the sums ask for, those whose measured distortion is lowest.

        That stays the number that is told; in the end all images are solved on, and none is left to measure on.
        """
        graph, few = task.graph, task.few
        best, seen = None, set()
        weights = (1.0, self.stream_weight) if any(map(is_stream, graph.groups)) else (1.0,)
        for weight in weights:
            rival = None
            for exponent, block_weight in itertools.product(self.exponents, task.block_weights):
                factors = [
                    block_weight if group.branch else weight if is_stream(group) else 1.0
                    for group in graph.groups
                ]
                choice = choose_widths_by(cost, curves, exponent, factors, bound, limit, task.widths)
                if choice.kept in seen:
                    task.meter.add(task.solving(few))
                    continue
                seen.add(choice.kept)
                masks = [keep_first(order, kept) for order, kept in zip(orders, choice.kept, strict=True)]
                origin = self.record() | task.multiples.record(graph) | {
                    "exponent": exponent, "stream_weight": weight, "budget": budget.given
                } | ({"block_weight": block_weight} if self.granularity != "channels" else {})  # fmt: skip
                plan = Plan.of(graph, masks, origin)
                measured, tensors = task.tried(plan, few)
                if rival is None or measured < rival.measured:
                    rival = Trial(measured, summed(curves, choice.kept, exponent), choice.gap, plan, tensors)
            if best is None or (rival is not None and rival.measured < self.stream_gain * best.measured):
                best = rival
        assert best is not None
        return best if few is task.batches else replace(best, tensors=task.solved(best.plan, task.batches))


@dataclass(frozen=True)
class Task:
    """One network and its calibration images.

    Attributes:
        program: of a copy of the dense model.
        graph: of it.
        batches: all calibration images.
        few: those that curves are measured on.
        rest: the others, on which layers are solved again for curves: on what a layer was solved for, it errs less.
        others: those that what is tried is measured on.
        dense: the dense model's outputs on these; None: too much to keep.
        how: the method.
        multiples: what widths are multiples of.
        macs: of one image.
        meter: is told how much is done; a unit is one image's way through the network.
    """

    program: Replay
    graph: Graph
    batches: list[Inputs]
    few: list[Inputs]
    rest: list[Inputs]
    others: list[Inputs]
    dense: list[Outputs] | None
    how: RD
    multiples: Multiples
    macs: int
    meter: Meter

    @classmethod
    def of(
        cls, program: Replay, graph: Graph, batches: list[Inputs], how: RD, multiples: Multiples, meter: Meter
    ) -> Self:
        """What there is to work with, and how much work that is."""
        few = rest = others = batches
        if how.estimates and how.part > 1:
            few, others = (part_of(program, batches, how.part, {place}) for place in (0, 1))
            rest = part_of(program, batches, how.part, range(1, how.part))
        dense, macs = references(program, others), max(1, Cost(graph).macs())
        task = cls(program, graph, batches, few, rest, others, dense, how, multiples, macs, meter)
        levels = len(how.shares) if how.estimates else how.levels - 1
        tries = len(how.exponents) * (2 if any(map(is_stream, graph.groups)) else 1)
        tries *= len(task.block_weights)
        meter.total = (
            2 * count(rest) + 4 * count(few) + 0.5 * levels * len(graph.groups) * count(few)
            + tries * task.solving(few) + how.estimates * task.solving(batches)
            + sum(map(task.ranking, graph.groups))
        )  # fmt: skip
        return task

    @property
    def block_weights(self) -> tuple[float, ...]:
        """The factors of the curves of blocks that are tried."""
        return self.how.block_weights if any(group.branch for group in self.graph.groups) else (1.0,)

    @property
    def widths(self) -> list[list[int]]:
        """Per group, the widths that it may have, ascending."""
        return [
            widths_of(group, self.how.min_keep, step)
            for group, step in zip(self.graph.groups, self.multiples.units, strict=True)
        ]

    def solving(self, batches: Sequence[Inputs]) -> float:
        """About what solving all layers again takes, in images' ways through the network."""
        return 6.0 * count(batches)

    def see(self) -> dict[str, Seen]:
        """What goes into every layer."""
        return see(self.program, self.rest, self.meter.each(2 * count(self.rest) / len(self.rest)))

    def rank(self, seen: Mapping[str, Seen]) -> list["Ranking"]:
        """The order in which the units of each group leave."""
        how, program = self.how, self.program
        if how.estimates:
            importance = importances(program, self.few, seen, distortion=how.distortion, seed=how.seed)
        else:
            importance = by_power(seen)
        self.meter.add(4 * count(self.few))
        shares = how.shares if how.estimates else ()
        found = []
        for group in self.graph.groups:
            found.append(rank_units(program, group, seen, importance, shares))
            self.meter.add(self.ranking(group))
        return found

    def ranking(self, group: Group) -> float:
        """About what ranking the units of a group takes, in images' ways through the network."""
        wide = {m.tensor: self.program.tensor(m.tensor)[0].numel() for m in group.members if m.role == "in"}
        return sum(5.0 * k**3 for k in wide.values() if k <= WIDEST) / (2 * self.macs)

    def solved(self, plan: Plan, batches: Sequence[Inputs]) -> dict[str, Tensor]:
        """The tensors of a plan that is made up for on some batches."""
        each = self.meter.each(self.solving(batches) / max(1, len(layers(self.program))))
        return compensated(self.program, self.graph, plan, batches, self.how.compensation, each)

    def tried(self, plan: Plan, batches: Sequence[Inputs]) -> tuple[float, dict[str, Tensor]]:
        """The mean distortion on other images when a plan is made up for on some batches, and the tensors."""
        tensors = self.solved(plan, batches)
        found = joint(self.program, self.others, tensors, distortion=self.how.distortion, dense=self.dense)
        return float(found.mean()), tensors


def count(batches: Sequence[Inputs]) -> int:
    """Images in all batches."""
    return sum(map(batch_of, batches))


@dataclass(frozen=True)
class Trial:
    """Widths that were tried: their measured and predicted distortion, how far the sum may be from the best, and the
    tensors that make up for what went.
    """

    measured: float
    predicted: float
    gap: float
    plan: Plan
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Ranking:
    """In which order the units of a group leave, and what that costs the layers that read them.

    Attributes:
        order: (units,), the one that is hardest to do without first.
        kept: widths after each step, descending, from all units to one.
        cost: the importance-weighted squared error of the readers' outputs at these widths, or what stands for it.
        solved: width -> readers' weights there, (o, k), by name.
    """

    order: Tensor
    kept: npt.NDArray[np.int64]
    cost: npt.NDArray[np.float64]
    solved: Mapping[int, Mapping[str, Tensor]]


def rank_units(
    program: Replay,
    group: Group,
    seen: Mapping[str, Seen],
    importance: Mapping[str, Tensor],
    shares: Sequence[float] = (),
) -> Ranking:
    """Let the units of a group leave, some at a time, those whose loss costs their readers least.

    Without a reader that can be solved again, units with the smallest filters leave first.

    Args:
        program: of the dense model.
        group: of its graph.
        seen: what goes into its layers.
        importance: weight name -> what the squared error of each output counts, (o,).
        shares: of the units, at which the readers' weights are kept.
    """
    if group.branch:
        return Ranking(torch.zeros(1, dtype=torch.long), np.array([1, 0]), np.zeros(2), {})
    readers = [m for m in group.members if m.role == "in" and m.tensor in seen and m.dim == 1]
    readers = [m for m in readers if len(seen[m.tensor].inputs) == 1]
    if not readers:
        producers = [m for m in group.members if m.role == "out"] or list(group.members)
        norm = sum(m.take(program.tensor(m.tensor)).square().sum(1) for m in producers)
        assert isinstance(norm, Tensor)
        values, order = norm.cpu().double().sort(descending=True, stable=True)
        lost = values.flip(0).cumsum(0)[:-1]
        return Ranking(order, np.arange(group.units, 0, -1), np.array([0.0, *lost.tolist()]), {})
    left = {}
    for name in dict.fromkeys(m.tensor for m in readers):
        (inner,) = seen[name].inputs
        blocks = [columns_of(m, program.tensor(name)) for m in readers if m.tensor == name]
        left[name] = Elimination(
            inner.a, damping(inner.a, inner.noise), seen[name].weight, torch.cat(blocks, 1), importance[name]
        )
    gone: list[int] = []
    kept, cost, solved = [group.units], [0.0], {}
    at_once = max(1, group.units // 32)
    wanted = {max(1, round(share * group.units)) for share in shares}
    while len(gone) < group.units - 1:
        price = torch.stack([layer.prices() for layer in left.values()]).sum(0)
        units = price.sort(stable=True).indices[: min(at_once, group.units - 1 - len(gone))]
        gone += units.tolist()
        cost.append(cost[-1] + sum(layer.remove(units) for layer in left.values()))
        kept.append(group.units - len(gone))
        if any(kept[-1] <= width < kept[-2] for width in wanted):
            solved[kept[-1]] = {name: layer.full() for name, layer in left.items()}
    last = [unit for unit in range(group.units) if unit not in set(gone)]
    return Ranking(torch.tensor([*last, *gone[::-1]]), np.array(kept), np.array(cost), solved)


def part_of(program: Replay, batches: Sequence[Inputs], part: int, wanted: Collection[int]) -> list[Inputs]:
    """Images whose number modulo `part` is one of those wanted, in batches as large; all, where they are too few.

    Of a graph that takes one size only, whole batches.
    """
    if sum(batch_of(x) for x in batches) < 2 * part or (program.batch is not None and len(batches) < part):
        return list(batches)
    if program.batch is not None:
        return [x for number, x in enumerate(batches) if number % part in wanted]
    found: list[Inputs] = []
    size, before = max(batch_of(x) for x in batches), 0
    for x in batches:
        places = torch.tensor(
            [i for i in range(batch_of(x)) if (before + i) % part in wanted], dtype=torch.long
        )
        before += batch_of(x)
        if not len(places):
            continue
        some = some_of(x, places)
        if found and batch_of(found[-1]) + batch_of(some) <= size:
            found[-1] = joined(found[-1], some)
        else:
            found.append(some)
    return found


def columns_of(member: Member, weight: Tensor) -> Tensor:
    """Columns of the flattened weight (o, k) that read each unit, (units, positions)."""
    each = weight[0, 0].numel()
    index = torch.as_tensor(member.index)
    return (index[:, :, None] * each + torch.arange(each)).flatten(1)


def keep_first(order: Tensor, count: int) -> Tensor:
    """(units,) bool: the first of an order stay."""
    mask = torch.zeros(len(order), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def score_ranks(order: Tensor) -> Tensor:
    """Scores that an order stands for, (units,): higher = stays longer."""
    score = torch.empty(len(order))
    score[order] = torch.arange(len(order), 0, -1, dtype=torch.float32)
    return score


def measure_curves(task: Task, rankings: Sequence[Ranking], seen: Mapping[str, Seen], key: str) -> Curves:
    """The distortion of each group at several widths, every other group whole."""
    how, groups = task.how, task.graph.groups
    grids, widths = [], []
    for group, ranking, able in zip(groups, rankings, task.widths, strict=True):
        every = grid_of(able)
        estimated = how.estimates and not group.branch
        grids.append(every if how.estimates or group.branch else measured_widths(able, how.levels))
        widths.append(anchors_of(ranking, how.shares) if estimated else grids[-1][1:].tolist())
    found = measure(
        task.program,
        task.few,
        [
            [pruned_alone(task, group, ranking, width, seen) for width in some]
            for group, ranking, some in zip(groups, rankings, widths, strict=True)
        ],
        distortion=how.distortion,
        batched=passes(task.program),
        tick=task.meter.each(0.5 * count(task.few) / len(task.few)),
    )
    images = []
    for group, ranking, some, moved, grid in zip(groups, rankings, widths, found, grids, strict=True):
        if how.estimates and not group.branch:
            images.append(estimate(ranking, some, moved.mean(1).tolist(), grid)[:, None])
        else:
            own = np.concatenate([np.zeros((1, moved.shape[1])), moved])
            images.append(own.mean(1, keepdims=True) if how.estimates else own)
    return Curves(tuple(group.name for group in groups), tuple(grids), tuple(images), key)


def measured_widths(able: Sequence[int], levels: int) -> npt.NDArray[np.int64]:
    """Of the widths that may be, ascending, so many by equal ratios, descending."""
    return nearest(np.geomspace(able[-1], 1, levels), able)


def grid_of(able: Sequence[int]) -> npt.NDArray[np.int64]:
    """The widths that the search over widths sees, descending: all that may be, or some of them by equal ratios."""
    if len(able) <= GRID:
        return np.array(able[::-1], dtype=np.int64)
    return nearest(np.geomspace(able[-1], able[0], GRID), able)


def nearest(wanted: npt.NDArray[np.float64], able: Sequence[int]) -> npt.NDArray[np.int64]:
    """Of the widths that may be, ascending, those nearest to those wanted, descending."""
    possible = np.array(able)
    wanted = np.clip(wanted, possible[0], None)
    return np.unique(possible[np.abs(possible[None] - wanted[:, None]).argmin(1)])[::-1].astype(np.int64)


def anchors_of(ranking: Ranking, shares: Sequence[float]) -> list[int]:
    """The widths that are measured to scale an estimate, descending; the readers' weights there are known."""
    known = ranking.kept[1:]
    wanted = [share * ranking.kept[0] for share in shares]
    return (
        sorted({int(known[np.abs(known - w).argmin()]) for w in wanted}, reverse=True) if len(known) else []
    )


def estimate(
    ranking: Ranking, anchors: Sequence[int], measured: Sequence[float], grid: npt.NDArray[np.int64]
) -> Curve:
    """The distortion at each width of a grid: the readers' error, scaled to what was measured at some widths.

    Between the widths that were measured the logarithm of the scale is linear in that of the width.

    Args:
        ranking: of the group.
        anchors: widths that were measured, descending.
        measured: the distortion there.
        grid: widths, descending.
    """
    cost = np.interp(-grid, -ranking.kept, ranking.cost)
    if not anchors:
        return cost
    at = np.interp(-np.array(anchors), -ranking.kept, ranking.cost)
    scale = np.log(np.maximum(measured, 1e-12) / np.maximum(at, 1e-30))
    values = cost * np.exp(np.interp(-np.log(grid), -np.log(anchors), scale))
    return np.asarray(np.maximum.accumulate(values))


def pruned_alone(
    task: Task, group: Group, ranking: Ranking, width: int, seen: Mapping[str, Seen]
) -> dict[str, Tensor]:
    """The tensors of a network in which only this group is narrower, its readers solved again."""
    program = task.program
    keep = positions(program, [group], [keep_first(ranking.order, width)])
    tensors = {n: program.tensor(n) * k for n, k in keep.items()}
    if task.how.compensation != "least-squares":
        return tensors
    readers = {m.tensor for m in group.members if m.role == "in"} & seen.keys()
    known = ranking.solved.get(width, {})
    for name in readers:
        if name in known:
            found = seen[name].tensors(known[name])
        else:
            found = seen[name].fitted().solved(keep[name])
        tensors |= {n: t * keep[n] if n in keep else t for n, t in found.items()}
    return tensors


def choose_widths_by(
    cost: Cost,
    curves: Curves,
    exponent: float,
    factors: Sequence[float],
    bound: str,
    limit: float,
    widths: Sequence[Sequence[int]],
) -> ChosenWidths:
    """Widths of least summed distortion within the limit, then single steps as long as one more fits."""
    levels, values, possible = [], [], []
    for factor, kept, curve, able in zip(factors, curves.kept, curves.reduced(), widths, strict=True):
        levels.append(grid_of(able))
        curve = (factor * curve) ** exponent
        values.append(
            at_levels(kept, curve, levels[-1]) if able[0] else curve
        )  # of a block, it is all there is
        possible.append(np.array(able, dtype=np.int64))
    choice = choose_widths(cost, curves.names, levels, values, bound, limit)
    along = [np.interp(-w, -level, value) for w, level, value in zip(possible, levels, values, strict=True)]
    place = [int(np.searchsorted(w, k)) for w, k in zip(possible, choice.kept, strict=True)]
    price = Costs(cost, bound)
    open_ = [g for g, w in enumerate(possible) if place[g] + 1 < len(w)]
    while open_:  # widths between the levels
        kept_now = np.array([w[i] for w, i in zip(possible, place, strict=True)])
        slopes = price.slopes(kept_now[None])[0]

        def gain(g: int, slopes: Curve = slopes) -> float:
            i = place[g]
            saved, wider = along[g][i] - along[g][i + 1], possible[g][i + 1] - possible[g][i]
            return float(saved / max(slopes[g] * wider, 1))

        best = max(open_, key=gain)
        kept_now[best] = possible[best][place[best] + 1]
        if price.of(kept_now[None])[0] <= limit:
            place[best] += 1
            if place[best] + 1 == len(possible[best]):
                open_.remove(best)
        else:  # nor will it later: others only make its units dearer
            open_.remove(best)
    kept_last = tuple(int(w[i]) for w, i in zip(possible, place, strict=True))
    total = float(sum(value[i] for value, i in zip(along, place, strict=True)))
    return ChosenWidths(kept_last, min(total, choice.distortion), choice.bound)


def is_stream(group: Group) -> bool:
    """Whether several layers write the units of a group, as they do where branches are added up."""
    return not group.branch and len({member.tensor for member in group.members if member.role == "out"}) > 1


def summed(curves: Curves, kept: Sequence[int], exponent: float) -> float:
    """The distortion that the curves foretell for these widths."""
    total = 0.0
    for width, levels, curve in zip(kept, curves.kept, curves.reduced(), strict=True):
        total += float(np.interp(-width, -levels, curve**exponent))
    return float(total ** (1 / exponent))
