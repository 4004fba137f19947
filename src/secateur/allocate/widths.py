"""From densities to widths: how many units each group keeps so that every layer is about as dense as asked.

A layer's density is the product of what its axes keep; which group stands on which axis, the graph says.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from secateur.allocate.density import Layer, Vector
from secateur.allocate.table import list_widths
from secateur.cost import Cost
from secateur.cost.frozen import what_stays
from secateur.errors import BudgetError, unknown
from secateur.graph import Axis, Graph

RULES = {
    "fit": "least squares over all layers that a group touches",
    "sqrt": "layers that produce a group, or else read it: the square root of their density where both sides shrink",
}
"""How densities become shares of groups -> one line for lists of choices."""

PULL = 1.0
"""Weight of the square-root rule in a fit of several coupled groups.

Without it a chain is fitted exactly, by widths that zig-zag from layer to layer.
"""

FLOOR = 1e-4
"""Smallest share a fit considers."""


class Widths:
    """Densities as functions of the shares that groups keep.

    Args:
        graph: from `analyze`.
        layers: from `list_layers`.
    Attributes:
        units: per group of the dense model.
        touched: whether a layer has units of a group, (layers, groups) bool.
        leader: per group, the one whose share it takes; its own number for all but squeeze-excitation.
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer]) -> None:
        self.graph, self.layers = graph, tuple(layers)
        self.units = np.array([group.units for group in graph.groups], dtype=float)
        products = {product.name: product for product in graph.params}
        shapes = [products[layer.weight].axes for layer in layers]
        number: dict[Axis, int] = {Axis(1): 0}
        for axes in shapes:
            for axis in axes:
                number.setdefault(axis, len(number))
        depth = max((len(axes) for axes in shapes), default=0)
        rows = [[number[a] for a in axes] + [0] * (depth - len(axes)) for axes in shapes]
        self.axes = np.array(rows, dtype=np.int64).reshape(len(layers), depth)
        self.base = np.array([axis.base for axis in number], dtype=float)
        self.slope = np.zeros((len(number), len(self.units)))
        for axis, row in number.items():
            for group, each in axis.parts:
                self.slope[row, group] += each * self.units[group]
        self.touched = self.elasticity(np.ones(len(self.units))) > 0
        self.leader = self._leaders()

    def densities(self, shares: Vector) -> Vector:
        """(groups,) shares -> (layers,) densities."""
        full = self.base + self.slope.sum(1)
        kept = self.base + self.slope @ shares
        return np.asarray((kept / full)[self.axes].prod(1), dtype=float)

    def elasticity(self, shares: Vector) -> Vector:
        """How many per cent each density moves when a share moves by one, (layers, groups)."""
        kept = self.base + self.slope @ shares
        each = self.slope * shares / np.maximum(kept, 1e-300)[:, None]
        return np.asarray(each[self.axes].sum(1), dtype=float)

    def change(self, held: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Which layers' densities can change when some groups are held, (layers,) bool."""
        free = [g for g, leader in enumerate(self.leader) if leader not in held and g not in held]
        return np.asarray(self.touched[:, free].any(1))

    def streams(self, grouped: Collection[str] = ()) -> list[int]:
        """Groups of residual streams: those that several layers produce, and that of the first layer.

        In a network without such streams the first layer's width is as free as any. The gates of
        squeeze-excitation produce nothing, nor do grouped convolutions where another layer produces what they read.

        Args:
            grouped: names of convolutions with several groups.
        """
        followers = [g for g, leader in enumerate(self.leader) if leader != g]
        gates = {
            layer.name for layer, row in zip(self.layers, self.touched, strict=True) if row[followers].any()
        }
        producers = [{m.module for m in g.members if m.role == "out"} - gates for g in self.graph.groups]
        producers = [names - set(grouped) or names for names in producers]
        first = {self.graph.macs[0].name}
        own = [len(names) < 2 or self.leader[g] != g for g, names in enumerate(producers)]
        if all(own):
            return []
        return [g for g, names in enumerate(producers) if not own[g] or names == first]

    def _leaders(self) -> list[int]:
        """Squeeze-excitation follows what it squeezes, so that its reduction stays what it is.

        It is a group between two layers that see one value per channel, which read and write the same other
        group, whose channels are images elsewhere.
        """
        leaders, touched = list(range(len(self.units))), self.touched
        spatial = [
            any(touched[i, g] and not layer.pointwise for i, layer in enumerate(self.layers))
            for g in range(len(self.units))
        ]
        for group in range(len(self.units)):
            own = [i for i in range(len(self.layers)) if touched[i, group]]
            others = {tuple(np.flatnonzero(touched[i] & (np.arange(len(self.units)) != group))) for i in own}
            if len(own) == 2 and all(self.layers[i].pointwise for i in own) and len(others) == 1:
                (seen,) = others
                if len(seen) == 1 and spatial[seen[0]]:
                    leaders[group] = int(seen[0])
        return leaders


def fit_shares(
    widths: Widths,
    densities: Mapping[str, float],
    *,
    streams: Sequence[int] = (),
    shared: bool = False,
    rule: str = "fit",
    cap: float = 1.0,
    weigh: Sequence[float] | Vector | None = None,
) -> Vector:
    """The share of units that each group is to keep, before any budget is looked at.

    A group alone takes the mean of what the layers it touches ask for, weighted by their cost, so that their
    cost together is just what was asked: the hidden width of a basic block or an inverted residual. Groups
    coupled by layers between them (bottlenecks, plain chains, dense blocks) are fitted together,

        min over u   sum_l a_l (log p_l(u) - log p_l)^2  +  PULL sum_g A_g (u_g - ask_g)^2,    u = log shares

    where ask is the square-root rule: each of a layer's free axes takes an equal part of log p_l.

    Args:
        widths: of the graph and its layers.
        densities: per layer, by name; layers that are left out have no say.
        streams: numbers of groups that belong to residual streams.
        shared: each stream gets the geometric mean of the roots of the densities of the layers that touch it;
            otherwise it is kept.
        rule: a name in `RULES`.
        cap: largest share.
        weigh: weight of each layer, its cost; default its number of weights.
    Returns:
        (groups,), at most `cap`.
    Raises:
        BudgetError: unknown rule.
    Source: Cai et al. 2022, arXiv:2203.02549, crops both sides of a layer by the root of its density.
    Differs: a reconstruction.
    """
    if rule not in RULES:
        raise BudgetError(unknown("rule", rule, RULES))
    layers, count = widths.layers, len(widths.units)
    p = np.array([max(densities.get(layer.name, 1.0), 1 / layer.weights) for layer in layers])
    a = np.array([layer.weights for layer in layers] if weigh is None else weigh, dtype=float)
    said = np.array([layer.name in densities for layer in layers])
    a = np.where(said, a, 0.0) / max(a.sum(), 1e-300)
    leader = np.array(widths.leader)
    touched = widths.touched
    held = {leader[g] for g in streams}
    shares = np.ones(count)
    if shared:
        for group in held:
            near = said & touched[:, leader == group].any(1)
            if near.any():
                shares[leader == group] = min(cap, float(np.exp(np.log(p[near]).mean() / 2)))
    follows = touched[:, leader != np.arange(count)].any(1)  # squeeze-excitation has no say of its own
    a = np.where(follows, 0.0, a)
    free = [g for g in range(count) if leader[g] == g and g not in held]
    spread = np.zeros((count, len(free)))  # free shares -> all groups
    for column, group in enumerate(free):
        spread[leader == group, column] = 1.0

    def all_shares(x: Vector) -> Vector:
        return np.where(spread.any(1), spread @ x, shares)

    whole = all_shares(np.ones(len(free)))
    target = p / widths.densities(whole)
    slopes = widths.elasticity(whole) @ spread
    degree = np.maximum(slopes.sum(1), 0.5)
    ask = np.clip(target ** (1 / degree), FLOOR, cap)
    voice = a[:, None] * slopes
    if rule == "sqrt":
        made = np.array([[_produces(widths, i, g) for g in free] for i in range(len(layers))]).reshape(
            slopes.shape
        )
        voice = voice * np.where(made.any(0), made, True)
    heard = voice.sum(0)
    alone = np.where(heard > 0, (voice * ask[:, None]).sum(0) / np.maximum(heard, 1e-300), 1.0)
    x = alone.copy()
    if rule == "fit":
        for part in _coupled(slopes > 1e-12):
            if len(part) > 1:
                x[part] = _fitted(widths, all_shares, x, part, a, p, heard, cap, spread)
    return np.clip(all_shares(x), FLOOR, cap)


def _produces(widths: Widths, layer: int, group: int) -> bool:
    weight = widths.layers[layer].weight
    return any(m.tensor == weight and m.role == "out" for m in widths.graph.groups[group].members)


def _coupled(touch: np.ndarray) -> list[list[int]]:
    """Sets of columns that are connected by rows which touch several of them."""
    root = list(range(touch.shape[1]))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for row in touch:
        members = np.flatnonzero(row).tolist()
        for other in members[1:]:
            root[find(other)] = find(members[0])
    sets: dict[int, list[int]] = {}
    for column in range(touch.shape[1]):
        sets.setdefault(find(column), []).append(column)
    return list(sets.values())


def _fitted(
    widths: Widths,
    all_shares: Callable[[Vector], Vector],
    x: Vector,
    part: list[int],
    a: Vector,
    p: Vector,
    heard: Vector,
    cap: float,
    spread: Vector,
) -> Vector:
    """Shares of coupled groups by least squares in logarithms."""
    start = np.log(x[part])
    pull = np.sqrt(PULL * np.maximum(heard[part], 1e-9))

    def at(u: Vector) -> Vector:
        full = x.copy()
        full[part] = np.exp(u)
        return all_shares(full)

    near = (widths.elasticity(at(start)) @ spread[:, part]).any(1)
    weight = np.sqrt(a[near])

    def residual(u: Vector) -> Vector:
        return np.concatenate(
            [weight * (np.log(widths.densities(at(u))[near]) - np.log(p[near])), pull * (u - start)]
        )

    def slope(u: Vector) -> Vector:
        rows = weight[:, None] * (widths.elasticity(at(u)) @ spread[:, part])[near]
        return np.concatenate([rows, np.diag(pull)])

    low, high = np.log(FLOOR), np.log(cap) + 1e-9
    from scipy.optimize import least_squares  # slow to import

    found = least_squares(residual, np.clip(start, low, high - 1e-9), jac=slope, bounds=(low, high))
    return np.asarray(np.exp(found.x), dtype=float)


def meet_budget(
    cost: Cost,
    shares: Sequence[float] | Vector,
    limits: Mapping[str, int],
    *,
    keep: Sequence[int] = (),
    cap: float = 1.0,
    min_keep: int = 1,
    round_to: int | Sequence[int] = 1,
    extra: Mapping[str, tuple[Callable[[Vector], float], float]] | None = None,
) -> list[int]:
    """Widths near the given shares that meet every budget within one step.

    One factor for all shares is bisected on the real-valued cost; then widths are rounded, the widest beyond their
    share step down while a budget is overdrawn, and the narrowest step up, each at most to the first width beyond its
    share. So at least one group could not take one step more.

    Args:
        cost: what widths cost.
        shares: per group.
        limits: the largest allowed cost per measure in closed form.
        keep: numbers of groups that stay whole.
        cap: largest share; above 1, groups may grow.
        min_keep: units that every group keeps at least.
        round_to: widths are multiples of this, or all units; one number, or one per group.
        extra: further costs: name -> (function of (groups,) widths, its limit).
    Raises:
        BudgetError: out of reach; the message gives the reachable range.
    """
    units = np.array(cost.full, dtype=float)
    steps = [round_to] * len(units) if isinstance(round_to, int) else round_to
    levels = [
        _levels(n, min_keep, step, cap) if i not in keep else [n]
        for i, (n, step) in enumerate(zip(cost.full, steps, strict=True))
    ]
    least = np.array([level[0] for level in levels], dtype=float)
    most = np.array([level[-1] for level in levels], dtype=float)

    spent = {**{m: _spent(cost, m) for m in limits}, **{m: f for m, (f, _) in (extra or {}).items()}}
    bounds = {**limits, **{m: limit for m, (_, limit) in (extra or {}).items()}}

    def over(kept: Vector) -> list[str]:
        return [m for m, limit in bounds.items() if spent[m](kept) > limit * (1 + 1e-12)]

    if over(least):
        reach = ", ".join(
            f"{m}: {limit:,} asked for, {spent[m](least):,.6g} to {spent[m](units):,.6g} reachable"
            for m, limit in bounds.items()
        )
        kept_whole = f" with {len(keep)} of {len(units)} groups kept whole" if keep else ""
        streams = ', or let residual streams shrink too (streams="shared")' if keep else ""
        lower = "".join(
            f", or lower {name}"
            for name, value in (("min_keep", min_keep), ("round_to", max(steps)))
            if value > 1
        )
        first = next(iter(limits), "macs")
        raise BudgetError(
            f"budget out of reach ({reach}){kept_whole}. Raise the budget{streams}{lower}."
            f"{what_stays(cost, first, [int(n) for n in least])}"
        )
    wish = np.asarray(shares, dtype=float) * units
    low, high = 0.0, float((most / np.maximum(wish, 1e-9)).max()) * 1.01
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if over(np.clip(middle * wish, least, most)) else (middle, high)
    wish = np.clip(low * wish, least, most)
    place = [int(np.abs(np.array(level) - w).argmin()) for level, w in zip(levels, wish, strict=True)]

    def kept() -> Vector:
        return np.array([level[i] for level, i in zip(levels, place, strict=True)], dtype=float)

    while bad := over(kept()):
        before = {m: spent[m](kept()) for m in bad}
        able = [g for g, i in enumerate(place) if i > 0]
        widest = sorted(able, key=lambda g: -levels[g][place[g]] / wish[g])
        for group in widest:
            place[group] -= 1
            if any(spent[m](kept()) < cost_before for m, cost_before in before.items()):
                break
            place[group] += 1
        else:  # where several operators share a peak, one group alone may not lower it
            place[widest[0]] -= 1
    closed: set[int] = set()
    while able := [
        g
        for g, i in enumerate(place)
        if g not in closed and i + 1 < len(levels[g]) and levels[g][i] <= wish[g]
    ]:
        group = min(able, key=lambda g: levels[g][place[g] + 1] / wish[g])
        place[group] += 1
        if over(kept()):
            place[group] -= 1
            closed.add(group)
    return [int(n) for n in kept()]


def _spent(cost: Cost, measure: str) -> Callable[[Vector], float]:
    return lambda kept: cost.soft(measure, torch.as_tensor(kept)).item()


def _levels(units: int, min_keep: int, round_to: int, cap: float) -> list[int]:
    """Widths a group may have, ascending; beyond the dense width in steps of `round_to`.

    >>> _levels(10, 3, 4, 1.6)
    [4, 8, 10, 12, 16]
    """
    wider = range((units // round_to + 1) * round_to, int(cap * units + 1e-9) + 1, round_to)
    return [*list_widths(units, min_keep, round_to), *wider]
