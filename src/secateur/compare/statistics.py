"""Means over seeds, differences paired by seed, and how large one must be to mean something."""

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.compare.results import Outcome
from secateur.compare.words import DENSE, MEASURES, describe_budget


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One arm at one budget: means over the seeds that worked, and sample standard deviations.

    Attributes:
        budget: in words; empty for the dense model.
        seeds: that worked.
        kept: share of the dense model that is left, by measure; empty if no seed worked.
        difference: to the arm `against`, paired by seed; with its sample standard deviation.
        against: the dense model, or another arm; empty if there is nothing to compare with.
        over: whether it costs more than the budget allows.
        masked: whether units are zeros, with which all operations are done.
        latency_ms: of one pass, as a share of the dense network's, which was measured beside it, times the median of
            all measurements of the dense network: a clock that drifts between runs does not matter.
        latency_spread: sample standard deviation of that over the runs, milliseconds.
        speed_up: dense over this.
        seconds_per_epoch, training_seconds: medians over the seeds.
        failed: what went wrong with the others.
    """

    arm: str
    budget: str
    seeds: int
    kept: Mapping[str, float]
    accuracy: float | None
    spread: float | None
    accuracy_cut: float | None
    difference: float | None
    difference_spread: float | None
    against: str
    step_macs: float | None
    step_bytes: float | None
    latency_ms: float | None
    latency_spread: float | None
    speed_up: float | None
    seconds_per_epoch: float
    training_seconds: float
    over: bool
    masked: bool
    failed: str


def rank_arms(outcomes: Sequence[Outcome]) -> list[Standing]:
    """One line per budget and arm: the largest budget first, its best arm first and those over the budget last."""
    dense = find_dense_accuracies(outcomes)
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((describe_budget(outcome.budget), outcome.arm), []).append(outcome)
    clock = find_dense_latency(outcomes)
    by = {(o.arm, describe_budget(o.budget), o.seed): o.accuracy for o in outcomes if o.accuracy is not None}
    by |= {(DENSE, "", seed): accuracy for seed, accuracy in dense.items()}
    lines = [_average(budget, arm, found, by, clock) for (budget, arm), found in groups.items()]
    places = {budget: place for place, budget in enumerate(list_budgets(outcomes))}
    return sorted(lines, key=lambda line: (places[line.budget], line.over, -(line.accuracy or 0)))


def list_budgets(outcomes: Sequence[Outcome]) -> list[str]:
    """The budgets in words, the dense model's first and then the largest, whichever cells there are."""
    found = {describe_budget(o.budget): o.budget for o in outcomes}
    return sorted(found, key=lambda words: (tuple(found[words]), [-share for share in found[words].values()]))


def _average(
    budget: str,
    arm: str,
    found: Sequence[Outcome],
    by: Mapping[tuple[str, str, int], float],
    clock: float | None,
) -> Standing:
    good = [o for o in found if o.accuracy is not None]
    accuracies = [o.accuracy for o in good if o.accuracy is not None]
    against = found[0].against
    others = [by.get((against, budget, o.seed), by.get((against, "", o.seed))) for o in good]
    paired = [a - b for a, b in zip(accuracies, others, strict=True) if b is not None and against != arm]
    timed = [o.latency for o in good if o.latency and o.latency.steady]
    shares, bounds = [1 / pair.speed_up for pair in timed], found[0].budget
    share, share_spread = mean_of(shares), spread_of(shares)
    return Standing(
        arm=arm,
        budget=budget,
        seeds=len(good),
        kept={name: mean_of(o.share(name) for o in good) or 0.0 for name in MEASURES} if good else {},
        accuracy=mean_of(accuracies),
        spread=spread_of(accuracies),
        accuracy_cut=mean_of(o.accuracy_cut for o in good if o.accuracy_cut is not None),
        difference=mean_of(paired),
        difference_spread=spread_of(paired),
        against=against if paired else "",
        step_macs=mean_of(o.step_macs for o in good if o.step_macs is not None),
        step_bytes=mean_of(o.step_bytes for o in good if o.step_bytes is not None),
        latency_ms=clock * share if clock and share else None,
        latency_spread=clock * share_spread if clock and share_spread is not None else None,
        speed_up=1 / share if share else None,
        seconds_per_epoch=median_of(o.training_seconds / o.epochs for o in good if o.epochs) or 0.0,
        training_seconds=median_of(o.training_seconds for o in good) or 0.0,
        over=any(o.share(name) > bound + 1e-6 for o in good for name, bound in bounds.items()),
        masked=any(o.masked for o in good),
        failed="; ".join(dict.fromkeys(o.error for o in found if o.error)),
    )


def find_dense_accuracies(outcomes: Sequence[Outcome]) -> dict[int, float]:
    """Seed -> accuracy of the dense model: trained beside the others, or the one that they started from."""
    given = next((o.accuracy_dense for o in outcomes if o.accuracy_dense is not None), None)
    start = {} if given is None else {o.seed: given for o in outcomes}
    return start | {o.seed: o.accuracy for o in outcomes if not o.budget and o.accuracy is not None}


def find_dense_latency(outcomes: Sequence[Outcome]) -> float | None:
    """Milliseconds of one fast pass of the dense network: the median over all measurements that were not disturbed."""
    found = [o.latency.before.p10_ms for o in outcomes if o.latency and o.latency.steady]
    return statistics.median(found) if found else None


def list_within_latencies(
    outcomes: Sequence[Outcome],
) -> tuple[list[float], dict[str, list[float | None]]]:
    """How accurate each arm is within the same latencies.

    Equal MACs are not equal time, so a row per budget does not say who is ahead on the clock. Between two of its
    budgets an arm is on the line that joins them; a latency above all of them is met by the largest.

    Returns:
        milliseconds, the median of all arms at each budget; and by arm its accuracy within each, None where even its
        smallest budget takes longer. Best arms first; those of one budget are left out.
    """
    at: dict[str, list[float]] = {}
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rank_arms(outcomes):
        if row.budget and row.latency_ms is not None and row.accuracy is not None:
            at.setdefault(row.budget, []).append(row.latency_ms)
            lines.setdefault(row.arm, []).append((row.latency_ms, row.accuracy))
    lines = {arm: sorted(points) for arm, points in lines.items() if len(points) > 1}
    times = [statistics.median(found) for found in at.values()] if lines else []
    found = {arm: [_within(points, time) for time in times] for arm, points in lines.items()}
    return times, dict(sorted(found.items(), key=lambda line: -sum(filter(None, line[1]))))


def _within(points: Sequence[tuple[float, float]], latency: float) -> float | None:
    times, accuracies = zip(*points, strict=True)
    best = np.maximum.accumulate(accuracies)  # a network that is slower and worse than another is not taken
    return float(np.interp(latency, times, best)) if times[0] <= latency else None


def describe_disturbed(outcomes: Sequence[Outcome]) -> str:
    """What to say about measurements that other work disturbed; empty if there are none."""
    found = [o.latency for o in outcomes if o.latency]
    if not (bad := sum(not pair.steady for pair in found)):
        return ""
    return (
        f"Other work disturbed {bad} of {len(found)} measurements of latency, which are left out; the same command, "
        f"on a machine that does nothing else, measures them again."
    )


def find_margin(accuracies: Sequence[Sequence[float]]) -> float | None:
    """How far apart the means of two arms must be to be told apart: Tukey's honest significant difference at 5 %.

    What is left of the accuracies without the means of arms and of seeds is taken for noise, alike in all arms.

    Args:
        accuracies: (arms, seeds); all arms have the same seeds.
    Returns:
        None where one arm, one seed or a missing run leaves no noise to see.
    Source: Tukey 1949, "Comparing individual means in the analysis of variance", for a randomised block design.
    """
    values = np.asarray(accuracies, dtype=float)
    arms, seeds = values.shape
    if arms < 2 or seeds < 2 or not np.isfinite(values).all():
        return None
    rest = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
    freedom = (arms - 1) * (seeds - 1)
    return _quantile(arms, freedom) * math.sqrt((rest**2).sum() / freedom / seeds)


@functools.cache
def _quantile(arms: int, freedom: int) -> float:
    from scipy.stats import studentized_range  # slow to import, and processes that train cells need it not

    return float(studentized_range.ppf(0.95, arms, freedom))


def mean_of(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.mean(found) if found else None


def median_of(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def spread_of(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
