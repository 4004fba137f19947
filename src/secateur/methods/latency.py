"""Budgets in milliseconds, met by measuring."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from secateur.cost import Budget
from secateur.cost.latency import compare_pair, measure_latency
from secateur.cost.prices import Prices
from secateur.engine.method import Context
from secateur.engine.pruned import Pruned
from secateur.errors import BudgetError
from secateur.graph import Inputs
from secateur.methods.oneshot import OneShot
from secateur.settings import checked

Clock = Callable[[nn.Module], float]
"""A model -> the milliseconds of one pass."""

_CLOSE = 0.95  # of the bound: a result that takes this much of it is near enough
_NEAR = 0.01  # shares of MACs that differ by less are not told apart by a clock


@dataclass(frozen=True)
class Trial:
    """A share of the MACs, the milliseconds that it takes, and the model; None: the dense one."""

    share: float
    milliseconds: float
    pruned: Pruned | None = None


def here(dense: nn.Module, inputs: Inputs) -> Clock:
    """The fast tenth of passes over the example inputs, in PyTorch, on their device."""
    return in_turn(dense, inputs, lambda model: model)


def in_turn(dense: nn.Module, inputs: Inputs, ready: Callable[[nn.Module], Callable[..., object]]) -> Clock:
    """A clock that times models in turn with the dense one, and tells them in units of its first measurement.

    So a machine which slows down meanwhile does not change what is chosen.

    Args:
        dense: the model that is pruned.
        inputs: their batch is what is timed.
        ready: what of a model is timed, such as the model in another runtime.
    """
    first: list[tuple[Callable[..., object], float]] = []

    def clock(model: nn.Module) -> float:
        if not first:
            run = ready(dense)
            first.append((run, measure_latency(run, inputs, repeats=20).p10_ms))
        ((run, milliseconds),) = first
        if model is dense:
            return milliseconds
        return milliseconds / compare_pair(run, ready(model), inputs).speed_up

    return clock


def prune_to_latency(
    cut: Callable[[Budget], Pruned], model: nn.Module, budget: Budget, clock: Clock, *, trials: int = 8
) -> Pruned:
    """Look for the largest share of MACs whose model is fast enough.

    Milliseconds do not follow from MACs, but with one way of cutting they fall with them; so each trial lies where the
    ones before it say that the bound is met. A bound that is met to within 5 % ends the search.

    Args:
        cut: a copy of the model within a budget in closed form.
        model: the dense one.
        budget: with `latency_ms`; its other bounds hold as well.
        clock: measures.
        trials: how many models are cut and measured at most.
    Returns:
        the model with the most MACs of those that were fast enough, with `latency`.
    Raises:
        BudgetError: the dense model is fast enough, or no model that was tried is.
    """
    limit = budget.latency_ms
    assert limit is not None
    dense = clock(model)
    if dense <= limit:
        raise BudgetError(
            f"budget latency_ms={limit:g}: the dense model takes {dense:.3g} ms and fits already; lower the budget"
        )
    seen, least, refused = [Trial(1.0, dense)], 0.0, ""
    others = {name: bound for name, bound in budget.given.items() if name != "latency_ms"}
    if others:
        seen.append(_timed(cut(Budget(**others)), clock))
    enough = others and seen[-1].milliseconds <= limit
    for _ in range(trials):
        if enough or (share := _next(seen, least, limit)) is None:
            break
        try:
            pruned = cut(Budget(**others | {"macs": share}))
        except BudgetError as error:
            least, refused = share, f" With less: {error}"
            continue
        if any(_share(pruned) == trial.share for trial in seen):
            least = share  # no widths lie between what is known and this
        else:
            seen.append(_timed(pruned, clock))
    fit = [trial for trial in seen if trial.milliseconds <= limit]
    if not fit:
        best = min(seen, key=lambda trial: trial.milliseconds)
        raise BudgetError(
            f"budget latency_ms={limit:g}: not reached. The dense model takes {dense:.3g} ms; with {best.share:.1%} "
            f"of its MACs it takes {best.milliseconds:.3g} ms, the least of {len(seen)} trials.{refused}"
        )
    best = max(fit, key=lambda trial: trial.share)
    assert best.pruned is not None
    assert best.pruned.plan is not None
    measured = {"bound": limit, "dense": dense, "trials": [[t.share, t.milliseconds] for t in seen[1:]]}
    plan = replace(best.pruned.plan, origin={**best.pruned.plan.origin, "latency_ms": measured})
    return replace(
        best.pruned,
        plan=plan,
        before={**best.pruned.before, "latency_ms": dense},
        after={**best.pruned.after, "latency_ms": best.milliseconds},
    )


def prune_at_prices(
    cut: Callable[[Budget], Pruned],
    model: nn.Module,
    budget: Budget,
    prices: Prices,
    clock: Clock,
    *,
    trials: int = 5,
) -> Pruned:
    """Cut by prices in milliseconds, measure, and ask for as much more or less as the prices were wrong.

    Args:
        cut: a copy of the model within a budget of `latency_ms`, as the prices tell it.
        model: the dense one.
        budget: of `latency_ms` alone.
        prices: of the model's widths and blocks.
        clock: measures.
        trials: how many models are cut and measured at most.
    Returns:
        the slowest model of those that were fast enough, with `latency`.
    Raises:
        BudgetError: the dense model is fast enough, no model that was tried is, or other bounds are given.
    """
    limit = budget.latency_ms
    assert limit is not None
    if len(budget.given) > 1:
        raise BudgetError("blocks are chosen by milliseconds alone: give latency_ms and no other bound")
    if prices.dense <= limit:
        raise BudgetError(
            f"budget latency_ms={limit:g}: the dense model takes {prices.dense:.3g} ms and fits already; lower the "
            f"budget"
        )
    asked, seen, refused = _aim(limit), list[tuple[float, float, Pruned]](), ""
    for _ in range(trials):
        try:
            pruned = cut(Budget(latency_ms=asked))
        except BudgetError as error:
            refused = f" With less: {error}"
            break
        seen.append((clock(pruned.model), asked, pruned))
        took = seen[-1][0]
        if _CLOSE * limit <= took <= limit:
            break
        asked *= _aim(limit) / took
    fit = [trial for trial in seen if trial[0] <= limit]
    if not fit:
        best = min((trial[0] for trial in seen), default=prices.dense)
        raise BudgetError(
            f"budget latency_ms={limit:g}: not reached; the fastest of {len(seen)} trials takes {best:.3g} ms.{refused}"
        )
    took, _, found = max(fit, key=lambda trial: trial[0])
    assert found.plan is not None
    measured = {
        "bound": limit,
        "dense": prices.dense,
        "per_gmac": 1e9 * prices.per_mac,
        "blocks": dict(prices.extra),
        "trials": [[p.after["macs"] / p.before["macs"], ms] for ms, _, p in seen],
    }
    plan = replace(found.plan, origin={**found.plan.origin, "budget": budget.given, "latency_ms": measured})
    return replace(
        found,
        plan=plan,
        before={**found.before, "latency_ms": prices.dense},
        after={**found.after, "latency_ms": took},
    )


def _timed(pruned: Pruned, clock: Clock) -> Trial:
    return Trial(_share(pruned), clock(pruned.model), pruned)


def _share(pruned: Pruned) -> float:
    return pruned.after["macs"] / pruned.before["macs"]


def _next(seen: Sequence[Trial], least: float, limit: float) -> float | None:
    """The share of MACs to try next; None: no trial would tell anything new.

    Args:
        seen: the dense model and what was measured.
        least: a share that was out of reach, or below which nothing new is, or 0.
        limit: milliseconds.
    """
    seen = sorted(seen, key=lambda trial: trial.share)
    low = next((t for t in reversed(seen) if t.milliseconds <= limit), None)
    high = next(t for t in seen if t.milliseconds > limit and (low is None or t.share > low.share))
    if low is None:  # a line through the two smallest, or through the dense model and zero
        start, other = least, seen[1] if len(seen) > 1 else Trial(0.0, 0.0)
    elif low.milliseconds >= _CLOSE * limit:
        return None
    else:
        start, other = max(low.share, least), low
    gap = high.share - start
    if gap < _NEAR:
        return None
    slope = (other.milliseconds - high.milliseconds) / (other.share - high.share)
    aim = high.share - (high.milliseconds - _aim(limit)) / slope if slope > 0 else 0.0
    # one odd measurement must not end the search far off: towards the unknown, at most half of the way
    return min(max(aim, start + (0.5 if low is None else 0.1) * gap), high.share - 0.1 * gap)


def _aim(limit: float) -> float:
    """A little below the bound, since clocks are not exact."""
    return (1 + _CLOSE) / 2 * limit


@checked(BudgetError)
def budget_in_macs(
    model: nn.Module,
    inputs: Inputs,
    budget: Budget,
    evenly: OneShot | None = None,
    *,
    clock: Clock | None = None,
) -> Budget:
    """What a bound in milliseconds comes to in MACs, for methods that cannot try: those that prune during training.

    A copy of the model is cut evenly, every group alike, until it is fast enough; its MACs are the bound. A method
    that shares the cuts out otherwise takes a little more or less time than asked for.

    Args:
        model: only read.
        inputs: example inputs; their batch is what is timed.
        budget: with `latency_ms`.
        evenly: how the copy is cut, such as with frozen modules; default: `OneShot(allocation="uniform", round_to=1)`.
        clock: measures; default: `here(model, inputs)`.
    Raises:
        BudgetError: see `prune_to_latency`.
    """
    if budget.latency_ms is None:
        raise BudgetError(f"{budget!r} bounds no milliseconds; give latency_ms")
    method = evenly or OneShot(allocation="uniform", round_to=1)
    found = prune_to_latency(
        lambda within: method.prune(model, inputs, within, Context()),
        model,
        budget,
        clock or here(model, inputs),
    )
    return Budget(**{**budget.given, "latency_ms": None, "macs": int(found.after["macs"])})
