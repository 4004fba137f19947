"""Rate–distortion pruning of channels: curves per group, widths as one problem, consumers solved again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocate.products import ChosenWidths, choose_widths
from secateur.allocate.table import list_widths
from secateur.cost import Budget, Cost
from secateur.cost.multiples import AUTO, ROUND_TO, ROUND_TO_HELP, Multiples, choose_multiples
from secateur.engine.method import Context, Method, Progress, images_of
from secateur.engine.pruned import Pruned, cut_and_prove
from secateur.errors import BudgetError, ScoreError, SecateurError
from secateur.graph import Graph, Group, Inputs, Member, analyze
from secateur.graph.duplicate import duplicate
from secateur.graph.replay import Replay, Tensors
from secateur.methods.rd.curves import DISTORTIONS, Curves, interpolated, joint, key_of, measure
from secateur.methods.rd.single_weights import COMPENSATIONS, passes
from secateur.plan import Plan
from secateur.reconstruction.compensate import Fitted, compensate, layers, reestimate
from secateur.reconstruction.leastsquares import block_prices
from secateur.settings import option, settings


@settings
class RD(Method):
    """Choose widths by measured distortion curves, and solve the remaining weights again.

    For each group of channels and several widths, the distance of the outputs is measured when only that group is
    pruned, with its consumers solved again. Widths of least summed distance within the budget are then cut together,
    and all remaining weights solved again. Sums mislead most about groups that several layers write, such as residual
    streams; so sums that protect these are tried as well.

    Takes models of one image tensor in and logits out, and budgets of one bound.

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
    distortion: str = option("distance between outputs", default="kl", choices=DISTORTIONS)
    exponents: tuple[float, ...] = option(
        "of the mean distortion before curves are added up; of several, the best is taken",
        default=(0.5, 1.0),
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
    levels: int = option("widths measured per group", default=9, least=2)
    min_keep: int = option("units that every group keeps at least", default=1, least=1)
    round_to: int | str = option(ROUND_TO_HELP, default=AUTO, choices=ROUND_TO, least=1)
    seed: int = option("of the images for the proof", default=0, least=0)

    def check(self) -> None:
        if not self.exponents:
            raise SecateurError("RD: exponents is empty; give at least one, such as (0.5, 1.0)")

    @property
    def needs_data(self) -> bool:
        return True

    @torch.no_grad()
    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> Pruned:
        if context.data is None:
            raise ScoreError("method 'rd' measures on data: pass data=, batches of images")
        if len(budget.bounds) != 1:
            raise BudgetError(
                f"method 'rd' takes one bound, got {', '.join(budget.bounds)}; give one of them"
            )
        batches = images_of(context.data)
        model = duplicate(model).eval()
        graph = analyze(model, inputs, freeze=self.freeze)
        if not graph.groups:
            raise BudgetError(
                "nothing can be pruned: the model has no group of removable units (see graph.frozen)"
            )
        cost = Cost(graph)
        ((bound, _),) = budget.bounds.items()
        cost.sum(bound)  # or it is refused here, before anything is measured
        limit = budget.limits({bound: cost.of(bound)})[bound]
        multiples = choose_multiples(
            model, graph, self.round_to, partial(cost.within, {bound: limit}), min_keep=self.min_keep
        )
        program = Replay(model, batches[0])
        orders, widths = rank_units(program, graph, batches, self, multiples.units)
        key = key_of(model, batches, self.measured_with() | {"round_to": list(multiples.units)})
        curves = Curves.once(
            context.cache,
            key,
            lambda: measure_curves(program, graph, batches, orders, widths, self, key, context.progress),
        )
        best = self._best(program, cost, batches, orders, curves, bound, limit, budget, multiples)
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
        return {
            "compensation": self.compensation, "distortion": self.distortion, "levels": self.levels,
            "freeze": list(self.freeze), "min_keep": self.min_keep,
            "granularity": "channels",
        }  # fmt: skip

    def _best(
        self,
        program: Replay,
        cost: Cost,
        batches: Sequence[Tensor],
        orders: Sequence[Tensor],
        curves: Curves,
        bound: str,
        limit: float,
        budget: Budget,
        multiples: Multiples,
    ) -> "Trial":
        """Of the widths that the sums ask for, those whose measured distortion is lowest."""
        graph = cost.graph
        best, seen = None, set()
        weights = (1.0, self.stream_weight) if any(map(is_stream, graph.groups)) else (1.0,)
        for weight in weights:
            rival = None
            for exponent in self.exponents:
                choice = choose_widths_by(cost, curves, exponent, weight, bound, limit, self, multiples.units)
                if choice.kept in seen:
                    continue
                seen.add(choice.kept)
                masks = [keep_first(order, kept) for order, kept in zip(orders, choice.kept, strict=True)]
                origin = self.record() | multiples.record(graph) | {
                    "exponent": exponent, "stream_weight": weight, "budget": dict(budget.bounds)
                }  # fmt: skip
                plan = Plan.of(graph, masks, origin)
                tensors = compensated(program, graph, plan, batches, self.compensation)
                moved = float(joint(program, batches, tensors, distortion=self.distortion).mean())
                if rival is None or moved < rival.measured:
                    rival = Trial(moved, summed(curves, choice.kept, exponent), choice.gap, plan, tensors)
            if best is None or (rival is not None and rival.measured < self.stream_gain * best.measured):
                best = rival
        assert best is not None
        return best


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


def rank_units(
    program: Replay, graph: Graph, batches: Sequence[Tensor], how: RD, steps: Sequence[int]
) -> tuple[list[Tensor], list[Any]]:
    """Per group: its units in the order in which they stay, best first; and the widths to measure, descending."""
    whole = {
        layer.weight: torch.ones_like(program.tensor(layer.weight), dtype=torch.bool)
        for layer in layers(program)
    }
    fitted = compensate(program, batches, whole).fitted
    orders, widths = [], []
    for group, step in zip(graph.groups, steps, strict=True):
        orders.append(order_units(program, group, fitted))
        possible = np.array(list_widths(group.units, how.min_keep, step))
        wanted = np.geomspace(group.units, possible[0], how.levels)
        nearest = possible[np.abs(possible[None] - wanted[:, None]).argmin(1)]
        widths.append(np.unique(nearest)[::-1].astype(np.int64))
    return orders, widths


def order_units(program: Replay, group: Group, fitted: Mapping[str, Fitted]) -> Tensor:
    """The units of a group, the one that is hardest to do without first.

    Units leave one at a time, the one whose loss costs its consumers least once these are solved again.
    Without a consumer, units with the smallest filters leave first.
    """
    consumers = [m for m in group.members if m.role == "in" and m.tensor in fitted and m.dim == 1]
    consumers = [m for m in consumers if len(fitted[m.tensor].moments) == 1]
    if not consumers:
        producers = [m for m in group.members if m.role == "out"] or list(group.members)
        norm = sum(m.take(program.tensor(m.tensor)).square().sum(1) for m in producers)
        assert isinstance(norm, Tensor)
        return norm.cpu().sort(descending=True, stable=True).indices
    blocks = [columns_of(m, program.tensor(m.tensor)) for m in consumers]
    alive = [torch.ones(fitted[m.tensor].moments[0].a.shape[0], dtype=torch.bool) for m in consumers]
    gone: list[int] = []
    at_once = max(1, group.units // 32)
    while len(gone) < group.units - 1:
        price = torch.zeros(group.units, dtype=torch.float64)
        for m, block, live in zip(consumers, blocks, alive, strict=True):
            price += block_prices(fitted[m.tensor].moments[0], live, block)
        for unit in price.sort(stable=True).indices[: min(at_once, group.units - 1 - len(gone))].tolist():
            gone.append(unit)
            for block, live in zip(blocks, alive, strict=True):
                live[block[unit]] = False
    last = [unit for unit in range(group.units) if unit not in set(gone)]
    return torch.tensor([*last, *gone[::-1]])


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


def measure_curves(
    program: Replay,
    graph: Graph,
    batches: Sequence[Tensor],
    orders: Sequence[Tensor],
    widths: Sequence[Any],
    how: RD,
    key: str,
    progress: Progress | None,
) -> Curves:
    """The distortion of each group at each width, every other group whole."""
    whole = {
        layer.weight: torch.ones_like(program.tensor(layer.weight), dtype=torch.bool)
        for layer in layers(program)
    }
    fitted = compensate(program, batches, whole).fitted if how.compensation == "least-squares" else {}
    candidates: list[Sequence[Tensors]] = []
    for group, order, width in zip(graph.groups, orders, widths, strict=True):
        variants: list[Tensors] = []
        for kept in width[1:].tolist():
            keep = positions(program, [group], [keep_first(order, kept)])
            tensors = {n: program.tensor(n) * k for n, k in keep.items()}
            for name in keep.keys() & fitted.keys():
                found = fitted[name].solved(keep[name])
                tensors |= {n: t * keep[n] if n in keep else t for n, t in found.items()}
            variants.append(tensors)
        candidates.append(variants)
    images = measure(
        program, batches, candidates, distortion=how.distortion, batched=passes(batches[0]), tick=progress
    )
    zero = np.zeros((1, sum(len(x) for x in batches)))
    names = tuple(group.name for group in graph.groups)
    return Curves(names, tuple(widths), tuple(np.concatenate([zero, v]) for v in images), key)


def choose_widths_by(
    cost: Cost,
    curves: Curves,
    exponent: float,
    stream_weight: float,
    bound: str,
    limit: float,
    how: RD,
    steps: Sequence[int],
) -> ChosenWidths:
    """Widths of least summed distortion within the limit, then single units as long as one more fits."""
    graph, levels, values = cost.graph, [], []
    able = [
        list_widths(group.units, how.min_keep, step) for group, step in zip(graph.groups, steps, strict=True)
    ]
    for group, kept, curve, widths in zip(graph.groups, curves.kept, curves.reduced(), able, strict=True):
        factor = stream_weight if is_stream(group) else 1.0
        grid, value = interpolated(kept, (factor * curve) ** exponent, 4 * len(kept))
        possible = np.isin(grid, widths)
        levels.append(grid[possible])
        values.append(value[possible])
    choice = choose_widths(cost, curves.names, levels, values, bound, limit)
    kept_now = list(choice.kept)
    while True:  # widths between the levels
        best: tuple[float, int, int] | None = None
        for g, widths in enumerate(able):
            wider = [w for w in widths if w > kept_now[g]]
            if not wider:
                continue
            trial = [*kept_now[:g], wider[0], *kept_now[g + 1 :]]
            if cost.of(bound, trial) > limit:
                continue
            now, then = (float(np.interp(-w, -levels[g], values[g])) for w in (kept_now[g], wider[0]))
            price = cost.of(bound, trial) - cost.of(bound, kept_now)
            gain = (now - then) / max(price, 1)
            if best is None or gain > best[0]:
                best = gain, g, wider[0]
        if best is None:
            break
        kept_now[best[1]] = best[2]
    total = sum(float(np.interp(-k, -lv, v)) for k, lv, v in zip(kept_now, levels, values, strict=True))
    return ChosenWidths(tuple(kept_now), min(total, choice.distortion), choice.bound)


def is_stream(group: Group) -> bool:
    """Whether several layers write the units of a group, as they do where branches are added up."""
    return len({member.tensor for member in group.members if member.role == "out"}) > 1


def summed(curves: Curves, kept: Sequence[int], exponent: float) -> float:
    """The distortion that the curves foretell for these widths."""
    total = 0.0
    for width, levels, curve in zip(kept, curves.kept, curves.reduced(), strict=True):
        total += float(np.interp(-width, -levels, curve**exponent))
    return float(total ** (1 / exponent))


def positions(program: Replay, groups: Sequence[Group], masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameter name -> bool of its shape, False where a removed unit lies."""
    owned = dict(program.model.named_parameters())
    keep: dict[str, Tensor] = {}
    for group, mask in zip(groups, masks, strict=True):
        if mask.all():
            continue
        for member in group.members:
            if member.tensor in owned:
                if member.tensor not in keep:
                    keep[member.tensor] = torch.ones_like(owned[member.tensor], dtype=torch.bool)
                member.fill_(keep[member.tensor], ~mask, 0)
    return keep


@torch.no_grad()
def compensated(
    program: Replay, graph: Graph, plan: Plan, batches: Sequence[Tensor], compensation: str
) -> dict[str, Tensor]:
    """The tensors of the masked network that make up for what a plan removes; removed units stay zero.

    Args:
        program: of the dense model.
        graph: of the same model.
        plan: any plan for it, whatever chose it.
        batches: calibration images, (n, …) each.
        compensation: a name in `secateur.methods.rd.single_weights.COMPENSATIONS`.
    """
    keep = positions(program, graph.groups, plan.masks(graph))
    start = {name: program.tensor(name) * k for name, k in keep.items()}
    if compensation == "none":
        return start
    if compensation == "batch-norm":
        return reestimate(program, batches, start)
    masks = {
        layer.weight: keep.get(layer.weight, torch.ones_like(program.tensor(layer.weight), dtype=torch.bool))
        for layer in layers(program)
    }
    return compensate(program, batches, masks, start=start, keep=keep).tensors
